"""Solves as machine code, and their reverse passes, as a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffsolve.engines.native.programs.lookup import find
from diffsolve.engines.native.programs.recipes import recipe_of
from diffsolve.engines.native.runtime.adjoint_solve import (
    ForwardPath,
    ReverseProblem,
    solve_reverse,
)
from diffsolve.engines.native.runtime.kernels import kernel
from diffsolve.engines.native.runtime.method import method_of
from diffsolve.engines.native.runtime.runtimes import runtime_of
from diffsolve.engines.native.runtime.solve import RETCODES
from diffsolve.engines.plan import (
    AdjointEquation,
    ForwardSolve,
    NoSecondDerivative,
    Plan,
    SaveRequest,
    SolveContext,
    Trajectory,
)
from diffsolve.engines.reverse_solves import in_tolerances, reverse_failure, reverse_stops
from diffsolve.engines.settings import Settings
from diffsolve.problems.probe import unhooked
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.norms import Tolerance
from diffsolve.solvers.switching import AutoSwitch


class NativePlan(Plan):
    """The machine code of a right-hand side, and what the kernels are given; see ``Plan``.

    Parameters
    ----------
    field, t0, u0, direction
        Right-hand side, start of the solve, and which way its time goes.
    verify
        Whether to compare code that is known with one evaluation by torch.

    Attributes
    ----------
    bound
        The program with the tensors of this solve.
    template
        What the kernels' arrays hold in such solves. ``prepare`` finds it.

    Raises
    ------
    Declined
        If the right-hand side cannot be compiled.
    """

    engine = "native"

    def __init__(self, field: VectorField, t0: float, u0: Tensor, direction: float, verify: bool):
        with unhooked():
            self.bound = find(field, recipe_of(field), t0, u0, direction, verify)
        self._runtime = runtime_of(self.bound)
        self.template: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> NativePlan:
        return self  # nothing changes it, and machine code has no copies

    def keep_params(self) -> None:
        self.bound.keep_params()

    def compile_s(self) -> float:
        return self.bound.compile_s()

    def differentiable(self, field: VectorField, by_state: bool) -> list[Tensor]:
        """Every tensor with ``requires_grad`` that ``f`` uses, or could use.

        Raises
        ------
        Declined
            If ``f`` keeps gradients from flowing somewhere.
        """
        return self.bound.differentiable(field, by_state)

    def prepare(
        self, field: VectorField, alg: Algorithm, settings: Settings, sensealg: Any
    ) -> None:
        """Find the template, and compile what the reverse pass of ``sensealg`` needs.

        Raises
        ------
        Declined
            If the native engine cannot solve it, or cannot go back.
        """
        bound = self.bound
        key = bound.program, sensealg, bound.active
        latest = field.memo.setup
        if latest is not None and latest[0] == key:
            self.template = latest[1]
            return
        self.template = self._runtime.template(
            bound.program, alg, field, sensealg.prepared(settings)
        )
        sensealg.compile(self, alg)
        field.memo.setup = key, self.template

    # -- code of the reverse pass, made before the solve -----------------------------------------

    def compile_sweep(self, checkpoints: int | None) -> None:
        """Make what ``pull`` needs."""
        if checkpoints is not None:
            self.template.check_checkpoints()
        self.template.reverse(self.bound.active)

    def compile_adjoint(self, alg: Algorithm, along_path: bool, kept_states: int | None) -> None:
        """Make the adjoint equation, to be solved by ``alg``."""
        if isinstance(alg, AutoSwitch):
            alg = alg.nonstiff
        program, active = self.bound.program, self.bound.active
        method = method_of(alg)
        kernel("advance", method.family, program.is_float32)
        program.address("interpolating" if along_path else "backsolve", active)
        if method.family.is_implicit:
            program.adjoint_jacobian(active, not along_path)
        if along_path and kept_states is not None:
            kernel("replay", self.template.method.family, program.is_float32)

    # -- solves ----------------------------------------------------------------------------------

    def integrate(self, context: SolveContext, u0: Tensor, request: SaveRequest) -> Trajectory:
        trajectory = self._runtime.integrate(self.bound, self.template, context, u0, request)
        context.stats.kernel_s = trajectory.kernel_s
        return trajectory

    def for_reverse(self, context: SolveContext) -> SolveContext:
        """Without what refers to ``f``."""
        self.bound.forget_functions()
        light = object.__new__(SolveContext)
        light.__dict__.update(context.__dict__, field=context.field.without_functions())
        return light

    # -- the discrete adjoint --------------------------------------------------------------------

    def keep(self, trajectory: Trajectory) -> tuple[list[Tensor], Any]:
        memory = trajectory.records
        return [memory.give_states()], memory.records()

    def pull(
        self,
        context: SolveContext,
        kept: Sequence[Tensor],
        records: Any,
        u0: Tensor,
        cotangents: Sequence[Tensor | None],
        by_state: bool,
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        alg, (of_saved, *of_steps) = context.alg, cotangents
        swept = self._runtime.sweep(records, kept[0], cotangents, self.bound.active)
        estimated = any(x is not None for x in of_steps)
        if (
            (alg.has_jacobian_inside or (alg.is_implicit and estimated))
            and not swept.is_finite(by_state)
            and all(x is None or bool(x.isfinite().all()) for x in cotangents)
        ):  # f is the reason, not the loss
            raise NoSecondDerivative
        u_bar, times = None, context.saves.array
        if by_state:
            u_bar = torch.from_numpy(swept.u_bar)
            first = context.t0 if times is None or not len(times) else times[0]
            if of_saved is not None and len(of_saved) and first == context.t0:
                u_bar = u_bar + of_saved[0]
        stats = context.stats.adjoint
        assert stats is not None
        stats.count(swept.counts)
        stats.naccept, stats.kernel_s = records.integers[L.ACCEPTED], swept.kernel_s
        return u_bar, self._gradients(context.field.params, swept.p_bar)

    def _gradients(self, params: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
        """Those of the parameters from the flat ones; zero for what ``f`` never uses."""
        tensors = self.bound.tensors
        if len(params) == 1 and len(tensors) == 1 and tensors[0] is params[0]:
            return [flat if params[0].dim() == 1 else flat.view(params[0].shape)]
        totals: dict[int, Tensor] = {}
        for x, (offset, count) in zip(tensors, self.bound.program.blocks, strict=True):
            if x.requires_grad:
                part = flat if count == len(flat) else flat[offset : offset + count]
                part = part if x.dim() == 1 else part.view(x.shape)
                totals[id(x)] = totals[id(x)] + part if id(x) in totals else part
        return [totals[id(p)] if id(p) in totals else torch.zeros_like(p) for p in params]

    # -- continuous adjoints ---------------------------------------------------------------------

    def forward(
        self, context: SolveContext, adjoint: AdjointEquation, u0: Tensor
    ) -> tuple[Trajectory, list[Tensor], Any]:
        along, kept_states = adjoint.along_path, adjoint.kept_states
        keeps_states = along and kept_states is not None
        keeps_dense = along and not keeps_states
        request = SaveRequest(
            context.saves,
            keeps_states,
            kept_states,
            dense=context.dense or keeps_dense,
            complete=keeps_dense,
        )
        trajectory = self.integrate(context, u0, request)
        memory = trajectory.records
        kept = []
        if along:
            kept = [memory.give_states() if keeps_states else memory.give_dense()]
            if not context.dense:
                trajectory.dense = None
                memory.arrays.pop(L.DENSE, None)
        return trajectory, kept, memory.records()

    def solve_adjoint(
        self, context: SolveContext, adjoint: AdjointEquation, forward: ForwardSolve, bars: Tensor
    ) -> Sequence[Tensor]:
        program, active, n = self.bound.program, self.bound.active, len(bars[0])
        entries, along, times = (
            program.active_entries(active),
            adjoint.along_path,
            [float(t) for t in forward.times],
        )
        extra = 0 if along else n
        z = torch.zeros(n + extra + len(entries), dtype=bars.dtype, device="cpu")
        z[:n] = bars[-1]
        if not along:
            z[n : 2 * n] = forward.saved[-1]
        if times[-1] != context.t0:
            problem = ReverseProblem(
                field=program.address("interpolating" if along else "backsolve", active),
                z=z,
                blocks=[n, n + extra, len(z)],
                settings=_settings(context, adjoint, n, len(z), times),
                jacobian=lambda: program.adjoint_jacobian(active, not along),
                path=ForwardPath(forward.records, forward.kept[0], adjoint.kept_states is None)
                if along
                else None,
                saved=forward.saved if not along and adjoint.resets_state else None,
            )
            z = self._solved(context, adjoint, problem, forward.u0, times, bars)
        if times[0] == context.t0 and times[-1] != context.t0:
            z[:n] += bars[0]
        flat = torch.zeros(program.n_params, dtype=bars.dtype, device="cpu")
        flat[entries] = z[n + extra :]
        return [z[:n], *self._gradients(context.field.params, flat)]

    def _solved(
        self,
        context: SolveContext,
        adjoint: AdjointEquation,
        problem: ReverseProblem,
        u0: Tensor,
        times: Sequence[float],
        bars: Tensor,
    ) -> Tensor:
        """The reverse state at the start of the solve."""
        alg, tolerance, n = adjoint.alg or context.alg, context.settings.tolerance, len(bars[0])
        row = {t: i for i, t in enumerate(times)}
        result = solve_reverse(
            self.bound,
            alg,
            problem,
            times[-1],
            context.t0,
            lambda t: row.get(t, -1),
            bars,
            tolerance,
            context.field.breaks,
        )
        stats = context.stats.adjoint
        assert stats is not None
        stats.alg, stats.kernel_s = alg.name, result.kernel_s
        stats.count(result.counts)
        stats.naccept, stats.nreject = result.naccept, result.nreject
        if result.status != L.DONE:
            raise reverse_failure(
                type(adjoint).__name__,
                result.message,
                RETCODES[result.status],
                result.t,
                result.h,
            )
        if not adjoint.along_path:
            missed = in_tolerances(result.z[n : 2 * n], u0, tolerance)
            adjoint.warn_of(max(result.worst, missed))
        return result.z


def _settings(
    context: SolveContext, adjoint: AdjointEquation, n: int, size: int, times: Sequence[float]
) -> Settings:
    """Those of the reverse solve, whose state has ``size`` entries."""
    forward = context.settings.tolerance

    def blocks(given: float | None, theirs: Tensor) -> Tensor:
        own = torch.as_tensor(
            float(theirs.min()) if given is None else given, dtype=theirs.dtype, device="cpu"
        )
        if adjoint.along_path or given is not None:
            return own
        full = own.expand(size).clone()
        full[n : 2 * n] = theirs  # the forward tolerance for the state
        return full

    tolerance = Tolerance(blocks(adjoint.rtol, forward.rtol), blocks(adjoint.atol, forward.atol))
    return adjoint.reverse_settings(context, tolerance, reverse_stops(context, times))
