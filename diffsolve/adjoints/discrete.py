"""The discrete adjoint: the gradient of what the solver computed, to rounding."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffsolve.adjoints.sensealg import Handover, Outputs, Sensealg, forbid_double_backward
from diffsolve.engines.declined import Declined
from diffsolve.engines.native.plan import NativePlan
from diffsolve.engines.plan import NoSecondDerivative, SaveRequest, SolveContext
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch.forward import trajectory_of
from diffsolve.engines.torch.loop import integrate
from diffsolve.engines.torch.plan import TorchPlan
from diffsolve.engines.torch.step_log import Saving
from diffsolve.engines.torch.tape import check_checkpoints
from diffsolve.problems.autocast import without_autocast
from diffsolve.solution import Stats
from diffsolve.solvers.algorithm import Algorithm


@dataclass(frozen=True)
class DiscreteAdjoint(Sensealg):
    """Differentiate the solver's steps.

    The gradient is exact for the computed solution, whatever the tolerance, and includes
    ``sol.steps.error``, ``error_norm`` and ``stiffness``. By default each accepted step's state
    is kept (of a small one on the native engine also the stages), and the reverse pass runs the
    steps again under autograd: one at a time, or for small states in batches. Rejected steps and
    the controller are not differentiated.

    Parameters
    ----------
    tape
        Plain autograd through the loop: memory for every operation, but double backward and
        ``torch.func`` transforms work.
    checkpoints
        Number of states to keep; the others are computed again. None: all.
    through_step_size
        Differentiate the step sizes too (the controller and the initial step); implies ``tape``.

    Raises
    ------
    ValueError
        If ``checkpoints`` is not a positive integer, or is combined with ``tape``.

    References
    ----------
    Discretise-then-optimise: Sapienza et al., Differentiable Programming for Differential
    Equations: A Review (2024), section 3; checkpoints: Griewank, Walther, ACM TOMS 26 (2000) 19.
    """

    tape: bool = False
    checkpoints: int | None = None
    through_step_size: bool = False

    def __post_init__(self) -> None:
        if self.through_step_size:
            object.__setattr__(self, "tape", True)
        check_checkpoints(self.checkpoints)
        if self.checkpoints is not None and self.tape:
            raise ValueError("tape=True keeps everything: drop checkpoints, or tape")

    @property
    def handles_time(self) -> bool:  # type: ignore[override]
        return self.through_step_size

    handles_steps = True
    reads_params = False  # kept with the states

    @property
    def handles_noise(self) -> bool:  # type: ignore[override]
        return not self.through_step_size  # a Brownian path has no derivative by time

    def prepared(self, settings: Settings) -> Settings:
        settings = settings.differentiated
        return replace(settings, h_on_tape=True) if self.through_step_size else settings

    def refuse_native(self) -> None:
        if self.through_step_size:
            raise Declined("through_step_size=True differentiates the step sizes on the tape")
        if self.tape:
            raise Declined("DiscreteAdjoint(tape=True) records the operations of torch")

    def compile(self, plan: NativePlan, alg: Algorithm) -> None:
        self.refuse_native()
        plan.compile_sweep(self.checkpoints)

    def run(self, context: SolveContext) -> Outputs:
        if self.tape:
            return self._run_on_tape(context)
        request = SaveRequest(context.saves, True, self.checkpoints, context.dense)
        return run_stepwise(context, request)

    def _run_on_tape(self, context: SolveContext) -> Outputs:
        t0, t1 = context.t0, context.t1
        if self.through_step_size:
            t0, t1 = (torch.as_tensor(t, dtype=torch.float64, device="cpu") for t in context.span)
        saving = Saving(context.save_times, context.dense)
        field = context.field
        with torch.enable_grad(), without_autocast(field.device):
            log = integrate(field, context.alg, context.u0, t0, t1, context.settings, saving)
            trajectory = trajectory_of(context, log)
            u = trajectory.u
            if field.params:
                u = _Linked.apply(u, *field.params)
            if not log.estimates:
                return Outputs(trajectory, u)
            estimates: Any = log.estimates
            columns = [torch.stack(column) for column in zip(*estimates, strict=True)]
            return Outputs(trajectory, u, torch.stack(columns))


def run_stepwise(context: SolveContext, request: SaveRequest) -> Outputs:
    """Integrate; the gradient of the outputs is pulled back through the recorded steps."""
    handover = Handover(context, request)
    apply: Any = _Discrete.apply
    if context.plan.engine == "native" and not torch.compiler.is_compiling():
        # skips the search for torch.func transforms, under which nothing is native
        apply = super(torch.autograd.Function, _Discrete).apply  # type: ignore[misc]
    u, estimates = apply(handover, context.u0, *context.field.params)
    return Outputs(handover.take(), u, estimates)


class _Linked(torch.autograd.Function):
    """Identity that makes parameters part of the graph: unused ones get zeros, not None."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        return u.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, *(torch.zeros_like(p) for p in ctx.saved_tensors)


