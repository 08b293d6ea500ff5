"""One step of an explicit Runge-Kutta method in machine code, and its reverse.

The same formulas as in ``step.py``, over rows of numbers in the work space that ``layout``
describes. ``take_step`` goes from ``W_U, W_DU`` to the stages, ``W_NEW``, ``W_STIFF`` and the error
rows; ``reverse_step`` pulls cotangents back through it by products with the Jacobian of ``f``.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.estimates import ERROR, LOW, NEW, SPARE, STIFF, TOTAL, reverse_error
from diffsolve.solvers.kernels.functions import StepFunctions
from diffsolve.solvers.kernels.memory import call_step, call_step_vjp, cast, inlined, reals, view
from diffsolve.solvers.kernels.norms import (
    add_scaled,
    copy,
    distance,
    larger,
    scaled_norm,
    tolerance_scale,
)
from diffsolve.solvers.kernels.one_step import ONE_STEP, keeps_stages
from diffsolve.solvers.kernels.rows import (
    bar_row,
    combine,
    combine_error,
    field_at,
    nothing_to_forget,
    row,
    stage,
    stage_bar,
    stage_times,
    through_combination,
    vjp_at,
)


@inlined
def take_step(I, R, t, h, like):
    """Stages, new state and error rows of a step from ``W_U, W_DU``; true: nothing to solve."""
    n, stages = I[L.N], I[L.STAGES]
    new, stiff = row(I, L.W_NEW, like), row(I, L.W_STIFF, like)
    error, low = row(I, L.W_ERROR, like), row(I, L.W_LOW, like)
    copy(n, row(I, L.W_DU, like), stage(I, 0, like), like)
    if I[L.FUSED] != 0:
        times = stage_times(I, t, h, like)
        u, k = row(I, L.W_U, like), stage(I, 0, like)
        call_step(I[L.FUSED], cast(h, like), times, u, k, I[L.PARAMS], new, stiff, error, low)
        I[L.NF] += stages - 1
        return True
    nodes = reals(I[L.C])
    if I[L.STIFF_STAGE] == 0:
        copy(n, row(I, L.W_U, like), stiff, like)
    for i in range(1, stages):
        g = stiff if i == I[L.STIFF_STAGE] else new
        combine(I, I[L.A], i * stages, i, h, g, like)
        field_at(I, R, t + nodes[i] * h, t, t + h, g, stage(I, i, like), like)
    if I[L.B_ERROR] != 0:
        combine_error(I, I[L.B_ERROR], h, error, like)
    if I[L.B_LOW] != 0:
        combine_error(I, I[L.B_LOW], h, low, like)
    return True


@inlined
def recall(I, R, t, h, marks, inside, like):
    """Make the stages of a step and its results for the reverse pass, where it reads them."""
    estimated = I[L.ERROR_BARS] != 0 or I[L.ERROR_NORM_BARS] != 0 or I[L.STIFFNESS_BARS] != 0
    if keeps_stages(I):
        if I[L.FUSED_VJP] == 0 or estimated:
            combine_results(I, h, like)
        return True
    completed = inside > 0 and I[L.EXTRA] > 0
    if I[L.FUSED_VJP] == 0 or estimated or completed:
        return take_step(I, R, t, h, like)
    copy(I[L.N], row(I, L.W_DU, like), stage(I, 0, like), like)
    return True  # the fused reverse makes the rest itself


@inlined
def combine_results(I, h, like):
    """What a step gives, from stages that are known."""
    stages, same = I[L.STAGES], I[L.STIFF_STAGE]
    combine(I, I[L.A], same * stages, same, h, row(I, L.W_STIFF, like), like)
    combine(I, I[L.A], (stages - 1) * stages, stages - 1, h, row(I, L.W_NEW, like), like)
    if I[L.B_ERROR] != 0:
        combine_error(I, I[L.B_ERROR], h, row(I, L.W_ERROR, like), like)
    if I[L.B_LOW] != 0:
        combine_error(I, I[L.B_LOW], h, row(I, L.W_LOW, like), like)


@inlined
def add_extra_stages(I, R, t, h, like):
    """The stages that only the interpolant needs, behind the others."""
    stages, rows = I[L.STAGES], I[L.STAGES] + I[L.EXTRA]
    nodes = reals(I[L.C_EXTRA])
    g = row(I, L.W_TEMP, like)
    for i in range(I[L.EXTRA]):
        combine(I, I[L.A_EXTRA], i * rows, stages + i, h, g, like)
        field_at(I, R, t + nodes[i] * h, t, t + h, g, stage(I, stages + i, like), like)


@inlined
def measure(I, R, t, h, like):
    """Scaled error (returned), its norm and the stiffness of the step in the work space."""
    error, norm, stiffness = quick_measure(I, like)
    if not error + norm + stiffness < math.inf:
        error, norm, stiffness = careful_measure(I, like)
    R[L.LAST_ERROR], R[L.LAST_STIFFNESS] = error, stiffness
    if I[L.SWITCH] != 0:
        R[L.RELATIVE_STIFFNESS] = relative_stiffness(I, like)
    return error, norm, stiffness


@inlined
def relative_stiffness(I, like):
    """The stiffness with both of its norms in units of the tolerance."""
    u, new = view(row(I, L.W_U, like), like), view(row(I, L.W_NEW, like), like)
    last = view(stage(I, I[L.STAGES] - 1, like), like)
    same, g = view(stage(I, I[L.STIFF_STAGE], like), like), view(row(I, L.W_STIFF, like), like)
    above, below = 0.0, 0.0
    for m in range(I[L.N]):
        scale = tolerance_scale(I, m, larger(u[m], new[m]))
        dk, dg = (float(last[m]) - float(same[m])) / scale, (float(new[m]) - float(g[m])) / scale
        above += dk * dk
        below += dg * dg
    return math.sqrt(above / below) if below > 0 else 0.0


@inlined
def quick_measure(I, like):
    """The three in one loop; NaN or Inf where ``careful_measure`` is needed."""
    n = I[L.N]
    if I[L.N_BLOCKS] != 1 or I[L.B_ERROR] == 0:
        return math.nan, math.nan, math.nan
    u, new = view(row(I, L.W_U, like), like), view(row(I, L.W_NEW, like), like)
    last, same = (
        view(stage(I, I[L.STAGES] - 1, like), like),
        view(stage(I, I[L.STIFF_STAGE], like), like),
    )
    g = view(row(I, L.W_STIFF, like), like)
    e, low = view(row(I, L.W_ERROR, like), like), view(row(I, L.W_LOW, like), like)
    rtol, rtol_stride = reals(I[L.RTOL]), I[L.RTOL_STRIDE]
    atol, atol_stride = reals(I[L.ATOL]), I[L.ATOL_STRIDE]
    damped = I[L.B_LOW] != 0
    scaled, plain, above, below, other = 0.0, 0.0, 0.0, 0.0, 0.0
    for m in range(n):
        scale = atol[m * atol_stride] + rtol[m * rtol_stride] * larger(u[m], new[m])
        x = float(e[m])
        q = x / scale
        scaled += q * q
        plain += x * x
        dk = float(last[m]) - float(same[m])
        dg = float(new[m]) - float(g[m])
        above += dk * dk
        below += dg * dg
        if damped:
            q = float(low[m]) / scale
            other += q * q
    if not scaled + plain + above + below + other < math.inf:
        return math.nan, math.nan, math.nan
    error = math.sqrt(scaled / n)
    if damped and error > 0:
        error = error * error / math.hypot(error, 0.1 * math.sqrt(other / n))
    stiffness = math.sqrt(above / below) if below > 0 else 0.0
    return error, math.sqrt(plain / n), stiffness


@inlined
def careful_measure(I, like):
    """As ``quick_measure``, but also for several blocks, without an estimate, and huge numbers."""
    n = I[L.N]
    u, new = row(I, L.W_U, like), row(I, L.W_NEW, like)
    last, stiff = stage(I, I[L.STAGES] - 1, like), stage(I, I[L.STIFF_STAGE], like)
    numerator = distance(n, last, stiff, like)
    denominator = distance(n, new, row(I, L.W_STIFF, like), like)
    error, norm = 0.0, 0.0
    if I[L.B_ERROR] == 0:
        if not distance(n, new, 0, like) < math.inf:
            error = math.nan
    else:
        norm = distance(n, row(I, L.W_ERROR, like), 0, like) / math.sqrt(n)
        error = scaled_norm(I, row(I, L.W_ERROR, like), u, new, like)
        if I[L.B_LOW] != 0:
            low = scaled_norm(I, row(I, L.W_LOW, like), u, new, like)
            if error > 0:
                error = error * error / math.hypot(error, 0.1 * low)
    stiffness = numerator / denominator if denominator > 0 else 0.0
    if not numerator + denominator < math.inf:
        error, stiffness = math.nan, math.nan
    return error, norm, stiffness


# -- reverse -------------------------------------------------------------------------------------


@inlined
def reverse_extra_stages(I, R, t, h, like):
    """Pull the cotangents of the extra stages back to those of the others."""
    total = bar_row(I, TOTAL, like)
    stages, rows, n = I[L.STAGES], I[L.STAGES] + I[L.EXTRA], I[L.N]
    nodes = reals(I[L.C_EXTRA])
    g, bar = row(I, L.W_TEMP, like), row(I, L.W_DU, like)
    for i in range(I[L.EXTRA] - 1, -1, -1):
        combine(I, I[L.A_EXTRA], i * rows, stages + i, h, g, like)
        w = stage_bar(I, stages + i, like)
        vjp_at(I, t + nodes[i] * h, t, t + h, g, w, bar, like)
        add_scaled(n, 1.0, bar, total, like)
        through_combination(I, I[L.A_EXTRA], i * rows, stages + i, h, bar, like)


@inlined
def reverse_estimates(I, R, t, h, index, like):
    """Cotangents of the step's estimates to those of its stages, states and error rows."""
    n = I[L.N]
    new, spare = row(I, L.W_NEW, like), bar_row(I, SPARE, like)
    reverse_error(I, index, like)
    if I[L.STIFFNESS_BARS] == 0:
        return
    bar = float(view(I[L.STIFFNESS_BARS], like)[index])
    last, same = I[L.STAGES] - 1, I[L.STIFF_STAGE]
    below = distance(n, new, row(I, L.W_STIFF, like), like)
    if below > 0 and bar != 0:
        above = distance(n, stage(I, last, like), stage(I, same, like), like)
        copy(n, stage(I, last, like), spare, like)
        add_scaled(n, -1.0, stage(I, same, like), spare, like)
        if above > 0:
            factor = bar / (below * above)
            add_scaled(n, factor, spare, stage_bar(I, last, like), like)
            add_scaled(n, -factor, spare, stage_bar(I, same, like), like)
        copy(n, new, spare, like)
        add_scaled(n, -1.0, row(I, L.W_STIFF, like), spare, like)
        factor = -bar * above / (below * below * below)
        add_scaled(n, factor, spare, bar_row(I, NEW, like), like)
        add_scaled(n, -factor, spare, bar_row(I, STIFF, like), like)


