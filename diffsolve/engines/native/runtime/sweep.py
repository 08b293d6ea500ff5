"""The reverse pass of the discrete adjoint in machine code, as ``engines/torch/sweep.py`` has it.

``F`` is the ``StepFunctions`` of a family. What is written here is the same for all of them: which
steps are taken again from a state that was kept, and in which order cotangents go back.
"""

from __future__ import annotations

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import inlined, reals, size_of
from diffsolve.solvers.kernels.norms import add_scaled
from diffsolve.solvers.kernels.rows import marks_of


@inlined
def load_step(I, R, index, F, like):
    """Go back to a recorded step: to its record, or to its state made again."""
    size, stride = size_of(like), I[L.STRIDE]
    if stride == 1:
        F.load_record(I, R, index, I[L.STATES] + index * I[L.STATE_SIZE] * size, like)
        return
    begin = segment_begin(I, index)
    if index == I[L.SWEEP_FROM] or (index + 1) % stride == 0:
        remake_segment(I, R, begin, index, F, like)
    F.load_state(I, I[L.SEGMENT] + (index - begin) * F.state_size(I) * size, like)


@inlined
def segment_begin(I, index):
    """The last step up to this one whose state was kept, by the loop or when its method began."""
    begin = index // I[L.STRIDE] * I[L.STRIDE]
    return I[L.RUN_BEGIN] if begin < I[L.RUN_BEGIN] else begin


@inlined
def take_up(I, begin, F, like):
    """Go on from the state of such a step."""
    place = I[L.STATES] + (begin // I[L.STRIDE]) * I[L.STATE_SIZE] * size_of(like)
    if begin % I[L.STRIDE] != 0:
        place = I[L.RUN_STATE]
    F.take_up(I, place, like)


@inlined
def repeat_step(I, R, index, F, like):
    if not F.repeat_step(I, R, reals(I[L.STEP_T])[index], reals(I[L.STEP_H])[index], like):
        I[L.NOT_REPEATED] = 1


@inlined
def restart_if_marked(I, R, index, F, like):
    """Make the state anew where the solve did so."""
    if marks_of(I, index)[L.MARK_RESTART] != 0:
        F.restart(I, R, reals(I[L.STEP_T])[index], like)


@inlined
def remake_segment(I, R, begin, last, F, like):
    """Take steps again from a state that was kept, and keep the state of each, up to ``last``."""
    each = F.state_size(I) * size_of(like)
    take_up(I, begin, F, like)
    for i in range(begin, last + 1):
        F.prepare_repeat(I, R, i, like)
        F.keep_state(I, I[L.SEGMENT] + (i - begin) * each, like)
        if i == last:
            break
        repeat_step(I, R, i, F, like)
        F.advance_state(I, R, like)
        restart_if_marked(I, R, i + 1, F, like)


@inlined
def sweep_step(I, R, index, F, like):
    """From the cotangents of the state after a step to those of the one before it."""
    n, size = I[L.N], size_of(like)
    t, h = reals(I[L.STEP_T])[index], reals(I[L.STEP_H])[index]
    marks, inside, end_save = marks_of(I, index), 0, -1
    if I[L.SAVED_BARS] != 0:
        inside, end_save = marks[L.MARK_INSIDE], marks[L.MARK_END_SAVE]
    is_estimated = I[L.ERROR_BARS] != 0 or I[L.ERROR_NORM_BARS] != 0 or I[L.STIFFNESS_BARS] != 0
    has_more = inside > 0 or is_estimated
    load_step(I, R, index, F, like)
    before = I[L.NF]
    if not F.recall(I, R, t, h, marks, inside, like):
        I[L.NOT_REPEATED] = 1
    I[L.NF] = before  # evaluations are counted when they are differentiated
    F.begin_bars(I, has_more, like)
    if end_save >= 0:
        bars = I[L.SAVED_BARS] + end_save * I[L.OUT_STRIDE] * size
        add_scaled(n, 1.0, bars, F.new_bar(I, like), like)
    if inside > 0:
        if I[L.EXTRA] > 0:
            F.complete(I, R, t, h, like)
            I[L.NF] -= I[L.EXTRA]
        F.reverse_values(I, R, t, h, marks[L.MARK_FIRST_SAVE], inside, like)
    if is_estimated:
        F.reverse_estimates(I, R, t, h, index, like)
    if inside > 0 and I[L.EXTRA] > 0:
        F.reverse_complete(I, R, t, h, like)
    F.reverse_step(I, R, t, h, like)
    F.end_bars(I, has_more, like)
    if marks[L.MARK_RESTART] != 0:
        F.reverse_restart(I, R, t, like)


@inlined
def sweep(I, R, F, like):
    """Go back through the recorded steps; return to Python after ``CHUNK`` of them."""
    for _ in range(I[L.CHUNK]):
        if I[L.STEPS_LEFT] == I[L.RUN_BEGIN]:
            return L.DONE
        I[L.STEPS_LEFT] -= 1
        sweep_step(I, R, I[L.STEPS_LEFT], F, like)
        if I[L.NOT_REPEATED] != 0:
            return L.NEWTON_FAILED
    return L.DONE if I[L.STEPS_LEFT] == I[L.RUN_BEGIN] else L.GO_ON


@inlined
def replay(I, R, F, like):
    """Dense records of ``CHUNK`` steps from ``REPLAY_FROM`` on, whose state was kept."""
    first = I[L.REPLAY_FROM]
    starts, sizes = reals(I[L.STEP_T]), reals(I[L.STEP_H])
    take_up(I, first, F, like)
    for i in range(first, first + I[L.CHUNK]):
        if i > first:
            restart_if_marked(I, R, i, F, like)
        F.prepare_repeat(I, R, i, like)
        repeat_step(I, R, i, F, like)
        F.complete(I, R, starts[i], sizes[i], like)
        place = I[L.DENSE] + (i - first) * I[L.DENSE_ROWS] * I[L.N] * size_of(like)
        F.keep_dense(I, place, True, like)
        F.advance_state(I, R, like)
    return L.DONE if I[L.NOT_REPEATED] == 0 else L.NEWTON_FAILED
