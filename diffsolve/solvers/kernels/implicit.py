"""Estimates of an implicit step: its error, and the Jacobian's spectral radius; and their reverse.

The radius is ``sqrt(|J^3 v| / |J v|)`` with a fixed vector ``v`` of signs: three steps of the power
iteration, the square so that a pair of complex eigenvalues does not make it swing.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.estimates import ERROR, SPARE, reverse_error
from diffsolve.solvers.kernels.jacobian import (
    add_outer,
    evaluate_jacobian,
    jacobian_of_step,
    multiply,
    multiply_transposed,
)
from diffsolve.solvers.kernels.linear import factor, solve, solve_transposed
from diffsolve.solvers.kernels.memory import cast, inlined, reals, view
from diffsolve.solvers.kernels.norms import (
    add_scaled,
    copy,
    distance,
    fill_zero,
    is_finite,
    larger,
    scaled_norm,
    tolerance_scale,
)
from diffsolve.solvers.kernels.rows import bar_row, combine_error, row, stage, through_combination


@inlined
def fill_signs(n, target, like):
    """The Thue-Morse sequence, which no smooth vector is orthogonal to for long."""
    x = view(target, like)
    for i in range(n):
        bits, parity = i, 0
        while bits != 0:
            parity ^= bits & 1
            bits >>= 1
        x[i] = cast(1.0 - 2.0 * parity, like)


@inlined
def normalise(n, x_row, like):
    """Divide by the largest magnitude, which is returned; squares then cannot overflow."""
    x = view(x_row, like)
    peak = 0.0
    for i in range(n):
        size = abs(float(x[i]))
        if not size < math.inf:
            return math.nan
        peak = size if size > peak else peak
    if peak > 0.0:
        for i in range(n):
            x[i] = cast(float(x[i]) / peak, like)
    return peak


@inlined
def spectral_radius(I, R, t, h, first, second, third, spare, like):
    """The estimate; leaves ``J v`` and ``J^2 v``, both normalised, and their image by ``J``.

    Returns also the largest magnitude of the second product before it was normalised.
    """
    n = I[L.N]
    fill_signs(n, spare, like)
    multiply(I, R, t, h, spare, first, like)
    peak = normalise(n, first, like)
    if not peak > 0.0:
        return peak, 0.0
    multiply(I, R, t, h, first, second, like)
    peak = normalise(n, second, like)
    if not peak > 0.0:
        return peak, 0.0
    multiply(I, R, t, h, second, third, like)
    return math.sqrt(peak * distance(n, third, 0, like) / distance(n, first, 0, like)), peak


@inlined
def radius_of_step(I, like):
    """The spectral radius that a fused step wrote behind its Jacobian; NaN for other steps."""
    if I[L.STEP_FUSED] == 0:
        return math.nan
    return float(view(I[L.JAC_VALUES], like)[I[L.JAC_ENTRIES] + I[L.TIME_TERMS]])


@inlined
def combine_smoothed(I, R, h, like):
    """The error row. A method may want it smooth: then it goes through the matrix of the stages."""
    combine_error(I, I[L.B_ERROR], h, row(I, L.W_ERROR, like), like)
    if I[L.SMOOTHED] != 0:
        n, error = I[L.N], row(I, L.W_ERROR, like)
        x = view(error, like)
        scale = cast(1.0 / reals(I[L.GAMMA])[0], like)
        for m in range(n):
            x[m] *= scale
        solve(I, R, error, like)


@inlined
def quick_errors(I, like):
    """Scaled error and its norm, in one loop; NaN or Inf where ``careful_errors`` is needed."""
    if I[L.N_BLOCKS] != 1 or I[L.B_ERROR] == 0:
        return math.nan, math.nan
    n = I[L.N]
    u, new = view(row(I, L.W_U, like), like), view(row(I, L.W_NEW, like), like)
    error = view(row(I, L.W_ERROR, like), like)
    last = view(stage(I, I[L.STAGES] - 1, like), like)
    scaled, plain = 0.0, 0.0
    for m in range(n):
        x = float(error[m])
        q = x / tolerance_scale(I, m, larger(u[m], new[m]))
        scaled += q * q
        plain += x * x + 0.0 * float(last[m])  # NaN where the derivative is not finite
    return math.sqrt(scaled / n), math.sqrt(plain / n)


@inlined
def careful_errors(I, like):
    """As ``quick_errors``, but also for several blocks, without an estimate, and huge numbers."""
    n = I[L.N]
    u, new = row(I, L.W_U, like), row(I, L.W_NEW, like)
    error, norm = 0.0, 0.0
    if I[L.B_ERROR] == 0:
        if not is_finite(n, new, like):
            error = math.nan
    else:
        norm = distance(n, row(I, L.W_ERROR, like), 0, like) / math.sqrt(n)
        error = scaled_norm(I, row(I, L.W_ERROR, like), u, new, like)
        if not norm < math.inf:
            error = math.nan
    if not is_finite(n, stage(I, I[L.STAGES] - 1, like), like):
        error = math.nan
    return error, norm


@inlined
def measure(I, R, t, h, like):
    """Scaled error, its norm, and the stiffness where the step is one to be accepted."""
    u, stiffness = row(I, L.W_U, like), math.nan
    error, norm = quick_errors(I, like)
    if not error + norm < math.inf:
        error, norm = careful_errors(I, like)
    wanted = I[L.STIFFNESS] != 0 or I[L.SWITCH] != 0
    if wanted and (error <= 1.0 or (I[L.ADAPTIVE] == 0 and error < math.inf)):
        if I[L.JVP] == 0:  # products need the entries
            jacobian_of_step(I, R, t, h, u, like)
        stiffness = radius_of_step(I, like)
        if not stiffness < math.inf:
            first, second = row(I, L.W_STIFF, like), row(I, L.W_LOW, like)
            third, spare = row(I, L.W_TEMP, like), row(I, L.W_BASE, like)
            stiffness, _ = spectral_radius(I, R, t, h, first, second, third, spare, like)
        if not stiffness < math.inf:
            error = math.nan
    R[L.LAST_ERROR], R[L.LAST_STIFFNESS] = error, stiffness
    R[L.RELATIVE_STIFFNESS] = stiffness
    return error, norm, stiffness


# -- reverse -------------------------------------------------------------------------------------


@inlined
def reverse_stiffness(I, R, t, h, bar, like):
    """Add the cotangent of the spectral radius to that of the Jacobian."""
    n = I[L.N]
    first, second = row(I, L.W_STIFF, like), row(I, L.W_LOW, like)
    third, spare = row(I, L.W_TEMP, like), row(I, L.W_BASE, like)
    radius, peak = spectral_radius(I, R, t, h, first, second, third, spare, like)
    if not radius > 0.0:
        return
    above, below = distance(n, third, 0, like), distance(n, first, 0, like)
    # radius**2 = peak * above / below
    x_bar, y_bar = bar_row(I, SPARE, like), row(I, L.W_DU, like)
    fill_zero(n, x_bar, like)
    add_scaled(n, bar * radius / (2.0 * above * above), third, x_bar, like)
    add_outer(I, 1.0, x_bar, second, like)
    fill_zero(n, y_bar, like)
    multiply_transposed(I, x_bar, y_bar, like)
    fill_zero(n, x_bar, like)
    add_scaled(n, 1.0 / peak, y_bar, x_bar, like)  # the cotangent of the second product
    add_outer(I, 1.0, x_bar, first, like)
    fill_zero(n, y_bar, like)
    multiply_transposed(I, x_bar, y_bar, like)
    add_scaled(n, -bar * radius / (2.0 * below * below), first, y_bar, like)
    # the first product was divided by its peak, and so is its cotangent
    fill_signs(n, spare, like)
    multiply(I, R, t, h, spare, third, like)
    peak = normalise(n, third, like)
    add_outer(I, 1.0 / peak, y_bar, spare, like)


@inlined
def reverse_estimates(I, R, t, h, index, like):
    """Cotangents of the step's estimates to those of the stages, states and parameters."""
    n = I[L.N]
    wanted = I[L.STIFFNESS_BARS] != 0
    of_error = I[L.B_ERROR] != 0 and (I[L.ERROR_BARS] != 0 or I[L.ERROR_NORM_BARS] != 0)
    smoothed = I[L.SMOOTHED] != 0 and of_error
    if wanted or smoothed:
        evaluate_jacobian(I, R, t, t, t + h, row(I, L.W_U, like), like)
        I[L.FRESH] = 1
    if smoothed:
        factor(I, R, h, like)
        combine_smoothed(I, R, h, like)
    elif of_error:
        combine_error(I, I[L.B_ERROR], h, row(I, L.W_ERROR, like), like)
    if of_error:
        reverse_error(I, index, like)
    error_bar = bar_row(I, ERROR, like)
    if smoothed:
        solve_transposed(I, R, error_bar, like)
        add_outer(I, h, error_bar, row(I, L.W_ERROR, like), like)
        spare = bar_row(I, SPARE, like)
        copy(n, error_bar, spare, like)
        fill_zero(n, error_bar, like)
        add_scaled(n, 1.0 / reals(I[L.GAMMA])[0], spare, error_bar, like)
    if of_error:
        through_combination(I, I[L.B_ERROR], 0, I[L.STAGES], h, error_bar, like)
    if wanted:
        bar = float(view(I[L.STIFFNESS_BARS], like)[index])
        if bar != 0.0:
            reverse_stiffness(I, R, t, h, bar, like)
