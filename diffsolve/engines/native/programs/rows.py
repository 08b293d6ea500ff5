"""An SDE as machine code: drift, diffusion, steps and their reverse, over many rows."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.codegen.llvm import Code, Output, lanes_of
from diffsolve.engines.native.codegen.row_functions import TooWide, compile_rows
from diffsolve.engines.native.codegen.rows import Each, Routine
from diffsolve.engines.native.graph.expression import Node, Pool, needed
from diffsolve.engines.native.programs.base import Program
from diffsolve.engines.native.programs.row_routines import RowRoutines
from diffsolve.engines.native.programs.row_steps import (
    RowStep,
    StepMethod,
    reverse_routine,
    step_routine,
)

#: Bytes of the stack that vectors of wide rows may take; beyond it fewer rows go together.
_STACK = 800_000
_LOCALS = 40  # arrays of vectors in a step, at most
Nodes = list[Node]


def _release(pool: Pool, steps: dict[Any, RowStep]) -> None:
    pool.release()
    for step in steps.values():
        step.pool.release()


class RowProgram(Program):
    """The functions of one SDE. A state is many rows, which are treated alike.

    ``address`` knows, for parameters in the blocks ``active`` that are differentiated:

    =====================================  =========================================================
    ``"drift"``                            ``f(t, u, p, out)``
    ``"diffusion"``                        ``g(t, u, p, out)``; rows of ``width`` numbers
    ``"diffusion_vjp", active``            ``g_vjp(t, u, p, w, u_bar, p_bar)``; ``p_bar`` in lanes
    ``"step", method``                     see ``row_steps.step_routine``
    ``"step_vjp", method, active, whole``  see ``row_steps.reverse_routine``
    =====================================  =========================================================

    Parameters
    ----------
    pool, drift, diffusion, m, is_diagonal
        As those of ``RowRoutines``.
    blocks, is_float32
        As those of ``Program``.
    has_many_rows
        Whether there may be more rows than one.

    Attributes
    ----------
    d, width, m, is_diagonal
        As those of ``RowRoutines``.
    lanes
        Rows that are computed at a time.
    """

    def __init__(
        self,
        pool: Pool,
        drift: Nodes,
        diffusion: Nodes,
        m: int,
        is_diagonal: bool,
        blocks: Sequence[tuple[int, int]],
        is_float32: bool,
        has_many_rows: bool,
    ):
        super().__init__(pool, [*drift, *diffusion], blocks, is_float32)
        self.routines = routines = RowRoutines(
            pool, drift, diffusion, m, is_diagonal, self.active_entries
        )
        self.m, self.is_diagonal, self.d, self.width = m, is_diagonal, routines.d, routines.width
        self.lanes = lanes_of(is_float32) if has_many_rows else 1
        while self.lanes > 1 and 8 * _LOCALS * self.lanes * max(self.d, self.width) > _STACK:
            self.lanes //= 2
        self._steps: dict[Any, RowStep] = {}
        weakref.finalize(self, _release, pool, self._steps).atexit = False

    def operations(self, source: Routine) -> int:
        return sum(map(_operations, source.routines()))

    def translate(self, source: Routine) -> Code:
        try:
            return compile_rows(source, self.lanes, self.is_float32)
        except TooWide:
            raise Declined(f"a row of {self.d:,} entries is too long") from None

    def evaluations(self, method: StepMethod) -> tuple[int, int]:
        """Evaluations of drift and diffusion in a step."""
        step = self._step_of(method)
        kinds = [e.kind for e in step.evaluations]
        return kinds.count("drift"), kinds.count("diffusion") + step.spared

    def _step_of(self, method: StepMethod) -> RowStep:
        """The expressions of a step."""
        step = self._steps.get(method)
        if step is None:
            step = RowStep(self.routines, method.needs_area)
            method.write(step)
            self._steps[method] = step
        return step

    def _drift(self) -> Routine:
        return self.routines.evaluation("drift")

    def _diffusion(self) -> Routine:
        return self.routines.evaluation("diffusion")

    def _diffusion_vjp(self, active: tuple[bool, ...]) -> Routine:
        return self.routines.product("diffusion", active)

    def _step(self, method: StepMethod) -> Routine:
        return step_routine(self.routines, self._step_of(method))

    def _step_vjp(self, method: StepMethod, active: tuple[bool, ...], whole: bool) -> Routine:
        return reverse_routine(self.routines, self._step_of(method), active, whole)

    makers = {  # noqa: RUF012
        "drift": _drift,
        "diffusion": _diffusion,
        "diffusion_vjp": _diffusion_vjp,
        "step": _step,
        "step_vjp": _step_vjp,
    }


def _operations(routine: Routine) -> int:
    outputs = [x for x in routine.statements if isinstance(x, Output)]
    for x in routine.statements:
        outputs += x.outputs if isinstance(x, Each) else []
    return len(needed([x.node for x in outputs]))
