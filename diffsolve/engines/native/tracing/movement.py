"""Rules for operations that copy, join, pick and place entries."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsolve.engines.native.graph.expression import Pool
from diffsolve.engines.native.tracing.registry import (
    Unsupported,
    axes_of,
    check_room,
    constant_index,
    each,
    operation,
)


def _objects(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=object)


@operation("clone", "contiguous")
def _clone(pool: Pool, x: Any, memory_format: Any = None) -> np.ndarray:
    return x


@operation("_to_copy", "to")
def _to_copy(pool: Pool, x: Any, dtype: Any = None, **_: Any) -> np.ndarray:
    whole = dtype is not None and not dtype.is_floating_point and not dtype.is_complex
    if not whole or str(dtype) == "torch.bool":
        return x
    return each(pool, lambda a: pool.unary("trunc", a), x)


@operation("copy")
def _copy(pool: Pool, x: Any, source: Any, non_blocking: bool = False) -> np.ndarray:
    return np.broadcast_to(_objects(source), x.shape)


@operation("fill")
def _fill(pool: Pool, x: Any, value: Any) -> np.ndarray:
    return np.broadcast_to(_objects(value), x.shape)


@operation("zero")
def _zero(pool: Pool, x: Any) -> np.ndarray:
    return np.broadcast_to(_objects(0.0), x.shape)


@operation("full_like")
def _full_like(pool: Pool, x: Any, value: Any, **_: Any) -> np.ndarray:
    return np.broadcast_to(_objects(value), x.shape)


@operation("cat", "concat")
def _cat(pool: Pool, tensors: list[Any], dim: int = 0) -> np.ndarray:
    parts = [_objects(x) for x in tensors if x.shape != (0,)]
    return np.concatenate(parts, axis=dim) if parts else _objects(tensors[0])


@operation("stack")
def _stack(pool: Pool, tensors: list[Any], dim: int = 0) -> np.ndarray:
    return np.stack([_objects(x) for x in tensors], axis=dim)


@operation("repeat")
def _repeat(pool: Pool, x: Any, repeats: Any) -> np.ndarray:
    check_room(pool, x.size * int(np.prod(repeats)))
    return np.tile(x, repeats) if len(repeats) else x


@operation("roll")
def _roll(pool: Pool, x: Any, shifts: Any, dims: Any = ()) -> np.ndarray:
    if not dims:
        return np.roll(x.reshape(-1), shifts[0]).reshape(x.shape)
    return np.roll(x, tuple(shifts), tuple(dims))


@operation("flip")
def _flip(pool: Pool, x: Any, dims: Any) -> np.ndarray:
    return np.flip(x, axes_of(list(dims), x.ndim)) if len(dims) else x


@operation("rot90")
def _rot90(pool: Pool, x: Any, k: int = 1, dims: Any = (0, 1)) -> np.ndarray:
    return np.rot90(x, k, tuple(dims))


def _lower(x: np.ndarray, diagonal: int) -> np.ndarray:
    return np.tri(x.shape[-2], x.shape[-1], diagonal, dtype=bool)


@operation("tril")
def _tril(pool: Pool, x: Any, diagonal: int = 0) -> np.ndarray:
    return np.where(_lower(x, diagonal), _objects(x), 0.0)


@operation("triu")
def _triu(pool: Pool, x: Any, diagonal: int = 0) -> np.ndarray:
    return np.where(_lower(x, diagonal - 1), 0.0, _objects(x))


@operation("block_diag")
def _block_diag(pool: Pool, tensors: list[Any]) -> np.ndarray:
    parts = [np.atleast_2d(_objects(x)) for x in tensors]
    rows, columns = (sum(x.shape[i] for x in parts) for i in (0, 1))
    out = np.full((rows, columns), 0.0, dtype=object)
    i = j = 0
    for x in parts:
        out[i : i + x.shape[0], j : j + x.shape[1]] = x
        i, j = i + x.shape[0], j + x.shape[1]
    return out


@operation("diagonal_copy")
def _diagonal_copy(pool: Pool, x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> np.ndarray:
    return np.diagonal(x, offset, dim1, dim2)


@operation("diag_embed")
def _diag_embed(pool: Pool, x: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> np.ndarray:
    size = x.shape[-1] + abs(offset)
    out = np.full((*x.shape[:-1], size, size), 0.0, dtype=object)
    k = np.arange(x.shape[-1])
    out[..., k + max(-offset, 0), k + max(offset, 0)] = x
    return np.moveaxis(out, (-2, -1), (dim1, dim2))


@operation("constant_pad_nd")
def _constant_pad(pool: Pool, x: Any, pad: Any, value: Any = 0) -> np.ndarray:
    # pairs from the last dimension on; negative ones cut
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2)
    pairs += [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    cut = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(pairs, x.shape, strict=True))
    around = [(max(a, 0), max(b, 0)) for a, b in pairs]
    return np.pad(_objects(x)[cut], around, constant_values=value)


def _enter_pad(kind: str, mode: Any) -> None:
    @operation(*(f"{kind}_pad{n}d" for n in (1, 2, 3)))
    def rule(pool: Pool, x: Any, pad: Any) -> np.ndarray:
        pairs = [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
        around = [(0, 0)] * (x.ndim - len(pairs)) + pairs
        return np.pad(_objects(x), around, mode=mode)


_enter_pad("reflection", "reflect")
_enter_pad("replication", "edge")


# -- by index ------------------------------------------------------------------------------------


def _key(indices: Any) -> tuple[Any, ...]:
    """Indices of torch, None where a dimension is taken whole, as NumPy's."""
    return tuple(slice(None) if i is None else constant_index(i) for i in indices)


