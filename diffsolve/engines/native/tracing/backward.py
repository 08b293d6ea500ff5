"""Rules for the derivatives that autograd takes inside ``f``, as Hamiltonian networks do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffsolve.engines.native.graph.expression import Node, Pool
from diffsolve.engines.native.tracing.activations import softplus
from diffsolve.engines.native.tracing.registry import along, each, operation


@operation("tanh_backward")
def _tanh(pool: Pool, grad: Any, y: Any) -> np.ndarray:
    return each(pool, lambda g, a: pool.number(g) * (1.0 - a * a), grad, y)


@operation("sigmoid_backward")
def _sigmoid(pool: Pool, grad: Any, y: Any) -> np.ndarray:
    return each(pool, lambda g, a: pool.number(g) * ((1.0 - pool.number(a)) * a), grad, y)


@operation("threshold_backward")
def _threshold(pool: Pool, grad: Any, x: Any, threshold: float) -> np.ndarray:
    return each(pool, lambda g, a: pool.where(pool.binary("le", a, threshold), 0.0, g), grad, x)


@operation("leaky_relu_backward")
def _leaky_relu(pool: Pool, grad: Any, x: Any, slope: float, is_result: bool) -> np.ndarray:
    def one(g: Any, a: Any) -> Node:
        return pool.where(pool.binary("gt", a, 0.0), g, pool.binary("mul", g, slope))

    return each(pool, one, grad, x)


@operation("silu_backward")
def _silu(pool: Pool, grad: Any, x: Any) -> np.ndarray:
    def one(g: Any, a: Any) -> Node:
        s = pool.unary("sigmoid", a)
        return pool.number(g) * (s * (a * (1.0 - s) + 1.0))

    return each(pool, one, grad, x)


@operation("softplus_backward")
def _softplus(pool: Pool, grad: Any, x: Any, beta: float, threshold: float) -> np.ndarray:
    def one(g: Any, a: Any) -> Node:
        scaled = pool.number(a) * beta
        linear = pool.binary("gt", scaled, threshold)
        slope = pool.unary("sigmoid", pool.where(linear, 0.0, scaled))
        return pool.where(linear, g, pool.number(g) * slope)

    return each(pool, one, grad, x)


@operation("elu_backward")
def _elu(
    pool: Pool, grad: Any, alpha: float, scale: float, input_scale: float, is_result: bool, x: Any
) -> np.ndarray:
    def one(g: Any, a: Any) -> Node:
        g, a = pool.number(g), pool.number(a)
        low = pool.binary("le", a, 0.0)
        below = pool.where(low, a, 0.0)
        if is_result:
            curve = (below + alpha * scale) * input_scale
        else:
            curve = pool.unary("exp", below * input_scale) * (input_scale * alpha * scale)
        return pool.where(low, g * curve, g * scale)

    return each(pool, one, grad, x)


@operation("gelu_backward")
def _gelu(pool: Pool, grad: Any, x: Any, approximate: str = "none") -> np.ndarray:
    def one(g: Any, a: Any) -> Node:
        g, a = pool.number(g), pool.number(a)
        if approximate == "tanh":
            scale = math.sqrt(2 / math.pi)
            y = pool.unary("tanh", (a + 0.044715 * (a * a * a)) * scale)
            inner = (a * a * (3 * 0.044715) + 1.0) * scale
            return g * (0.5 * (y + 1.0) + 0.5 * a * (1.0 - y * y) * inner)
        below = 0.5 * (pool.unary("erf", a * math.sqrt(0.5)) + 1.0)
        density = pool.unary("exp", a * a * -0.5) * (1.0 / math.sqrt(2 * math.pi))
        return g * (below + a * density)

    return each(pool, one, grad, x)


@operation("mish_backward")
def _mish(pool: Pool, grad: Any, x: Any) -> np.ndarray:
    def one(g: Any, a: Any) -> Node:
        g, a = pool.number(g), pool.number(a)
        y = pool.unary("tanh", softplus(pool, a))
        return g * (y + a * pool.unary("sigmoid", a) * (1.0 - y * y))

    return each(pool, one, grad, x)


@operation("hardtanh_backward")
def _hardtanh(pool: Pool, grad: Any, x: Any, low: float, high: float) -> np.ndarray:
    def one(g: Any, a: Any) -> Node:
        outside = pool.binary("or", pool.binary("le", a, low), pool.binary("ge", a, high))
        return pool.where(outside, 0.0, g)

    return each(pool, one, grad, x)


@operation("hardshrink_backward", "softshrink_backward")
def _shrink(pool: Pool, grad: Any, x: Any, lambd: float) -> np.ndarray:
    def one(g: Any, a: Any) -> Node:
        return pool.where(pool.binary("le", pool.unary("abs", a), lambd), 0.0, g)

    return each(pool, one, grad, x)


@operation("hardsigmoid_backward")
def _hardsigmoid(pool: Pool, grad: Any, x: Any) -> np.ndarray:
    def one(g: Any, a: Any) -> Node:
        inside = pool.binary("and", pool.binary("gt", a, -3.0), pool.binary("lt", a, 3.0))
        # the sixth is rounded to single precision in torch
        return pool.where(inside, pool.number(g) * float(np.float32(1 / 6)), 0.0)

    return each(pool, one, grad, x)


@operation("hardswish_backward")
def _hardswish(pool: Pool, grad: Any, x: Any) -> np.ndarray:
    def one(g: Any, a: Any) -> Node:
        bent = pool.where(pool.binary("lt", a, 3.0), g * (pool.number(a) / 3.0 + 0.5), g)
        return pool.where(pool.binary("le", a, -3.0), 0.0, bent)

    return each(pool, one, grad, x)


@operation("log_sigmoid_backward")
def _log_sigmoid(pool: Pool, grad: Any, x: Any, buffer: Any) -> np.ndarray:
    return each(pool, lambda g, a: pool.number(g) * pool.unary("sigmoid", -pool.number(a)), grad, x)


@operation("_softmax_backward_data")
def _softmax(pool: Pool, grad: Any, y: Any, dim: int, dtype: Any) -> np.ndarray:
    weighted = each(pool, lambda g, a: pool.binary("mul", g, a), grad, y)
    total = along(weighted, dim, True, pool.sum)
    return each(pool, lambda w, a, s: w - a * s, weighted, y, total)


@operation("_log_softmax_backward_data")
def _log_softmax(pool: Pool, grad: Any, y: Any, dim: int, dtype: Any) -> np.ndarray:
    total = along(grad, dim, True, pool.sum)
    return each(pool, lambda g, a, s: pool.number(g) - pool.unary("exp", a) * s, grad, y, total)


@operation("native_layer_norm_backward")
def _layer_norm(
    pool: Pool, grad: Any, x: Any, shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any,
    mask: Any,
) -> list[Any]:  # fmt: skip
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    outer = tuple(range(x.ndim - len(shape)))

    def times(a: Any, b: Any) -> np.ndarray:
        return each(pool, lambda i, j: pool.binary("mul", i, j), a, b)

    unit = each(pool, lambda a, m, r: (pool.number(a) - m) * r, x, mean, rstd)
    by_unit = grad if weight is None else times(grad, weight)
    flat = along(by_unit, axes, True, lambda row: pool.sum(row) / len(row))
    tilt = along(times(by_unit, unit), axes, True, lambda row: pool.sum(row) / len(row))
    by_x = each(pool, lambda g, f, n, s, r: (g - f - n * s) * r, by_unit, flat, unit, tilt, rstd)

    def over_outer(a: Any) -> np.ndarray:
        return along(a, outer, False, pool.sum) if outer else a

    by_weight = over_outer(times(grad, unit)) if mask[1] else None
    return [by_x if mask[0] else None, by_weight, over_outer(grad) if mask[2] else None]
