"""What the kernels' arrays hold in all solves of an SDE with a method and settings."""

from __future__ import annotations

from typing import Any

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.programs.formulas import step_method
from diffsolve.engines.native.programs.rows import RowProgram
from diffsolve.engines.native.runtime.kernels import Kernel, kernel
from diffsolve.engines.native.runtime.method import MethodNumbers
from diffsolve.engines.native.runtime.template import Template, made_once
from diffsolve.engines.settings import Settings
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.stochastic.native import FAMILY
from diffsolve.solvers.stochastic.noise.native import NOISE


class RowTemplate(Template):
    """That of an SDE, whose step is one function over many rows.

    Attributes
    ----------
    formulas
        Of the method.
    """

    def __init__(self, program: RowProgram, alg: Algorithm, noise: str, settings: Settings):
        self.formulas = step_method(alg, noise, program.is_diagonal or program.m == 1)
        super().__init__(program, MethodNumbers(FAMILY, self.formulas, alg.order), settings)
        self.order = alg.order
        self._draw = kernel("draw", NOISE, False)
        integers = self.integers
        integers[L.DIFFUSION] = program.address("diffusion")
        integers[L.DRIFTS], integers[L.DIFFUSIONS] = program.evaluations(self.formulas)
        integers[L.DRAW] = self._draw.code.address  # type: ignore[attr-defined]
        integers[L.REMEMBERS] = settings.adaptive
        self._reverse: dict[Any, tuple[int, int, Kernel]] = {}

    def operations(self, rows: int) -> float:
        """Operations of a step of so many paths, about; a normal takes fifty."""
        return rows * (self.program.size * self.method.n + 50.0 * self.program.m)

    def check_checkpoints(self) -> None:
        # else the noise of a step does not follow from its number
        if self.settings.adaptive:
            raise Declined("checkpoints of adaptive steps of an SDE have no compiled form")

    def reverse(self, active: tuple[bool, ...], whole: bool = False) -> tuple[int, int, Kernel]:
        """Addresses of a step's reverse and of the diffusion's product, and the kernel.

        ``whole``: the reverse of all that a step gives, its estimates too.
        """
        addresses = self._reverse.get((active, whole))
        if addresses is None:
            program = self.program
            addresses = self._reverse[active, whole] = (
                program.address("step_vjp", self.formulas, active, whole),
                program.address("diffusion_vjp", active),
                kernel("sweep", FAMILY, program.is_float32),
            )
        return addresses


def template_for(
    program: RowProgram, alg: Algorithm, field: Any, settings: Settings
) -> RowTemplate:
    """The template of such solves, from those that were made before."""
    key = (
        *(type(alg), getattr(alg, "tableau", None), getattr(alg, "integral", None)),
        *(field.noise, settings.controller, id(settings.tolerance)),
        *(settings.adaptive, settings.dt, settings.dtmin, settings.dtmax),
        *(settings.maxiters, settings.h_on_tape),
    )
    return made_once(
        program.templates, key, lambda: RowTemplate(program, alg, field.noise, settings)
    )
