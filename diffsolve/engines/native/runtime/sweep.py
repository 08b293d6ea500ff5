"""The reverse pass of the discrete adjoint in machine code: ``adjoints/sweep.py``, step by step.

``F`` holds what a family of methods does (``solvers/kernels/functions.py``).
"""

from __future__ import annotations

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.estimates import NEW, TOTAL
from diffsolve.solvers.kernels.memory import inlined, reals, size_of
from diffsolve.solvers.kernels.norms import add_scaled, copy, fill_zero
from diffsolve.solvers.kernels.rows import (
    bar_row,
    field_at,
    forget,
    marks_of,
    row,
    stage,
    stage_bar,
    vjp_at,
    weight_at,
)


@inlined
def load_state(I, R, index, F, like):
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
    begin = segment_begin(I, index)
    if index == I[L.SWEEP_LAST] or (index + 1) % stride == 0:
        remake_segment(I, R, begin, index, F, like)
    place = I[L.SEGMENT] + 2 * (index - begin) * n * size
    copy(n, place, row(I, L.W_U, like), like)
    copy(n, place + n * size, row(I, L.W_DU, like), like)


@inlined
def segment_begin(I, index):
    """The last step before, or at, this one whose state was kept or taken over."""
    begin = index // I[L.STRIDE] * I[L.STRIDE]
    return I[L.RUN_BEGIN] if begin < I[L.RUN_BEGIN] else begin


