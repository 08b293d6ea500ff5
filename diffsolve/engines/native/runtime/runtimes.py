"""What runs a program of each kind."""

from __future__ import annotations

from diffsolve.engines.native.programs.bound import BoundProgram, RowBound, ScalarBound
from diffsolve.engines.native.runtime.row_solve import RowRuntime
from diffsolve.engines.native.runtime.scalar_solve import ScalarRuntime
from diffsolve.engines.native.runtime.solve import Runtime

_RUNTIMES: dict[type[BoundProgram], Runtime] = {
    ScalarBound: ScalarRuntime(),
    RowBound: RowRuntime(),
}


def runtime_of(bound: BoundProgram) -> Runtime:
    """That of a program."""
    return _RUNTIMES[type(bound)]
