"""The adaptive loop in machine code: ``engines/torch/loop.py``, decision by decision.

``F`` is the ``StepFunctions`` of a family (``solvers/kernels/functions.py``). The loop knows
neither what a step is, nor what a method carries from one step to the next.

All of the loop's memory is in the two arrays of ``layout``. So it can return to Python after any
step: to let signals be handled, to make room, or because it is done.
"""

from __future__ import annotations

import math

from diffsolve.engines.native.runtime.jumps import jump
from diffsolve.engines.native.runtime.saving import has_room, note_step, save
from diffsolve.engines.native.runtime.step_size import ROUNDING, below_floor, fit, propose
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import inlined, reals, ulp
from diffsolve.solvers.kernels.norms import copy, scaled_norm
from diffsolve.solvers.kernels.rows import combine_error, outside_path, row
from diffsolve.solvers.kernels.stable_steps import is_too_long, limit_size, limiting_stiffness

_FIRST_ULPS = 16  # as in the torch engine
_AFTER_NEWTON = 0.5  # factor of the step size where the stages could not be solved for


@inlined
def restart(I, R, F, like):
    """Make the state from ``W_U`` alone, for the step that begins at the time at hand."""
    I[L.RESTARTED] = 1
    I[L.STABLE_AGE] = I[L.STABLE_WAIT]  # the right-hand side may have jumped
    F.restart(I, R, R[L.T], like)


@inlined
def begin(I, R, F, like):
    """Make the first state, save it if wanted, and choose the size of the first step."""
    t = R[L.T]
    copy(I[L.N], I[L.START], row(I, L.W_U, like), like)
    if outside_path(I, R, t, 0.0):
        R[L.LAST_H] = 0.0
        return L.NEED_PATH
    restart(I, R, F, like)
    times = reals(I[L.SAVES])
    if I[L.N_SAVES] < 0 or (I[L.N_SAVES] > 0 and times[0] == t):
        save(I, row(I, L.W_U, like), like)
    if reals(I[L.STOPS])[I[L.N_STOPS] - 1] == t:
        I[L.STOP] = I[L.N_STOPS]
        return L.GO_ON
    if math.isnan(R[L.SIZE]):
        size = F.first_size(I, R, like)
        if size < 0:
            I[L.SAVED] = 0
            return L.NEED_PATH
        R[L.SIZE] = size
    if not R[L.SIZE] < math.inf:
        return L.UNSTABLE
    if I[L.ADAPTIVE] != 0:  # t must be able to tell the first step
        least = _FIRST_ULPS * ulp(t)
        least = R[L.DTMIN] if R[L.DTMIN] > least else least
        R[L.SIZE] = least if R[L.SIZE] < least else R[L.SIZE]
    return L.GO_ON


@inlined
def accept(I, R, h, at_stop, error, norm, stiffness, F, like):
    """Note the step at hand, and make its end the start of the next one."""
    I[L.SINCE] += 1
    if at_stop:
        t_new = reals(I[L.STOPS])[I[L.STOP]]
    elif I[L.ADAPTIVE] != 0:
        t_new = R[L.T] + h
    else:  # counted from the last stop, so that rounding does not add up
        t_new = R[L.ANCHOR] + I[L.SINCE] * h
    note_step(I, R, R[L.T], h, t_new, error, norm, stiffness, F, like)
    I[L.ACCEPTED] += 1
    R[L.T] = t_new
    F.advance_state(I, R, like)
    I[L.REJECTIONS], I[L.FAILURE], I[L.RESTARTED] = 0, 0, 0
    I[L.STABLE_AGE] += 1
    if at_stop:
        R[L.ANCHOR], I[L.SINCE] = t_new, 0
        I[L.STOP] += 1
        if I[L.STOP] < I[L.N_STOPS]:
            jump(I, R, I[L.STOP] - 1, like)
            restart(I, R, F, like)


@inlined
def error_within(I, R, t, h, at_stop, error, like):
    """The error of a step, or that of the values saved inside of it where it is larger."""
    if I[L.B_DENSE] == 0 or I[L.N_SAVES] <= I[L.SAVED]:
        return error
    end = reals(I[L.STOPS])[I[L.STOP]] if at_stop else t + h
    if not R[L.DIRECTION] * reals(I[L.SAVES])[I[L.SAVED]] < R[L.DIRECTION] * end:
        return error
    between = row(I, L.W_TEMP, like)
    combine_error(I, I[L.B_DENSE], h, between, like)
    found = scaled_norm(I, between, row(I, L.W_U, like), row(I, L.W_NEW, like), like)
    return found if found > error else error


@inlined
def prepare_attempt(I, R, F):
    """Forget what was learnt in earlier steps, where a repeated step could not know it.

    With checkpoints the steps after a kept state are taken again, but not those that were rejected.
    """
    if I[L.THINNING] == 0 or I[L.STRIDE] == 0:
        return
    starts = I[L.ACCEPTED] % I[L.STRIDE] == 0 or I[L.ACCEPTED] == I[L.RUN_BEGIN]
    if starts or I[L.REJECTIONS] > 0:
        F.forget(I, R)
        I[L.FORGOT] = 1
    else:
        I[L.FORGOT] = 0


