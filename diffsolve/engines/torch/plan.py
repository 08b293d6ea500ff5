"""The plan of the torch engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffsolve.engines.plan import (
    AdjointEquation,
    ForwardSolve,
    Plan,
    SaveRequest,
    SolveContext,
    Trajectory,
)
from diffsolve.engines.torch.adjoint_solve import solve_adjoint
from diffsolve.engines.torch.forward import TapedSteps, integrate_with_torch, trajectory_of
from diffsolve.engines.torch.sweep import Sweep
from diffsolve.engines.torch.tape import StepTape


class TorchPlan(Plan):
    """Any right-hand side, dtype and device; see ``Plan``."""

    engine = "torch"

    def __init__(self, reason: str = ""):
        self.reason = reason

    def integrate(self, context: SolveContext, u0: Tensor, request: SaveRequest) -> Trajectory:
        tape = request.tape
        if tape is None and request.states:
            tape = StepTape(request.checkpoints)
        return trajectory_of(context, integrate_with_torch(context, u0, tape, request.dense), tape)

    def keep(self, trajectory: Trajectory) -> tuple[list[Tensor], TapedSteps]:
        return trajectory.records.tape.unload(), trajectory.records

    def pull(
        self,
        context: SolveContext,
        kept: Sequence[Tensor],
        records: TapedSteps,
        u0: Tensor,
        cotangents: Sequence[Tensor | None],
        by_state: bool,
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        tape, stats = records.tape.loaded(kept), context.stats.adjoint
        assert stats is not None
        if context.alg.is_implicit:  # steps are compared up to the tolerance only
            self.refuse_changed(context, u0.detach())
        sweep = Sweep(context, cotangents, records.final)
        u_bar, grads = sweep.run(tape)
        stats.count(sweep.field.counts())
        stats.naccept = len(tape.records)
        return u_bar, grads

    def forward(
        self, context: SolveContext, adjoint: AdjointEquation, u0: Tensor
    ) -> tuple[Trajectory, list[Tensor], Any]:
        log, tensors, restore = adjoint.forward(context, u0)
        return trajectory_of(context, log), tensors, restore

    def solve_adjoint(
        self, context: SolveContext, adjoint: AdjointEquation, forward: ForwardSolve, bars: Tensor
    ) -> Sequence[Tensor]:
        return solve_adjoint(context, adjoint, forward, bars)

    def refuse_changed(self, context: SolveContext, u0: Tensor) -> None:
        if context.du0 is not None:
            context.field.refuse_changed(context.t0, context.direction, u0, context.du0)
