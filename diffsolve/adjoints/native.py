"""Sensealgs on the native engine: the same reverse passes, in machine code.

Each autograd function here stands beside its sibling for the torch engine, and hands over to the
kernels what that one does with tensors.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from diffsolve.adjoints.reversal import in_tolerances, reverse_failure, reverse_stops
from diffsolve.adjoints.sensealg import Carrier, Job, Outputs, first_order
from diffsolve.adjoints.sweep import Sweep
from diffsolve.adjoints.tape import StepTape
from diffsolve.engines.native.programs.bound import RowBound as NativeSDE
from diffsolve.engines.native.programs.bound import ScalarBound as NativeField
from diffsolve.engines.native.runtime.memory import Memory
from diffsolve.engines.native.runtime.reverse import Path, ReverseProblem, solve_reverse, sweep
from diffsolve.engines.native.runtime.solve import RETCODES
from diffsolve.engines.native.runtime.stochastic_reverse import sweep as stochastic_sweep
from diffsolve.engines.native.runtime.template import Wanted
from diffsolve.solution import Stats
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.norms import Tolerance

if TYPE_CHECKING:
    from diffsolve.adjoints.backsolve import BacksolveAdjoint
    from diffsolve.adjoints.continuous import ContinuousAdjoint
    from diffsolve.engines.settings import Settings


def gradients(job: Job, params: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """Gradients of the parameters from those of the flat ones; zero for what ``f`` never uses."""
    native: Any = job.native
    if len(params) == 1 and len(native.tensors) == 1 and native.tensors[0] is params[0]:
        return [flat if params[0].dim() == 1 else flat.view(params[0].shape)]
    found: dict[int, Tensor] = {}
    for x, (offset, count) in zip(native.tensors, native.program.blocks, strict=True):
        if x.requires_grad:
            part = flat if count == len(flat) else flat[offset : offset + count]
            part = part if x.dim() == 1 else part.view(x.shape)
            found[id(x)] = found[id(x)] + part if id(x) in found else part
    return [found[id(p)] if id(p) in found else torch.zeros_like(p) for p in params]


# -- discrete ------------------------------------------------------------------------------------


def run_discrete(job: Job, checkpoints: int | None) -> Outputs:
    """Integrate; the outputs' gradient is the compiled sweep through the steps."""
    carrier = Carrier(job, checkpoints)
    apply: Any = _NativeDiscrete.apply
    if not torch.compiler.is_compiling():
        # beneath its look for torch.func transforms, under which nothing is native
        apply = super(torch.autograd.Function, _NativeDiscrete).apply  # type: ignore[misc]
    u, estimates = apply(carrier, job.u0, *job.field.params)
    return Outputs(carrier.handed_over(), u, estimates)