@inlined
def reason_to_stop(I):
    """What an attempt that failed makes of the solve when the step cannot be smaller."""
    if I[L.FAILURE] == L.NOT_CONVERGED or I[L.FAILURE] == L.SINGULAR:
        return L.NEWTON_FAILED
    return L.UNSTABLE if I[L.FAILURE] != 0 else L.DT_LESS_THAN_MIN


@inlined
def reject(I):
    """Count a rejected step."""
    I[L.REJECTED] += 1
    I[L.REJECTIONS] += 1


@inlined
def attempt(I, R, F, like):
    """One attempted step, accepted or not."""
    adaptive, t = I[L.ADAPTIVE] != 0, R[L.T]
    if I[L.STABLE] != 0 and I[L.REJECTIONS] == 0:
        limit_size(I, R, like)
    size, at_stop = fit(I, R)
    h = R[L.DIRECTION] * size
    if not at_stop and below_floor(I, R, t):
        return reason_to_stop(I)
    if I[L.ATTEMPTS] >= I[L.MAXITERS]:
        return L.MAX_ITERS
    if outside_path(I, R, t, h):
        R[L.LAST_H] = h
        return L.NEED_PATH
    I[L.ATTEMPTS] += 1
    R[L.LAST_H] = h
    I[L.FAILURE] = 0
    prepare_attempt(I, R, F)
    if not F.take_step(I, R, t, h, like):
        reject(I)
        R[L.LAST_ERROR] = R[L.LAST_STIFFNESS] = math.nan
        if adaptive:
            R[L.SIZE] = _AFTER_NEWTON * size
        if adaptive and I[L.FAILURE] != L.JAC_NOT_FINITE:
            return L.GO_ON
        return reason_to_stop(I)  # a smaller step would have the same Jacobian
    error, norm, stiffness = F.measure(I, R, t, h, like)
    accepted, factor = error < math.inf, 1.0
    if adaptive:
        largest = error_within(I, R, t, h, at_stop, error, like)
        is_cut_short = at_stop and size * ROUNDING < R[L.SIZE]  # its error says little
        accepted, factor = propose(I, R, largest, not is_cut_short)
        if accepted and is_too_long(I, R, t + h, size, stiffness, like):
            accepted, factor = False, R[L.STABLE_SIZE] / size
    if accepted:
        accept(I, R, h, at_stop, error, norm, stiffness, F, like)
    else:
        reject(I)
        I[L.FAILURE] = 0 if error < math.inf else L.NOT_FINITE
        if not adaptive:
            return L.UNSTABLE
    if not adaptive:
        R[L.SIZE] = R[L.DT]
    elif accepted and at_stop:
        before = R[L.DTMAX] if R[L.DTMAX] < R[L.SIZE] else R[L.SIZE]
        R[L.SIZE] = size * factor if size * factor > before else before
    else:
        R[L.SIZE] = size * factor
    if accepted and I[L.SWITCH] != 0:
        return consider_switch(I, R, size)
    return L.GO_ON


@inlined
def consider_switch(I, R, size):
    """Whether the other method is to go on, as ``solvers/switching.py`` decides it."""
    product = limiting_stiffness(I, R, size, R[L.RELATIVE_STIFFNESS]) * size
    if I[L.SWITCH] == L.STIFF:
        asks = product < R[L.STIFF_ABOVE]
    else:
        asks = not product <= R[L.STIFF_ABOVE]  # NaN counts as stiff
    I[L.SWITCH_COUNT] = I[L.SWITCH_COUNT] + 1 if asks else 0
    return L.SWITCHED if I[L.SWITCH_COUNT] >= I[L.SWITCH_AFTER] else L.GO_ON


@inlined
def take_over(I, R, F, like):
    """Begin with the other of two methods, and keep the state that it begins with."""
    if I[L.HANDED_OVER] == L.WITHOUT_DERIVATIVE:  # that at hand is right up to the tolerance only
        restart(I, R, F, like)
    I[L.HANDED_OVER] = 0
    F.keep_state(I, I[L.RUN_STATE], like)


@inlined
def advance(I, R, F, like):
    """Integrate until the end, a failure, or a reason to return to Python for a moment."""
    if I[L.BEGUN] == 0:
        status = begin(I, R, F, like)
        if status != L.GO_ON:
            return status
        I[L.BEGUN] = 1
    if I[L.HANDED_OVER] != 0:
        take_over(I, R, F, like)
    for _ in range(I[L.CHUNK]):
        if I[L.STOP] >= I[L.N_STOPS]:
            return L.DONE
        if not has_room(I, F):
            return L.NEED_ROOM
        status = attempt(I, R, F, like)
        if status != L.GO_ON:
            return status
    return L.DONE if I[L.STOP] >= I[L.N_STOPS] else L.GO_ON