@inlined
def take_up(I, begin, like):
    """``W_U, W_DU`` from what was kept at such a step."""
    n, size = I[L.N], size_of(like)
    place = I[L.STATES] + 2 * (begin // I[L.STRIDE]) * n * size
    if begin % I[L.STRIDE] != 0:
        place = I[L.RUN_STATE]
    copy(n, place, row(I, L.W_U, like), like)
    copy(n, place + n * size, row(I, L.W_DU, like), like)


@inlined
def repeat(I, R, index, F, like):
    """A step again, as it was taken."""
    I[L.FRESH] = 0
    if marks_of(I, index)[L.MARK_FORGOT] != 0:
        forget(I, R)
    if not F.take_step(I, R, reals(I[L.STEP_T])[index], reals(I[L.STEP_H])[index], like):
        I[L.LOST] = 1


@inlined
def remake_segment(I, R, begin, last, F, like):
    """Repeat the steps from a state that was kept, and note where each starts."""
    n, size = I[L.N], size_of(like)
    starts = reals(I[L.STEP_T])
    u, du = row(I, L.W_U, like), row(I, L.W_DU, like)
    take_up(I, begin, like)
    for i in range(begin, last + 1):
        place = I[L.SEGMENT] + 2 * (i - begin) * n * size
        copy(n, u, place, like)
        copy(n, du, place + n * size, like)
        if i == last:
            break
        repeat(I, R, i, F, like)
        copy(n, row(I, L.W_NEW, like), u, like)
        copy(n, stage(I, I[L.STAGES] - 1, like), du, like)
        if marks_of(I, i + 1)[L.MARK_RESTART] != 0:
            t = starts[i + 1]
            field_at(I, R, t, t, t + R[L.DIRECTION], u, du, like)


@inlined
def sweep_step(I, R, index, F, like):
    """From the cotangents of the state after a step to those of the one before it."""
    n, size = I[L.N], size_of(like)
    stages, rows = I[L.STAGES], I[L.STAGES] + I[L.EXTRA]
    t, h = reals(I[L.STEP_T])[index], reals(I[L.STEP_H])[index]
    marks = marks_of(I, index)
    load_state(I, R, index, F, like)
    forget(I, R)
    I[L.WHOLE], before = marks[L.MARK_WHOLE], I[L.NF]
    if not F.recall(I, R, t, h, marks[L.MARK_INSIDE], like):
        I[L.LOST] = 1
    I[L.NF] = before  # evaluations are counted when they are differentiated
    I[L.WHOLE] = marks[L.MARK_WHOLE]

    new_bar, total = bar_row(I, NEW, like), bar_row(I, TOTAL, like)
    state_bar, slope_bar = I[L.STATE_BAR], I[L.STATE_BAR] + n * size
    fill_zero((rows + L.W_BARS) * n, stage_bar(I, 0, like), like)  # those of the results follow
    copy(n, state_bar, new_bar, like)
    copy(n, slope_bar, stage_bar(I, stages - 1, like), like)
    if I[L.SAVED_BARS] != 0:
        if marks[L.MARK_END_SAVE] >= 0:
            bars = I[L.SAVED_BARS] + marks[L.MARK_END_SAVE] * n * size
            add_scaled(n, 1.0, bars, new_bar, like)
        if marks[L.MARK_INSIDE] > 0:
            if I[L.EXTRA] > 0:
                F.complete(I, R, t, h, like)
                I[L.NF] -= I[L.EXTRA]
            times = reals(I[L.SAVES])
            for i in range(marks[L.MARK_INSIDE]):
                save = marks[L.MARK_FIRST_SAVE] + i
                bars = I[L.SAVED_BARS] + save * n * size
                theta = (times[save] - t) / h
                add_scaled(n, 1.0, bars, total, like)
                for j in range(rows):
                    weight = weight_at(I[L.POLY], j, I[L.DEGREE], theta, 0)
                    add_scaled(n, weight * h, bars, stage_bar(I, j, like), like)
    F.reverse_estimates(I, R, t, h, index, like)
    if I[L.SAVED_BARS] != 0 and marks[L.MARK_INSIDE] > 0 and I[L.EXTRA] > 0:
        F.reverse_complete(I, R, t, h, like)
    F.reverse_step(I, R, t, h, like)
    copy(n, total, state_bar, like)
    copy(n, stage_bar(I, 0, like), slope_bar, like)
    if marks[L.MARK_RESTART] != 0:  # the derivative there follows from the state
        u, bar = row(I, L.W_U, like), row(I, L.W_DU, like)
        vjp_at(I, t, t, t + R[L.DIRECTION], u, slope_bar, bar, like)
        add_scaled(n, 1.0, bar, state_bar, like)
        fill_zero(n, slope_bar, like)


@inlined
def sweep(I, R, F, like):
    """Go back through the recorded steps; return to Python after ``CHUNK`` of them."""
    for _ in range(I[L.CHUNK]):
        if I[L.SWEPT] == I[L.RUN_BEGIN]:
            return L.DONE
        I[L.SWEPT] -= 1
        index = I[L.SWEPT]
        sweep_step(I, R, index, F, like)
        if I[L.LOST] != 0:
            return L.NEWTON_FAILED
    return L.DONE if I[L.SWEPT] == I[L.RUN_BEGIN] else L.GO_ON


@inlined
def replay(I, R, F, like):
    """Stages of the steps from ``SWEPT`` on, ``CHUNK`` of them, made again for ``DENSE``.

    The first of them starts from a state that was kept.
    """
    n, size, first = I[L.N], size_of(like), I[L.SWEPT]
    rows = I[L.STAGES] + I[L.EXTRA]
    starts, sizes = reals(I[L.STEP_T]), reals(I[L.STEP_H])
    u, du = row(I, L.W_U, like), row(I, L.W_DU, like)
    take_up(I, first, like)
    for i in range(first, first + I[L.CHUNK]):
        if i > first and marks_of(I, i)[L.MARK_RESTART] != 0:
            t = starts[i]
            field_at(I, R, t, t, t + R[L.DIRECTION], u, du, like)
        repeat(I, R, i, F, like)
        F.complete(I, R, starts[i], sizes[i], like)
        place = I[L.DENSE] + (i - first) * I[L.DENSE_ROWS] * n * size
        copy(n, u, place, like)
        copy(rows * n, stage(I, 0, like), place + n * size, like)
        copy(n, row(I, L.W_NEW, like), u, like)
        copy(n, stage(I, I[L.STAGES] - 1, like), du, like)
    return L.DONE if I[L.LOST] == 0 else L.NEWTON_FAILED
