"""The functions that a family of methods gives to the loops.

Numba compiles all of them. Their first arguments are ``I`` and ``R``, the two arrays of ``layout``.
Their last one is ``like``, a zero of the type of the state, which tells Numba that type.
Between them, ``t`` and ``h`` are the start and the size of the step at hand. A ``place`` is an
address, and rows are those of the work space (``rows.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class StepFunctions(NamedTuple):
    """What a step of a family is, what its state is, and how cotangents go back through it.

    The loops get all of these as one argument, ``F``. Numba takes a named tuple apart when it
    compiles: every call is a direct one. (A plain tuple would be called through pointers.)

    The *state* is what a method carries from step to step: ``u`` and whatever else it needs. It
    lies in the work space. A *record* is what the reverse pass gets of a step: the state that the
    step began with, and more if that saves work.

    Attributes
    ----------
    take_step
        ``(I, R, t, h, like)``: from the state to ``W_NEW``, and all that the others read of a step.
        Returns whether its equations were solved.
    measure
        ``(I, R, t, h, like)``: returns the scaled error, its norm and the stiffness.
    complete
        ``(I, R, t, h, like)``: the stages that only the interpolant needs.
    value_at
        ``(I, R, t, h, at, out, like)``: the solution at a time inside of the step.
    forget
        ``(I, R)``: what was learnt in earlier steps and a repeated step could not know.
    first_size
        ``(I, R, like)``: a size for the first step. NaN: the right-hand side is not finite;
        -1: the forward solution must be shown first.
    restart
        ``(I, R, t, like)``: the state from ``W_U`` alone, for a step that begins at ``t``.
    advance_state
        ``(I, R, like)``: from the end of a step to the state for the next one.
    has_room
        ``(I)``: whether there is room for whatever a step adds beside what the loop notes.
    state_size
        ``(I)``: how many numbers ``keep_state`` writes.
    keep_state, load_state
        ``(I, place, like)``: write the state of a step that is taken again, and go back to it.
    take_up
        ``(I, place, like)``: go on from a state that ``keep_state`` or ``keep_record`` wrote.
    keep_record
        ``(I, place, like)``: write the record of the step at hand, ``STATE_SIZE`` numbers.
    load_record
        ``(I, R, index, place, like)``: go back to the step number ``index``.
    keep_dense
        ``(I, place, complete, like)``: write what dense output needs of the step at hand.
    prepare_repeat, repeat_step
        ``(I, R, index, like)`` and ``(I, R, t, h, like)``: take a step again, from the state. They
        are two functions, because the last step of a segment is only prepared.
    recall
        ``(I, R, t, h, marks, inside, like)``: make what the functions below read of the step. Its
        state was loaded; ``inside`` values within it have cotangents. Returns as ``take_step``.
    begin_bars
        ``(I, has_more, like)``: the cotangents of what the step made. ``STATE_BAR`` is that of the
        state after it; ``has_more``: others will be added.
    new_bar
        ``(I, like)``: address of the cotangent of ``W_NEW``.
    reverse_values
        ``(I, R, t, h, first, inside, like)``: cotangents of the values saved within the step.
    reverse_estimates
        ``(I, R, t, h, index, like)``: cotangents of what ``measure`` gave.
    reverse_complete, reverse_step
        ``(I, R, t, h, like)``: back through ``complete`` and ``take_step``.
    end_bars
        ``(I, has_more, like)``: let ``STATE_BAR`` be the cotangent of the state before the step.
    reverse_restart
        ``(I, R, t, like)``: back through ``restart``.
    """

    take_step: Any
    measure: Any
    complete: Any
    value_at: Any
    forget: Any
    first_size: Any
    restart: Any
    advance_state: Any
    has_room: Any
    state_size: Any
    keep_state: Any
    load_state: Any
    take_up: Any
    keep_record: Any
    load_record: Any
    keep_dense: Any
    prepare_repeat: Any
    repeat_step: Any
    recall: Any
    begin_bars: Any
    new_bar: Any
    reverse_values: Any
    reverse_estimates: Any
    reverse_complete: Any
    reverse_step: Any
    end_bars: Any
    reverse_restart: Any
