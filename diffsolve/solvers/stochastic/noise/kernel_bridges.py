"""Intervals of Brownian motion that are divided: one for all paths, and down a tree.

The formulas are those of ``bridge.py``. As in ``kernel.py``, loops are over many paths and without
branches. Numbers are float64.
"""

from __future__ import annotations

import math
from typing import Any

from diffsolve.solvers.kernels.memory import inlined
from diffsolve.solvers.stochastic.noise.kernel import array, draw, fill, fused

TILE = 256  # paths that go down the tree together: what they need stays in the nearest cache
_TREE = 2 << 56  # the domain of nodes, as in ``philox.py``

# arrays of a tile, rows of the work space in this order; then the results
_get_n1, _ = array(1)  # normals, written by `fill`
_get_n2, _ = array(2)
_get_w, _put_w = array(3)  # an interval
_get_h, _put_h = array(4)
_get_w1, _put_w1 = array(5)  # its parts
_get_h1, _put_h1 = array(6)
_get_w2, _put_w2 = array(7)
_get_h2, _put_h2 = array(8)
_get_next_w, _put_next_w = array(9)  # one that waits
_get_next_h, _put_next_h = array(10)
_get_sum, _put_sum = array(11)  # what was added up: W, and the integral
_get_area, _put_area = array(12)
_, _put_W = array(13)
_, _put_H = array(14)
ROWS = 12


@inlined
def weights(a, b, h):
    """``c`` and ``c/q`` for an interval of length ``h`` that is divided by ``a`` and ``b``."""
    q = 1.0 - 3.0 * a * b
    c = math.sqrt(h * a * b * q)
    return c, c / q


@inlined
def divide(size, n1, n2, w, h, scale, a, b, c, e, w1, h1, w2, h2):
    """Both parts of ``size`` intervals, whose ``W, H`` are ``scale`` times ``w`` and ``h``."""
    six, aa, bb = 6.0 * a * b, a * a, b * b
    for i in range(size):
        x, y = _get_n1(n1, i), _get_n2(n2, i)
        W, H = scale * _get_w(w, i), scale * _get_h(h, i)
        z = fused(six, H, c * x)
        k = fused(-0.5 * e, x, H)
        _put_w1(w1, i, fused(a, W, z))
        _put_h1(h1, i, fused(aa, k, b * e * y))
        _put_w2(w2, i, fused(b, W, -z))
        _put_h2(h2, i, fused(bb, k, -(a * e * y)))


@inlined
def bridge(I, R, like):
    """Divide an interval of each path.

    Integers: the address of the seeds, whether there is one a path, counter, paths, components,
    addresses of ``W`` and ``H`` of the interval, of work space for two such arrays, and of the
    results, ``(4, paths, m)``: ``W1, H1, W2, H2``. Reals: the factor of what is given, ``a``, ``b``
    and the length.
    """
    size = I[3] * I[4]
    step = 8 * size
    work, out = I[7], I[8]
    fill(I[0], I[1], I[2], 1, 0, I[3], I[4], 1.0, work, work + step, like)
    c, e = weights(R[1], R[2], R[3])
    divide(
        size,
        work,
        work + step,
        I[5],
        I[6],
        R[0],
        R[1],
        R[2],
        c,
        e,
        out,
        out + step,
        out + 2 * step,
        out + 3 * step,
    )
    return 0


# -- a tree --------------------------------------------------------------------------------------


def _copied(get_w: Any, get_h: Any, put_w: Any, put_h: Any) -> Any:
    @inlined
    def copy(size, w, h, to_w, to_h):
        for i in range(size):
            put_w(to_w, i, get_w(w, i))
            put_h(to_h, i, get_h(h, i))

    return copy


def _put_before(get_w: Any, get_h: Any) -> Any:
    """Put intervals of a length before what was added up over ``known``."""

    @inlined
    def before(size, w, h, length, known, total, area):
        rest = 0.5 * length + known
        for i in range(size):
            W = get_w(w, i)
            _put_area(area, i, _get_area(area, i) + fused(rest, W, length * get_h(h, i)))
            _put_sum(total, i, _get_sum(total, i) + W)

    return before


