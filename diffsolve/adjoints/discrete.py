"""The discrete adjoint: the gradient of what the solver computed, to rounding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffsolve.adjoints.sensealg import Job, Outputs, Sensealg
from diffsolve.adjoints.tape import StepTape
from diffsolve.engines.torch_engine import Record, Saving, Settings, integrate
from diffsolve.solution import Stats
from diffsolve.solvers.norms import measure


@dataclass(frozen=True)
class DiscreteAdjoint(Sensealg):
    """Differentiate the solver's steps.

    The gradient is exact for the computed solution, whatever the tolerance, and includes
    ``sol.steps.error``, ``error_norm`` and ``stiffness``. By default each accepted step's state
    is kept, and the reverse pass runs one step at a time again under autograd. Rejected steps
    and the controller are not differentiated.

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
        sweep = _Sweep(job, tape, cotangents)
        du0, dparams = sweep.run()
        stats.nf, stats.naccept = sweep.field.nf, len(tape.records)
        stats.wall_s = time.perf_counter() - started
        return (None, du0, *dparams)


class _Sweep:
    """The reverse pass: pull cotangents through one step after the other."""

    def __init__(self, job: Job, tape: StepTape, cotangents: Sequence[Tensor | None]):
        self.job, self.tape = job, tape
        self.of_saved = cotangents[0]
        self.of_estimates = cotangents[1:]
        self.field, self.params = job.field.for_vjp()
        self.dparams: list[Tensor | None] = [None] * len(self.params)

    def run(self) -> tuple[Tensor, list[Tensor]]:
        job = self.job
        state_bar: list[Tensor | None] = []
        index = len(self.tape.records)
        for record, state in self.tape.backward(job.alg, self.field):
            index -= 1
            state_bar = state_bar or [None] * len(state)
            self._add_saved(state_bar, record.end_save)
            state_bar = self._through_step(index, record, state, state_bar)
            if record.restart:
                state_bar = self._through_init(record, state, state_bar)
        u_bar = torch.zeros_like(job.u0) if not state_bar or state_bar[0] is None else state_bar[0]
        first_time = job.save_times[0] if job.save_times else job.t0
        if self.of_saved is not None and len(self.of_saved) and first_time == job.t0:
            u_bar = u_bar + self.of_saved[0]
        zeros = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.params, self.dparams, strict=True)
        ]
        return u_bar, zeros

    def _add_saved(self, state_bar: list[Tensor | None], index: int | None) -> None:
        if index is not None and self.of_saved is not None:
            known, new = state_bar[0], self.of_saved[index]
            state_bar[0] = new if known is None else known + new

    def _through_step(
        self,
        index: int,
        record: Record,
        state: tuple[Tensor, ...],
        state_bar: list[Tensor | None],
    ) -> list[Tensor | None]:
        pulled: list[tuple[Tensor, Tensor]] = []
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in state]
            step = self.job.alg.step(self.field, record.t, record.h, tuple(leaves))
            pulled += [
                (y, bar) for y, bar in zip(step.state, state_bar, strict=True) if bar is not None
            ]
            if record.thetas and self.of_saved is not None:
                theta = torch.tensor(record.thetas, dtype=torch.float64)
                first = record.first_save
                bars = self.of_saved[first : first + len(record.thetas)]
                pulled.append((step.interpolant(theta), bars))
            if any(bar is not None for bar in self.of_estimates):
                e = measure(step, leaves[0], self.job.settings.tolerance, on_tape=True)
                for y, bar in zip(
                    (e.error, e.error_norm, e.stiffness), self.of_estimates, strict=True
                ):
                    if bar is not None and isinstance(y, Tensor):
                        pulled.append((y, bar[index].to(y.dtype)))
        return self._pull(pulled, leaves)

    def _through_init(
        self, record: Record, state: tuple[Tensor, ...], state_bar: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Through the restart of the method at ``record.t``, where its state follows from u."""
        with torch.enable_grad():
            u = state[0].detach().requires_grad_()
            after = self.field.after(record.t, record.h)
            made = self.job.alg.init(self.field, record.t, u, self.field(after, u))
            pulled = [(y, bar) for y, bar in zip(made, state_bar, strict=True) if bar is not None]
        (u_bar,) = self._pull(pulled, [u])
        return [u_bar, *[None] * (len(state) - 1)]

    def _pull(
        self, pulled: list[tuple[Tensor, Tensor]], leaves: list[Tensor]
    ) -> list[Tensor | None]:
        """Cotangents of the leaves; those of the parameters are summed up."""
        pulled = [(y, bar) for y, bar in pulled if y.requires_grad]
        if not pulled:
            return [None] * len(leaves)
        outputs, bars = zip(*pulled, strict=True)
        grads = torch.autograd.grad(outputs, [*leaves, *self.params], bars, allow_unused=True)
        for i, g in enumerate(grads[len(leaves) :]):
            if g is not None:
                known = self.dparams[i]
                self.dparams[i] = g if known is None else known + g
        return list(grads[: len(leaves)])
