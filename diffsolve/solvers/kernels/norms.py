"""Norms and sums of rows of numbers, for kernels that Numba compiles; rows are addresses."""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import cast, inlined, integers, reals, view


@inlined
def copy(n, source, target, like):
    x, y = view(source, like), view(target, like)
    m = 0
    while m + 4 <= n:  # all is read before it is written, so that LLVM makes a vector of four
        a, b, c, d = x[m], x[m + 1], x[m + 2], x[m + 3]
        y[m], y[m + 1], y[m + 2], y[m + 3] = a, b, c, d
        m += 4
    while m < n:
        y[m] = x[m]
        m += 1


@inlined
def fill_zero(n, target, like):
    y = view(target, like)
    m = 0
    while m + 4 <= n:
        y[m], y[m + 1], y[m + 2], y[m + 3] = like, like, like, like
        m += 4
    while m < n:
        y[m] = like
        m += 1


@inlined
def add_scaled(n, a, source, target, like):
    """``target += a * source``."""
    factor = cast(a, like)
    x, y = view(source, like), view(target, like)
    m = 0
    while m + 4 <= n:
        p, q = y[m] + factor * x[m], y[m + 1] + factor * x[m + 1]
        r, s = y[m + 2] + factor * x[m + 2], y[m + 3] + factor * x[m + 3]
        y[m], y[m + 1], y[m + 2], y[m + 3] = p, q, r, s
        m += 4
    while m < n:
        y[m] += factor * x[m]
        m += 1


@inlined
def is_finite(n, x_row, like):
    x = view(x_row, like)
    total = 0.0
    for m in range(n):
        total += 0.0 * float(x[m])  # NaN if it is not finite
    return total == 0.0


@inlined
def distance(n, x_row, y_row, like):
    """Euclidean norm of ``x - y``, or of ``x`` where ``y_row`` is 0; NaN where not finite."""
    x = view(x_row, like)
    y = view(y_row if y_row != 0 else x_row, like)
    keep = 0.0 if y_row == 0 else 1.0
    total = 0.0
    for m in range(n):
        d = float(x[m]) - keep * float(y[m])
        total += d * d
    if total < math.inf:
        return math.sqrt(total)
    peak = 0.0  # squares may overflow where the values do not
    for m in range(n):
        d = abs(float(x[m]) - keep * float(y[m]))
        if not d < math.inf:
            return math.nan
        peak = d if d > peak else peak
    total = 0.0
    for m in range(n):
        d = (float(x[m]) - keep * float(y[m])) / peak
        total += d * d
    return peak * math.sqrt(total)


@inlined
def tolerance_scale(I, m, magnitude):
    """``atol + rtol * magnitude`` of component ``m``."""
    rtol = reals(I[L.RTOL])
    atol = reals(I[L.ATOL])
    return atol[m * I[L.ATOL_STRIDE]] + rtol[m * I[L.RTOL_STRIDE]] * magnitude


@inlined
def larger(x, y):
    a, b = abs(float(x)), abs(float(y))
    return a if a > b else b


@inlined
def scaled_norm(I, x_row, u_row, v_row, like):
    """Largest over the blocks of the RMS of ``x / (atol + rtol max(|u|, |v|))``; NaN if one is."""
    x, u, v = view(x_row, like), view(u_row, like), view(v_row, like)
    ends = integers(I[L.BLOCK_ENDS])
    worst, begin = 0.0, 0
    for block in range(I[L.N_BLOCKS]):
        end = ends[block]
        if end == begin:
            continue
        total = 0.0
        for m in range(begin, end):
            q = float(x[m]) / tolerance_scale(I, m, larger(u[m], v[m]))
            total += q * q
        norm = math.sqrt(total / (end - begin))
        if not total < math.inf:
            peak = 0.0
            for m in range(begin, end):
                q = abs(float(x[m]) / tolerance_scale(I, m, larger(u[m], v[m])))
                if not q < math.inf:
                    return math.nan
                peak = q if q > peak else peak
            total = 0.0
            for m in range(begin, end):
                q = float(x[m]) / tolerance_scale(I, m, larger(u[m], v[m])) / peak
                total += q * q
            norm = peak * math.sqrt(total / (end - begin))
        worst = norm if norm > worst else worst
        begin = end
    return worst
