"""What the continuous adjoints share: one reverse solve of the adjoint equation.

With ``L`` a function of the saved states, ``lambda = dL/du(t)`` obeys ``d lambda/dt = -J^T lambda``
and jumps by ``dL/du_i`` at each saved time; ``dL/dp`` is the integral of ``f_p^T lambda``
(Pontryagin 1962; Cao, Li, Petzold, Serban, SIAM J. Sci. Comput. 24 (2003) 1076). The reverse state
is ``[lambda, (u,) mu]``: one solve from the last saved time to the first, with stops at the saves.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsolve.adjoints.native import run_continuous
from diffsolve.adjoints.reversal import reverse_failure, reverse_stops
from diffsolve.adjoints.reverse import ReverseField, UsedLater
from diffsolve.adjoints.sensealg import Carrier, Job, Outputs, Sensealg, first_order
from diffsolve.adjoints.stochastic import (
    StochasticReverse,
    check_explicit,
    check_reverse_method,
    reverse_method,
)
from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.programs.bound import ScalarBound as NativeField
from diffsolve.engines.native.runtime.reverse import compile_adjoint
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch_engine import OnStop, integrate
from diffsolve.engines.trajectory import Saving, Trajectory
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import Stats
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.norms import Tolerance
from diffsolve.solvers.stochastic.method import StochasticMethod
from diffsolve.solvers.switching import AutoSwitch

Restore = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class ContinuousAdjoint(Sensealg):
    """Base of the adjoints that solve the adjoint equation.

    Parameters
    ----------
    alg
        Method of the reverse solve; None: that of the forward solve. Behind fixed steps it takes
        fixed ones, of the same size. For an SDE ``EulerHeun()`` or
        ``LambaEulerHeun()``; None: the latter where the forward steps are adaptive, else the other.
    rtol, atol
        Tolerances of the reverse solve, numbers; None: those of the forward solve. ``atol``
        counts in units of the largest cotangent.
    """

    alg: Algorithm | None = None
    rtol: float | None = None
    atol: float | None = None

    handles_noise = True

    def __post_init__(self) -> None:
        if self.alg is not None and not isinstance(self.alg, Algorithm):
            hint = f"; write {self.alg.__name__}()" if isinstance(self.alg, type) else ""
            raise TypeError(f"{type(self).__name__}: alg must be a method{hint}, got {self.alg!r}")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and 0 <= value < float("inf")
            if value is not None and not number:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a number >= 0, got {value!r}"
                )

    def prepared(self, settings: Settings) -> Settings:
        if self.alg is not None and not self.alg.adaptive and settings.adaptive:
            raise ValueError(
                f"{self.alg.name} has no error estimate, so {type(self).__name__} cannot use it "
                "behind an adaptive forward solve: choose an adaptive one, or pass "
                "adaptive=False and dt"
            )
        return settings

    @abstractmethod
    def forward(self, job: Job, u0: Tensor) -> tuple[Trajectory, list[Tensor], Restore]:
        """Integrate; returns also tensors for autograd to save, and what makes ``kept`` of them."""

    @abstractmethod
    def reverse(
        self, job: Job, kept: Any, field: VectorField, params: list[Tensor]
    ) -> ReverseField:
        """The reverse problem, from what the reverse pass needs of the forward one."""

    #: Whether the reverse solve reads the forward solution, rather than solving it again.
    along_path: ClassVar[bool] = False

    def compile(self, native: NativeField, alg: Algorithm) -> None:
        if isinstance(alg, StochasticMethod):
            raise Declined("the adjoint equation of an SDE is solved by torch")
        compile_adjoint(native, self.alg or alg, self.along_path)

    def reverse_method(self, job: Job) -> Algorithm:
        """The method of the reverse solve."""
        if isinstance(job.field, SDEField):
            return reverse_method(self.alg, job)
        return self.alg or job.alg

    def run(self, job: Job) -> Outputs:
        if self.alg is not None:
            check_reverse_method(self.alg, isinstance(job.field, SDEField))
        if isinstance(job.alg, StochasticMethod):
            check_explicit(job.alg, job.settings)
        if job.native is not None:
            return run_continuous(self, job)
        carrier = Carrier(job)
        u: Any = _Continuous.apply(self, carrier, job.u0, *job.field.params)
        trajectory = carrier.handed_over()
        return Outputs(trajectory, u, job.estimates(trajectory))

    def reverse_settings(self, job: Job, tolerance: Tolerance, stops: Sequence[float]) -> Settings:
        forward = job.settings
        alg = self.reverse_method(job)
        same = self.alg is None and alg.name == job.alg.name
        return replace(
            forward,
            tolerance=tolerance,
            controller=forward.controller if same else alg.default_controller(),
            controller_stiff=(
                forward.controller_stiff
                if same
                else alg.stiff.default_controller()
                if isinstance(alg, AutoSwitch)
                else None
            ),
            adaptive=forward.adaptive and alg.adaptive,
            to_rounding=forward.to_rounding and self.rtol is None and self.atol is None,
            dt=None if forward.adaptive else forward.dt,
            maxiters=forward.maxiters + len(stops),  # each ends a step
            tstops=tuple(stops),
            progress=False,
        )


class _Continuous(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sensealg: ContinuousAdjoint, carrier: Carrier, u0: Tensor, *params: Tensor
    ) -> Tensor:
        carrier.trajectory, tensors, restore = sensealg.forward(carrier.job, u0.detach())
        saved = carrier.job.stacked(carrier.trajectory.u)
        ctx.sensealg, ctx.job, ctx.restore = sensealg, carrier.job, restore
        ctx.times = carrier.trajectory.t
        # autograd frees them after backward, and sees a parameter changed in place
        ctx.counts = 2 + len(params)
        ctx.save_for_backward(saved, u0, *params, *tensors)
        return saved

    @staticmethod
    @first_order
    def backward(ctx: Any, bars: Tensor) -> Any:
        tensors = ctx.saved_tensors
        saved, u0, *params = tensors[: ctx.counts]
        ctx.inputs = (u0, *params)
        started = time.perf_counter()
        job = ctx.job
        stats = job.stats.adjoint = Stats(engine=job.stats.engine)
        direction = job.t1 - job.t0
        job.field.refuse_changed(job.t0, direction, u0.detach(), job.du0)
        size = float(bars.abs().max()) if bars.numel() else 0.0
        if not size < float("inf"):
            raise RuntimeError("the cotangent of the saved states is NaN or Inf: check the loss")
        if size == 0:
            grads = [torch.zeros_like(x) for x in (u0, *params)]
        else:
            # the equation is linear: tolerances then mean the same for every loss
            kept = ctx.restore(tensors[ctx.counts :])
            forward = _Forward(job, kept, u0.detach(), ctx.times, saved)
            grads = _solve_reverse(ctx.sensealg, forward, bars / size, stats)
            grads = [g * size for g in grads]
        stats.wall_s = time.perf_counter() - started
        return (None, None, *grads)


@dataclass
class _Forward:
    """What the reverse pass knows of the forward one: besides ``kept``, the saved values."""

    job: Job
    kept: Any
    u0: Tensor
    times: Sequence[float]
    saved: Tensor


def _solve_reverse(
    sensealg: ContinuousAdjoint, forward: _Forward, bars: Tensor, stats: Stats
) -> list[Tensor]:
    """Gradients by the flat initial state and by each parameter."""
    job = forward.job
    field, params = job.field.for_vjp()
    # parameters that f can reach but does not call would only make the reverse state longer
    active = [i for i, p in enumerate(job.field.params) if id(p) in job.field.used]
    try:
        found = _solve_for(sensealg, forward, bars, stats, field, [params[i] for i in active])
    except UsedLater:
        active = list(range(len(params)))
        found = _solve_for(sensealg, forward, bars, stats, field, params)
    grads = [torch.zeros_like(p) for p in params]
    for i, g in zip(active, found[1:], strict=True):
        grads[i] = g
    return [found[0], *grads]


def _solve_for(
    sensealg: ContinuousAdjoint,
    forward: _Forward,
    bars: Tensor,
    stats: Stats,
    field: VectorField,
    params: list[Tensor],
) -> list[Tensor]:
    """The same by some of the parameters."""
    job, times, saved = forward.job, forward.times, forward.saved
    reverse = sensealg.reverse(job, forward.kept, field, params)
    if isinstance(reverse, StochasticReverse):
        reverse.check(forward.u0, times, saved)
    at_time = {t: i for i, t in enumerate(times)}

    def on_stop(t: float, z: Tensor) -> Tensor:
        i = at_time.get(t)
        return z if i is None else reverse.at_save(z, bars[i], saved[i])

    z = reverse.start(bars[-1], saved[-1])
    if times[-1] != job.t0:
        z = _integrate_reverse(sensealg, job, reverse, z, times, on_stop, stats)
        reverse.finish(z)
        if times[0] == job.t0:
            z = reverse.at_save(z, bars[0], saved[0])
    parts = z.split(reverse.sizes)
    return [parts[0], *(_like(part, p) for part, p in zip(parts[2:], params, strict=True))]


def _integrate_reverse(
    sensealg: ContinuousAdjoint,
    job: Job,
    reverse: ReverseField,
    z: Tensor,
    times: Sequence[float],
    on_stop: OnStop,
    stats: Stats,
) -> Tensor:
    """The reverse state at ``t0``, from the one at the last of the saved times."""
    alg = sensealg.reverse_method(job)
    start, end = times[-1], job.t0
    direction = -1.0 if job.t1 >= job.t0 else 1.0
    forward = job.settings.tolerance
    tolerance = reverse.tolerance(
        float(forward.rtol.min()) if sensealg.rtol is None else sensealg.rtol,
        float(forward.atol.min()) if sensealg.atol is None else sensealg.atol,
        forward,
    )
    stops = reverse_stops(job, times, reverse.pins)
    settings = sensealg.reverse_settings(job, tolerance, stops)
    if reverse.first_size is not None:
        settings = replace(settings, dt=settings.dt or reverse.first_size)
    du = reverse(reverse.after(start, direction), z) if alg.carries_derivative else None
    result = integrate(reverse, alg, z, start, end, settings, Saving(times=()), du, on_stop)
    stats.alg, stats.nf = alg.name, reverse.nf
    stats.naccept, stats.nreject = result.naccept, result.nreject
    reverse.count_in(stats)
    if not result.retcode.successful or result.final is None:
        raise reverse_failure(
            type(sensealg).__name__, result.message, result.retcode, result.final_t, result.final_h
        )
    return result.final


def _like(part: Tensor, p: Tensor) -> Tensor:
    """A parameter's part of the reverse state in the shape and dtype of the parameter."""
    if p.is_complex() and not part.is_complex():
        return torch.view_as_complex(part.reshape(*p.shape, 2).clone()).to(p)
    if part.is_complex() and not p.is_complex():
        part = part.real
    return part.reshape(p.shape).to(p)
