"""Solves in machine code: calls of the compiled loop, and what comes out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.diagnosis import Failure, explain
from diffsolve.engines.native.programs.bound import ScalarBound as NativeField
from diffsolve.engines.native.runtime.kernels import kernel
from diffsolve.engines.native.runtime.memory import Counts, Memory
from diffsolve.engines.native.runtime.switching import join_dense
from diffsolve.engines.native.runtime.template import Wanted
from diffsolve.engines.settings import Settings
from diffsolve.engines.trajectory import progress_bar
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import ReturnCode, Steps
from diffsolve.solvers.algorithm import Algorithm, Trouble
from diffsolve.solvers.interpolation import DenseOutput
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


@dataclass(slots=True)
class StepColumns:
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

    def times(self) -> tuple[Tensor, Tensor]:
        t, h = self.table[:2, : self.count].copy()
        return torch.from_numpy(t), torch.from_numpy(h)

    def estimates(self) -> Tensor:
        """``error, error_norm, stiffness``: ``(3, n)``."""
        rows = self.table[2:]
        if self.dtype != rows.dtype:
            rows = rows.view(self.dtype)
        return torch.from_numpy(rows[:, : self.count])

    def steps(self, estimates: Tensor | None = None) -> Steps:
        """The columns of all, or the times with estimates that are differentiated."""
        rows = self.estimates() if estimates is None else estimates
        return Steps(*self.times(), rows[0], rows[1], rows[2])


@dataclass
class NativeTrajectory:
    """What a native solve gives back; as ``torch_engine.Trajectory``, with tensors for lists."""

    t: Sequence[float]
    u: Tensor
    columns: StepColumns
    counts: Counts
    nreject: int
    final_t: float
    final_h: float
    retcode: ReturnCode
    kernel_s: float
    memory: Memory = field(repr=False)
    message: str = ""
    dense: NativeDense | DenseOutput | None = None

    @property
    def naccept(self) -> int:
        return self.columns.count


def integrate(
    native: NativeField,
    alg: Algorithm,
    u0: Tensor,
    t0: float,
    t1: float,
    settings: Settings,
    wanted: Wanted,
    field: VectorField,
) -> NativeTrajectory:
    """Integrate from ``t0`` to ``t1`` in machine code.

    Returns
    -------
    NativeTrajectory
        With the partial result and the reason where the solve failed.
    """
    made = native.template
    memory = Memory(native, made, native.program.n, native.params, field.breaks, wanted=wanted)
    memory.span(t0, t1, settings.tstops)
    memory.start(u0)
    other = made.other
    if wanted.states and other is not None:
        memory.prepare_stiff = lambda: other().reverse(native.program, native.active)
    bar = progress_bar(t0, t1) if settings.progress else None
    started = time.perf_counter()
    try:
        status = memory.advance(bar)
    finally:
        if bar is not None:
            bar.close()
    kernel_s = time.perf_counter() - started
    integers, reals, held = memory.integers, memory.reals, memory.held
    saved = integers[L.SAVED]
    if wanted.times is None:
        times: Sequence[float] = [*memory.steps()[0].tolist(), reals[L.T]][:saved]
    else:
        times = wanted.times if saved == integers[L.N_SAVES] else wanted.times[:saved]  # type: ignore[assignment]
    out = held[L.OUT_U]
    found = NativeTrajectory(
        t=times,
        u=torch.from_numpy(out if saved == len(out) else out[:saved]),
        columns=StepColumns(held[L.STEP_T], integers[L.ACCEPTED], memory.dtype),
        counts=memory.counts(),
        nreject=integers[L.REJECTED],
        final_t=reals[L.T],
        final_h=reals[L.LAST_H] if integers[L.ATTEMPTS] else math.nan,
        retcode=RETCODES[status],
        kernel_s=kernel_s,
        memory=memory,
    )
    if status != L.DONE:
        found.message = message_of(status, memory, alg, settings, (t0, t1), field)
    memory.give_back_work()
    del held[L.START]
    held.pop(L.MATRIX, None)
    if wanted.dense:
        if len(memory.runs) > 1:
            join_dense(memory)
        found.dense = NativeDense(memory, t0, u0)
    return found


def message_of(
    status: int,
    memory: Memory,
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
            is_sde=isinstance(field, SDEField),
            field=field,
        )
    )


class NativeDense:
    """Continuous extension of a native solve; as ``DenseOutput``."""

    def __init__(self, memory: Memory, t0: float, u0: Tensor):
        self._memory = memory
        self.direction = memory.reals[L.DIRECTION]
        self.u0 = u0
        self.ends = [self.direction * t0, self.direction * memory.reals[L.T]]

    def __call__(self, times: Sequence[float], derivative: int = 0) -> Tensor:
        """States ``(m, N)`` at times in any order."""
        low, high = self.ends
        for t in times:
            if not low <= self.direction * t <= high:
                ends = sorted((self.direction * low, self.direction * high))
                raise ValueError(f"t = {t} is outside of the solved interval {ends}")
        memory = self._memory.copy()  # threads may read at once
        out = torch.from_numpy(np.empty((len(times), memory.n), memory.dtype))
        integers = memory.integers
        if not integers[L.ACCEPTED]:  # an empty span: every time is t0
            return self.u0.expand_as(out) if not derivative else torch.zeros_like(out)
        memory.hold(L.READ, np.asarray(times, dtype=np.float64))
        memory.hold(L.READ_OUT, out)
        integers[L.N_READ], integers[L.DERIVATIVE] = len(times), derivative
        memory.work()
        memory.run(kernel("read", memory.method.family, memory.native.program.is_float32))
        return out
