"""Rules for activations of networks.

Where a branch that is not taken could overflow, its argument is masked first: its slope would be
infinite, and zero times that is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffsolve.engines.native.graph.expression import Node, Pool
from diffsolve.engines.native.tracing.pointwise import bounded, enter_each
from diffsolve.engines.native.tracing.registry import each, operation


def softplus(pool: Pool, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Node:
    scaled = pool.number(x) * beta
    linear = pool.binary("gt", scaled, threshold)
    small = pool.where(linear, 0.0, scaled)
    return pool.where(linear, x, pool.unary("log1p", pool.unary("exp", small)) / beta)


def _relu(pool: Pool, x: Node) -> Node:
    return pool.where(pool.binary("le", x, 0.0), 0.0, x)


def _between(pool: Pool, x: Any, low: float, high: float) -> Node:
    """Clamped, with slope zero at the bounds too."""
    below, above = pool.binary("le", x, low), pool.binary("ge", x, high)
    return pool.where(below, low, pool.where(above, high, x))


def _hardswish(pool: Pool, x: Node) -> Node:
    below, above = pool.binary("le", x, -3.0), pool.binary("ge", x, 3.0)
    inner = pool.where(below, 0.0, pool.where(above, 0.0, x))
    bent = pool.where(above, x, inner * (inner + 3.0) / 6.0)
    return pool.where(below, x * 0.0, bent)


def _log_sigmoid(pool: Pool, x: Node) -> Node:
    tail = pool.unary("log1p", pool.unary("exp", -pool.unary("abs", x)))
    return pool.binary("min", x, 0.0) - tail


for _name, _f in {
    "relu": _relu,
    "relu6": lambda pool, x: _between(pool, x, 0.0, 6.0),
    "silu": lambda pool, x: x * pool.unary("sigmoid", x),
    "mish": lambda pool, x: x * pool.unary("tanh", softplus(pool, x)),
    "hardsigmoid": lambda pool, x: _between(pool, x + 3.0, 0.0, 6.0) / 6.0,
    "hardswish": _hardswish,
}.items():
    enter_each(_name, _f)


@operation("log_sigmoid_forward")
def _log_sigmoid_rule(pool: Pool, x: np.ndarray) -> list[Any]:
    values = each(pool, lambda a: _log_sigmoid(pool, pool.number(a)), x)
    return [values, each(pool, lambda a: pool.unary("exp", -pool.unary("abs", a)), x)]


@operation("softplus")
def _softplus(pool: Pool, x: Any, beta: float = 1.0, threshold: float = 20.0) -> np.ndarray:
    return each(pool, lambda a: softplus(pool, a, beta, threshold), x)


@operation("gelu")
def _gelu(pool: Pool, x: Any, approximate: str = "none") -> np.ndarray:
    def one(a: Any) -> Node:
        a = pool.number(a)
        if approximate == "tanh":
            inner = (a + 0.044715 * (a * a * a)) * math.sqrt(2 / math.pi)
            return 0.5 * a * (pool.unary("tanh", inner) + 1.0)
        return 0.5 * a * (pool.unary("erf", a * math.sqrt(0.5)) + 1.0)

    return each(pool, one, x)


@operation("elu")
def _elu(
    pool: Pool, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> np.ndarray:
    def one(a: Any) -> Node:
        a = pool.number(a)
        low = pool.binary("le", a, 0.0)
        curve = pool.unary("expm1", pool.where(low, a, 0.0) * input_scale)
        return pool.where(low, curve * (alpha * scale), a * scale)

    return each(pool, one, x)


@operation("celu")
def _celu(pool: Pool, x: Any, alpha: float = 1.0) -> np.ndarray:
    return _elu(pool, x, alpha, 1.0, 1.0 / alpha)


@operation("selu")
def _selu(pool: Pool, x: Any) -> np.ndarray:
    # Klambauer et al. (2017), Self-Normalizing Neural Networks, equation (2)
    return _elu(pool, x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@operation("leaky_relu")
def _leaky_relu(pool: Pool, x: Any, slope: float = 0.01) -> np.ndarray:
    return _prelu(pool, x, slope)


@operation("prelu", "_prelu_kernel")
def _prelu(pool: Pool, x: Any, slope: Any) -> np.ndarray:
    def one(a: Any, s: Any) -> Node:
        return pool.where(pool.binary("gt", a, 0.0), a, pool.binary("mul", a, s))

    return each(pool, one, x, slope)


@operation("glu")
def _glu(pool: Pool, x: Any, dim: int = -1) -> np.ndarray:
    a, b = np.split(x, 2, axis=dim)
    return each(pool, lambda i, j: pool.binary("mul", i, pool.unary("sigmoid", j)), a, b)


@operation("threshold")
def _threshold(pool: Pool, x: Any, threshold: float, value: float) -> np.ndarray:
    return each(pool, lambda a: pool.where(pool.binary("le", a, threshold), value, a), x)


@operation("hardtanh")
def _hardtanh(pool: Pool, x: Any, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    return each(pool, lambda a: _between(pool, a, low, high), x)


@operation("hardshrink")
def _hardshrink(pool: Pool, x: Any, lambd: float = 0.5) -> np.ndarray:
    def one(a: Any) -> Node:
        return pool.where(pool.binary("le", pool.unary("abs", a), lambd), 0.0, a)

    return each(pool, one, x)


@operation("softshrink")
def _softshrink(pool: Pool, x: Any, lambd: float = 0.5) -> np.ndarray:
    def one(a: Any) -> Node:
        a = pool.number(a)
        inside = pool.where(pool.binary("le", pool.unary("abs", a), lambd), 0.0, a + lambd)
        return pool.where(pool.binary("gt", a, lambd), a - lambd, inside)

    return each(pool, one, x)


@operation("logit", "special_logit")
def _logit(pool: Pool, x: Any, eps: float | None = None) -> np.ndarray:
    def one(a: Any) -> Node:
        a = pool.number(a) if eps is None else bounded(pool, a, eps, 1.0 - eps)
        return pool.unary("log", a / (1.0 - a))

    return each(pool, one, x)
