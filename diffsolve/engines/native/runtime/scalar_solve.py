"""Solves of ODEs in machine code, and the discrete adjoint of their steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.programs.bound import ScalarBound
from diffsolve.engines.native.programs.scalar import ScalarProgram
from diffsolve.engines.native.runtime.kernels import kernel
from diffsolve.engines.native.runtime.memory import SolveMemory
from diffsolve.engines.native.runtime.solve import Runtime
from diffsolve.engines.native.runtime.switching import advance, join_dense, runs_of, use
from diffsolve.engines.native.runtime.template import ScalarTemplate, template_for
from diffsolve.engines.plan import SaveRequest, SolveContext, Trajectory
from diffsolve.engines.settings import Settings
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.kernels import layout as L


class ScalarRuntime(Runtime):
    """What runs a ``ScalarProgram``: one memory, whose steps two methods may take by turns."""

    def template(
        self, program: ScalarProgram, alg: Algorithm, field: VectorField, settings: Settings
    ) -> ScalarTemplate:
        return template_for(program, alg, field, settings)

    def run(
        self,
        bound: ScalarBound,
        template: ScalarTemplate,
        context: SolveContext,
        u0: Tensor,
        request: SaveRequest,
        bar: Any,
    ) -> tuple[SolveMemory, int, float]:
        breaks = context.field.breaks
        n, params = bound.program.n, bound.params
        memory = SolveMemory(bound, template, n, params, breaks, request=request)
        memory.span(context.t0, context.t1, context.settings.tstops)
        memory.start(u0)
        other: Any = template.other
        if request.states and other is not None:
            memory.prepare_stiff = lambda: other().reverse(bound.active)
        started = time.perf_counter()
        status = advance(memory, bar)
        return memory, status, time.perf_counter() - started

    def first(self, records: SolveMemory) -> SolveMemory:
        return records

    def finish(
        self,
        records: SolveMemory,
        context: SolveContext,
        u0: Tensor,
        request: SaveRequest,
        trajectory: Trajectory,
    ) -> None:
        records.give_back_work()
        del records.arrays[L.START]
        records.arrays.pop(L.MATRIX, None)
        if request.dense:
            if len(records.runs) > 1:
                join_dense(records)
            trajectory.dense = NativeDense(records, context.t0, u0)

    def begin_sweep(
        self, records: SolveMemory, states: Tensor, active: tuple[bool, ...], whole: bool
    ) -> list[SolveMemory]:
        memory = records.copy()
        memory.borrow_work()
        memory.take_states(states)
        memory.restart_counts()
        integers, n, dtype = memory.integers, memory.n, memory.dtype
        memory.hold_new(L.STATE_BAR, np.zeros(2 * n + memory.bound.program.n_params, dtype))
        integers[L.P_BAR] = integers[L.STATE_BAR] + 2 * n * dtype.itemsize
        if integers[L.STRIDE] > 1:
            memory.hold_new(L.SEGMENT, np.empty((integers[L.STRIDE], 2, n), dtype))
        return [memory]

    def run_sweep(self, passes: list[SolveMemory], active: tuple[bool, ...]) -> int:
        """Back through the runs of each method, the last one first."""
        (memory,) = passes
        integers = memory.integers
        for run in reversed(runs_of(memory)):
            if len(memory.runs) > 1:
                use(memory, run)
                if memory.method.is_implicit:
                    memory.add_linear_systems()
            vjp, step_vjp, jacobian_vjp, function = run.template.reverse(active)
            integers[L.VJP], integers[L.FUSED_VJP] = vjp, step_vjp
            integers[L.JAC_VJP] = jacobian_vjp
            integers[L.STEPS_LEFT], integers[L.SWEEP_FROM] = run.end, run.end - 1
            status = memory.run(function)
            if status != L.DONE:
                return status
        memory.give_back_work()
        return L.DONE

    def end_sweep(
        self, passes: list[SolveMemory], active: tuple[bool, ...]
    ) -> tuple[np.ndarray, Tensor]:
        (memory,) = passes
        bars, n = memory.arrays[L.STATE_BAR], memory.n
        return bars[:n], torch.from_numpy(bars[2 * n :])


class NativeDense:
    """Continuous extension of a native solve; as ``DenseOutput``."""

    def __init__(self, memory: SolveMemory, t0: float, u0: Tensor):
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
        memory.run(kernel("read", memory.method.family, memory.bound.program.is_float32))
        return out
