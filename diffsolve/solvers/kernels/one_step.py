"""What one-step methods for ODEs share: their state, ``(u, du)``, forward and back.

The state lies in the rows ``W_U`` and ``W_DU``, one behind the other. ``du`` is the derivative at
``u``, which is also stage 0 of the step. ``ONE_STEP`` has these functions by the names that they
have in ``StepFunctions``.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.estimates import NEW, TOTAL
from diffsolve.solvers.kernels.memory import inlined, reals, size_of
from diffsolve.solvers.kernels.norms import add_scaled, copy, fill_zero, scaled_norm
from diffsolve.solvers.kernels.rows import (
    bar_row,
    field_at,
    forget,
    interpolate,
    marks_of,
    outside_path,
    row,
    stage,
    stage_bar,
    vjp_at,
    weight_at,
)

# -- the state -----------------------------------------------------------------------------------


@inlined
def first_size(I, R, like):
    """Size of the first step, as in ``solvers/initial_step.py``."""
    n, t, direction = I[L.N], R[L.T], R[L.DIRECTION]
    u, du, g = row(I, L.W_U, like), row(I, L.W_DU, like), row(I, L.W_NEW, like)
    f1 = row(I, L.W_TEMP, like)
    dtmax = abs(reals(I[L.STOPS])[I[L.N_STOPS] - 1] - t)
    dtmax = R[L.DTMAX] if R[L.DTMAX] < dtmax else dtmax
    d0, d1 = scaled_norm(I, u, u, u, like), scaled_norm(I, du, u, u, like)
    if not d1 < math.inf:
        return math.nan
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * (d0 / d1)
    h0 = dtmax if dtmax < h0 else h0
    h = direction * h0
    if outside_path(I, R, t, h):
        R[L.LAST_H] = h
        return -1.0
    copy(n, u, g, like)
    add_scaled(n, h, du, g, like)
    field_at(I, R, t + h, t, t + h, g, f1, like)
    add_scaled(n, -1.0, du, f1, like)
    d2 = scaled_norm(I, f1, u, u, like) / h0
    largest = d2 if not d2 < d1 else d1
    if not largest < math.inf:
        return h0 * 1e-3
    if largest <= 1e-15:
        h1 = h0 * 1e-3 if h0 * 1e-3 > 1e-6 else 1e-6
    else:
        h1 = (0.01 / largest) ** (1 / I[L.ORDER])
    h1 = 100 * h0 if 100 * h0 < h1 else h1
    return dtmax if dtmax < h1 else h1


@inlined
def restart(I, R, t, like):
    """The derivative at ``t``, on the side of the step that begins there."""
    field_at(I, R, t, t, t + R[L.DIRECTION], row(I, L.W_U, like), row(I, L.W_DU, like), like)


@inlined
def advance_state(I, R, like):
    """The derivative at the end is the last stage."""
    n = I[L.N]
    copy(n, row(I, L.W_NEW, like), row(I, L.W_U, like), like)
    copy(n, stage(I, I[L.STAGES] - 1, like), row(I, L.W_DU, like), like)
    I[L.FRESH] = 0


@inlined
def has_room(I):
    """Steps add nothing of their own."""
    return True


@inlined
def state_size(I):
    """That of ``u`` and ``du``."""
    return 2 * I[L.N]


@inlined
def keep_state(I, place, like):
    copy(2 * I[L.N], row(I, L.W_U, like), place, like)


@inlined
def load_state(I, place, like):
    copy(2 * I[L.N], place, row(I, L.W_U, like), like)


@inlined
def keeps_stages(I):
    """Whether the records of steps hold all of their stages, of which stage 0 is ``du``."""
    return I[L.STATE_SIZE] > 2 * I[L.N]


@inlined
def keep_record(I, place, like):
    n = I[L.N]
    copy(n, row(I, L.W_U, like), place, like)
    copy(I[L.STATE_SIZE] - n, stage(I, 0, like), place + n * size_of(like), like)


@inlined
def load_record(I, R, index, place, like):
    n = I[L.N]
    load_state(I, place, like)
    if keeps_stages(I):
        copy(I[L.STATE_SIZE] - n, place + n * size_of(like), stage(I, 0, like), like)


@inlined
def keep_dense(I, place, complete, like):
    """The state, then the stages; ``complete``: with those of the interpolant."""
    n = I[L.N]
    copy(n, row(I, L.W_U, like), place, like)
    count = I[L.STAGES] + I[L.EXTRA] if complete else I[L.STAGES]
    copy(count * n, stage(I, 0, like), place + n * size_of(like), like)


@inlined
def value_at(I, R, t, h, at, out, like):
    """The continuous extension of the step, from its stages."""
    n = I[L.N]
    base = row(I, L.W_BASE, like)  # the state right before the stages, as in a dense record
    copy(n, row(I, L.W_U, like), base, like)
    rows = I[L.STAGES] + I[L.EXTRA]
    interpolate(n, rows, I[L.DEGREE], I[L.POLY], (at - t) / h, h, 0, base, out, like)


@inlined
def prepare_repeat(I, R, index, like):
    """Let Newton's iteration know what it knew when the step was taken."""
    I[L.FRESH] = 0
    if marks_of(I, index)[L.MARK_FORGOT] != 0:
        forget(I, R)


