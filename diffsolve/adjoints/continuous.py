"""What the continuous adjoints share: one reverse solve of the adjoint equation.

With ``L`` a function of the saved states, ``lambda = dL/du(t)`` obeys ``d lambda/dt = -J^T lambda``
and jumps by ``dL/du_i`` at each saved time; ``dL/dp`` is the integral of ``f_p^T lambda``
(Pontryagin 1962; Cao, Li, Petzold, Serban, SIAM J. Sci. Comput. 24 (2003) 1076). The reverse state
is ``[lambda, (u,) mu]``: one solve from the last saved time to the first, with stops at the saves.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffsolve.adjoints.sensealg import Job, Outputs, Sensealg
from diffsolve.engines.torch_engine import Saving, Settings, Trajectory, integrate
from diffsolve.problems.capture import refuse_unknown_leaves
from diffsolve.problems.structure import StateStructure
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import SolveError, Stats
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.norms import Tolerance, rms


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
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{type(self).__name__}: {name} must be >= 0, got {value}")

    def prepared(self, settings: Settings) -> Settings:
        if self.alg is not None and not self.alg.adaptive and settings.adaptive:
            raise ValueError(
                f"{self.alg.name} has no error estimate, so {type(self).__name__} cannot use it "
                "behind an adaptive forward solve: choose an adaptive one, or pass "
                "adaptive=False and dt"
            )
        return settings

    @abstractmethod
    def forward(self, job: Job, u0: Tensor) -> tuple[Trajectory, Any]:
        """Integrate; returns also what the reverse pass needs."""

    @abstractmethod
    def reverse(self, job: Job, kept: Any, field: VectorField, params: list[Tensor]) -> Reverse:
        """The reverse problem."""

    def run(self, job: Job) -> Outputs:
        holder = _Holder(self, job)
        u = _Continuous.apply(holder, job.u0, *job.field.params)
        return Outputs(holder.trajectory, u, *job.estimates(holder.trajectory))  # type: ignore[arg-type]

    def reverse_settings(self, job: Job, tolerance: Tolerance, stops: Sequence[float]) -> Settings:
        forward = job.settings
        alg = self.alg or job.alg
        same = self.alg is None
        return replace(
            forward,
            tolerance=tolerance,
            controller=forward.controller if same else alg.default_controller(),
            adaptive=forward.adaptive if same else alg.adaptive,
            dt=None if forward.adaptive else forward.dt,
            tstops=tuple(stops),
            progress=False,
        )


def _unused(t: Any, u: Any) -> Any:  # a bound method here would keep the field alive in a cycle
    raise NotImplementedError


class Reverse(VectorField, ABC):
    """Right-hand side of the reverse problem over ``z = [lambda, ..., mu]``.

    Parameters
    ----------
    field, params
        Forward right-hand side, and the tensors its vector-Jacobian products are taken by.
    extra
        Entries of the reverse state between ``lambda`` and ``mu``.
    """

    def __init__(self, field: VectorField, params: list[Tensor], extra: int):
        self.field = field
        self.n = field.structure.size
        self.sizes = [self.n, extra, *[_as_reals(p, field.dtype).numel() for p in params]]
        z = torch.empty(sum(self.sizes), dtype=field.dtype, device=field.device)
        super().__init__(_unused, None, StateStructure(z))
        self.breaks = field.breaks
        self.params = params
        self._checked = False  # whether the graph of f was looked through

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
            if not self._checked:
                refuse_unknown_leaves([du], [u, *self.params])
                self._checked = True
            grads = torch.autograd.grad(du, [u, *self.params], bar, allow_unused=True)
        else:
            grads = (None,) * (1 + len(self.params))
        inputs = [u, *self.params]
        full = [
            _as_reals(torch.zeros_like(x) if g is None else g, self.dtype)
            for g, x in zip(grads, inputs, strict=True)
        ]
        return du.detach(), full[0], full[1:]

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


class _Holder:
    """Carries what is not a tensor in and out of the autograd function."""

    def __init__(self, sensealg: ContinuousAdjoint, job: Job):
        self.sensealg, self.job = sensealg, job
        self.trajectory: Any = None
        self.kept: Any = None


class _Continuous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, holder: _Holder, u0: Tensor, *params: Tensor) -> Tensor:
        job = holder.job
        holder.trajectory, holder.kept = holder.sensealg.forward(job, u0.detach())
        saved = job.stacked(holder.trajectory.u)
        ctx.holder = holder
        ctx.save_for_backward(saved, u0, *params)
        return saved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, bars: Tensor) -> Any:
        saved, *_ = ctx.saved_tensors  # raises if a parameter was changed in place
        holder = ctx.holder
        started = time.perf_counter()
        job = holder.job
        stats = job.stats.adjoint = Stats(engine=job.stats.engine)
        dparams: Sequence[Tensor]
        du0, dparams = _solve_reverse(holder, saved, bars, stats)
        stats.wall_s = time.perf_counter() - started
        return (None, du0, *dparams)


def _solve_reverse(
    holder: _Holder, saved: Tensor, bars: Tensor, stats: Stats
) -> tuple[Tensor, list[Tensor]]:
    sensealg, job, times = holder.sensealg, holder.job, holder.trajectory.t
    field, params = job.field.for_vjp()
    size = float(bars.abs().max()) if bars.numel() else 0.0
    if size == 0:
        return torch.zeros_like(job.u0), [torch.zeros_like(p) for p in params]
    if not size < float("inf"):
        raise RuntimeError("the cotangent of the saved states is NaN or Inf: check the loss")
    bars = bars / size  # the equation is linear: tolerances then mean the same for every loss
    alg = sensealg.alg or job.alg
    stats.alg = alg.name
    reverse = sensealg.reverse(job, holder.kept, field, params)
    at_time = {t: i for i, t in enumerate(times)}
    start, end = times[-1], job.t0
    direction = -1.0 if job.t1 >= job.t0 else 1.0
    stops = {*times, *job.settings.tstops} - {start, end}
    stops = sorted((t for t in stops if direction * t > direction * start), reverse=direction < 0)
    forward = job.settings.tolerance
    tolerance = reverse.tolerance(
        float(forward.rtol.min()) if sensealg.rtol is None else sensealg.rtol,
        float(forward.atol.min()) if sensealg.atol is None else sensealg.atol,
        forward,
    )
    settings = sensealg.reverse_settings(job, tolerance, stops)

    def on_stop(t: float, z: Tensor) -> Tensor:
        i = at_time.get(t)
        return z if i is None else reverse.at_save(z, bars[i], saved[i])

    z = reverse.start(bars[-1], saved[-1])
    if start != end:
        with torch.no_grad():
            du = reverse(reverse.after(start, direction), z)
            result = integrate(reverse, alg, z, start, end, settings, Saving(times=()), du, on_stop)
        stats.nf, stats.naccept, stats.nreject = reverse.nf, result.naccept, result.nreject
        if not result.retcode.successful:
            raise SolveError(
                f"the reverse solve of {type(sensealg).__name__} failed: {result.message} "
                "DiscreteAdjoint() has no reverse solve that could fail.",
                result.retcode,
                result.final_t,
                result.final_h,
            )
        assert result.final is not None
        z = result.final
        reverse.finish(z)
        if times[0] == end:
            z = reverse.at_save(z, bars[0], saved[0])
    parts = (z * size).split(reverse.sizes)
    return parts[0], [_like(part, p) for part, p in zip(parts[2:], params, strict=True)]


def _as_reals(g: Tensor, dtype: torch.dtype) -> Tensor:
    """``g``, flat, in the dtype of the reverse state; a complex one as pairs if that is real."""
    if g.is_complex() and not dtype.is_complex:
        g = torch.view_as_real(g.resolve_conj())
    return g.reshape(-1).to(dtype)


def _like(part: Tensor, p: Tensor) -> Tensor:
    """A parameter's part of the reverse state in the shape and dtype of the parameter."""
    if p.is_complex() and not part.is_complex():
        return torch.view_as_complex(part.reshape(*p.shape, 2).clone()).to(p)
    if part.is_complex() and not p.is_complex():
        part = part.real
    return part.reshape(p.shape).to(p)
