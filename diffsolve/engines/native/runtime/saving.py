"""What the loop saves and notes of its steps, and reading of dense output, in machine code."""

from __future__ import annotations

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import inlined, integers, reals, size_of, view
from diffsolve.solvers.kernels.norms import copy
from diffsolve.solvers.kernels.rows import interpolate, locate, marks_of, row, stage


@inlined
def save(I, source, like):
    """Copy a state to the next row of the results."""
    n = I[L.N]
    copy(n, source, I[L.OUT_U] + I[L.SAVED] * I[L.OUT_STRIDE] * size_of(like), like)
    I[L.SAVED] += 1


@inlined
def keep_record(I, F, like):
    """Keep the record of the step at hand, if it is one of those that are kept."""
    index = I[L.ACCEPTED]
    if I[L.STRIDE] == 0 or index % I[L.STRIDE] != 0:
        return
    length = I[L.STATE_SIZE]
    each = length * size_of(like)
    if index // I[L.STRIDE] >= I[L.STATE_ROOM]:  # full: drop every second one
        I[L.STRIDE] *= 2
        for i in range(1, (I[L.STATE_ROOM] + 1) // 2):
            copy(length, I[L.STATES] + 2 * i * each, I[L.STATES] + i * each, like)
        if index % I[L.STRIDE] != 0:
            return
    F.keep_record(I, I[L.STATES] + (index // I[L.STRIDE]) * each, like)


@inlined
def save_within(I, R, t, h, end, F, like):
    """Save what lies in the step.

    Returns the first index, how many lie inside, the index of the one at the end or -1, and whether
    the stages of the interpolant are there.
    """
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
def note_step(I, R, t, h, end, error, norm, stiffness, F, like):
    """Save what lies in an accepted step, and note what is wanted of it."""
    index = I[L.ACCEPTED]
    keep_record(I, F, like)
    first, inside, end_save, complete = save_within(I, R, t, h, end, F, like)
    if I[L.MARKS] != 0:
        marks = marks_of(I, index)
        marks[L.MARK_RESTART] = I[L.RESTARTED]
        marks[L.MARK_FORGOT] = I[L.FORGOT]
        marks[L.MARK_FUSED] = I[L.STEP_FUSED]
        marks[L.MARK_FIRST_SAVE] = first
        marks[L.MARK_INSIDE] = inside
        marks[L.MARK_END_SAVE] = end_save
    if I[L.DENSE] != 0:
        place = I[L.DENSE] + index * I[L.DENSE_ROWS] * I[L.N] * size_of(like)
        F.keep_dense(I, place, complete, like)
        integers(I[L.COMPLETE])[index] = 1 if complete else 0
    if I[L.STEP_T] != 0:
        reals(I[L.STEP_T])[index] = t
        reals(I[L.STEP_H])[index] = h
        view(I[L.ERROR], like)[index] = error
        view(I[L.ERROR_NORM], like)[index] = norm
        view(I[L.STIFFNESS], like)[index] = stiffness


@inlined
def has_room(I, F):
    """Whether there is room to note one step more."""
    if I[L.STEP_T] != 0 and I[L.ACCEPTED] >= I[L.STEP_ROOM]:
        return False
    if I[L.N_SAVES] < 0 and I[L.SAVED] >= I[L.SAVE_ROOM]:
        return False
    if not F.has_room(I):
        return False
    kept = I[L.STRIDE] != 0 and I[L.ACCEPTED] % I[L.STRIDE] == 0
    full = kept and I[L.ACCEPTED] // I[L.STRIDE] >= I[L.STATE_ROOM]
    return not full or I[L.THINNING] != 0


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