def _positions(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape)


@operation("index", "_unsafe_index")
def _index(pool: Pool, x: Any, indices: Any) -> np.ndarray:
    return _objects(x)[_key(indices)]


@operation("take")
def _take(pool: Pool, x: Any, index: Any) -> np.ndarray:
    return _objects(x).reshape(-1)[constant_index(index)]


@operation("masked_select")
def _masked_select(pool: Pool, x: Any, mask: Any) -> np.ndarray:
    x, mask = np.broadcast_arrays(_objects(x), constant_index(mask))
    return x[mask]


@operation("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(
    pool: Pool, x: Any, indices: Any, values: Any, accumulate: bool = False, unsafe: bool = False
) -> np.ndarray:
    places = _positions(x.shape)[_key(indices)]
    return _placed(pool, x, places, np.broadcast_to(_objects(values), places.shape), accumulate)


def _placed(pool: Pool, x: Any, places: np.ndarray, values: Any, add: bool) -> np.ndarray:
    """A copy of ``x`` with values put, or added, at some places of its entries in C order."""
    out = _objects(x).copy().reshape(-1)
    for place, value in zip(places.reshape(-1).tolist(), values.reshape(-1).tolist(), strict=True):
        out[place] = pool.binary("add", out[place], value) if add else value
    return out.reshape(x.shape)


@operation("index_select")
def _index_select(pool: Pool, x: Any, dim: int, index: Any) -> np.ndarray:
    if x.ndim == 0:
        return x
    return np.take(_objects(x), np.atleast_1d(constant_index(index)), axis=dim)


@operation("embedding")
def _embedding(pool: Pool, weight: Any, index: Any, *_: Any, **__: Any) -> np.ndarray:
    return _objects(weight)[constant_index(index)]


def _lines_at(shape: tuple[int, ...], dim: int, index: np.ndarray) -> np.ndarray:
    """Places, in C order, that ``gather`` and ``scatter`` mean by ``index``."""
    if not shape:
        return np.zeros(index.shape, dtype=int)
    dim %= len(shape)
    index = index.reshape(index.shape or (1,))
    where: list[Any] = list(np.indices(index.shape))
    where[dim] = index
    return _positions(shape)[tuple(where)]


@operation("gather")
def _gather(pool: Pool, x: Any, dim: int, index: Any, sparse_grad: bool = False) -> np.ndarray:
    index = constant_index(index)
    return _objects(x).reshape(-1)[_lines_at(x.shape, dim, index)].reshape(index.shape)


def _source(values: Any, index: np.ndarray) -> np.ndarray:
    """Values for each entry of an index, which may be smaller than they are."""
    values = _objects(values)
    if values.ndim == 0:
        return np.broadcast_to(values, index.shape)
    return values[tuple(slice(n) for n in index.shape)]


@operation("scatter")
def _scatter(pool: Pool, x: Any, dim: int, index: Any, values: Any, reduce: Any = None) -> Any:
    if reduce not in (None, "add"):
        raise Unsupported(f"with reduce={reduce!r}")
    index = constant_index(index)
    places = _lines_at(x.shape, dim, index)
    return _placed(pool, x, places, _source(values, index), reduce == "add")


