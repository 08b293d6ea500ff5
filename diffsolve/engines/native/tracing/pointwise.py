"""Rules for operations that treat each entry by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from diffsolve.engines.native.graph.expression import COMPARE, Node, Pool
from diffsolve.engines.native.tracing.registry import Unsupported, each, operation, words

_LN2 = math.log(2.0)
_UNARY = words(
    "neg abs floor ceil trunc exp expm1 log log1p sqrt sin cos tan asin acos atan sinh cosh tanh "
    "asinh acosh atanh erf erfc sigmoid"
)
_SAME_NAME = {"negative": "neg", "special_erf": "erf", "special_expit": "sigmoid", "fix": "trunc"}


def _enter_unary(name: str, op: str) -> None:
    @operation(name)
    def rule(pool: Pool, x: np.ndarray) -> np.ndarray:
        return each(pool, lambda a: pool.unary(op, a), x)


for _op in _UNARY:
    _enter_unary(_op, _op)
for _name, _op in _SAME_NAME.items():
    _enter_unary(_name, _op)


def _enter_binary(name: str, op: str) -> None:
    @operation(name)
    def rule(pool: Pool, x: Any, y: Any) -> np.ndarray:
        return each(pool, lambda a, b: pool.binary(op, a, b), x, y)


for _op in COMPARE:
    _enter_binary(_op, _op)
for _name, _op in {
    "mul": "mul", "multiply": "mul", "maximum": "max", "minimum": "min",
    "logical_and": "and", "logical_or": "or", "logical_xor": "xor",
}.items():  # fmt: skip
    _enter_binary(_name, _op)


def enter_each(name: str, f: Callable[[Pool, Node], Any]) -> None:
    """Enter a rule for a function of one number."""

    @operation(name)
    def rule(pool: Pool, x: np.ndarray) -> np.ndarray:
        return each(pool, lambda a: f(pool, pool.number(a)), x)


def _not_finite(pool: Pool, x: Node) -> Node:
    """Infinite, or NaN."""
    return pool.binary("ne", x - x, 0.0)


def bounded(pool: Pool, x: Any, low: Any, high: Any) -> Node:
    """Clamped: NaN stays, and where the bounds are crossed the upper one counts."""
    for bound, op in ((low, "lt"), (high, "gt")):
        if bound is not None:
            outside = pool.binary(op, x, bound)
            if not pool.node(bound).is_const:
                outside = pool.binary("or", outside, pool.binary("ne", bound, bound))
            x = pool.where(outside, bound, x)
    return pool.node(x)


def _sinc(pool: Pool, x: Node) -> Node:
    zero = pool.binary("eq", x, 0.0)
    angle = pool.where(zero, 1.0, x) * math.pi
    return pool.where(zero, 1.0, pool.unary("sin", angle) / angle)


for _name, _f in {
    "positive": lambda pool, x: x,
    "sign": lambda pool, x: pool.unary("sign", x),
    "sgn": lambda pool, x: pool.unary("sign", x),
    "square": lambda pool, x: x * x,
    "reciprocal": lambda pool, x: 1.0 / x,
    "rsqrt": lambda pool, x: 1.0 / pool.unary("sqrt", x),
    "exp2": lambda pool, x: pool.binary("pow", 2.0, x),
    "log2": lambda pool, x: pool.unary("log", x) / _LN2,
    "log10": lambda pool, x: pool.unary("log", x) / math.log(10.0),
    "frac": lambda pool, x: x - pool.unary("trunc", x),
    "deg2rad": lambda pool, x: x * (math.pi / 180),
    "rad2deg": lambda pool, x: x * (180 / math.pi),
    "sinc": _sinc,
    "special_sinc": _sinc,
    "isnan": lambda pool, x: pool.binary("ne", x, x),
    "isinf": lambda pool, x: pool.binary("eq", pool.unary("abs", x), math.inf),
    "isfinite": lambda pool, x: pool.logical_not(_not_finite(pool, x)),
    "isposinf": lambda pool, x: pool.binary("eq", x, math.inf),
    "isneginf": lambda pool, x: pool.binary("eq", x, -math.inf),
    "logical_not": lambda pool, x: pool.logical_not(x),
}.items():
    enter_each(_name, _f)


# -- arithmetic ----------------------------------------------------------------------------------


@operation("add")
def _add(pool: Pool, x: Any, y: Any, alpha: Any = 1) -> np.ndarray:
    return each(pool, lambda a, b: pool.binary("add", a, pool.binary("mul", b, alpha)), x, y)


@operation("sub", "subtract")
def _sub(pool: Pool, x: Any, y: Any, alpha: Any = 1) -> np.ndarray:
    return each(pool, lambda a, b: pool.binary("sub", a, pool.binary("mul", b, alpha)), x, y)


@operation("rsub")
def _rsub(pool: Pool, x: Any, y: Any, alpha: Any = 1) -> np.ndarray:
    return _sub(pool, y, x, alpha)


@operation("div", "divide", "true_divide")
def _div(pool: Pool, x: Any, y: Any, rounding_mode: str | None = None) -> np.ndarray:
    if rounding_mode == "floor":
        return _floor_divide(pool, x, y)

    def one(a: Any, b: Any) -> Node:
        ratio = pool.binary("div", a, b)
        return ratio if rounding_mode is None else pool.unary("trunc", ratio)

    return each(pool, one, x, y)


@operation("floor_divide")
def _floor_divide(pool: Pool, x: Any, y: Any) -> np.ndarray:
    def one(a: Any, b: Any) -> Node:
        a, b = pool.number(a), pool.number(b)
        rest = pool.binary("fmod", a, b)
        ratio = (a - rest) / b
        ratio = pool.where(_crosses(pool, rest, b), ratio - 1.0, ratio)
        whole = pool.unary("floor", ratio)
        # the ratio may lie just below the whole number that it stands for
        whole = pool.where(pool.binary("gt", ratio - whole, 0.5), whole + 1.0, whole)
        # infinite or NaN: rounding it keeps it, and has no slope
        by_zero = pool.unary("trunc", a / b)
        return pool.where(pool.binary("eq", b, 0.0), by_zero, whole)

    return each(pool, one, x, y)


def _crosses(pool: Pool, rest: Node, b: Node) -> Node:
    """Whether a remainder that is not zero has not the sign of the divisor."""
    signs = pool.binary("xor", pool.binary("lt", b, 0.0), pool.binary("lt", rest, 0.0))
    return pool.binary("and", pool.binary("ne", rest, 0.0), signs)


@operation("remainder")
def _remainder(pool: Pool, x: Any, y: Any) -> np.ndarray:
    def one(a: Any, b: Any) -> Node:
        b = pool.number(b)
        rest = pool.binary("fmod", a, b)
        return pool.where(_crosses(pool, rest, b), rest + b, rest)

    return each(pool, one, x, y)


@operation("fmod")
def _fmod(pool: Pool, x: Any, y: Any) -> np.ndarray:
    return each(pool, lambda a, b: pool.binary("fmod", a, b), x, y)


@operation("pow")
def _pow(pool: Pool, x: Any, y: Any) -> np.ndarray:
    if x is not None and not isinstance(x, np.ndarray) and x == 1:
        return each(pool, lambda b: pool.const(1.0), y)  # for NaN too
    return each(pool, pool.power, x, y)


@operation("atan2", "arctan2")
def _atan2(pool: Pool, x: Any, y: Any) -> np.ndarray:
    return each(pool, lambda a, b: pool.binary("atan2", a, b), x, y)


@operation("round")
def _round(pool: Pool, x: np.ndarray, decimals: int = 0) -> np.ndarray:
    scale = 10.0 ** abs(decimals)

    def one(a: Any) -> Node:
        if decimals == 0:
            return pool.unary("round", a)
        a = pool.number(a)
        if decimals > 0:
            return pool.unary("round", a * scale) / scale
        return pool.unary("round", a / scale) * scale

    return each(pool, one, x)


@operation("addcmul")
def _addcmul(pool: Pool, x: Any, a: Any, b: Any, value: Any = 1) -> np.ndarray:
    return each(pool, lambda i, j, k: pool.number(i) + pool.number(j) * value * k, x, a, b)


@operation("addcdiv")
def _addcdiv(pool: Pool, x: Any, a: Any, b: Any, value: Any = 1) -> np.ndarray:
    return each(pool, lambda i, j, k: pool.number(i) + pool.number(j) * value / k, x, a, b)


@operation("lerp")
def _lerp(pool: Pool, x: Any, y: Any, w: Any) -> np.ndarray:
    def one(a: Any, b: Any, c: Any) -> Node:
        a, b, c = pool.number(a), pool.number(b), pool.number(c)
        near = pool.binary("lt", pool.unary("abs", c), 0.5)
        return pool.where(near, a + c * (b - a), b - (b - a) * (1.0 - c))

    return each(pool, one, x, y, w)


@operation("hypot")
def _hypot(pool: Pool, x: Any, y: Any) -> np.ndarray:
    def one(a: Any, b: Any) -> Node:
        a, b = pool.number(a), pool.number(b)
        return pool.unary("sqrt", a * a + b * b)

    return each(pool, one, x, y)


@operation("xlogy", "special_xlogy")
def _xlogy(pool: Pool, x: Any, y: Any) -> np.ndarray:
    def one(a: Any, b: Any) -> Node:
        a, b = pool.number(a), pool.number(b)
        singular = pool.binary("or", pool.binary("le", b, 0.0), pool.binary("eq", b, math.inf))
        zero = pool.binary("and", pool.binary("eq", a, 0.0), singular)
        return pool.where(zero, 0.0, a * pool.unary("log", pool.where(zero, 1.0, b)))

    return each(pool, one, x, y)


def _log_add(pool: Pool, x: Any, y: Any, base: float) -> np.ndarray:
    def one(a: Any, b: Any) -> Node:
        a, b = pool.number(a), pool.number(b)
        gap = pool.where(pool.binary("eq", a, b), 0.0, a - b)  # of two infinities too
        power = pool.unary("exp", -pool.unary("abs", gap) * base)
        return pool.binary("max", a, b) + pool.unary("log1p", power) / base

    return each(pool, one, x, y)


@operation("logaddexp")
def _logaddexp(pool: Pool, x: Any, y: Any) -> np.ndarray:
    return _log_add(pool, x, y, 1.0)


@operation("logaddexp2")
def _logaddexp2(pool: Pool, x: Any, y: Any) -> np.ndarray:
    return _log_add(pool, x, y, _LN2)


@operation("ldexp")
def _ldexp(pool: Pool, x: Any, y: Any) -> np.ndarray:
    return each(pool, lambda a, b: pool.binary("mul", a, pool.binary("pow", 2.0, b)), x, y)


@operation("copysign")
def _copysign(pool: Pool, x: Any, y: Any) -> np.ndarray:
    def one(a: Any, b: Any) -> Node:
        b = pool.number(b)
        size = pool.unary("abs", a)
        minus_zero = pool.binary("and", pool.binary("eq", b, 0.0), pool.binary("lt", 1.0 / b, 0.0))
        return pool.where(pool.binary("or", pool.binary("lt", b, 0.0), minus_zero), -size, size)

    return each(pool, one, x, y)


@operation("heaviside")
def _heaviside(pool: Pool, x: Any, y: Any) -> np.ndarray:
    def one(a: Any, b: Any) -> Node:
        step = pool.where(pool.binary("gt", a, 0.0), 1.0, 0.0)
        return pool.where(pool.binary("eq", a, 0.0), b, step)

    return each(pool, one, x, y)


@operation("fmax")
def _fmax(pool: Pool, x: Any, y: Any) -> np.ndarray:
    return _but_nan(pool, "ge", x, y)


@operation("fmin")
def _fmin(pool: Pool, x: Any, y: Any) -> np.ndarray:
    return _but_nan(pool, "le", x, y)


def _but_nan(pool: Pool, op: str, x: Any, y: Any) -> np.ndarray:
    def one(a: Any, b: Any) -> Node:
        first = pool.binary("or", pool.binary(op, a, b), pool.binary("ne", b, b))
        return pool.where(first, a, b)

    return each(pool, one, x, y)


# -- choices -------------------------------------------------------------------------------------


@operation("where")
def _where(pool: Pool, c: Any, x: Any, y: Any) -> np.ndarray:
    return each(pool, pool.where, c, x, y)


@operation("masked_fill")
def _masked_fill(pool: Pool, x: Any, mask: Any, value: Any) -> np.ndarray:
    return each(pool, pool.where, mask, value, x)


@operation("clamp", "clip")
def _clamp(pool: Pool, x: Any, min: Any = None, max: Any = None) -> np.ndarray:
    if min is None:
        return each(pool, lambda a, b: bounded(pool, a, None, b), x, max)
    if max is None:
        return each(pool, lambda a, b: bounded(pool, a, b, None), x, min)
    return each(pool, lambda a, b, c: bounded(pool, a, b, c), x, min, max)


@operation("clamp_min")
def _clamp_min(pool: Pool, x: Any, min: Any) -> np.ndarray:
    return _clamp(pool, x, min, None)


@operation("clamp_max")
def _clamp_max(pool: Pool, x: Any, max: Any) -> np.ndarray:
    return _clamp(pool, x, None, max)


@operation("nan_to_num")
def _nan_to_num(
    pool: Pool, x: Any, nan: float | None = None, posinf: Any = None, neginf: Any = None
) -> np.ndarray:
    largest = float(np.finfo(pool.dtype).max)
    high = largest if posinf is None else posinf
    low = -largest if neginf is None else neginf

    def one(a: Any) -> Node:
        finite = pool.where(pool.binary("eq", a, math.inf), high, a)
        finite = pool.where(pool.binary("eq", a, -math.inf), low, finite)
        return pool.where(pool.binary("ne", a, a), 0.0 if nan is None else nan, finite)

    return each(pool, one, x)


def _bitwise(name: str, op: str) -> None:
    @operation(f"bitwise_{name}", f"__{name}__")
    def rule(pool: Pool, x: Any, y: Any) -> np.ndarray:
        return each(pool, lambda a, b: pool.binary(op, _bit(pool, a), _bit(pool, b)), x, y)


for _name in ("and", "or", "xor"):
    _bitwise(_name, _name)


@operation("bitwise_not")
def _bitwise_not(pool: Pool, x: Any) -> np.ndarray:
    return each(pool, lambda a: pool.logical_not(_bit(pool, a)), x)


def _bit(pool: Pool, x: Any) -> Node:
    x = pool.node(x)
    if not x.is_bool:
        raise Unsupported("of integers")
    return x
