"""The discrete adjoint: the gradient of what the solver computed, to rounding."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffsolve.adjoints.sensealg import Job, Outputs, Sensealg
from diffsolve.adjoints.sweep import Sweep
from diffsolve.adjoints.tape import StepTape
from diffsolve.engines.torch_engine import Saving, Settings, integrate
from diffsolve.solution import Stats


@dataclass(frozen=True)
class DiscreteAdjoint(Sensealg):
    """Differentiate the solver's steps.

    The gradient is exact for the computed solution, whatever the tolerance, and includes
    ``sol.steps.error``, ``error_norm`` and ``stiffness``. By default each accepted step's state
    is kept, and the reverse pass runs the steps again under autograd: one at a time, or for small
    states in batches. Rejected steps and the controller are not differentiated.

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
        If ``checkpoints`` is not positive, or is combined with ``tape``.

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
        if self.checkpoints is not None and (self.checkpoints < 1 or self.tape):
            raise ValueError(
                f"checkpoints must be a positive number, without tape; got {self.checkpoints}"
            )

    @property
    def handles_time(self) -> bool:  # type: ignore[override]
        return self.through_step_size

    def prepared(self, settings: Settings) -> Settings:
        return replace(settings, h_on_tape=self.through_step_size)

    def run(self, job: Job) -> Outputs:
        if self.tape:
            return self._run_on_tape(job)
        tape = StepTape(self.checkpoints)
        holder = _Holder(job, tape)
        u, error, error_norm, stiffness = _Discrete.apply(holder, job.u0, *job.field.params)  # type: ignore[misc]
        return Outputs(holder.trajectory, u, error, error_norm, stiffness)

    def _run_on_tape(self, job: Job) -> Outputs:
        t0, t1 = job.t0, job.t1
        if self.through_step_size:
            t0, t1 = (torch.as_tensor(t, dtype=torch.float64) for t in job.span)
        saving = Saving(job.save_times, job.dense)
        with torch.enable_grad():
            trajectory = integrate(job.field, job.alg, job.u0, t0, t1, job.settings, saving)
            columns = zip(
                *((e.error, e.error_norm, e.stiffness) for e in trajectory.estimates), strict=True
            )
            estimates = [torch.stack(column) for column in columns]
            if not estimates:
                estimates = list(job.estimates(trajectory))
            return Outputs(trajectory, job.stacked(trajectory.u), *estimates)


class _Holder:
    """Carries what is not a tensor in and out of the autograd function."""

    def __init__(self, job: Job, tape: StepTape):
        self.job = job
        self.tape = tape
        self.trajectory: Any = None


class _Discrete(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, holder: _Holder, u0: Tensor, *params: Tensor) -> Any:
        job = holder.job
        trajectory = holder.trajectory = job.run(u0.detach(), holder.tape)
        ctx.holder = holder
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u0, *params)
        return (job.stacked(trajectory.u), *job.estimates(trajectory))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        _ = ctx.saved_tensors  # raises if a parameter was changed in place
        started = time.perf_counter()
        job, tape = ctx.holder.job, ctx.holder.tape
        stats = job.stats.adjoint = Stats(engine=job.stats.engine, alg=job.alg.name)
        sweep = Sweep(job, cotangents)
        du0, dparams = sweep.run(tape)
        stats.nf, stats.naccept = sweep.nf, len(tape.records)
        stats.wall_s = time.perf_counter() - started
        return (None, du0, *dparams)
