"""The reverse pass of the discrete adjoint in machine code: ``adjoints/sweep.py``, step by step."""

from __future__ import annotations

import math

from diffsolve.solvers.explicit_rk.kernel import (
    add_extra_stages,
    combine_results,
    field_at,
    interpolation_weight,
    marks_of,
    reverse_extra_stages,
    reverse_step,
    row,
    stage,
    stage_bar,
    take_step,
    vjp_at,
)
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import inlined, reals, size_of, view
from diffsolve.solvers.kernels.norms import (
    add_scaled,
    copy,
    distance,
    fill_zero,
    larger,
    scaled_norm,
    tolerance_scale,
)

_NEW, _STIFF, _ERROR, _LOW, _TOTAL, _SPARE = range(L.W_BARS)


@inlined
def bar_row(I, index, like):
    """Address of a cotangent of the step's results, behind those of the stages."""
    rows = I[L.STAGES] + I[L.EXTRA]
    return stage_bar(I, rows + index, like)


@inlined
def load_state(I, R, index, like):
    """``W_U, W_DU`` at the start of a recorded step, made again where it was not kept."""
    n, size, stride = I[L.N], size_of(like), I[L.STRIDE]
    if stride == 1:
        rows = I[L.STATE_ROWS]
        place = I[L.STATES] + index * rows * n * size
        copy(n, place, row(I, L.W_U, like), like)
        copy(n, place + n * size, row(I, L.W_DU, like), like)
        if rows > 2:
            copy((rows - 1) * n, place + n * size, stage(I, 0, like), like)
        return
    begin = index // stride * stride
    if index == I[L.ACCEPTED] - 1 or index == begin + stride - 1:
        remake_segment(I, R, begin, index, like)
    place = I[L.SEGMENT] + 2 * (index - begin) * n * size
    copy(n, place, row(I, L.W_U, like), like)
    copy(n, place + n * size, row(I, L.W_DU, like), like)


