"""The discrete adjoint: the gradient of what the solver computed, to rounding."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffsolve.adjoints.native import run_discrete
from diffsolve.adjoints.sensealg import Carrier, Job, Outputs, Sensealg, first_order
from diffsolve.adjoints.sweep import Sweep
from diffsolve.adjoints.tape import StepTape, check_checkpoints
from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.programs.bound import RowBound as NativeSDE
from diffsolve.engines.native.programs.bound import ScalarBound as NativeField
from diffsolve.engines.native.runtime.threads import (
    check_checkpoints as stochastic_checkpoints,
)
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch_engine import integrate
from diffsolve.engines.trajectory import Saving
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

    def compile(self, native: NativeField, alg: Algorithm) -> None:
        self.refuse_native()
        if self.checkpoints is not None and isinstance(native, NativeSDE):
            stochastic_checkpoints(native.template)
        native.template.reverse(native.program, native.active)

    def run(self, job: Job) -> Outputs:
        if self.tape:
            return self._run_on_tape(job)
        if job.native is not None:
            return run_discrete(job, self.checkpoints)
        return run_stepwise(job, StepTape(self.checkpoints))

    def _run_on_tape(self, job: Job) -> Outputs:
        t0, t1 = job.t0, job.t1
        if self.through_step_size:
            t0, t1 = (torch.as_tensor(t, dtype=torch.float64, device="cpu") for t in job.span)
        saving = Saving(job.save_times, job.dense)
        with torch.enable_grad(), without_autocast(job.field.device):
            trajectory = integrate(job.field, job.alg, job.u0, t0, t1, job.settings, saving)
            u = job.stacked(trajectory.u)
            if job.field.params:
                u = _Linked.apply(u, *job.field.params)
            if not trajectory.estimates:
                return Outputs(trajectory, u, job.estimates(trajectory))
            rows = [(e.error, e.error_norm, e.stiffness) for e in trajectory.estimates]
            columns = [torch.stack(column) for column in zip(*rows, strict=True)]
            return Outputs(trajectory, u, columns)


def run_stepwise(job: Job, tape: StepTape) -> Outputs:
    """Integrate with torch; the outputs' gradient goes back through the steps that ``tape`` has."""
    carrier = Carrier(job, tape)
    u, *estimates = _Discrete.apply(carrier, job.u0, *job.field.params)  # type: ignore[misc]
    return Outputs(carrier.handed_over(), u, estimates)


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
    def forward(ctx: Any, carrier: Carrier, u0: Tensor, *params: Tensor) -> Any:
        job, tape = carrier.job, carrier.kept
        carrier.trajectory = job.run(u0.detach(), tape)
        ctx.job, ctx.tape, ctx.final = job, tape, carrier.trajectory.final
        ctx.set_materialize_grads(False)
        # autograd frees the states after backward, and sees a parameter changed in place
        ctx.counts = 1 + len(params)
        ctx.save_for_backward(u0, *params, *tape.unload())
        return (job.stacked(carrier.trajectory.u), *job.estimates(carrier.trajectory))

    @staticmethod
    @first_order
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        ctx.inputs = saved[: ctx.counts]
        started = time.perf_counter()
        job, tape = ctx.job, ctx.tape.loaded(saved[ctx.counts :])
        if job.alg.is_implicit:  # steps are compared up to the tolerance only
            job.field.refuse_changed(job.t0, job.t1 - job.t0, saved[0].detach(), job.du0)
        stats = job.stats.adjoint = Stats(engine=job.stats.engine, alg=job.alg.name)
        sweep = Sweep(job, cotangents, ctx.final)
        du0, dparams = sweep.run(tape)
        stats.nf, stats.naccept = sweep.field.nf, len(tape.records)
        sweep.field.count_in(stats)
        stats.wall_s = time.perf_counter() - started
        return (None, du0, *dparams)
