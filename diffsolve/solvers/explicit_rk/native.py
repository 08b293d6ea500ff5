"""Explicit Runge-Kutta methods on the native engine."""

from __future__ import annotations

from typing import Any

from diffsolve.solvers.explicit_rk.step import stiffness_stage
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.family import Numbers, TableauFamily


class _ExplicitFamily(TableauFamily):
    def write(self, numbers: Numbers, method: Any) -> None:
        super().write(numbers, method)
        numbers.number(L.STIFF_STAGE, stiffness_stage(method))

    def fused_step(self, program: Any, method: Any) -> int:
        return program.address("step", method)

    def fused_vjp(self, program: Any, method: Any, active: tuple[bool, ...], fused: int) -> int:
        return program.address("step_vjp", method, active)


FAMILY = _ExplicitFamily("explicit_rk", "diffsolve.solvers.explicit_rk.kernel")
