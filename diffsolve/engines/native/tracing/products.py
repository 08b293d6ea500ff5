"""Rules for products of matrices, convolutions, and the layers of networks that normalise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.graph.expression import Node, Pool
from diffsolve.engines.native.tracing.reductions import average, sums, variance, vector_norm
from diffsolve.engines.native.tracing.registry import (
    Unsupported,
    along,
    axes_of,
    check_room,
    each,
    operation,
)

# -- products of matrices ------------------------------------------------------------------------


def _product(pool: Pool, a: Any, b: Any) -> np.ndarray:
    """``(m, k) @ (k, n)``."""
    a, b = np.asarray(a, dtype=object), np.asarray(b, dtype=object)
    (m, k), n = a.shape, b.shape[1]
    if m * k * n > max(pool.most - len(pool.nodes), 0):
        raise Declined(f"it is too large: a product of matrices takes {m * k * n:,} products")
    rows, columns = a.tolist(), b.T.tolist()
    out = np.empty((m, n), dtype=object)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            out[i, j] = _inner(pool, row, column)
    return out


def _inner(pool: Pool, a: list[Any], b: list[Any]) -> Node:
    return pool.sum([pool.binary("mul", x, y) for x, y in zip(a, b, strict=True)])


@operation("mm")
def _mm(pool: Pool, a: Any, b: Any) -> np.ndarray:
    return _product(pool, a, b)


@operation("mv")
def _mv(pool: Pool, a: Any, b: Any) -> np.ndarray:
    return _product(pool, a, b[:, None])[:, 0]


@operation("dot", "vdot")
def _dot(pool: Pool, a: Any, b: Any) -> np.ndarray:
    return _product(pool, a[None], b[:, None])[0, 0]


@operation("bmm")
def _bmm(pool: Pool, a: Any, b: Any) -> np.ndarray:
    check_room(pool, a.size * b.shape[2])
    out = np.empty((a.shape[0], a.shape[1], b.shape[2]), dtype=object)
    for i in range(len(a)):
        out[i] = _product(pool, a[i], b[i])
    return out


def _scaled_sum(pool: Pool, x: Any, product: np.ndarray, beta: Any, alpha: Any) -> np.ndarray:
    if beta == 0:  # what is there does not count, NaN or not
        return each(pool, lambda b: pool.binary("mul", b, alpha), product)

    def one(a: Any, b: Any) -> Node:
        scaled = pool.binary("mul", a, beta)
        return pool.binary("add", scaled, pool.binary("mul", b, alpha))

    return each(pool, one, x, product)


@operation("addmm")
def _addmm(pool: Pool, x: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> np.ndarray:
    return _scaled_sum(pool, x, _product(pool, a, b), beta, alpha)


@operation("addmv")
def _addmv(pool: Pool, x: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> np.ndarray:
    return _scaled_sum(pool, x, _mv(pool, a, b), beta, alpha)


@operation("baddbmm")
def _baddbmm(pool: Pool, x: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> np.ndarray:
    return _scaled_sum(pool, x, _bmm(pool, a, b), beta, alpha)


@operation("addbmm")
def _addbmm(pool: Pool, x: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> np.ndarray:
    return _scaled_sum(pool, x, sums(pool, _bmm(pool, a, b), 0), beta, alpha)


@operation("addr")
def _addr(pool: Pool, x: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> np.ndarray:
    return _scaled_sum(pool, x, _product(pool, a[:, None], b[None]), beta, alpha)


@operation("linear")
def _linear(pool: Pool, x: Any, weight: Any, bias: Any = None) -> np.ndarray:
    out = _product(pool, x.reshape(-1, x.shape[-1]), weight.T)
    if bias is not None:
        out = each(pool, lambda a, b: pool.binary("add", a, b), out, bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])


@operation("_trilinear")
def _trilinear(
    pool: Pool, a: Any, b: Any, c: Any, expand1: Any, expand2: Any, expand3: Any, sumdim: Any,
    unroll_dim: int = 1,
) -> np.ndarray:  # fmt: skip
    parts = [
        np.expand_dims(x, tuple(axes)) for x, axes in ((a, expand1), (b, expand2), (c, expand3))
    ]
    products = each(pool, lambda i, j, k: pool.number(i) * j * k, *parts)
    return sums(pool, products, sumdim)


@operation("linalg_cross", "cross")
def _cross(pool: Pool, a: Any, b: Any, dim: int = -1) -> np.ndarray:
    a, b = np.broadcast_arrays(np.asarray(a, dtype=object), np.asarray(b, dtype=object))
    x, y = np.moveaxis(a, dim, 0), np.moveaxis(b, dim, 0)

    def minor(i: int, j: int) -> np.ndarray:
        def one(p: Any, q: Any, r: Any, s: Any) -> Node:
            return pool.binary("sub", pool.binary("mul", p, q), pool.binary("mul", r, s))

        return each(pool, one, x[i], y[j], x[j], y[i])

    return np.moveaxis(np.stack([minor(1, 2), minor(2, 0), minor(0, 1)]), 0, dim)


@operation("trace")
def _trace(pool: Pool, x: Any) -> np.ndarray:
    return np.asarray(pool.sum(np.diagonal(x).tolist()), dtype=object)


@operation("mse_loss")
def _mse_loss(pool: Pool, x: Any, y: Any, reduction: int = 1) -> np.ndarray:
    def one(a: Any, b: Any) -> Node:
        gap = pool.binary("sub", a, b)
        return gap * gap

    squares = each(pool, one, x, y)
    if reduction == 0:
        return squares
    rule = pool.sum if reduction == 2 else functools.partial(average, pool)
    return along(squares, None, False, rule)


@operation("dist")
def _dist(pool: Pool, x: Any, y: Any, p: float = 2) -> np.ndarray:
    return vector_norm(pool, each(pool, lambda a, b: pool.binary("sub", a, b), x, y), p)


# -- convolutions and layers ---------------------------------------------------------------------


@operation("convolution")
def _convolution(
    pool: Pool, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> np.ndarray:  # fmt: skip
    if transposed:
        raise Unsupported("transposed")
    around = [(0, 0), (0, 0), *((p, p) for p in padding)]
    x = np.pad(np.asarray(x, dtype=object), around, constant_values=0.0)
    space = weight.shape[2:]
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, d, s in zip(x.shape[2:], space, dilation, stride, strict=True)
    ]
    batch, channels, each_group = len(x), weight.shape[0], weight.shape[1]
    check_room(pool, batch * weight.size * int(np.prod(sizes)))
    out = np.empty((batch, channels, *sizes), dtype=object)
    for where in np.ndindex(*sizes):
        window = [
            slice(i * s, i * s + d * (k - 1) + 1, d)
            for i, s, d, k in zip(where, stride, dilation, space, strict=True)
        ]
        for c in range(channels):
            start = c // (channels // groups) * each_group
            kernel = weight[c].reshape(-1).tolist()
            for n in range(batch):
                patch = x[(n, slice(start, start + each_group), *window)].reshape(-1).tolist()
                total = _inner(pool, patch, kernel)
                out[(n, c, *where)] = total if bias is None else total + bias[c]
    return out


def _normalised(pool: Pool, row: list[Any], eps: float) -> tuple[list[Node], Node, Node]:
    mean = average(pool, row)
    rstd = 1.0 / pool.unary("sqrt", variance(pool, row, 0) + eps)
    return [(a - mean) * rstd for a in map(pool.number, row)], mean, rstd


def normalised(pool: Pool, x: Any, axes: tuple[int, ...], eps: float) -> list[np.ndarray]:
    """``x`` without its mean and scaled by its deviation along some axes; these two, too."""
    x = np.asarray(x, dtype=object)
    kept = [i for i in range(x.ndim) if i not in axes]
    order = [*kept, *axes]
    moved = x.transpose(order)
    shape = [x.shape[i] for i in kept]
    out = np.empty(moved.shape, dtype=object).reshape(int(np.prod(shape)), -1)
    means, rstds = np.empty(len(out), dtype=object), np.empty(len(out), dtype=object)
    for i, row in enumerate(moved.reshape(len(out), -1).tolist()):
        values, means[i], rstds[i] = _normalised(pool, row, eps)
        out[i, :] = values
    back = out.reshape(moved.shape).transpose(np.argsort(order))
    return [back, means.reshape(shape), rstds.reshape(shape)]


def affine(pool: Pool, x: np.ndarray, weight: Any, bias: Any) -> np.ndarray:
    if weight is not None:
        x = each(pool, lambda a, w: pool.binary("mul", a, w), x, weight)
    if bias is not None:
        x = each(pool, lambda a, b: pool.binary("add", a, b), x, bias)
    return x


@operation("native_layer_norm")
def _layer_norm(pool: Pool, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> list[Any]:
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    out, mean, rstd = normalised(pool, x, axes, eps)
    kept = [n if i not in axes else 1 for i, n in enumerate(x.shape)]
    return [affine(pool, out, weight, bias), mean.reshape(kept), rstd.reshape(kept)]


@operation("_weight_norm_interface")
def _weight_norm(pool: Pool, v: Any, g: Any, dim: int = 0) -> list[Any]:
    others = [i for i in range(v.ndim) if i != dim % v.ndim]
    sizes = vector_norm(pool, v, 2, others, True) if others else each(pool, _size_of(pool), v)
    scaled = each(pool, lambda a, b, n: pool.number(a) * (pool.number(b) / n), v, g, sizes)
    return [scaled, sizes]


def _size_of(pool: Pool) -> Callable[[Any], Node]:
    return lambda a: pool.unary("abs", a)


@operation("_fused_rms_norm")
def _rms_norm(pool: Pool, x: Any, shape: Any, weight: Any, eps: float | None) -> list[Any]:
    floor = float(np.finfo(pool.dtype).eps) if eps is None else eps

    def inverse(row: list[Any]) -> Node:
        mean = average(pool, [a * a for a in map(pool.number, row)])
        return 1.0 / pool.unary("sqrt", mean + floor)

    axes = list(range(x.ndim - len(shape), x.ndim))
    scale = along(x, axes, True, inverse)
    out = each(pool, lambda a, s: pool.binary("mul", a, s), x, scale)
    return [affine(pool, out, weight, None), scale]


@operation("native_group_norm")
def _group_norm(
    pool: Pool, x: Any, weight: Any, bias: Any, n: int, c: int, hw: int, group: int, eps: float
) -> list[Any]:
    grouped = np.asarray(x, dtype=object).reshape(n, group, -1)
    out, mean, rstd = normalised(pool, grouped, axes_of(2, 3), eps)
    per_channel = (1, c, *[1] * (x.ndim - 2))
    weight, bias = (None if y is None else y.reshape(per_channel) for y in (weight, bias))
    return [affine(pool, out.reshape(x.shape), weight, bias), mean, rstd]


@operation("native_batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(
    pool: Pool, x: Any, weight: Any, bias: Any, mean: Any, var: Any, *more: Any
) -> list[Any]:
    training, eps = (more[0] if len(more) == 3 else False), more[-1]
    shape = (1, x.shape[1], *[1] * (x.ndim - 2))
    if training:
        if mean is not None:
            raise Unsupported("in training mode")
        axes = (0, *range(2, x.ndim))
        weight, bias = (None if y is None else y.reshape(shape) for y in (weight, bias))
        out, mean, rstd = normalised(pool, x, axes, eps)
        return [affine(pool, out, weight, bias), mean, rstd]
    weight, bias, mean, var = (
        None if y is None else y.reshape(shape) for y in (weight, bias, mean, var)
    )

    def one(a: Any, m: Any, v: Any) -> Node:
        return (pool.number(a) - m) / pool.unary("sqrt", pool.number(v) + eps)

    return [affine(pool, each(pool, one, x, mean, var), weight, bias), None, None]