def _put_after(get_w: Any, get_h: Any) -> Any:
    """Put intervals of a length after what was added up."""

    @inlined
    def after(size, w, h, length, total, area):
        for i in range(size):
            W, s = get_w(w, i), _get_sum(total, i)
            own = fused(length, fused(0.5, W, s), length * get_h(h, i))
            _put_area(area, i, _get_area(area, i) + own)
            _put_sum(total, i, s + W)

    return after


_first_half = _copied(_get_w1, _get_h1, _put_w, _put_h)
_second_half = _copied(_get_w2, _get_h2, _put_w, _put_h)
_wait = _copied(_get_w2, _get_h2, _put_next_w, _put_next_h)
_resume = _copied(_get_next_w, _get_next_h, _put_w, _put_h)
_before = _put_before(_get_w, _get_h)
_before_second = _put_before(_get_w2, _get_h2)
_after = _put_after(_get_w, _get_h)
_after_first = _put_after(_get_w1, _get_h1)


@inlined
def _split(size, work, row, a, b, length):
    """Divide the interval of the work space, of this length, by the normals there."""
    c, e = weights(a, b, length)
    n1, w, w1, w2 = work, work + 2 * row, work + 4 * row, work + 6 * row
    divide(size, n1, n1 + row, w, w + row, 1.0, a, b, c, e, w1, w1 + row, w2, w2 + row)


@inlined
def _draw(tree, node, first, paths, work, row, like):
    """The normals of a node."""
    seeds, seeded, m = tree[0], tree[1], tree[3]
    fill(seeds, seeded, _TREE | node, 1, first, paths, m, 1.0, work, work + row, like)


@inlined
def _halve(tree, node, bit, first, paths, work, row, length, like):
    """Divide a node in the middle, and go on with one of its halves."""
    size = paths * tree[3]
    _draw(tree, node, first, paths, work, row, like)
    _split(size, work, row, 0.5, 0.5, length)
    if bit == 0:
        _first_half(size, work + 4 * row, work + 5 * row, work + 2 * row, work + 3 * row)
    else:
        _second_half(size, work + 6 * row, work + 7 * row, work + 2 * row, work + 3 * row)


@inlined
def _is_start(leaf, part, below):
    """Whether a time is the start of the node that is so many levels above the leaves."""
    return part == 0.0 and leaf & ((1 << below) - 1) == 0


@inlined
def _is_end(leaf, part, below):
    return part == 1.0 and (leaf + 1) & ((1 << below) - 1) == 0


@inlined
def _from_right(tree, node, level, length, leaf, part, first, paths, work, row, like):
    """Add up what lies right of a time that is in the first half of the tree's node."""
    size, depth = paths * tree[3], tree[4]
    w2, total = work + 6 * row, work + 10 * row
    known = 0.0
    while level < depth and not _is_start(leaf, part, depth - level):
        bit = (leaf >> (depth - 1 - level)) & 1
        _halve(tree, node, bit, first, paths, work, row, length, like)
        level, node, length = level + 1, 2 * node + bit, 0.5 * length
        if bit == 0:
            _before_second(size, w2, w2 + row, length, known, total, total + row)
            known += length
    if part > 0.0:
        _draw(tree, node, first, paths, work, row, like)
        _split(size, work, row, part, 1.0 - part, length)
        length *= 1.0 - part
        _before_second(size, w2, w2 + row, length, known, total, total + row)
    else:
        _before(size, work + 2 * row, work + 3 * row, length, known, total, total + row)


@inlined
def _from_left(tree, node, level, length, leaf, part, first, paths, work, row, like):
    """Add up what lies left of a time that is in the second half of the tree's node."""
    size, depth = paths * tree[3], tree[4]
    w1, total = work + 4 * row, work + 10 * row
    while level < depth and not _is_end(leaf, part, depth - level):
        bit = (leaf >> (depth - 1 - level)) & 1
        _halve(tree, node, bit, first, paths, work, row, length, like)
        level, node, length = level + 1, 2 * node + bit, 0.5 * length
        if bit == 1:
            _after_first(size, w1, w1 + row, length, total, total + row)
    if part < 1.0:
        _draw(tree, node, first, paths, work, row, like)
        _split(size, work, row, part, 1.0 - part, length)
        _after_first(size, w1, w1 + row, part * length, total, total + row)
    else:
        _after(size, work + 2 * row, work + 3 * row, length, total, total + row)


