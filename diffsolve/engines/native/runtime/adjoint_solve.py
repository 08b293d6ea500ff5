"""Adjoint equations, solved backward in machine code."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.programs.bound import ScalarBound
from diffsolve.engines.native.programs.scalar import SparseJacobian
from diffsolve.engines.native.runtime.kernels import kernel
from diffsolve.engines.native.runtime.memory import Counts, SolveMemory
from diffsolve.engines.native.runtime.solve import message_of, refuse_not_repeated
from diffsolve.engines.native.runtime.switching import (
    advance,
    as_polynomials,
    degree_of,
    runs_of,
    use,
    use_polynomials,
)
from diffsolve.engines.native.runtime.template import template_for, write_tolerance
from diffsolve.engines.settings import Settings
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.norms import Tolerance


class ForwardPath:
    """The forward solution for an adjoint equation: all of its stages, or a window of them.

    Parameters
    ----------
    forward
        Memory of the forward solve.
    kept
        Its dense records, or with checkpoints the records of its steps.
    whole
        Whether ``kept`` are dense records.
    """

    def __init__(self, forward: SolveMemory, kept: Tensor, whole: bool):
        self.forward, self.kept, self.whole = forward, kept, whole
        self.starts, self.sizes, *_ = forward.steps()
        if not whole:
            self.forward = forward = forward.copy()
            forward.take_states(kept)
        self.direction = forward.reals[L.DIRECTION]
        self.end = forward.reals[L.T]

    def give(self, memory: SolveMemory, low: float, high: float) -> None:
        """Show the kernel a part of the path that holds the times between ``low`` and ``high``."""
        first, last = 0, len(self.starts)
        dense = self.kept
        if not self.whole:
            oriented = self.direction * self.starts
            a, b = sorted((self.direction * low, self.direction * high))
            stride = self.forward.integers[L.STRIDE]
            first = max(bisect_left(oriented, a) - 1, 0) // stride * stride
            last = max(bisect_right(oriented, b), first + 1)
            dense = self._remade(first, last)
        starts = np.ascontiguousarray(self.starts[first:last])
        memory.hold(L.PATH, dense)
        memory.hold(L.PATH_T, starts)
        memory.hold(L.PATH_H, np.ascontiguousarray(self.sizes[first:last]))
        integers, reals = memory.integers, memory.reals
        integers[L.PATH_STEPS] = last - first
        end = self.end if last == len(self.starts) else float(self.starts[last])
        reals[L.PATH_END] = end
        reals[L.WINDOW_LOW], reals[L.WINDOW_HIGH] = sorted((float(starts[0]), end))
        shown = self.forward if self.whole else self.window
        integers[L.PRIMAL_N] = self.forward.n
        integers[L.PATH_ROWS] = shown.integers[L.STAGES] + shown.integers[L.EXTRA]
        integers[L.PATH_STRIDE] = shown.integers[L.DENSE_ROWS]
        integers[L.PATH_DEGREE] = shown.integers[L.DEGREE]
        integers[L.PATH_POLY] = shown.integers[L.POLY]

    def _remade(self, first: int, last: int) -> Tensor:
        """Dense records of some steps, repeated from the states that were kept."""
        memory = self.window = self.forward.copy()
        memory.work()
        runs = [run for run in runs_of(memory) if run.begin < last and run.end > first]
        parts = []
        for run in runs:
            if len(memory.runs) > 1:
                use(memory, run)
                if memory.method.is_implicit:
                    memory.add_linear_systems()
            begin, end = max(first, run.begin), min(last, run.end)
            rows = 1 + memory.method.rows
            dense = np.empty((end - begin, rows, memory.n), memory.dtype)
            memory.hold_new(L.DENSE, dense)
            integers = memory.integers
            integers[L.DENSE_ROWS] = rows
            integers[L.REPLAY_FROM], integers[L.CHUNK] = begin, end - begin
            function = kernel("replay", memory.method.family, memory.bound.program.is_float32)
            refuse_not_repeated(memory.run(function))
            parts.append(dense)
        if len(memory.runs) > 1:
            degree = degree_of(memory)
            pairs = zip(parts, runs, strict=True)
            parts = [as_polynomials(part, run, degree) for part, run in pairs]
            use_polynomials(memory, degree)
        return torch.from_numpy(np.concatenate(parts))


@dataclass
class ReverseProblem:
    """An adjoint equation, ready to be solved backward in time.

    Attributes
    ----------
    field, jacobian
        Its right-hand side over ``z``, and the Jacobian of that for an implicit method.
    z
        Its state at the last saved time.
    blocks
        Ends of the parts of ``z``.
    settings
        Those of the reverse solve.
    path
        The forward solution, where it is read from there.
    saved
        Forward states ``(T, N)`` to which the reconstruction is set, where it is.
    """

    field: int
    z: Tensor
    blocks: list[int]
    settings: Settings
    jacobian: Callable[[], SparseJacobian] | None = None
    path: ForwardPath | None = None
    saved: Tensor | None = None


@dataclass
class ReverseResult:
    z: Tensor
    worst: float
    counts: Counts
    naccept: int
    nreject: int
    status: int
    message: str
    t: float
    h: float
    kernel_s: float


def solve_reverse(
    bound: ScalarBound,
    alg: Algorithm,
    problem: ReverseProblem,
    start: float,
    end: float,
    jumps: Callable[[float], int],
    bars: Tensor,
    forward_tolerance: Tolerance,
    breaks: Sequence[float],
) -> ReverseResult:
    """Solve an adjoint equation from ``start`` back to ``end``.

    Parameters
    ----------
    jumps
        Row of ``bars`` to add at a stop, or -1.
    """
    n = len(bars[0])
    params = torch.cat([bound.params, torch.zeros(2 * n, dtype=bars.dtype, device="cpu")])
    template = template_for(bound.program, alg, None, problem.settings)
    memory = SolveMemory(
        bound, template, len(problem.z), params, breaks, problem.field, problem.jacobian
    )
    integers, reals = memory.integers, memory.reals
    stops = problem.settings.tstops
    memory.span(start, end, stops)
    memory.blocks(problem.blocks)
    integers[L.PRIMAL_N] = n
    memory.hold(L.BARS, bars)
    memory.hold(L.JUMPS, np.asarray([*map(jumps, stops), -1], dtype=np.int64))
    if problem.saved is not None:
        memory.hold(L.RESET, problem.saved.detach().contiguous())
        slots = L.FORWARD_RTOL, L.FORWARD_RTOL_STRIDE, L.FORWARD_ATOL, L.FORWARD_ATOL_STRIDE
        write_tolerance(forward_tolerance, slots, integers, memory.arrays)
    if problem.path is not None:
        integers[L.PATH_OUT] = integers[L.PARAMS] + len(bound.params) * memory.dtype.itemsize
        problem.path.give(memory, start, start)
    memory.start(problem.z)
    started = time.perf_counter()
    status = advance(memory)
    while status == L.NEED_PATH and problem.path is not None:
        low, high = sorted((reals[L.T], reals[L.T] + reals[L.LAST_H]))
        low, high = max(low, reals[L.T_LOW]), min(high, reals[L.T_HIGH])
        problem.path.give(memory, low, high)
        status = advance(memory)
    kernel_s = time.perf_counter() - started
    z = memory.state()
    message = ""
    if status != L.DONE:
        message = message_of(status, memory, alg, problem.settings, (start, end))
    return ReverseResult(
        z=z,
        worst=reals[L.WORST],
        counts=memory.counts(),
        naccept=integers[L.ACCEPTED],
        nreject=integers[L.REJECTED],
        status=status,
        message=message,
        t=reals[L.T],
        h=reals[L.LAST_H] if integers[L.ATTEMPTS] else math.nan,
        kernel_s=kernel_s,
    )