@inlined
def remake_segment(I, R, begin, last, like):
    """Repeat the steps from a state that was kept, and note where each starts."""
    n, size = I[L.N], size_of(like)
    starts, sizes = reals(I[L.STEP_T]), reals(I[L.STEP_H])
    u, du = row(I, L.W_U, like), row(I, L.W_DU, like)
    kept = I[L.STATES] + 2 * (begin // I[L.STRIDE]) * n * size
    copy(n, kept, u, like)
    copy(n, kept + n * size, du, like)
    for i in range(begin, last + 1):
        place = I[L.SEGMENT] + 2 * (i - begin) * n * size
        copy(n, u, place, like)
        copy(n, du, place + n * size, like)
        if i == last:
            break
        take_step(I, R, starts[i], sizes[i], like)
        copy(n, row(I, L.W_NEW, like), u, like)
        copy(n, stage(I, I[L.STAGES] - 1, like), du, like)
        if marks_of(I, i + 1)[L.MARK_RESTART] != 0:
            t = starts[i + 1]
            field_at(I, R, t, t, t + R[L.DIRECTION], u, du, like)


@inlined
def add_norm_slope(I, x_row, factor, bar, like):
    """``bar += factor * d|x|/dx``, nothing at zero."""
    n = I[L.N]
    size = distance(n, x_row, 0, like)
    if size > 0:
        add_scaled(n, factor / size, x_row, bar, like)


@inlined
def add_scaled_norm_slope(I, x_row, norm, factor, bar, like):
    """The same of the scaled RMS norm: by ``x``, and by the states at both ends that scale it."""
    n = I[L.N]
    if not norm > 0:
        return
    x, x_bar = view(x_row, like), view(bar, like)
    u, v = view(row(I, L.W_U, like), like), view(row(I, L.W_NEW, like), like)
    u_bar = view(bar_row(I, _TOTAL, like), like)
    v_bar = view(bar_row(I, _NEW, like), like)
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
def reverse_estimates(I, index, like):
    """Cotangents of ``error``, ``error_norm`` and ``stiffness`` to those of the step's results."""
    n = I[L.N]
    error_row, low_row = row(I, L.W_ERROR, like), row(I, L.W_LOW, like)
    u, new = row(I, L.W_U, like), row(I, L.W_NEW, like)
    error_bar, spare = bar_row(I, _ERROR, like), bar_row(I, _SPARE, like)
    if I[L.ERROR_BARS] != 0 and I[L.B_ERROR] != 0:
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
                add_scaled_norm_slope(I, low_row, low, by_low, bar_row(I, _LOW, like), like)
        if by_e != 0:
            add_scaled_norm_slope(I, error_row, e, by_e, error_bar, like)
    if I[L.ERROR_NORM_BARS] != 0 and I[L.B_ERROR] != 0:
        bar = float(view(I[L.ERROR_NORM_BARS], like)[index])
        add_norm_slope(I, error_row, bar / math.sqrt(n), error_bar, like)
    if I[L.STIFFNESS_BARS] != 0:
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
            add_scaled(n, factor, spare, bar_row(I, _NEW, like), like)
            add_scaled(n, -factor, spare, bar_row(I, _STIFF, like), like)


@inlined
def sweep_step(I, R, index, like):
    """From the cotangents of the state after a step to those of the one before it."""
    n, size = I[L.N], size_of(like)
    stages, rows = I[L.STAGES], I[L.STAGES] + I[L.EXTRA]
    t, h = reals(I[L.STEP_T])[index], reals(I[L.STEP_H])[index]
    marks = marks_of(I, index)
    load_state(I, R, index, like)
    if I[L.STATE_ROWS] > 2:
        combine_results(I, h, like)
    else:
        take_step(I, R, t, h, like)
        I[L.NF] -= stages - 1  # counted when they are differentiated

    new_bar, total = bar_row(I, _NEW, like), bar_row(I, _TOTAL, like)
    state_bar, slope_bar = I[L.STATE_BAR], I[L.STATE_BAR] + n * size
    for i in range(rows):
        fill_zero(n, stage_bar(I, i, like), like)
    for i in range(L.W_BARS):
        fill_zero(n, bar_row(I, i, like), like)
    copy(n, state_bar, new_bar, like)
    copy(n, slope_bar, stage_bar(I, stages - 1, like), like)
    if I[L.SAVED_BARS] != 0:
        if marks[L.MARK_END_SAVE] >= 0:
            bars = I[L.SAVED_BARS] + marks[L.MARK_END_SAVE] * n * size
            add_scaled(n, 1.0, bars, new_bar, like)
        if marks[L.MARK_INSIDE] > 0:
            if I[L.EXTRA] > 0:
                add_extra_stages(I, R, t, h, like)
                I[L.NF] -= I[L.EXTRA]
            times = reals(I[L.SAVES])
            for i in range(marks[L.MARK_INSIDE]):
                save = marks[L.MARK_FIRST_SAVE] + i
                bars = I[L.SAVED_BARS] + save * n * size
                theta = (times[save] - t) / h
                add_scaled(n, 1.0, bars, total, like)
                for j in range(rows):
                    weight = interpolation_weight(I, j, theta)
                    add_scaled(n, weight * h, bars, stage_bar(I, j, like), like)
    reverse_estimates(I, index, like)
    if I[L.SAVED_BARS] != 0 and marks[L.MARK_INSIDE] > 0 and I[L.EXTRA] > 0:
        reverse_extra_stages(I, t, h, total, like)
    stiff_bar, error_bar = bar_row(I, _STIFF, like), bar_row(I, _ERROR, like)
    reverse_step(I, t, h, new_bar, stiff_bar, error_bar, bar_row(I, _LOW, like), total, like)
    copy(n, total, state_bar, like)
    copy(n, stage_bar(I, 0, like), slope_bar, like)
    if marks[L.MARK_RESTART] != 0:  # the derivative there follows from the state
        u, bar = row(I, L.W_U, like), row(I, L.W_DU, like)
        vjp_at(I, t, t, t + R[L.DIRECTION], u, slope_bar, bar, like)
        add_scaled(n, 1.0, bar, state_bar, like)
        fill_zero(n, slope_bar, like)


@inlined
def sweep(I, R, like):
    """Go back through the recorded steps; return to Python after ``CHUNK`` of them."""
    for _ in range(I[L.CHUNK]):
        if I[L.SWEPT] == 0:
            return L.DONE
        I[L.SWEPT] -= 1
        sweep_step(I, R, I[L.SWEPT], like)
    return L.DONE if I[L.SWEPT] == 0 else L.GO_ON


@inlined
def replay(I, R, like):
    """Stages of the steps from ``SWEPT`` on, ``CHUNK`` of them, made again for ``DENSE``.

    The first of them starts from a state that was kept.
    """
    n, size, first = I[L.N], size_of(like), I[L.SWEPT]
    rows = I[L.STAGES] + I[L.EXTRA]
    starts, sizes = reals(I[L.STEP_T]), reals(I[L.STEP_H])
    u, du = row(I, L.W_U, like), row(I, L.W_DU, like)
    kept = I[L.STATES] + 2 * (first // I[L.STRIDE]) * n * size
    copy(n, kept, u, like)
    copy(n, kept + n * size, du, like)
    for i in range(first, first + I[L.CHUNK]):
        if i > first and marks_of(I, i)[L.MARK_RESTART] != 0:
            t = starts[i]
            field_at(I, R, t, t, t + R[L.DIRECTION], u, du, like)
        take_step(I, R, starts[i], sizes[i], like)
        add_extra_stages(I, R, starts[i], sizes[i], like)
        place = I[L.DENSE] + (i - first) * (rows + 1) * n * size
        copy(n, u, place, like)
        copy(rows * n, stage(I, 0, like), place + n * size, like)
        copy(n, row(I, L.W_NEW, like), u, like)
        copy(n, stage(I, I[L.STAGES] - 1, like), du, like)
    return L.DONE
