"""Methods for SDEs on the native engine."""

from __future__ import annotations

from typing import Any

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.family import Family, Numbers


class _StochasticFamily(Family):
    """A step is one function over all paths; ``method`` holds its formulas."""

    def write(self, numbers: Numbers, method: Any) -> None:
        count = len(method.nodes)
        numbers.array(L.C, method.nodes)
        for slot, value in (
            (L.STAGES, count),
            (L.DEGREE, 1),
            (L.DENSE_ROWS, 1 + count),
            (L.B_ERROR, method.has_estimate),
            (L.AREA, method.needs_area),
            (L.READING, -1),
        ):
            numbers.number(slot, value)

    def fused_step(self, program: Any, method: Any) -> int:
        return program.address("step", method)


FAMILY = _StochasticFamily("stochastic", "diffsolve.solvers.stochastic.kernel")