@operation("scatter_add")
def _scatter_add(pool: Pool, x: Any, dim: int, index: Any, values: Any) -> np.ndarray:
    return _scatter(pool, x, dim, index, values, "add")


@operation("scatter_reduce")
def _scatter_reduce(
    pool: Pool, x: Any, dim: int, index: Any, values: Any, reduce: str, include_self: bool = True
) -> np.ndarray:
    if reduce != "sum" or not include_self:
        raise Unsupported(f"with reduce={reduce!r}")
    return _scatter(pool, x, dim, index, values, "add")


@operation("index_add")
def _index_add(pool: Pool, x: Any, dim: int, index: Any, source: Any, alpha: Any = 1) -> Any:
    scaled = each(pool, lambda a: pool.binary("mul", a, alpha), _objects(source))
    return _along_index(pool, x, dim, index, scaled, True)


@operation("index_copy")
def _index_copy(pool: Pool, x: Any, dim: int, index: Any, source: Any) -> np.ndarray:
    return _along_index(pool, x, dim, index, _objects(source), False)


@operation("index_fill")
def _index_fill(pool: Pool, x: Any, dim: int, index: Any, value: Any) -> np.ndarray:
    return _along_index(pool, x, dim, index, _objects(value), False)


def _along_index(pool: Pool, x: Any, dim: int, index: Any, values: Any, add: bool) -> np.ndarray:
    places = _positions(x.shape or (1,))
    places = np.take(places, np.atleast_1d(constant_index(index)), axis=dim)
    if x.ndim == 0:
        values = values.reshape(-1)
    return _placed(pool, x, places, np.broadcast_to(values, places.shape), add)


# -- a part replaced -----------------------------------------------------------------------------


def _with_part(pool: Pool, x: Any, key: Any, part: Any) -> np.ndarray:
    out = _objects(x).copy()
    out[key] = part[()]  # a single entry, not an array of one
    return out


def _at(dim: int, ndim: int, key: Any) -> tuple[Any, ...]:
    return (*[slice(None)] * (dim % ndim), key)


@operation("select_scatter")
def _select_scatter(pool: Pool, x: Any, part: Any, dim: int, index: int) -> np.ndarray:
    return _with_part(pool, x, _at(dim, x.ndim, index), part)


@operation("slice_scatter")
def _slice_scatter(
    pool: Pool, x: Any, part: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> np.ndarray:
    return _with_part(pool, x, _at(dim, x.ndim, slice(start, end, step)), part)


@operation("diagonal_scatter")
def _diagonal_scatter(
    pool: Pool, x: Any, part: Any, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> np.ndarray:
    places = np.diagonal(_positions(x.shape), offset, dim1, dim2)
    return _placed(pool, x, places, _objects(part), False)


@operation("select_backward")
def _select_backward(pool: Pool, grad: Any, sizes: Any, dim: int, index: int) -> np.ndarray:
    zeros = np.full(tuple(sizes), 0.0, dtype=object)
    return _with_part(pool, zeros, _at(dim, len(sizes), index), grad)


@operation("slice_backward")
def _slice_backward(
    pool: Pool, grad: Any, sizes: Any, dim: int, start: Any, end: Any, step: int
) -> np.ndarray:
    zeros = np.full(tuple(sizes), 0.0, dtype=object)
    return _with_part(pool, zeros, _at(dim, len(sizes), slice(start, end, step)), grad)


@operation("diagonal_backward")
def _diagonal_backward(
    pool: Pool, grad: Any, sizes: Any, offset: int, dim1: int, dim2: int
) -> np.ndarray:
    zeros = np.full(tuple(sizes), 0.0, dtype=object)
    return _diagonal_scatter(pool, zeros, grad, offset, dim1, dim2)


@operation("unfold_backward")
def _unfold_backward(
    pool: Pool, grad: Any, sizes: Any, dim: int, size: int, step: int
) -> np.ndarray:
    lines = np.moveaxis(_positions(tuple(sizes)), dim, -1)
    windows = np.lib.stride_tricks.sliding_window_view(lines, size, axis=-1)[..., ::step, :]
    places = np.moveaxis(windows, -2, dim)
    zeros = np.full(tuple(sizes), 0.0, dtype=object)
    return _placed(pool, zeros, places, _objects(grad), True)