@inlined
def reverse_step(I, R, t, h, like):
    """Pull the cotangents of a step's results back to its start.

    That of the state is added to the row ``TOTAL``, that of the derivative there is left in its
    row. ``W_DU`` is used as work space.
    """
    stages, n = I[L.STAGES], I[L.N]
    new_bar, stiff_bar = bar_row(I, NEW, like), bar_row(I, STIFF, like)
    error_bar, low_bar = bar_row(I, ERROR, like), bar_row(I, LOW, like)
    total = bar_row(I, TOTAL, like)
    if I[L.FUSED_VJP] != 0:
        times = stage_times(I, t, h, like)
        call_step_vjp(
            I[L.FUSED_VJP],
            cast(h, like),
            times,
            row(I, L.W_U, like),
            stage(I, 0, like),
            I[L.PARAMS],
            stage_bar(I, 0, like),
            new_bar,
            stiff_bar,
            error_bar,
            low_bar,
            total,
            I[L.P_BAR],
        )
        I[L.NF] += stages - 1
        return
    if I[L.B_ERROR] != 0:
        through_combination(I, I[L.B_ERROR], 0, stages, h, error_bar, like)
    if I[L.B_LOW] != 0:
        through_combination(I, I[L.B_LOW], 0, stages, h, low_bar, like)
    nodes = reals(I[L.C])
    g, bar = row(I, L.W_TEMP, like), row(I, L.W_DU, like)
    if I[L.STIFF_STAGE] == 0:
        add_scaled(n, 1.0, stiff_bar, total, like)
    for i in range(stages - 1, 0, -1):
        if i == stages - 1:
            copy(n, row(I, L.W_NEW, like), g, like)
        elif i == I[L.STIFF_STAGE]:
            copy(n, row(I, L.W_STIFF, like), g, like)
        else:
            combine(I, I[L.A], i * stages, i, h, g, like)
        vjp_at(I, t + nodes[i] * h, t, t + h, g, stage_bar(I, i, like), bar, like)
        if i == stages - 1:
            add_scaled(n, 1.0, new_bar, bar, like)
        if i == I[L.STIFF_STAGE]:
            add_scaled(n, 1.0, stiff_bar, bar, like)
        add_scaled(n, 1.0, bar, total, like)
        through_combination(I, I[L.A], i * stages, i, h, bar, like)


FUNCTIONS = StepFunctions(
    **ONE_STEP,
    take_step=take_step,
    measure=measure,
    complete=add_extra_stages,
    forget=nothing_to_forget,
    repeat_step=take_step,
    recall=recall,
    reverse_estimates=reverse_estimates,
    reverse_complete=reverse_extra_stages,
    reverse_step=reverse_step,
)
