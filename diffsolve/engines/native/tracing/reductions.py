"""Rules for sums, norms, extremes, products of matrices, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from diffsolve.engines.native.graph.expression import Node, Pool
from diffsolve.engines.native.tracing.registry import Unsupported, along, each, lines, operation


@operation("sum")
def sums(pool: Pool, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return along(x, dim, keepdim, pool.sum)


@operation("nansum")
def _nansum(pool: Pool, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    known = each(pool, lambda a: pool.where(pool.binary("ne", a, a), 0.0, a), x)
    return along(known, dim, keepdim, pool.sum)


@operation("mean")
def _mean(pool: Pool, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return along(x, dim, keepdim, lambda row: average(pool, row))


def average(pool: Pool, row: list[Any]) -> Node:
    return pool.sum(row) / len(row) if row else pool.const(math.nan)


@operation("prod")
def _prod(pool: Pool, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return along(x, dim, keepdim, pool.prod)


def _running(pool: Pool, op: str) -> Callable[[list[Any]], list[Any]]:
    def run(line: list[Any]) -> list[Any]:
        out = [pool.number(x) for x in line]
        for k in range(1, len(out)):
            out[k] = pool.binary(op, out[k - 1], out[k])
        return out

    return run


@operation("cumsum")
def _cumsum(pool: Pool, x: Any, dim: int, dtype: Any = None) -> np.ndarray:
    return lines(x, dim, _running(pool, "add"))


@operation("cumprod")
def _cumprod(pool: Pool, x: Any, dim: int, dtype: Any = None) -> np.ndarray:
    return lines(x, dim, _running(pool, "mul"))


def _all(pool: Pool, row: list[Any], op: str) -> Node:
    out = pool.const(op == "and")
    for x in row:
        out = pool.binary(op, out, x) if not out.is_const else _joined(pool, out, x, op)
    return out


def _joined(pool: Pool, known: Node, x: Any, op: str) -> Node:
    """``known op x``, where the truth of ``known`` is a constant."""
    return pool.truth(x) if known.data == (op == "and") else known


@operation("all")
def _all_rule(pool: Pool, x: Any, dim: Any = None, keepdim: bool = False) -> np.ndarray:
    return along(x, dim, keepdim, lambda row: _all(pool, row, "and"))


@operation("any")
def _any_rule(pool: Pool, x: Any, dim: Any = None, keepdim: bool = False) -> np.ndarray:
    return along(x, dim, keepdim, lambda row: _all(pool, row, "or"))


@operation("count_nonzero")
def _count_nonzero(pool: Pool, x: Any, dim: Any = None) -> np.ndarray:
    return along(x, dim, False, lambda row: pool.sum([pool.truth(a) for a in row]))


# -- extremes ------------------------------------------------------------------------------------


@operation("amax")
def _amax(pool: Pool, x: Any, dim: Any = None, keepdim: bool = False) -> np.ndarray:
    return along(x, dim, keepdim, lambda row: pool.extreme("largest", row))


@operation("amin")
def _amin(pool: Pool, x: Any, dim: Any = None, keepdim: bool = False) -> np.ndarray:
    return along(x, dim, keepdim, lambda row: pool.extreme("smallest", row))


def _enter_extreme(name: str, op: str, whole: str, pair: str) -> None:
    @operation(name)
    def rule(pool: Pool, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, np.ndarray):  # torch.max(a, b)
            return each(pool, lambda a, b: pool.binary(pair, a, b), x, dim)
        if dim is None:
            return along(x, None, False, lambda row: pool.extreme(whole, row))
        return [along(x, dim, keepdim, lambda row: _first(pool, row, op)), None]


_enter_extreme("max", "le", "largest", "max")
_enter_extreme("min", "ge", "smallest", "min")


def _first(pool: Pool, row: list[Any], op: str) -> Node:
    """The first of the extreme entries, or the first NaN: its slope goes to that one alone."""
    best = pool.number(row[0])
    for x in row[1:]:
        better = pool.logical_not(pool.binary(op, x, best))
        known = pool.binary("eq", best, best)
        best = pool.where(pool.binary("and", better, known), x, best)
    return best


@operation("aminmax")
def _aminmax(pool: Pool, x: Any, dim: Any = None, keepdim: bool = False) -> list[Any]:
    return [_amin(pool, x, dim, keepdim), _amax(pool, x, dim, keepdim)]


# -- norms and moments ---------------------------------------------------------------------------


def _root(pool: Pool, x: Node, order: float = 2.0) -> Node:
    """A root whose slope at zero is zero, as that of torch's norms."""
    zero = pool.binary("eq", x, 0.0)
    return pool.where(zero, 0.0, pool.power(pool.where(zero, 1.0, x), 1.0 / order))