# -- reverse -------------------------------------------------------------------------------------


@inlined
def begin_bars(I, has_more, like):
    """The cotangents of the stages and of the results, all zero but those of the new state."""
    n, rows = I[L.N], I[L.STAGES] + I[L.EXTRA]
    slope_bar = I[L.STATE_BAR] + n * size_of(like)
    fill_zero((rows + L.W_BARS) * n, stage_bar(I, 0, like), like)  # those of the results follow
    copy(n, I[L.STATE_BAR], bar_row(I, NEW, like), like)
    copy(n, slope_bar, stage_bar(I, I[L.STAGES] - 1, like), like)


@inlined
def new_bar(I, like):
    return bar_row(I, NEW, like)


@inlined
def reverse_values(I, R, t, h, first, inside, like):
    """Cotangents of values of the interpolant to those of the state and of the stages."""
    n, rows = I[L.N], I[L.STAGES] + I[L.EXTRA]
    times, total = reals(I[L.SAVES]), bar_row(I, TOTAL, like)
    for i in range(first, first + inside):
        bars = I[L.SAVED_BARS] + i * I[L.OUT_STRIDE] * size_of(like)
        theta = (times[i] - t) / h
        add_scaled(n, 1.0, bars, total, like)
        for j in range(rows):
            weight = weight_at(I[L.POLY], j, I[L.DEGREE], theta, 0)
            add_scaled(n, weight * h, bars, stage_bar(I, j, like), like)


@inlined
def end_bars(I, has_more, like):
    n = I[L.N]
    copy(n, bar_row(I, TOTAL, like), I[L.STATE_BAR], like)
    copy(n, stage_bar(I, 0, like), I[L.STATE_BAR] + n * size_of(like), like)


@inlined
def reverse_restart(I, R, t, like):
    """The derivative at the start followed from the state."""
    n = I[L.N]
    slope_bar = I[L.STATE_BAR] + n * size_of(like)
    u, bar = row(I, L.W_U, like), row(I, L.W_DU, like)
    vjp_at(I, t, t, t + R[L.DIRECTION], u, slope_bar, bar, like)
    add_scaled(n, 1.0, bar, I[L.STATE_BAR], like)
    fill_zero(n, slope_bar, like)


ONE_STEP = {
    "first_size": first_size,
    "restart": restart,
    "advance_state": advance_state,
    "has_room": has_room,
    "state_size": state_size,
    "keep_state": keep_state,
    "load_state": load_state,
    "take_up": load_state,
    "keep_record": keep_record,
    "load_record": load_record,
    "keep_dense": keep_dense,
    "value_at": value_at,
    "prepare_repeat": prepare_repeat,
    "begin_bars": begin_bars,
    "new_bar": new_bar,
    "reverse_values": reverse_values,
    "end_bars": end_bars,
    "reverse_restart": reverse_restart,
}
