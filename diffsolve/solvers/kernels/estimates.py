"""Cotangents of a step's scaled error and of its norm, for the sweeps of all families."""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import inlined, reals, view
from diffsolve.solvers.kernels.norms import (
    add_scaled,
    distance,
    larger,
    scaled_norm,
    tolerance_scale,
)
from diffsolve.solvers.kernels.rows import bar_row, row

# rows of cotangents of a step's results, behind those of the stages
NEW, STIFF, ERROR, LOW, TOTAL, SPARE = range(L.W_BARS)


@inlined
def add_norm_slope(I, x_row, factor, bar, like):
    """``bar += factor * d|x|/dx``, nothing at zero."""
    n = I[L.N]
    size = distance(n, x_row, 0, like)
    if size > 0:
        add_scaled(n, factor / size, x_row, bar, like)


@inlined
def add_scaled_norm_slope(I, x_row, norm, factor, bar, like):
    """Add the slope of the scaled RMS norm: by ``x``, and by both states that scale it."""
    n = I[L.N]
    if not norm > 0:
        return
    x, x_bar = view(x_row, like), view(bar, like)
    u, v = view(row(I, L.W_U, like), like), view(row(I, L.W_NEW, like), like)
    u_bar = view(bar_row(I, TOTAL, like), like)
    v_bar = view(bar_row(I, NEW, like), like)
    for m in range(n):
        scale = tolerance_scale(I, m, larger(u[m], v[m]))
        q = float(x[m]) / scale
        by_q = factor * q / (n * norm)
        x_bar[m] += by_q / scale
        rtol = reals(I[L.RTOL])[m * I[L.RTOL_STRIDE]]
        by_magnitude = -by_q * q / scale * rtol
        a, b = abs(float(u[m])), abs(float(v[m]))
        share = 1.0 if a > b else 0.0 if a < b else 0.5
        if u[m] != 0:
            u_bar[m] += share * by_magnitude * math.copysign(1.0, float(u[m]))
        if v[m] != 0:
            v_bar[m] += (1.0 - share) * by_magnitude * math.copysign(1.0, float(v[m]))


@inlined
def reverse_error(I, index, like):
    """Cotangents of ``error`` and ``error_norm`` to those of the error rows and of the states."""
    if I[L.B_ERROR] == 0:
        return
    n = I[L.N]
    error_row, low_row = row(I, L.W_ERROR, like), row(I, L.W_LOW, like)
    u, new = row(I, L.W_U, like), row(I, L.W_NEW, like)
    error_bar = bar_row(I, ERROR, like)
    if I[L.ERROR_BARS] != 0:
        bar = float(view(I[L.ERROR_BARS], like)[index])
        e = scaled_norm(I, error_row, u, new, like)
        by_e = bar
        if I[L.B_LOW] != 0:
            low = scaled_norm(I, low_row, u, new, like)
            root = math.hypot(e, 0.1 * low)
            by_e = 0.0
            if root > 0:
                by_e = bar * (2 * e / root - e * e * e / (root * root * root))
                by_low = -bar * e * e * 0.01 * low / (root * root * root)
                add_scaled_norm_slope(I, low_row, low, by_low, bar_row(I, LOW, like), like)
        if by_e != 0:
            add_scaled_norm_slope(I, error_row, e, by_e, error_bar, like)
    if I[L.ERROR_NORM_BARS] != 0:
        bar = float(view(I[L.ERROR_NORM_BARS], like)[index])
        add_norm_slope(I, error_row, bar / math.sqrt(n), error_bar, like)