@inlined
def _within(tree, node, length, s_part, t_part, first, paths, work, row, like):
    """Between two times of one leaf, where the path is the bridge of a single pair of normals."""
    size = paths * tree[3]
    w1, total = work + 4 * row, work + 10 * row
    area = total + row
    _draw(tree, node, first, paths, work, row, like)
    # what is before t, less what is before s, which moves the rest as well
    if t_part < 1.0:
        _split(size, work, row, t_part, 1.0 - t_part, length)
        _after_first(size, w1, w1 + row, t_part * length, total, area)
    else:
        _after(size, work + 2 * row, work + 3 * row, length, total, area)
    if s_part > 0.0:
        _split(size, work, row, s_part, 1.0 - s_part, length)
        before, rest = s_part * length, (t_part - s_part) * length
        for i in range(size):
            W = _get_w1(w1, i)
            own = fused(0.5 * before, W, before * _get_h1(w1 + row, i))
            _put_area(area, i, _get_area(area, i) - fused(rest, W, own))
            _put_sum(total, i, _get_sum(total, i) - W)


@inlined
def _descend(tree, R, first, paths, work, row, like):
    """Add up what lies between two times, for some paths."""
    m, depth, s, t = tree[3], tree[4], tree[5], tree[6]
    size, length = paths * m, R[0]
    w, h, total, area = work + 2 * row, work + 3 * row, work + 10 * row, work + 11 * row
    scale = math.sqrt(length)
    _draw(tree, 0, first, paths, work, row, like)
    for i in range(size):
        _put_w(w, i, scale * _get_n1(work, i))
        _put_h(h, i, scale * _get_n2(work + row, i))
        _put_sum(total, i, 0.0)
        _put_area(area, i, 0.0)
    level, node = 0, 1
    while True:
        if _is_start(s, R[1], depth - level) and _is_end(t, R[2], depth - level):
            _after(size, w, h, length, total, area)
            return
        if level == depth:
            _within(tree, node, length, R[1], R[2], first, paths, work, row, like)
            return
        if (s >> (depth - 1 - level)) != (t >> (depth - 1 - level)):
            break
        bit = (s >> (depth - 1 - level)) & 1
        _halve(tree, node, bit, first, paths, work, row, length, like)
        level, node, length = level + 1, 2 * node + bit, 0.5 * length
    _halve(tree, node, 0, first, paths, work, row, length, like)
    _wait(size, work + 6 * row, work + 7 * row, work + 8 * row, work + 9 * row)
    level, length = level + 1, 0.5 * length
    _from_right(tree, 2 * node, level, length, s, R[1], first, paths, work, row, like)
    _resume(size, work + 8 * row, work + 9 * row, w, h)
    _from_left(tree, 2 * node + 1, level, length, t, R[2], first, paths, work, row, like)


@inlined
def tree(I, R, like):
    """``W`` and ``H`` between two times of a virtual tree.

    Integers: the address of the seeds, whether there is one a path, paths, components, depth,
    leaves of both times, addresses of ``W`` and ``H``, ``(paths, m)`` each, and of the work space:
    `ROWS` rows of ``max(TILE, m)``. Reals: the length of the root, the parts of these leaves that
    lie before the times, and the length between the times.
    """
    m, work, row = I[3], I[9], 8 * max(TILE, I[3])
    lines = max(1, TILE // max(m, 1))
    share = 1.0 / R[3]
    for first in range(0, I[2], lines):
        paths = min(lines, I[2] - first)
        _descend(I, R, first, paths, work, row, like)
        W, H = I[7] + 8 * first * m, I[8] + 8 * first * m
        for i in range(paths * m):
            x = _get_sum(work + 10 * row, i)
            _put_W(W, i, x)
            _put_H(H, i, fused(share, _get_area(work + 11 * row, i), -0.5 * x))
    return 0


KERNELS = {"draw": draw, "bridge": bridge, "tree": tree}
