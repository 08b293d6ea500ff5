"""Steps of SDEs in machine code, what they keep, and their reverse.

A step is one function over all rows (``native/programs/rows.py``), which is given the noise.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.estimates import ERROR, TOTAL
from diffsolve.solvers.kernels.functions import StepFunctions
from diffsolve.solvers.kernels.memory import (
    call_reverse_of_rows,
    call_step,
    cast,
    inlined,
    reals,
    size_of,
    view,
)
from diffsolve.solvers.kernels.norms import (
    add_scaled,
    copy,
    fill_zero,
    larger,
    scaled_norm,
    tolerance_scale,
)
from diffsolve.solvers.kernels.rows import (
    bar_row,
    nothing_to_complete,
    nothing_to_forget,
    row,
    stage_times,
)
from diffsolve.solvers.stochastic.kernel_inside import reverse_values, value_at
from diffsolve.solvers.stochastic.kernel_noise import draw_again, draw_noise, has_room

# -- steps ---------------------------------------------------------------------------------------


@inlined
def step_on(I, R, t, h, u, noise, like):
    """The step from a state with some noise, to ``W_NEW``, ``W_ERROR`` and ``SUMS``."""
    call_step(
        I[L.FUSED],
        cast(h, like),
        stage_times(I, t, h, like),
        u,
        noise,
        noise + I[L.NOISE_SIZE] * size_of(like),
        I[L.PARAMS],
        row(I, L.W_NEW, like),
        row(I, L.W_ERROR, like),
        I[L.SUMS],
    )
    I[L.NF] += I[L.DRIFTS]
    I[L.NG] += I[L.DIFFUSIONS]


@inlined
def take_step(I, R, t, h, like):
    """Draw the noise of a step and take it; true: nothing to solve."""
    draw_noise(I, R, t, h, like)
    step_on(I, R, t, h, row(I, L.W_U, like), I[L.NOISE], like)
    return True


@inlined
def measure(I, R, t, h, like):
    """Scaled error (returned), its norm and the stiffness of the step in the work space.

    All three follow from sums of squares over the entries: of the scaled error, of the error, and
    of the two differences whose ratio is the stiffness. The sums are noted, because those of the
    paths in other threads must be added to them.
    """
    n = I[L.N]
    sums = view(I[L.SUMS], like)
    error, norm, stiffness = 0.0, 0.0, 0.0
    if float(sums[3]) != 0.0:  # also where it is NaN
        error = math.nan
    else:
        above, below = float(sums[0]), float(sums[1])
        stiffness = math.sqrt(above / below) if below > 0.0 else 0.0
        if I[L.B_ERROR] != 0:
            norm = math.sqrt(float(sums[2]) / n)
            error = quick_norm(I, row(I, L.W_ERROR, like), like)
        if not error + stiffness < math.inf:
            error = math.nan
    if I[L.STEP_SUMS] != 0:
        noted = reals(I[L.STEP_SUMS] + 32 * I[L.ACCEPTED])
        noted[0], noted[1] = error * error * n, float(sums[2])
        noted[2], noted[3] = float(sums[0]), float(sums[1])
    if keeps_errors(I):
        copy(n, row(I, L.W_ERROR, like), kept_error(I, I[L.NOISE], like), like)
    R[L.LAST_ERROR], R[L.LAST_STIFFNESS] = error, stiffness
    return error, norm, stiffness


@inlined
def keeps_errors(I):
    """Whether the errors of steps are recorded, behind their states and noise."""
    return I[L.STATE_SIZE] > I[L.N] + 2 * I[L.NOISE_SIZE]


@inlined
def kept_error(I, noise, like):
    """Address of the error of a step whose noise is there."""
    return noise + 2 * I[L.NOISE_SIZE] * size_of(like)


@inlined
def quick_norm(I, x_row, like):
    """``norms.scaled_norm`` of one block, as four sums that the processor adds up at once."""
    n, u_row, new_row = I[L.N], row(I, L.W_U, like), row(I, L.W_NEW, like)
    x, u, v = view(x_row, like), view(u_row, like), view(new_row, like)
    rtol, by_rtol = reals(I[L.RTOL]), I[L.RTOL_STRIDE]
    atol, by_atol = reals(I[L.ATOL]), I[L.ATOL_STRIDE]
    p, q, r, s = 0.0, 0.0, 0.0, 0.0
    m = 0
    while m + 4 <= n:
        a = float(x[m]) / (atol[m * by_atol] + rtol[m * by_rtol] * larger(u[m], v[m]))
        k = m + 1
        b = float(x[k]) / (atol[k * by_atol] + rtol[k * by_rtol] * larger(u[k], v[k]))
        k = m + 2
        c = float(x[k]) / (atol[k * by_atol] + rtol[k * by_rtol] * larger(u[k], v[k]))
        k = m + 3
        d = float(x[k]) / (atol[k * by_atol] + rtol[k * by_rtol] * larger(u[k], v[k]))
        p, q, r, s = p + a * a, q + b * b, r + c * c, s + d * d
        m += 4
    while m < n:
        a = float(x[m]) / (atol[m * by_atol] + rtol[m * by_rtol] * larger(u[m], v[m]))
        p += a * a
        m += 1
    total = (p + q) + (r + s)
    if total < math.inf:
        return math.sqrt(total / n)
    return scaled_norm(I, x_row, u_row, new_row, like)


# -- the state and its records -------------------------------------------------------------------


@inlined
def no_first_size(I, R, like):
    """Python guesses the size of the first step (``stochastic_step``)."""
    return math.nan


@inlined
def restart(I, R, t, like):
    """There is nothing beside ``u``."""


@inlined
def advance_state(I, R, like):
    copy(I[L.N], row(I, L.W_NEW, like), row(I, L.W_U, like), like)


@inlined
def state_size(I):
    """The noise of a step belongs to its state, since it is drawn before."""
    return I[L.N] + 2 * I[L.NOISE_SIZE]


@inlined
def keep_state(I, place, like):
    n = I[L.N]
    copy(n, row(I, L.W_U, like), place, like)
    copy(2 * I[L.NOISE_SIZE], I[L.NOISE], place + n * size_of(like), like)


@inlined
def load_state(I, place, like):
    """The reverse pass reads the state and the noise where they are: there may be many paths."""
    I[L.AT_STATE], I[L.AT_NOISE] = place, place + I[L.N] * size_of(like)


@inlined
def take_up(I, place, like):
    copy(I[L.N], place, row(I, L.W_U, like), like)


@inlined
def keep_record(I, place, like):
    """The state, the noise if it is not to be drawn again, and the error if that is wanted."""
    n = I[L.N]
    copy(n, row(I, L.W_U, like), place, like)
    copy(I[L.STATE_SIZE] - n, I[L.NOISE], place + n * size_of(like), like)


@inlined
def load_record(I, R, index, place, like):
    load_state(I, place, like)
    if I[L.STATE_SIZE] == I[L.N]:
        draw_again(I, R, index, like)
        I[L.AT_NOISE] = I[L.NOISE]


@inlined
def keep_dense(I, place, complete, like):
    """The state: the path has all else."""
    copy(I[L.N], row(I, L.W_U, like), place, like)


@inlined
def repeat_step(I, R, t, h, like):
    step_on(I, R, t, h, row(I, L.W_U, like), I[L.NOISE], like)
    return True


# -- reverse -------------------------------------------------------------------------------------


@inlined
def recall(I, R, t, h, marks, inside, like):
    """One function does all from the start of the step; true: nothing to solve."""
    return True


@inlined
def begin_bars(I, has_more, like):
    if has_more:
        fill_zero(I[L.N], bar_row(I, TOTAL, like), like)


@inlined
def new_bar(I, like):
    return I[L.STATE_BAR]


@inlined
def reverse_estimates(I, R, t, h, index, like):
    """Cotangents of a step's estimates to those of its error, its sums and its states.

    ``STEP_SUMS`` holds the sums over the paths of all threads.
    """
    n, u, noise = I[L.N], I[L.AT_STATE], I[L.AT_NOISE]
    sums, sums_bar = reals(I[L.STEP_SUMS] + 32 * index), view(I[L.SUMS_BAR], like)
    sums_bar[0] = sums_bar[1] = like
    if I[L.STIFFNESS_BARS] != 0 and sums[2] > 0.0 and sums[3] > 0.0:
        bar = 0.5 * float(view(I[L.STIFFNESS_BARS], like)[index]) * math.sqrt(sums[2] / sums[3])
        sums_bar[0] = cast(bar / sums[2], like)
        sums_bar[1] = cast(-bar / sums[3], like)
    if I[L.B_ERROR] == 0:
        return
    fill_zero(n, bar_row(I, ERROR, like), like)
    if I[L.ERROR_NORM_BARS] == 0 and I[L.ERROR_BARS] == 0:
        return
    error, new = row(I, L.W_ERROR, like), row(I, L.W_NEW, like)
    if keeps_errors(I) and index < I[L.SWEEP_FROM]:
        error = kept_error(I, noise, like)
        new = I[L.STATES] + (index + 1) * I[L.STATE_SIZE] * size_of(like)
    else:
        nf, ng = I[L.NF], I[L.NG]
        step_on(I, R, t, h, u, noise, like)
        I[L.NF], I[L.NG] = nf, ng
    if I[L.ERROR_NORM_BARS] != 0 and sums[1] > 0.0:
        bar = float(view(I[L.ERROR_NORM_BARS], like)[index]) / math.sqrt(I[L.N_ALL] * sums[1])
        add_scaled(n, bar, error, bar_row(I, ERROR, like), like)
    if I[L.ERROR_BARS] != 0 and sums[0] > 0.0:
        bar = float(view(I[L.ERROR_BARS], like)[index]) / math.sqrt(I[L.N_ALL] * sums[0])
        through_scaled_error(I, bar, u, new, error, like)


@inlined
def through_scaled_error(I, factor, u, new, error, like):
    """Cotangents of a step's scaled error; ``factor`` is that of half the sum of its squares."""
    x, x_bar = view(error, like), view(bar_row(I, ERROR, like), like)
    u, v = view(u, like), view(new, like)
    u_bar, v_bar = view(bar_row(I, TOTAL, like), like), view(I[L.STATE_BAR], like)
    rtol = reals(I[L.RTOL])
    for m in range(I[L.N]):
        scale = tolerance_scale(I, m, larger(u[m], v[m]))
        q = float(x[m]) / scale
        x_bar[m] += factor * q / scale
        by_magnitude = -factor * q * q / scale * rtol[m * I[L.RTOL_STRIDE]]
        a, b = abs(float(u[m])), abs(float(v[m]))
        share = 1.0 if a > b else 0.0 if a < b else 0.5
        if u[m] != 0:
            u_bar[m] += share * by_magnitude * math.copysign(1.0, float(u[m]))
        if v[m] != 0:
            v_bar[m] += (1.0 - share) * by_magnitude * math.copysign(1.0, float(v[m]))


