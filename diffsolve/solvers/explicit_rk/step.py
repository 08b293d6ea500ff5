"""One step of an explicit Runge-Kutta method over torch tensors.

The same formulas stand twice: written into reused buffers, for speed, where nothing is recorded;
and as pure operations, where autograd or a ``torch.func`` transform looks on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Step
from diffsolve.solvers.explicit_rk.tableau import Stages
from diffsolve.solvers.stage_rows import RKInterpolant, RKState, as_scale, constant


def take_step(
    field: VectorField, stages: Stages, t: Any, h: Any, state: RKState, open_end: bool = False
) -> Step:
    """Attempt a step; on the tape when autograd records.

    ``open_end``: without the derivative at the new point, which costs an evaluation; off the tape.
    """
    if torch.is_grad_enabled():
        return _recorded_step(field, stages, t, h, state)
    buffers = field.workspace.get(_StageBuffers)
    if buffers is None or buffers.stages is not stages:
        buffers = field.workspace.put(_StageBuffers(field, stages))
    return buffers.step(field, t, h, state, open_end)


def _recorded_step(field: VectorField, stages: Stages, t: Any, h: Any, state: RKState) -> Step:
    u, du = state
    scale = as_scale(field, h)
    a = constant(field, stages.a) * scale
    times = field.times(t, h, stages.c)
    k, g = [du], u
    stiff_stage = stiffness_stage(stages)
    g_stiff = u
    for i in range(1, stages.n):
        g = torch.addmv(u, torch.stack(k, 1), a[i, :i])
        k.append(field(times[i], g))
        if i == stiff_stage:
            g_stiff = g
    rows = torch.stack(k)
    error, error_low = (
        None if b is None else (constant(field, b) * scale) @ rows
        for b in (stages.b_error, stages.b_error_low)
    )
    return Step(
        RKState(g, k[-1]),
        error,
        (k[-1] - k[stiff_stage], g - g_stiff),
        RKInterpolant(field, t, h, u, rows, stages.interpolant),
        error_low,
    )


def stiffness_stage(stages: Stages) -> int:
    """The last stage before the final one, preferably at the same time.

    Derivatives at equal times differ by the state alone, as in Shampine's estimate (Hairer,
    Wanner, Solving ODEs II, section IV.2).
    """
    same_time = [i for i in range(stages.n - 1) if stages.c[i] == 1.0]
    return same_time[-1] if same_time else stages.n - 2


def _stiffness(field: VectorField, time: Tensor, u: Tensor, other: Tensor, same: Tensor) -> float:
    """The estimate, from the derivative at ``u`` and the one, ``same``, at another state."""
    above, below = torch.linalg.vector_norm(
        torch.stack([field(time, u) - same, u - other]), dim=1
    ).tolist()
    return above / below if below > 0 else 0.0


class _StageBuffers:
    """Buffers and views of them that one solve uses again in every step."""

    def __init__(self, field: VectorField, stages: Stages):
        n, size = stages.n, field.structure.size
        self.stages = stages
        self.nodes = stages.c[1:]  # the derivative at the first is known
        self.stiff_stage = stiffness_stage(stages)
        rows = [stages.a]
        if stages.b_error is not None:
            rows.append(stages.b_error[None])
        if stages.b_error_low is not None:
            rows.append(stages.b_error_low[None])
        self.weights = torch.as_tensor(np.concatenate(rows), dtype=field.dtype, device=field.device)
        self.scaled = torch.empty_like(self.weights)  # the weights times h
        self.k = torch.empty(n, size, dtype=field.dtype, device=field.device)
        self.k_rows = self.k.unbind(0)
        self.f_rows = field.rows_of(self.k)
        k_columns = self.k.T
        # stage i: u + sum over the stages before it
        self.combine = [(k_columns[:, :i], self.scaled[i, :i]) for i in range(1, n)]
        self.k_columns = k_columns
        self.error_weights = self.scaled[n] if stages.b_error is not None else None
        self.low_weights = self.scaled[n + 1] if stages.b_error_low is not None else None

    def step(self, field: VectorField, t: float, h: float, state: RKState, open_end: bool) -> Step:
        u, du = state
        torch.mul(self.weights, h, out=self.scaled)
        times = field.times(t, h, self.nodes)
        rows, f_rows, addmv, write = self.k_rows, self.f_rows, torch.addmv, field.write
        rows[0].copy_(du)
        g = g_stiff = u
        for i, (k_before, a) in enumerate(self.combine, 1):
            g = addmv(u, k_before, a)
            if i == self.stiff_stage:
                g_stiff = g
            if i < len(self.combine) or not open_end:
                write(times[i - 1], g, f_rows[i])
        last = rows[-1]
        if open_end:
            last.zero_()  # weights of zero are to make nothing of it
        error = error_low = None
        if self.error_weights is not None:
            error = torch.mv(self.k_columns, self.error_weights)
        if self.low_weights is not None:
            error_low = torch.mv(self.k_columns, self.low_weights)
        if open_end:
            same = rows[self.stiff_stage].clone()
            stiffness = partial(_stiffness, field, times[-1], g, g_stiff, same)
            dense = RKInterpolant(field, t, h, u, self.k, self.stages.interpolant)
            return Step(RKState(g, du), error, None, dense, error_low, stiffness_later=stiffness)
        return Step(
            RKState(g, last.clone()),
            error,
            (last - rows[self.stiff_stage], g - g_stiff),
            RKInterpolant(field, t, h, u, self.k, self.stages.interpolant),
            error_low,
        )
