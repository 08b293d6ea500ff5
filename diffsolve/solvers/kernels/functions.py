"""The functions of a family's steps that the loops call."""

from __future__ import annotations

from typing import Any, NamedTuple


class StepFunctions(NamedTuple):
    """What the loops ask of a family of methods, each entry a function that Numba compiles.

    The loops get all of them as one argument, ``F``. Numba takes a named tuple apart when it
    compiles: every call is a direct one. (A plain tuple would be called through pointers.)
    """

    take_step: Any
    measure: Any
    complete: Any
    value_at: Any
    recall: Any
    reverse_estimates: Any
    reverse_step: Any
    reverse_complete: Any
