"""The adaptive loop in machine code: ``engines/torch_engine.py``, decision by decision.

``F`` holds what a family of methods does (``solvers/kernels/functions.py``).

Needs Numba, which is imported only to build this once on a machine. All of the loop's memory is
in the two arrays of ``layout``, so that it can return to Python after any step: to let signals be
handled, to make room, or because it is done.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import inlined, integers, reals, size_of, ulp, view
from diffsolve.solvers.kernels.norms import add_scaled, copy, scaled_norm
from diffsolve.solvers.kernels.rows import (
    combine_error,
    field_at,
    forget,
    interpolate,
    locate,
    marks_of,
    row,
    stage,
)
from diffsolve.solvers.kernels.stable_steps import limit_size, limiting_stiffness, refuses

_STRETCH = 1.01  # as in the torch engine
_ROUNDING = 1 + 1e-8
_FIRST_ULPS = 16  # as in the torch engine
_ULPS = 8  # as in the torch engine
_AFTER_NEWTON = 0.5  # factor of the step size where the stages could not be solved for
_LEAST_MEMORY = math.log(1e-4)


@inlined
def save(I, source, like):
    n = I[L.N]
    copy(n, source, I[L.OUT_U] + I[L.SAVED] * I[L.OUT_STRIDE] * size_of(like), like)
    I[L.SAVED] += 1


@inlined
def outside_path(I, R, t, h):
    """Whether a step needs the forward solution where it is not at hand."""
    if I[L.PATH] == 0:
        return False
    low, high = (t, t + h) if h > 0 else (t + h, t)
    low = R[L.T_LOW] if low < R[L.T_LOW] else low
    high = R[L.T_HIGH] if high > R[L.T_HIGH] else high
    return low < R[L.WINDOW_LOW] or high > R[L.WINDOW_HIGH]


@inlined
def initial_step(I, R, like):
    """Size of the first step, as in ``solvers/initial_step.py``; -1 where the path must be made."""
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
def restart(I, R, like):
    """``W_DU`` just after the time at hand, on the side of the step to come."""
    I[L.RESTARTED] = 1
    I[L.STABLE_AGE] = I[L.STABLE_WAIT]  # the right-hand side may have jumped
    if I[L.FIELD] == 0:  # a method that carries no derivative
        return
    t = R[L.T]
    end = t + R[L.DIRECTION]
    field_at(I, R, t, t, end, row(I, L.W_U, like), row(I, L.W_DU, like), like)


@inlined
def begin(I, R, like):
    t = R[L.T]
    copy(I[L.N], I[L.START], row(I, L.W_U, like), like)
    if outside_path(I, R, t, 0.0):
        R[L.LAST_H] = 0.0
        return L.NEED_PATH
    restart(I, R, like)
    times = reals(I[L.SAVES])
    if I[L.N_SAVES] < 0 or (I[L.N_SAVES] > 0 and times[0] == t):
        save(I, row(I, L.W_U, like), like)
    if reals(I[L.STOPS])[I[L.N_STOPS] - 1] == t:
        I[L.STOP] = I[L.N_STOPS]
        return L.GO_ON
    if math.isnan(R[L.SIZE]):
        size = initial_step(I, R, like)
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
def pid(R, log_error):
    exponent = R[L.BETA1] * log_error + R[L.BETA2] * R[L.MEMORY1] + R[L.BETA3] * R[L.MEMORY2]
    return 1 + math.atan(math.exp(-exponent) - 1)


@inlined
def limited(factor, low, high):
    factor = high if high < factor else factor
    return low if factor < low else factor


@inlined
def propose(I, R, error, count):
    """Acceptance and the factor of the step size; ``count``: whether the memory may change."""
    kind, safety, smallest = I[L.CONTROLLER], R[L.SAFETY], R[L.FACTOR_MIN]
    if not error < math.inf:
        return False, smallest
    if error > 1:
        log_error = math.log(error)
        factor = math.exp(-R[L.BETA1] * log_error)
        if kind == L.PID:
            plain = math.exp(-R[L.BETA_PLAIN] * log_error)
            factor = pid(R, log_error)
            factor = plain if plain < factor else factor
        return False, limited(safety * factor, smallest, 1.0)
    limit = 1.0 if I[L.REJECTIONS] > 0 else R[L.FACTOR_MAX]
    if error == 0:
        return True, limit
    log_error = math.log(error)
    exponent = R[L.BETA1] * log_error
    if kind == L.PI:
        if I[L.HAS_MEMORY] == 0:
            exponent += 0.75 * R[L.BETA2] * log_error
        else:
            exponent -= R[L.BETA2] * R[L.MEMORY1]
    factor = pid(R, log_error) if kind == L.PID else math.exp(-exponent)
    if count and kind != L.INTEGRAL:
        I[L.HAS_MEMORY] = 1
        R[L.MEMORY2] = R[L.MEMORY1]
        R[L.MEMORY1] = log_error if error > 1e-4 else _LEAST_MEMORY
    factor = limited(safety * factor, smallest, limit)
    return True, 1.0 if 1.0 <= factor <= R[L.STEADY] else factor


@inlined
def fit(I, R):
    """Size of the next step, and whether it lands on the next stop."""
    size = R[L.DTMAX] if R[L.DTMAX] < R[L.SIZE] else R[L.SIZE]
    if I[L.STABLE] != 0:
        stable = R[L.STABLE_SIZE] if R[L.STABLE_SIZE] > R[L.DTMIN] else R[L.DTMIN]
        size = stable if stable < size else size
    stop = reals(I[L.STOPS])[I[L.STOP]]
    remaining = R[L.DIRECTION] * (stop - R[L.T])
    if remaining > 2 * size:
        return size, False
    if I[L.ADAPTIVE] == 0:
        largest = abs(R[L.ANCHOR]) if abs(R[L.ANCHOR]) > abs(stop) else abs(stop)
        rounding = _ULPS * ulp(largest)  # that of the time at hand
        rounding = 0.5 * size if 0.5 * size < rounding else rounding
        lands = remaining <= size * _ROUNDING + rounding
        return remaining if lands else size, lands
    if remaining <= size * _STRETCH and remaining <= R[L.DTMAX] * _ROUNDING:
        return remaining, True
    if remaining >= 2 * R[L.DTMIN]:
        return remaining / 2, False
    return size, False


@inlined
def keep_state(I, like):
    """Note the state that the step starts from, if it is one of those that are kept."""
    index, n, size = I[L.ACCEPTED], I[L.N], size_of(like)
    if I[L.STRIDE] == 0 or index % I[L.STRIDE] != 0:
        return
    length = I[L.STATE_SIZE]
    if index // I[L.STRIDE] >= I[L.STATE_ROOM]:  # room is made before, unless it is to be thinned
        I[L.STRIDE] *= 2
        for i in range(1, (I[L.STATE_ROOM] + 1) // 2):
            place = I[L.STATES] + i * length * size
            copy(length, I[L.STATES] + 2 * i * length * size, place, like)
        if index % I[L.STRIDE] != 0:
            return
    place = I[L.STATES] + (index // I[L.STRIDE]) * length * size
    copy(n, row(I, L.W_U, like), place, like)
    rest = stage(I, 0, like) if I[L.NOISE] == 0 else I[L.NOISE]
    copy(length - n, rest, place + n * size, like)


@inlined
def save_within(I, R, t, h, end, F, like):
    """Save what lies in the step; returns the first index, how many inside, the one at the end."""
    first, size = I[L.SAVED], size_of(like)
    complete = I[L.EXTRA] == 0
    if I[L.ALWAYS_COMPLETE] != 0 and not complete:
        F.complete(I, R, t, h, like)
        complete = True
    if I[L.N_SAVES] < 0:
        save(I, row(I, L.W_NEW, like), like)
        return first, 0, first, complete
    times, direction = reals(I[L.SAVES]), R[L.DIRECTION]
    inside, end_save = 0, -1
    while I[L.SAVED] < I[L.N_SAVES] and direction * times[I[L.SAVED]] <= direction * end:
        at = times[I[L.SAVED]]
        if at == end:
            end_save = I[L.SAVED]
            save(I, row(I, L.W_NEW, like), like)
            break
        if not complete:
            F.complete(I, R, t, h, like)
            complete = True
        F.value_at(I, R, t, h, at, I[L.OUT_U] + I[L.SAVED] * I[L.OUT_STRIDE] * size, like)
        I[L.SAVED] += 1
        inside += 1
    return first, inside, end_save, complete


@inlined
def accept(I, R, h, lands, error, norm, stiffness, F, like):
    n, index, start, size = I[L.N], I[L.ACCEPTED], R[L.T], size_of(like)
    I[L.SINCE] += 1
    if lands:
        t_new = reals(I[L.STOPS])[I[L.STOP]]
    elif I[L.ADAPTIVE] != 0:
        t_new = start + h
    else:  # counted from the last stop, so that rounding does not add up
        t_new = R[L.ANCHOR] + I[L.SINCE] * h
    keep_state(I, like)
    first, inside, end_save, complete = save_within(I, R, start, h, t_new, F, like)
    if I[L.MARKS] != 0:
        marks = marks_of(I, index)
        marks[L.MARK_RESTART] = I[L.RESTARTED]
        marks[L.MARK_FORGOT] = I[L.FORGOT]
        marks[L.MARK_WHOLE] = I[L.WHOLE]
        marks[L.MARK_FIRST_SAVE] = first
        marks[L.MARK_INSIDE] = inside
        marks[L.MARK_END_SAVE] = end_save
    if I[L.DENSE] != 0:
        rows = I[L.STAGES] + I[L.EXTRA]
        place = I[L.DENSE] + index * I[L.DENSE_ROWS] * n * size
        copy(n, row(I, L.W_U, like), place, like)
        count = rows if complete else I[L.STAGES]
        copy(count * n, stage(I, 0, like), place + n * size, like)
        integers(I[L.COMPLETE])[index] = 1 if complete else 0
    if I[L.STEP_T] != 0:
        reals(I[L.STEP_T])[index] = start
        reals(I[L.STEP_H])[index] = h
        view(I[L.ERROR], like)[index] = error
        view(I[L.ERROR_NORM], like)[index] = norm
        view(I[L.STIFFNESS], like)[index] = stiffness
    I[L.ACCEPTED] = index + 1
    R[L.T] = t_new
    copy(n, row(I, L.W_NEW, like), row(I, L.W_U, like), like)
    copy(n, stage(I, I[L.STAGES] - 1, like), row(I, L.W_DU, like), like)
    I[L.REJECTIONS], I[L.FAILURE], I[L.RESTARTED], I[L.FRESH] = 0, 0, 0, 0
    I[L.STABLE_AGE] += 1
    if lands:
        R[L.ANCHOR], I[L.SINCE] = t_new, 0
        I[L.STOP] += 1
        if I[L.STOP] < I[L.N_STOPS]:
            jump(I, R, I[L.STOP] - 1, like)
            restart(I, R, like)


@inlined
def jump(I, R, stop, like):
    """Change the reverse state at a saved time."""
    if I[L.JUMPS] == 0:
        return
    index, n, size = integers(I[L.JUMPS])[stop], I[L.PRIMAL_N], size_of(like)
    if index < 0:
        return
    u = row(I, L.W_U, like)
    add_scaled(n, 1.0, I[L.BARS] + index * n * size, u, like)
    if I[L.RESET] != 0:
        true = I[L.RESET] + index * n * size
        compare(I, R, u + n * size, true, like)
        copy(n, true, u + n * size, like)


@inlined
def compare(I, R, reached, true, like):
    """Note by how many tolerances a reconstructed state is off."""
    n = I[L.PRIMAL_N]
    x, y = view(reached, like), view(true, like)
    rtol = reals(I[L.FORWARD_RTOL])
    atol = reals(I[L.FORWARD_ATOL])
    total = 0.0
    for m in range(n):
        scale = rtol[m * I[L.FORWARD_RTOL_STRIDE]] * abs(float(y[m]))
        q = (float(x[m]) - float(y[m])) / (atol[m * I[L.FORWARD_ATOL_STRIDE]] + scale)
        total += q * q
    off = math.sqrt(total / n)
    if not off <= R[L.WORST]:
        R[L.WORST] = off


@inlined
def below_floor(I, R, t):
    """Whether the step size is too small to go on with."""
    size = R[L.SIZE]
    if size > 1e-300 and size > 1e-14 * abs(t) and size >= R[L.DTMIN]:
        return False  # far above four units of rounding
    return size < 4 * ulp(t) or (I[L.ADAPTIVE] != 0 and size < R[L.DTMIN])


@inlined
def error_within(I, R, t, h, lands, error, like):
    """The error of a step, or that of the values saved inside of it where it is larger."""
    if I[L.B_DENSE] == 0 or I[L.N_SAVES] <= I[L.SAVED]:
        return error
    end = reals(I[L.STOPS])[I[L.STOP]] if lands else t + h
    if not R[L.DIRECTION] * reals(I[L.SAVES])[I[L.SAVED]] < R[L.DIRECTION] * end:
        return error
    between = row(I, L.W_TEMP, like)
    combine_error(I, I[L.B_DENSE], h, between, like)
    found = scaled_norm(I, between, row(I, L.W_U, like), row(I, L.W_NEW, like), like)
    return found if found > error else error


@inlined
def attempt(I, R, F, like):
    """One attempted step, accepted or not."""
    adaptive, t = I[L.ADAPTIVE] != 0, R[L.T]
    if I[L.STABLE] != 0 and I[L.REJECTIONS] == 0:
        limit_size(I, R, like)
    size, lands = fit(I, R)
    h = R[L.DIRECTION] * size
    if not lands and below_floor(I, R, t):
        return reason_to_stop(I)
    if I[L.ATTEMPTS] >= I[L.MAXITERS]:
        return L.MAX_ITERS
    if outside_path(I, R, t, h):
        R[L.LAST_H] = h
        return L.NEED_PATH
    I[L.ATTEMPTS] += 1
    R[L.LAST_H] = h
    I[L.FAILURE] = 0
    begin_attempt(I, R)
    if not F.take_step(I, R, t, h, like):
        I[L.REJECTED] += 1
        I[L.REJECTIONS] += 1
        R[L.LAST_ERROR] = R[L.LAST_STIFFNESS] = math.nan
        if adaptive:
            R[L.SIZE] = _AFTER_NEWTON * size
        if adaptive and I[L.FAILURE] != L.JAC_NOT_FINITE:
            return L.GO_ON
        return reason_to_stop(I)  # a smaller step would have the same Jacobian
    error, norm, stiffness = F.measure(I, R, t, h, like)
    accepted, factor = error < math.inf, 1.0
    if adaptive:
        # one cut short by a stop has an error of no account
        judged = error_within(I, R, t, h, lands, error, like)
        accepted, factor = propose(I, R, judged, not (lands and size * _ROUNDING < R[L.SIZE]))
        if accepted and is_too_long(I, R, t + h, size, stiffness, like):
            accepted, factor = False, R[L.STABLE_SIZE] / size
    if accepted:
        accept(I, R, h, lands, error, norm, stiffness, F, like)
    else:
        I[L.REJECTED] += 1
        I[L.REJECTIONS] += 1
        I[L.FAILURE] = 0 if error < math.inf else L.NOT_FINITE
        if not adaptive:
            return L.UNSTABLE
    if not adaptive:
        R[L.SIZE] = R[L.DT]
    elif accepted and lands:
        before = R[L.DTMAX] if R[L.DTMAX] < R[L.SIZE] else R[L.SIZE]
        R[L.SIZE] = size * factor if size * factor > before else before
    else:
        R[L.SIZE] = size * factor
    if accepted and I[L.SWITCH] != 0:
        return consider_switch(I, R, size)
    return L.GO_ON


@inlined
def is_too_long(I, R, t, size, stiffness, like):
    """Whether a step was too long to be differentiated, as its end shows."""
    if I[L.STABLE] == 0 or size <= R[L.DTMIN]:
        return False
    u, du = row(I, L.W_NEW, like), stage(I, I[L.STAGES] - 1, like)
    return refuses(I, R, t, size, stiffness, u, du, like)


@inlined
def begin_attempt(I, R):
    """Forget what Newton's iteration learnt, where a repeated step could not know it.

    With checkpoints the steps after a kept state are taken again, but not those that were rejected.
    """
    if I[L.THINNING] == 0 or I[L.STRIDE] == 0:
        return
    starts = I[L.ACCEPTED] % I[L.STRIDE] == 0 or I[L.ACCEPTED] == I[L.RUN_BEGIN]
    if starts or I[L.REJECTIONS] > 0:
        forget(I, R)
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
def no_room_for_noise(I):
    """Whether a step of an SDE could need more: an interval, and one for each value inside."""
    inside = I[L.N_SAVES] - I[L.SAVED] if I[L.N_SAVES] > I[L.SAVED] else 0
    return I[L.KNOWN] + 2 > I[L.KNOWN_ROOM] or I[L.LOGGED] + inside + 2 > I[L.LOG_ROOM]


@inlined
def no_room(I):
    if I[L.STEP_T] != 0 and I[L.ACCEPTED] >= I[L.STEP_ROOM]:
        return True
    if I[L.N_SAVES] < 0 and I[L.SAVED] >= I[L.SAVE_ROOM]:
        return True
    if I[L.NOISE] != 0 and no_room_for_noise(I):
        return True
    kept = I[L.STRIDE] != 0 and I[L.ACCEPTED] % I[L.STRIDE] == 0
    full = kept and I[L.ACCEPTED] // I[L.STRIDE] >= I[L.STATE_ROOM]
    return full and I[L.THINNING] == 0


@inlined
def take_over(I, R, like):
    """Begin with the other of two methods, and note from what."""
    n = I[L.N]
    if I[L.TAKEN_OVER] == L.ANEW:  # the derivative at hand is right up to the tolerance only
        restart(I, R, like)
    I[L.TAKEN_OVER] = 0
    copy(2 * n, row(I, L.W_U, like), I[L.RUN_STATE], like)


@inlined
def advance(I, R, F, like):
    """Integrate until the end, a failure, or a reason to return to Python for a moment."""
    if I[L.BEGUN] == 0:
        status = begin(I, R, like)
        if status != L.GO_ON:
            return status
        I[L.BEGUN] = 1
    if I[L.TAKEN_OVER] != 0:
        take_over(I, R, like)
    for _ in range(I[L.CHUNK]):
        if I[L.STOP] >= I[L.N_STOPS]:
            return L.DONE
        if no_room(I):
            return L.NEED_ROOM
        status = attempt(I, R, F, like)
        if status != L.GO_ON:
            return status
    return L.DONE if I[L.STOP] >= I[L.N_STOPS] else L.GO_ON


@inlined
def read(I, R, F, like):
    """Continuous extension of a solution at ``READ``, times inside of it."""
    count, n, size = I[L.N_READ], I[L.N], size_of(like)
    steps, rows, direction = I[L.ACCEPTED], I[L.STAGES] + I[L.EXTRA], R[L.DIRECTION]
    times, starts, sizes = reals(I[L.READ]), reals(I[L.STEP_T]), reals(I[L.STEP_H])
    complete = integers(I[L.COMPLETE])
    for i in range(count):
        t = times[i]
        first = locate(starts, steps, t, direction)
        end = starts[first + 1] if first + 1 < steps else R[L.T]
        theta = (t - starts[first]) / (end - starts[first])
        dense = I[L.DENSE] + first * I[L.DENSE_ROWS] * n * size
        if complete[first] == 0:
            copy(n, dense, row(I, L.W_U, like), like)
            copy(I[L.STAGES] * n, dense + n * size, stage(I, 0, like), like)
            F.complete(I, R, starts[first], sizes[first], like)
            copy(rows * n, stage(I, 0, like), dense + n * size, like)
            complete[first] = 1
        out = I[L.READ_OUT] + i * n * size
        interpolate(
            n, rows, I[L.DEGREE], I[L.POLY], theta, sizes[first], I[L.DERIVATIVE], dense, out, like
        )
    return L.DONE