@inlined
def reverse_step(I, R, t, h, like):
    """From the cotangents of the new state, its error and its sums to that of the state before."""
    noise = I[L.AT_NOISE]
    call_reverse_of_rows(
        I[L.FUSED_VJP],
        cast(h, like),
        stage_times(I, t, h, like),
        I[L.AT_STATE],
        noise,
        noise + I[L.NOISE_SIZE] * size_of(like),
        I[L.PARAMS],
        I[L.STATE_BAR],
        bar_row(I, ERROR, like),
        I[L.SUMS_BAR],
        I[L.BAR],
        I[L.P_BAR],
    )
    I[L.NF] += I[L.DRIFTS]
    I[L.NG] += I[L.DIFFUSIONS]


@inlined
def end_bars(I, has_more, like):
    if has_more:
        add_scaled(I[L.N], 1.0, bar_row(I, TOTAL, like), I[L.BAR], like)
    I[L.STATE_BAR], I[L.BAR] = I[L.BAR], I[L.STATE_BAR]


FUNCTIONS = StepFunctions(
    take_step=take_step,
    measure=measure,
    complete=nothing_to_complete,
    value_at=value_at,
    forget=nothing_to_forget,
    first_size=no_first_size,
    restart=restart,
    advance_state=advance_state,
    has_room=has_room,
    state_size=state_size,
    keep_state=keep_state,
    load_state=load_state,
    take_up=take_up,
    keep_record=keep_record,
    load_record=load_record,
    keep_dense=keep_dense,
    prepare_repeat=draw_again,
    repeat_step=repeat_step,
    recall=recall,
    begin_bars=begin_bars,
    new_bar=new_bar,
    reverse_values=reverse_values,
    reverse_estimates=reverse_estimates,
    reverse_complete=nothing_to_complete,
    reverse_step=reverse_step,
    end_bars=end_bars,
    reverse_restart=restart,
)
