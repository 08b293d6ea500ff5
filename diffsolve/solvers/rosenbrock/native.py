"""Rosenbrock methods on the native engine."""

from __future__ import annotations

from typing import Any

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.family import ImplicitFamily, Numbers


class _RosenbrockFamily(ImplicitFamily):
    def write(self, numbers: Numbers, method: Any) -> None:
        super().write(numbers, method)
        numbers.array(L.COUPLING, method.coupling)
        numbers.array(L.TIME_WEIGHTS, method.d)
        numbers.number(L.AT_END, method.at_end)

    def fused_step(self, program: Any, method: Any) -> int:
        return program.address("rosenbrock_step", method)

    def fused_vjp(self, program: Any, method: Any, active: tuple[bool, ...], fused: int) -> int:
        return program.address("rosenbrock_vjp", method, active) if fused else 0


FAMILY = _RosenbrockFamily("rosenbrock", "diffsolve.solvers.rosenbrock.kernel")
