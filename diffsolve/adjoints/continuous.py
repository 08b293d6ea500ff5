"""What the continuous adjoints share: one reverse solve of the adjoint equation.

With ``L`` a function of the saved states, ``lambda = dL/du(t)`` obeys ``d lambda/dt = -J^T lambda``
and jumps by ``dL/du_i`` at each saved time; ``dL/dp`` is the integral of ``f_p^T lambda``
(Pontryagin 1962; Cao, Li, Petzold, Serban, SIAM J. Sci. Comput. 24 (2003) 1076). The reverse state
is ``[lambda, (u,) mu]``: one solve from the last saved time to the first, with stops at the saves.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsolve.adjoints.native import run_continuous
from diffsolve.adjoints.reversal import reverse_failure, reverse_stops
from diffsolve.adjoints.reverse_jacobian import (
    Lagrangian,
    ReverseJacobian,
    as_reals,
    reverse_jacobian,
)
from diffsolve.adjoints.sensealg import Carrier, Job, Outputs, Sensealg, first_order
from diffsolve.engines.native.field import NativeField
from diffsolve.engines.native.reverse import compile_adjoint
from diffsolve.engines.torch_engine import OnStop, Saving, Settings, Trajectory, integrate
from diffsolve.problems.capture import reached_leaves, refuse_unknown_leaves
from diffsolve.problems.structure import StateStructure
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import Stats
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.norms import Tolerance, rms
from diffsolve.solvers.switching import AutoSwitch

Restore = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class ContinuousAdjoint(Sensealg):
    """Base of the adjoints that solve the adjoint equation.

    Parameters
    ----------
    alg
        Method of the reverse solve; None: that of the forward solve.
    rtol, atol
        Tolerances of the reverse solve, numbers; None: those of the forward solve. ``atol``
        counts in units of the largest cotangent.
    """

    alg: Algorithm | None = None
    rtol: float | None = None
    atol: float | None = None

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
    def reverse(self, job: Job, kept: Any, field: VectorField, params: list[Tensor]) -> Reverse:
        """The reverse problem, from what the reverse pass needs of the forward one."""

    #: Whether the reverse solve reads the forward solution, rather than solving it again.
    along_path: ClassVar[bool] = False

    def compile(self, native: NativeField, alg: Algorithm) -> None:
        compile_adjoint(native, self.alg or alg, self.along_path)

    def run(self, job: Job) -> Outputs:
        if job.native is not None:
            return run_continuous(self, job)
        carrier = Carrier(job)
        u: Any = _Continuous.apply(self, carrier, job.u0, *job.field.params)
        trajectory = carrier.handed_over()
        return Outputs(trajectory, u, *job.estimates(trajectory))

    def reverse_settings(self, job: Job, tolerance: Tolerance, stops: Sequence[float]) -> Settings:
        forward = job.settings
        alg = self.alg or job.alg
        same = self.alg is None
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
            adaptive=forward.adaptive if same else alg.adaptive,
            dt=None if forward.adaptive else forward.dt,
            tstops=tuple(stops),
            progress=False,
        )


def _unused(t: Any, u: Any) -> Any:  # a bound method here would keep the field alive in a cycle
    raise NotImplementedError


class _UsedLater(Exception):
    """``f`` uses a parameter that it did not use at the start."""


class Reverse(VectorField, ABC):
    """Right-hand side of the reverse problem over ``z = [lambda, ..., mu]``.

    Parameters
    ----------
    field, params
        Forward right-hand side, and those of its parameters that gradients are taken by.
    extra
        Entries of the reverse state between ``lambda`` and ``mu``.
    """

    def __init__(self, field: VectorField, params: list[Tensor], extra: int):
        self.field = field
        self.n = field.structure.size
        self.sizes = [self.n, extra, *[as_reals(p, field.dtype).numel() for p in params]]
        z = torch.empty(sum(self.sizes), dtype=field.dtype, device=field.device)
        super().__init__(_unused, None, StateStructure.of(z))
        self.breaks = field.breaks
        self.params = params
        self.others = {id(p) for p in field.params} - {id(p) for p in params}

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        self.nf += 1
        return self.derivative(t, u)

    def write(self, t: Tensor, u: Tensor, row: Tensor) -> None:
        row.copy_(self(t, u))

    @abstractmethod
    def derivative(self, t: Tensor, z: Tensor) -> Tensor:
        """Right-hand side of the reverse state."""

    def products(self, t: Tensor, u: Tensor, bar: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``f(t, u)``, ``J^T bar`` and the contributions ``f_p^T bar``, flat."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            du = self.field(t, u)
        if du.requires_grad:
            leaves = reached_leaves([du])
            if not self.others.isdisjoint(leaves):
                raise _UsedLater
            refuse_unknown_leaves(leaves, [u, *self.params])
            grads = torch.autograd.grad(du, [u, *self.params], bar, allow_unused=True)
        else:
            grads = (None,) * (1 + len(self.params))
        inputs = [u, *self.params]
        full = [
            as_reals(torch.zeros_like(x) if g is None else g, self.dtype)
            for g, x in zip(grads, inputs, strict=True)
        ]
        return du.detach(), full[0], full[1:]

    @abstractmethod
    def state_at(self, time: Tensor, z: Tensor) -> Tensor:
        """The forward state ``(N,)`` that the right-hand side uses."""

    @abstractmethod
    def slope_at(self, time: Tensor, at: Lagrangian, by_time: Tensor | None) -> Tensor:
        """Derivative of the right-hand side by time; ``by_time`` is that of ``f``."""

    def linearise(self, t: float, h: float, z: Tensor, slope: bool) -> ReverseJacobian:
        """The Jacobian at the start of a step, for implicit methods.

        Raises
        ------
        ValueError
            If the state is complex.
        """
        return reverse_jacobian(self, t, h, z, slope)

    def blocks(self, z: Tensor) -> tuple[Tensor, ...]:
        """``lambda``, the extra entries, and all of ``mu``."""
        return z.split([self.n, self.sizes[1], sum(self.sizes[2:])])

    def norm(self, scaled: Tensor) -> Tensor:
        """Largest of the blocks' norms, so that no block hides behind a bigger one."""
        return torch.stack([rms(block) for block in self.blocks(scaled) if block.numel()]).max()

    def start(self, bar: Tensor, u: Tensor) -> Tensor:
        """Reverse state at the last saved time."""
        z = torch.zeros(sum(self.sizes), dtype=self.dtype, device=self.device)
        z[: self.n] = bar
        return z

    def at_save(self, z: Tensor, bar: Tensor, u: Tensor) -> Tensor:
        """Reverse state after passing a saved time with cotangent ``bar`` and state ``u``."""
        z = z.clone()
        z[: self.n] += bar
        return z

    def tolerance(self, rtol: float, atol: float, forward: Tolerance) -> Tolerance:
        def tensor(x: float) -> Tensor:
            return torch.tensor(x, dtype=self.structure.time_dtype, device=self.device)

        return Tolerance(tensor(rtol), tensor(atol), self.norm)

    def finish(self, z: Tensor) -> None:
        """Called with the reverse state at ``t0``."""


