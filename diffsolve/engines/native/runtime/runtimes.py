"""What runs a program of each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffsolve.engines.native.programs.bound import BoundProgram, RowBound, ScalarBound
from diffsolve.engines.native.runtime import (
    reverse,
    solve,
    stochastic_reverse,
    stochastic_solve,
    threads,
)
from diffsolve.engines.native.runtime import template as templates


@dataclass(frozen=True)
class Runtime:
    """Solves and reverse passes of programs of one kind.

    Attributes
    ----------
    template
        ``(program, alg, field, settings)``: what the kernels' arrays hold in such solves.
    integrate
        ``(bound, template, context, u0, request)``: a ``Trajectory``.
    sweep
        ``(records, kept, cotangents, active)``: ``Swept``.
    """

    template: Callable[..., Any]
    integrate: Callable[..., Any]
    sweep: Callable[..., Any]


_RUNTIMES: dict[type[BoundProgram], Runtime] = {
    ScalarBound: Runtime(templates.template_for, solve.integrate, reverse.sweep),
    RowBound: Runtime(threads.template_for, stochastic_solve.integrate, stochastic_reverse.sweep),
}


def runtime_of(bound: BoundProgram) -> Runtime:
    """That of a program."""
    return _RUNTIMES[type(bound)]
