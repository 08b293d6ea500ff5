"""The table of rules, each for an operation of torch, and functions that rules share.

A rule is called with the pool and the operation's own arguments. A tensor that depends on an input
is an object array of nodes, another tensor a NumPy array of its values. The rule returns the
expressions of the result: an array for each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.graph.expression import Pool

Rule = Callable[..., Any]
#: Rules by the operation's name, without the namespace and the underscore of its in-place form.
TABLE: dict[str, Rule] = {}


class Unsupported(Exception):
    """The rule of an operation does not cover this form of it: ``"with mode='x'"``."""


def operation(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule into the table."""

    def enter(rule: Rule) -> Rule:
        for name in names:
            TABLE[name] = rule
        return rule

    return enter


def each(pool: Pool, f: Callable[..., Any], *arrays: Any) -> np.ndarray:
    """``f`` for the entries of arrays and numbers, which broadcast as in torch."""
    shapes = [x.shape for x in arrays if isinstance(x, np.ndarray)]
    if len(shapes) > 1 and any(s != shapes[0] for s in shapes[1:]):
        size = int(np.prod(np.broadcast_shapes(*shapes)))
    else:
        size = int(np.prod(shapes[0])) if shapes else 1
    check_room(pool, size)
    return np.asarray(np.frompyfunc(f, len(arrays), 1)(*arrays), dtype=object)


def check_room(pool: Pool, count: int) -> None:
    """Decline an operation on more numbers than the pool has room for, before it is run."""
    if count > pool.most:
        raise Declined(f"it is too large: an operation on {count:,} numbers")


def constant_index(index: Any) -> np.ndarray:
    """The values of an index tensor; declined if it depends on an input."""
    index = np.asarray(index)
    if index.dtype == object:
        raise Declined("it indexes by values that are known only while solving")
    return index


def axes_of(dim: Any, ndim: int) -> tuple[int, ...]:
    """Dimensions as non-negative numbers; all of them if ``dim`` is None or empty, as in torch."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return tuple(range(ndim))
    dims: Sequence[int] = dim if isinstance(dim, (list, tuple)) else (dim,)
    return tuple(d % ndim for d in dims) if ndim else ()


def along(x: np.ndarray, dim: Any, keepdim: bool, f: Callable[[list[Any]], Any]) -> np.ndarray:
    """``f`` of the entries along some dimensions; these are removed, or kept with length 1."""
    x = np.asarray(x, dtype=object)
    axes = axes_of(dim, x.ndim)
    kept = [i for i in range(x.ndim) if i not in axes]
    shape = [x.shape[i] for i in kept]
    rows = x.transpose(*kept, *axes).reshape(int(np.prod(shape)), -1) if x.ndim else x.reshape(1, 1)
    out = np.empty(len(rows), dtype=object)
    for i, row in enumerate(rows):
        out[i] = f(row.tolist())
    if keepdim:
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
    return out.reshape(shape)


def lines(x: np.ndarray, dim: int, f: Callable[[list[Any]], list[Any]]) -> np.ndarray:
    """``f`` of each line along a dimension, which returns as many entries as it gets."""
    x = np.asarray(x, dtype=object)
    if x.ndim == 0:
        return filled(f([x.item()]), ())
    moved = np.moveaxis(x, dim, -1)
    out = np.empty(moved.shape, dtype=object)
    for where in np.ndindex(moved.shape[:-1]):
        line = f(moved[where].tolist())
        for k, y in enumerate(line):
            out[(*where, k)] = y
    return np.moveaxis(out, -1, dim)


def words(text: str) -> list[str]:
    return text.split()


def filled(items: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    """An object array of these items, in C order."""
    out = np.empty(len(items), dtype=object)
    out[:] = items
    return out.reshape(tuple(shape))
