"""Solves and reverse passes in machine code: what those of all programs share."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.diagnosis import Failure, explain
from diffsolve.engines.native.runtime.memory import Counts, SolveMemory
from diffsolve.engines.native.runtime.template import Template
from diffsolve.engines.plan import SaveRequest, SolveContext, StepTable, Trajectory
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch.step_log import progress_bar
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import ReturnCode
from diffsolve.solvers.algorithm import Algorithm, Trouble
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.norms import Estimates

RETCODES = {
    L.DONE: ReturnCode.SUCCESS,
    L.MAX_ITERS: ReturnCode.MAX_ITERS,
    L.DT_LESS_THAN_MIN: ReturnCode.DT_LESS_THAN_MIN,
    L.UNSTABLE: ReturnCode.UNSTABLE,
    L.NEWTON_FAILED: ReturnCode.NEWTON_FAILED,
}
_TROUBLES = {
    L.NOT_FINITE: Trouble.NOT_FINITE,
    L.NOT_CONVERGED: Trouble.DIVERGED,
    L.SINGULAR: Trouble.SINGULAR,
    L.JAC_NOT_FINITE: Trouble.JACOBIAN,
}
_ESTIMATE_BARS = (L.ERROR_BARS, L.ERROR_NORM_BARS, L.STIFFNESS_BARS)


@dataclass
class StepColumns(StepTable):
    """Start, size and estimates of the steps: rows of a table, which are made tensors when asked.

    Attributes
    ----------
    table
        ``(5, room)`` float64; single numbers fill the first half of a row. Its first two rows are
        read again by the reverse pass and for dense output.
    count
        Steps in it.
    dtype
        Of the estimates.
    """

    table: np.ndarray
    count: int
    dtype: np.dtype

    def __len__(self) -> int:
        return self.count

    def times(self) -> tuple[Tensor, Tensor]:
        t, h = self.table[:2, : self.count].copy()
        return torch.from_numpy(t), torch.from_numpy(h)

    def estimates(self) -> Tensor:
        rows = self.table[2:]
        if self.dtype != rows.dtype:
            rows = rows.view(self.dtype)
        return torch.from_numpy(rows[:, : self.count])


@dataclass
class Swept:
    """Cotangents of the initial state and of the flat parameters, and the work done."""

    u_bar: np.ndarray
    p_bar: Tensor
    counts: Counts
    kernel_s: float

    def is_finite(self, by_state: bool) -> bool:
        """Whether no gradient by the parameters, and by the state if wanted, is NaN or Inf."""
        arrays = [self.p_bar.numpy(), *([self.u_bar] if by_state else [])]
        # a sum tells in one call, unless it overflows
        return all(math.isfinite(x.sum()) or bool(np.isfinite(x).all()) for x in arrays)


class Runtime(ABC):
    """What runs the programs of one kind. ``records`` are their memories, one or several."""

    @abstractmethod
    def template(
        self, program: Any, alg: Algorithm, field: VectorField, settings: Settings
    ) -> Template:
        """What the kernels' arrays hold in such solves.

        Raises
        ------
        Declined
            If they cannot run as machine code.
        """

    def integrate(
        self,
        bound: Any,
        template: Any,
        context: SolveContext,
        u0: Tensor,
        request: SaveRequest,
    ) -> Trajectory:
        """Integrate; see ``Plan.integrate``."""
        bar = progress_bar(context.t0, context.t1) if context.settings.progress else None
        try:
            records, status, kernel_s = self.run(bound, template, context, u0, request, bar)
        finally:
            if bar is not None:
                bar.close()
        memory = self.first(records)
        trajectory = _trajectory_of(memory, records, status, request, kernel_s)
        if status != L.DONE:
            span = context.t0, context.t1
            trajectory.message = message_of(
                status, memory, context.alg, context.settings, span, context.field
            )
        self.finish(records, context, u0, request, trajectory)
        return trajectory

    @abstractmethod
    def run(
        self,
        bound: Any,
        template: Any,
        context: SolveContext,
        u0: Tensor,
        request: SaveRequest,
        bar: Any,
    ) -> tuple[Any, int, float]:
        """Call the kernels; returns their memory, how they ended, and the seconds in them."""

    @abstractmethod
    def first(self, records: Any) -> SolveMemory:
        """The memory whose steps are those of all."""

    @abstractmethod
    def finish(
        self,
        records: Any,
        context: SolveContext,
        u0: Tensor,
        request: SaveRequest,
        trajectory: Trajectory,
    ) -> None:
        """Make dense output, and let go of what the reverse pass does not need."""

    def sweep(
        self,
        records: Any,
        states: Tensor,
        cotangents: Sequence[Tensor | None],
        active: tuple[bool, ...],
    ) -> Swept:
        """Pull cotangents of the saved states and of the estimates back to the start.

        Parameters
        ----------
        records, states
            Of the forward solve: what was noted of the steps, and what autograd kept.
        cotangents
            Of the saved states ``(T, N)`` and of ``error, error_norm, stiffness`` ``(n,)``.
        active
            Which tensors of the parameters are differentiated.
        """
        of_saved, *of_steps = [
            x.contiguous() if x is not None and x.numel() else None for x in cotangents
        ]
        passes = self.begin_sweep(records, states, active, of_steps.count(None) < 3)
        for memory in passes:
            if of_saved is not None:
                memory.hold(L.SAVED_BARS, of_saved)
                memory.integers[L.SAVED_BARS] += memory.first_entry * memory.dtype.itemsize
            for slot, bar in zip(_ESTIMATE_BARS, of_steps, strict=True):
                if bar is not None:
                    memory.hold(slot, bar)
        started = time.perf_counter()
        refuse_not_repeated(self.run_sweep(passes, active))
        kernel_s = time.perf_counter() - started
        u_bar, p_bar = self.end_sweep(passes, active)
        return Swept(u_bar, p_bar, passes[0].counts(), kernel_s)

    @abstractmethod
    def begin_sweep(
        self, records: Any, states: Tensor, active: tuple[bool, ...], whole: bool
    ) -> list[Any]:
        """Memories for a reverse pass, with room for the cotangents.

        ``whole``: also estimates of the steps have cotangents.
        """

    @abstractmethod
    def run_sweep(self, passes: list[Any], active: tuple[bool, ...]) -> int:
        """Call the kernels; returns how they ended."""

    @abstractmethod
    def end_sweep(self, passes: list[Any], active: tuple[bool, ...]) -> tuple[np.ndarray, Tensor]:
        """Cotangents of the initial state and of the flat parameters."""


def refuse_not_repeated(status: int) -> None:
    """Refuse to go on where a step of the solve could not be taken again."""
    if status != L.DONE:
        raise RuntimeError(
            "the reverse pass could not repeat a step of the solve: its equations were not solved. "
            "Use DiscreteAdjoint() without checkpoints, which keeps their solutions."
        )


def _trajectory_of(
    memory: SolveMemory, records: Any, status: int, request: SaveRequest, kernel_s: float
) -> Trajectory:
    """What kernels have left in memory."""
    integers, reals, arrays = memory.integers, memory.reals, memory.arrays
    saved, times = integers[L.SAVED], request.saves.array
    if times is None:
        reached: Any = [*memory.steps()[0].tolist(), reals[L.T]][:saved]
    else:
        reached = times if saved == integers[L.N_SAVES] else times[:saved]
    out = arrays[L.OUT_U]
    return Trajectory(
        t=reached,
        u=torch.from_numpy(out if saved == len(out) else out[:saved]),
        steps=StepColumns(arrays[L.STEP_T], integers[L.ACCEPTED], memory.dtype),
        counts=memory.counts(),
        nreject=integers[L.REJECTED],
        final_t=reals[L.T],
        final_h=reals[L.LAST_H] if integers[L.ATTEMPTS] else math.nan,
        retcode=RETCODES[status],
        kernel_s=kernel_s,
        records=records,
    )


def message_of(
    status: int,
    memory: SolveMemory,
    alg: Algorithm,
    settings: Settings,
    span: tuple[float, float],
    field: VectorField | None = None,
) -> str:
    """Why a solve failed; ``field``: the user's right-hand side, if that is what was solved."""
    reals, integers = memory.reals, memory.integers
    last = None
    if integers[L.ATTEMPTS]:
        stiffness = reals[L.LAST_STIFFNESS]
        if integers[L.STABLE] and abs(reals[L.LAST_H]) >= reals[L.STABLE_SIZE]:
            stiffness = max(stiffness, reals[L.STABLE_RATE])
        last = Estimates(reals[L.LAST_ERROR], 0.0, stiffness)
    return explain(
        Failure(
            RETCODES[status],
            alg,
            settings,
            t0=span[0],
            t=reals[L.T],
            t1=span[1],
            h=reals[L.SIZE],
            last_h=reals[L.LAST_H] if integers[L.ATTEMPTS] else math.nan,
            attempts=integers[L.ATTEMPTS],
            rejected=integers[L.REJECTED],
            estimates=last,
            state=memory.state(),
            trouble=_TROUBLES.get(int(integers[L.FAILURE])),
            is_sde=field is not None and field.is_stochastic,
            field=field,
        )
    )