class _Continuous(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sensealg: ContinuousAdjoint, carrier: Carrier, u0: Tensor, *params: Tensor
    ) -> Tensor:
        carrier.trajectory, tensors, restore = sensealg.forward(carrier.job, u0.detach())
        saved = carrier.job.stacked(carrier.trajectory.u)
        ctx.sensealg, ctx.carrier, ctx.restore = sensealg, carrier, restore
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
        job = ctx.carrier.job
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
            forward = _Forward(job, ctx.restore(tensors[ctx.counts :]), ctx.times, saved)
            grads = _solve_reverse(ctx.sensealg, forward, bars / size, stats)
            grads = [g * size for g in grads]
        stats.wall_s = time.perf_counter() - started
        return (None, None, *grads)


@dataclass
class _Forward:
    """What the reverse pass knows of the forward one: besides ``kept``, the saved values."""

    job: Job
    kept: Any
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
    except _UsedLater:
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
    reverse: Reverse,
    z: Tensor,
    times: Sequence[float],
    on_stop: OnStop,
    stats: Stats,
) -> Tensor:
    """The reverse state at ``t0``, from the one at the last of the saved times."""
    alg = sensealg.alg or job.alg
    start, end = times[-1], job.t0
    direction = -1.0 if job.t1 >= job.t0 else 1.0
    forward = job.settings.tolerance
    tolerance = reverse.tolerance(
        float(forward.rtol.min()) if sensealg.rtol is None else sensealg.rtol,
        float(forward.atol.min()) if sensealg.atol is None else sensealg.atol,
        forward,
    )
    settings = sensealg.reverse_settings(job, tolerance, reverse_stops(job, times))
    du = reverse(reverse.after(start, direction), z)
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