class _Discrete(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handover: Handover, u0: Tensor, *params: Tensor) -> Any:
        context, request = handover.context, handover.request
        assert request is not None
        start = u0.detach() if u0.requires_grad else u0
        trajectory = handover.put(context.integrate(start, request))
        ctx.set_materialize_grads(False)
        ctx.counts = 1 + len(params)
        # autograd frees these after backward, and notices a parameter that was changed in place
        kept, ctx.records = context.plan.keep(trajectory)
        ctx.save_for_backward(u0, *params, *kept)
        # a graph must not keep f: the whole context is there as long as the solution lives
        ctx.context, ctx.whole = context.plan.for_reverse(context), weakref.ref(context)
        ctx.request, ctx.steps = request, len(trajectory.steps)
        return trajectory.u, trajectory.steps.estimates()

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, of_saved: Tensor | None, of_steps: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # raises if a parameter was changed in place
        started = time.perf_counter()
        context = ctx.context
        u0 = saved[0]
        # those of the field: saved-tensor hooks may have replaced the saved ones
        ctx.inputs = u0, *context.field.params
        by_state = ctx.needs_input_grad[1]
        stats = Stats(engine=context.stats.engine, alg=context.alg.name)
        context.stats.adjoint = stats
        cotangents = of_saved, *_rows(of_steps)
        try:
            u_bar, grads = context.plan.pull(
                context, saved[ctx.counts :], ctx.records, u0, cotangents, by_state
            )
        except NoSecondDerivative:
            u_bar, grads = _again_by_torch(ctx, u0, cotangents)
        stats.wall_s = time.perf_counter() - started
        return None, u_bar if by_state else None, *grads


def _rows(table: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cotangents of each estimate; None where they are all zero, which costs less."""
    if table is None:
        return None, None, None
    return tuple(row if row.count_nonzero() else None for row in table.contiguous())


def _again_by_torch(
    ctx: Any, u0: Tensor, cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, Sequence[Tensor]]:
    """The gradients of a solve whose second derivatives are not finite.

    The torch engine solves once more. Its ``Sweep`` differentiates the steps with such derivatives
    as those of another method.
    """
    context: SolveContext | None = ctx.whole()
    if context is not None:
        plan = TorchPlan()
        again = replace(context, plan=plan, du0=None)
        trajectory = again.integrate(u0.detach(), ctx.request)
        kept, records = plan.keep(trajectory)
        if len(trajectory.steps) == ctx.steps:
            if again.stats.adjoint is not None:
                again.stats.adjoint.engine = "torch"
            return plan.pull(again, kept, records, u0, cotangents, True)
    raise RuntimeError(
        "the gradient is NaN or Inf, since f has no second derivative at a state of the solve, "
        "such as u**1.5 and a norm at zero: keep the solution until backward, use "
        "engine='torch', or a method that needs only first derivatives, such as KenCarp4()"
    )