@operation("linalg_vector_norm")
def vector_norm(
    pool: Pool, x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> np.ndarray:
    def norm(row: list[Any]) -> Node:
        row = [pool.number(a) for a in row]
        if ord == 0:
            return pool.sum([pool.truth(a) for a in row])
        if ord == 2:
            return _root(pool, pool.sum([a * a for a in row]))
        sizes = [pool.unary("abs", a) for a in row]
        if ord == 1:
            return pool.sum(sizes)
        if math.isinf(ord):
            return pool.extreme("largest" if ord > 0 else "smallest", sizes)
        if ord < 1:
            raise Unsupported(f"of order {ord}")
        return _root(pool, pool.sum([pool.power(a, ord) for a in sizes]), ord)

    return along(x, dim, keepdim, norm)


@operation("norm")
def _norm(
    pool: Pool, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> np.ndarray:
    return vector_norm(pool, x, 2 if p is None else p, dim, keepdim)


def variance(pool: Pool, row: list[Any], correction: float) -> Node:
    mean = average(pool, row)
    squares = [(a - mean) * (a - mean) for a in map(pool.number, row)]
    return pool.sum(squares) / max(len(row) - correction, 0.0)


def _moments(f: Callable[[Pool, Node], Node]) -> Callable[..., Any]:
    def rule(
        pool: Pool, x: Any, dim: Any = None, *more: Any, correction: Any = 1, keepdim: bool = False
    ) -> Any:
        if isinstance(dim, bool):  # var(x, unbiased)
            dim, correction = None, int(dim)
        elif more:  # var(x, dim, unbiased, keepdim)
            correction, keepdim = int(more[0]), more[1] if len(more) > 1 else keepdim
        shift = 1 if correction is None else correction
        return along(x, dim, keepdim, lambda row: f(pool, variance(pool, row, shift)))

    return rule


_var = operation("var")(_moments(lambda pool, x: x))
_std = operation("std")(_moments(_root))


@operation("var_mean")
def _var_mean(pool: Pool, x: Any, dim: Any = None, correction: Any = 1, keepdim: bool = False):
    return [
        _var(pool, x, dim, correction=correction, keepdim=keepdim),
        _mean(pool, x, dim, keepdim),
    ]


@operation("std_mean")
def _std_mean(pool: Pool, x: Any, dim: Any = None, correction: Any = 1, keepdim: bool = False):
    return [
        _std(pool, x, dim, correction=correction, keepdim=keepdim),
        _mean(pool, x, dim, keepdim),
    ]


# -- exponentials, shifted by the largest entry: the gradient through the shift would cancel -------


def _shifted(pool: Pool, row: list[Any]) -> tuple[Node, list[Node]]:
    top = pool.unary("stop_gradient", pool.extreme("largest", row))
    return top, [pool.number(x) - top for x in row]


@operation("logsumexp")
def logsumexp(pool: Pool, x: Any, dim: Any, keepdim: bool = False) -> np.ndarray:
    def one(row: list[Any]) -> Node:
        top = pool.unary("stop_gradient", pool.extreme("largest", row))
        infinite = pool.binary("eq", pool.unary("abs", top), math.inf)
        top = pool.where(infinite, 0.0, top)
        total = pool.sum([pool.unary("exp", pool.number(a) - top) for a in row])
        return pool.unary("log", total) + top

    return along(x, dim, keepdim, one)


@operation("_softmax", "softmax")
def softmax(pool: Pool, x: Any, dim: int, *_: Any) -> np.ndarray:
    def one(row: list[Any]) -> list[Any]:
        powers = [pool.unary("exp", a) for a in _shifted(pool, row)[1]]
        total = pool.sum(powers)
        return [a / total for a in powers]

    return lines(x, dim, one)


@operation("_safe_softmax")
def _safe_softmax(pool: Pool, x: Any, dim: int, *_: Any) -> np.ndarray:
    rows = np.asarray(softmax(pool, x, dim))
    empty = along(x, dim, True, lambda row: _all(pool, _minus_infinite(pool, row), "and"))
    return each(pool, lambda c, a: pool.where(c, 0.0, a), empty, rows)


def _minus_infinite(pool: Pool, row: list[Any]) -> list[Node]:
    return [pool.binary("eq", a, -math.inf) for a in row]


@operation("_log_softmax", "log_softmax")
def log_softmax(pool: Pool, x: Any, dim: int, *_: Any) -> np.ndarray:
    def one(row: list[Any]) -> list[Any]:
        _, shifted = _shifted(pool, row)
        total = pool.unary("log", pool.sum([pool.unary("exp", a) for a in shifted]))
        return [a - total for a in shifted]

    return lines(x, dim, one)