class _NativeDiscrete(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Carrier, u0: Tensor, *params: Tensor) -> Any:
        job = carrier.job
        wanted = Wanted(job.saves.array, True, carrier.kept, job.dense)
        start = u0.detach() if u0.requires_grad else u0
        found = carrier.trajectory = job.run_native(start, wanted)
        ctx.set_materialize_grads(False)
        ctx.counts = 1 + len(params)
        # autograd frees the states after backward, and sees a parameter changed in place
        ctx.save_for_backward(u0, *params, found.memory.give())
        ctx.job, ctx.native, ctx.memory = job.for_reverse(), job.native, found.memory.records()
        # a graph must not keep f; what the solution keeps serves as long as that lives
        ctx.whole_job, ctx.checkpoints = weakref.ref(job), carrier.kept
        return found.u, found.columns.estimates()

    @staticmethod
    @first_order
    def backward(ctx: Any, of_saved: Tensor | None, of_steps: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # raises if a parameter was changed in place
        started = time.perf_counter()
        job, native = ctx.job, ctx.native
        # by identity: hooks may have put other tensors in the place of those that were saved
        params = job.field.params
        ctx.inputs = saved[0], *params
        stats = job.stats.adjoint = Stats(engine=job.stats.engine, alg=job.alg.name)
        pull: Any = stochastic_sweep if isinstance(native, NativeSDE) else sweep
        cotangents = of_saved, *_rows(of_steps)
        swept = pull(ctx.memory, saved[ctx.counts], cotangents, native.active)
        if (
            (job.alg.has_jacobian_inside or (job.alg.is_implicit and of_steps is not None))
            and not swept.is_finite(ctx.needs_input_grad[1])
            and all(x is None or bool(x.isfinite().all()) for x in cotangents)
        ):  # f is the reason, not the loss
            return None, *_by_torch(ctx, cotangents)
        u_bar, times = None, job.saves.array
        if ctx.needs_input_grad[1]:
            u_bar = torch.from_numpy(swept.u_bar)
            first = job.t0 if times is None or not len(times) else times[0]
            if of_saved is not None and len(of_saved) and first == job.t0:
                u_bar = u_bar + of_saved[0]
        stats.count(swept.counts)
        stats.naccept = ctx.memory.integers[L.ACCEPTED]
        stats.kernel_s = swept.kernel_s
        grads = gradients(job, params, swept.p_bar)
        stats.wall_s = time.perf_counter() - started
        return None, u_bar, *grads


def _by_torch(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a solve whose second derivatives are not finite.

    The torch engine solves it once more, and goes back through steps with such derivatives by
    another method; see ``Sweep``.
    """
    job: Job | None = ctx.whole_job()
    if job is not None:
        tape = StepTape(ctx.checkpoints)
        end = job.run(ctx.inputs[0].detach(), tape).final
        if end is not None and len(tape.records) == ctx.memory.integers[L.ACCEPTED]:
            u_bar, grads = Sweep(job, cotangents, end).run(tape)
            if job.stats.adjoint is not None:
                job.stats.adjoint.engine = "torch"
            return u_bar, *grads
    raise RuntimeError(
        "the gradient is NaN or Inf, since f has no second derivative at a state of the solve, "
        "such as u**1.5 and a norm at zero: keep the solution until backward, use "
        "engine='torch', or a method that needs only first derivatives, such as KenCarp4()"
    )


def _rows(table: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cotangents of each estimate; None where they are zero, which costs less."""
    if table is None:
        return None, None, None
    return tuple(row if row.count_nonzero() else None for row in table.contiguous())


# -- continuous ----------------------------------------------------------------------------------


def run_continuous(sensealg: ContinuousAdjoint, job: Job) -> Outputs:
    """Integrate; the outputs' gradient is a compiled solve of the adjoint equation."""
    carrier = Carrier(job)
    u: Any = _NativeContinuous.apply(sensealg, carrier, job.u0, *job.field.params)
    found: Any = carrier.handed_over()
    return Outputs(found, u, found.columns.estimates())


class _NativeContinuous(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sensealg: ContinuousAdjoint, carrier: Carrier, u0: Tensor, *params: Tensor
    ) -> Tensor:
        job = carrier.job
        along, checkpoints = sensealg.along_path, _checkpoints(sensealg)
        kept = along and checkpoints is not None
        dense = job.dense or (along and checkpoints is None)
        wanted = Wanted(job.saves.array, kept, checkpoints, dense, along and not kept)
        found = carrier.trajectory = job.run_native(u0.detach(), wanted)
        ctx.sensealg, ctx.job, ctx.native = sensealg, job.for_reverse(), job.native
        ctx.times, ctx.counts = [float(t) for t in found.t], 1 + len(params)
        path = ()
        if along:
            path = (found.memory.give() if kept else found.memory.give_dense(),)
            if not job.dense:
                found.dense = None
                found.memory.held.pop(L.DENSE, None)
        ctx.memory = found.memory.records()
        ctx.save_for_backward(u0, *params, found.u, *path)
        return found.u

    @staticmethod
    @first_order
    def backward(ctx: Any, bars: Tensor) -> Any:
        saved_tensors = ctx.saved_tensors  # raises if a parameter was changed in place
        saved, *path = saved_tensors[ctx.counts :]
        started = time.perf_counter()
        job = ctx.job
        u0, params = saved_tensors[0], job.field.params
        ctx.inputs = u0, *params
        stats = job.stats.adjoint = Stats(engine=job.stats.engine)
        size = float(bars.abs().max()) if bars.numel() else 0.0
        if not size < float("inf"):
            raise RuntimeError("the cotangent of the saved states is NaN or Inf: check the loss")
        if size == 0:
            grads = [torch.zeros_like(x) for x in (u0, *params)]
        else:
            # the equation is linear: tolerances then mean the same for every loss
            flat = _reverse(ctx, saved, (bars / size).contiguous(), path, stats)
            grads = [flat[0] * size, *gradients(job, params, flat[1] * size)]
        stats.wall_s = time.perf_counter() - started
        return None, None, *grads


def _reverse(
    ctx: Any, saved: Tensor, bars: Tensor, kept: Sequence[Tensor], stats: Stats
) -> tuple[Tensor, Tensor]:
    """Gradients by the flat initial state and by the flat parameters."""
    sensealg, job, times = ctx.sensealg, ctx.job, ctx.times
    native: NativeField = ctx.native
    memory: Memory = ctx.memory
    program, active, n = native.program, native.active, len(bars[0])
    entries = program.active_entries(active)
    along = sensealg.along_path
    alg = sensealg.alg or job.alg
    extra = 0 if along else n
    z = torch.zeros(n + extra + len(entries), dtype=bars.dtype, device="cpu")
    z[:n] = bars[-1]
    if not along:
        z[n : 2 * n] = saved[-1]
    worst = 0.0
    if times[-1] != job.t0:
        reset = not along and getattr(sensealg, "checkpointing", False)
        problem = ReverseProblem(
            field=program.address("interpolating" if along else "backsolve", active),
            z=z,
            blocks=[n, n + extra, len(z)],
            settings=_settings(sensealg, job, n, len(z), times),
            jacobian=lambda: program.adjoint_jacobian(active, not along),
            path=Path(memory, kept[0], _checkpoints(sensealg) is None) if along else None,
            saved=saved if reset else None,
        )
        row = {t: i for i, t in enumerate(times)}
        found = solve_reverse(
            native,
            alg,
            problem,
            times[-1],
            job.t0,
            lambda t: row.get(t, -1),
            bars,
            job.settings.tolerance,
            job.field.breaks,
        )
        stats.alg, stats.kernel_s = alg.name, found.kernel_s
        stats.count(found.counts)
        stats.naccept, stats.nreject = found.naccept, found.nreject
        if found.status != L.DONE:
            raise reverse_failure(
                type(sensealg).__name__, found.message, RETCODES[found.status], found.t, found.h
            )
        z, worst = found.z, found.worst
    if not along and times[-1] != job.t0:
        u0 = ctx.inputs[0].detach()
        cast("BacksolveAdjoint", sensealg).warn_of(
            max(worst, in_tolerances(z[n : 2 * n], u0, job.settings.tolerance))
        )
    if times[0] == job.t0 and times[-1] != job.t0:
        z[:n] += bars[0]
    flat = torch.zeros(program.n_params, dtype=bars.dtype, device="cpu")
    flat[entries] = z[n + extra :]
    return z[:n], flat


def _checkpoints(sensealg: ContinuousAdjoint) -> int | None:
    return getattr(sensealg, "checkpoints", None)


def _settings(
    sensealg: ContinuousAdjoint, job: Job, n: int, size: int, times: Sequence[float]
) -> Settings:
    """Those of the reverse solve, whose state has ``size`` entries."""
    forward = job.settings.tolerance

    def blocks(given: float | None, theirs: Tensor) -> Tensor:
        own = torch.as_tensor(
            float(theirs.min()) if given is None else given, dtype=theirs.dtype, device="cpu"
        )
        if sensealg.along_path or given is not None:
            return own
        full = own.expand(size).clone()
        full[n : 2 * n] = theirs  # the forward tolerance for the state
        return full

    tolerance = Tolerance(blocks(sensealg.rtol, forward.rtol), blocks(sensealg.atol, forward.atol))
    return sensealg.reverse_settings(job, tolerance, reverse_stops(job, times))
