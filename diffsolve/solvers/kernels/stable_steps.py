"""Steps that are stable also for what the solution does not show, as ``solvers/stable_steps.py``.

Change one, change the other. ``W_MODE`` holds the direction that the power iteration follows; rows
of the next step serve as work space, since no step is under way.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import cast, inlined, is_single, reals, view
from diffsolve.solvers.kernels.norms import copy, distance
from diffsolve.solvers.kernels.rows import field_at, row
from diffsolve.solvers.stability_constants import (
    AGREEMENT,
    DIRECTIONS,
    FASTER,
    GROWN,
    GROWTH_IN_ALL,
    GROWTHS,
    HALF,
    MIXED,
    MOST_LOOKS,
    NEAR,
    NEW,
    NONLINEAR,
    TOO_LONG,
    WIDER,
)

ROWS, LOG_10 = len(GROWTHS), math.log(10.0)
_EPS = 2.0**-52
_EPS_SINGLE = 2.0**-23
_32_BITS = 0xFFFFFFFF


@inlined
def limit_size(I, R, like):
    """Keep ``STABLE_SIZE`` up to date before a step."""
    wanted = R[L.DTMAX] if R[L.DTMAX] < R[L.SIZE] else R[L.SIZE]
    if I[L.STABLE_WAIT] == 0:
        R[L.STABLE_SIZE], R[L.STABLE_RATE] = math.inf, 0.0
        I[L.STABLE_FOLLOWS], I[L.STABLE_SURE] = 0, 0
        I[L.STABLE_AGE], I[L.STABLE_WAIT], I[L.STABLE_LAST_WAIT] = 1, 1, 1
    near = wanted > NEAR * R[L.STABLE_SIZE]
    if I[L.STABLE_AGE] >= I[L.STABLE_WAIT] or (near and I[L.STABLE_SURE] == 0):
        u, du = row(I, L.W_U, like), row(I, L.W_DU, like)
        look_until_agreed(I, R, R[L.T], u, du, wanted, like)


@inlined
def refuses(I, R, t, size, stiffness, u, du, like):
    """Whether a step to ``(t, u)`` turns out to be too long for the Jacobian there."""
    known, half = FASTER * R[L.STABLE_RATE], HALF * reals(I[L.STABLE])[DIRECTIONS - 1] / size
    known = known if known > half else half
    is_new = size > NEAR * R[L.STABLE_SIZE] and I[L.STABLE_WAIT] <= NEW
    if stiffness <= known and not (is_new or size > GROWN * R[L.STABLE_SEEN]):
        return False
    look_until_agreed(I, R, t, u, du, size, like)
    refused = size > TOO_LONG * R[L.STABLE_SIZE]
    I[L.STABLE_AGE] = I[L.STABLE_WAIT] if refused else -1  # where it ends the next one starts
    return refused


@inlined
def limiting_stiffness(I, R, size, stiffness):
    """The stiffness where it limits a step of this size: what an estimate may not see."""
    limits = I[L.STABLE] != 0 and size >= R[L.STABLE_SIZE]
    return R[L.STABLE_RATE] if limits and R[L.STABLE_RATE] > stiffness else stiffness


@inlined
def look_until_agreed(I, R, t, u, du, wanted, like):
    near, agreed = wanted > NEAR * R[L.STABLE_SIZE], False
    for _ in range(MOST_LOOKS):
        before = R[L.STABLE_SIZE]
        look(I, R, t, u, du, wanted, near, like)
        found = R[L.STABLE_SIZE]
        near = wanted > NEAR * found
        agreed = abs(found - before) <= AGREEMENT * before
        if agreed or not wanted > found:
            break
    I[L.STABLE_AGE], I[L.STABLE_SURE] = 0, 1 if near else 0
    R[L.STABLE_SEEN] = wanted
    most, double = I[L.STABLE_MOST_WAIT], 2 * I[L.STABLE_LAST_WAIT]
    I[L.STABLE_WAIT], I[L.STABLE_LAST_WAIT] = most, 1
    if near:
        double = most if most < double else double
        I[L.STABLE_WAIT] = I[L.STABLE_LAST_WAIT] = double if agreed else 1


@inlined
def look(I, R, t, u, du, size, checked, like):
    n = I[L.N]
    w, a, b = row(I, L.W_MODE, like), row(I, L.W_STIFF, like), row(I, L.W_ERROR, like)
    if I[L.STABLE_FOLLOWS] == 0:
        fill_pseudo_random(n, w, like)
    I[L.STABLE_FOLLOWS] = 0
    R[L.STABLE_SIZE], R[L.STABLE_RATE] = math.inf, 0.0
    scale(n, 1.0 / distance(n, w, 0, like), w, like)
    eps = _EPS_SINGLE if is_single(like) else _EPS
    norms = distance(n, u, 0, like) + size * distance(n, du, 0, like)
    delta = eps**0.75 * (norms if norms > 0 else 1.0)
    is_linear = linear_product(I, R, t, u, du, delta, w, a, checked, like)
    aa, wa = dot(n, a, a, like), dot(n, w, a, like)
    v = row(I, L.W_LOW, like)
    copy(n, a, v, like)
    if aa > 0:
        scale(n, 1.0 / math.sqrt(aa), v, like)
    is_linear = linear_product(I, R, t, u, du, delta, v, b, checked, like) and is_linear
    bb = dot(n, b, b, like)
    if not (is_linear and 0 < aa + bb < math.inf):
        return
    wb, ab = dot(n, w, b, like), dot(n, a, b, like)
    if bb > 0:
        I[L.STABLE_FOLLOWS] = 1
        fill_pseudo_random(n, w, like)
        mix(n, 1.0 / math.sqrt(bb), b, MIXED * math.sqrt(3.0 / n), w, like)
    limit_by_eigenvalues(I, R, aa, wa, wb, ab, eps)


@inlined
def linear_product(I, R, t, u, du, delta, v, out, checked, like):
    """``out = J v`` by a difference; false where a wider one differs, so that there is none."""
    n = I[L.N]
    difference(I, R, t, u, du, delta, v, out, like)
    if not checked:
        return True
    wide = row(I, L.W_BASE, like)
    difference(I, R, t, u, du, WIDER * delta, v, wide, like)
    return distance(n, wide, out, like) <= NONLINEAR * distance(n, out, 0, like)


@inlined
def difference(I, R, t, u, du, delta, v, out, like):
    n, moved = I[L.N], row(I, L.W_TEMP, like)
    x, y, z, d = view(u, like), view(v, like), view(moved, like), view(du, like)
    for m in range(n):
        z[m] = cast(float(x[m]) + delta * float(y[m]), like)
    field_at(I, R, t, t, t + R[L.DIRECTION], moved, out, like)
    q = view(out, like)
    for m in range(n):
        q[m] = cast((float(q[m]) - float(d[m])) / delta, like)


@inlined
def limit_by_eigenvalues(I, R, aa, wa, wb, ab, eps):
    """The limit by the eigenvalues of ``J`` on the plane of ``w`` and ``a = J w``."""
    rest = aa - wa * wa
    if rest <= eps**0.25 * aa:
        limit_by(I, R, R[L.DIRECTION] * wa, 0.0)
        return
    alpha = math.sqrt(aa)
    coupling = alpha * wb - wa * wa
    other = (alpha * ab - wa * aa - wa * coupling) / rest
    middle, shift = 0.5 * R[L.DIRECTION] * (wa + other), 0.5 * (wa - other)
    square = shift * shift + coupling
    if square < 0:
        limit_by(I, R, middle, math.sqrt(-square))
    else:
        limit_by(I, R, middle - math.sqrt(square), 0.0)
        limit_by(I, R, middle + math.sqrt(square), 0.0)


@inlined
def limit_by(I, R, real, imaginary):
    """``real`` is the part of the eigenvalue along the direction of the solve."""
    size = imaginary if real >= 0 else math.hypot(real, imaginary)
    if size == 0:
        return
    sizes, growth = reals(I[L.STABLE]), size * (R[L.T_HIGH] - R[L.T_LOW]) / GROWTH_IN_ALL
    below = math.log(growth if growth > 10.0 else 10.0) / LOG_10 - 1
    column = (-real if real < 0 else 0.0) / size * (DIRECTIONS - 1)
    j, i = int(below), int(column)
    j = ROWS - 2 if j > ROWS - 2 else j
    i = DIRECTIONS - 2 if i > DIRECTIONS - 2 else i
    y, x = below - j, column - i
    y = 1.0 if y > 1.0 else y
    low = sizes[j * DIRECTIONS + i] * (1 - x) + sizes[j * DIRECTIONS + i + 1] * x
    j += 1
    high = sizes[j * DIRECTIONS + i] * (1 - x) + sizes[j * DIRECTIONS + i + 1] * x
    limit = (low + y * (high - low)) / size
    if limit < R[L.STABLE_SIZE]:
        R[L.STABLE_SIZE], R[L.STABLE_RATE] = limit, math.hypot(real, imaginary)


@inlined
def fill_pseudo_random(n, target, like):
    x = view(target, like)
    for i in range(n):
        k = ((i + 1) * 0x9E3779B1) & _32_BITS
        k = ((k ^ (k >> 16)) * 0x85EBCA6B) & _32_BITS
        k = ((k ^ (k >> 13)) * 0xC2B2AE35) & _32_BITS
        x[i] = cast(float(k ^ (k >> 16)) / 2147483648.0 - 1.0, like)


@inlined
def scale(n, factor, target, like):
    x = view(target, like)
    for m in range(n):
        x[m] = cast(factor * float(x[m]), like)


@inlined
def mix(n, factor, source, own, target, like):
    """``target = factor * source + own * target``."""
    x, y = view(source, like), view(target, like)
    for m in range(n):
        y[m] = cast(factor * float(x[m]) + own * float(y[m]), like)


@inlined
def dot(n, x_row, y_row, like):
    x, y, total = view(x_row, like), view(y_row, like), 0.0
    for m in range(n):
        total += float(x[m]) * float(y[m])
    return total
