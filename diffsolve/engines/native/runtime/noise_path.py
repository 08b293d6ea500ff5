"""The Brownian path of a native solve: its first step, what it drew, and values along it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffsolve.engines.native.programs.bound import RowBound
from diffsolve.engines.native.runtime.threads import ThreadShare
from diffsolve.engines.plan import SolveContext, Trajectory
from diffsolve.problems.sde_field import SDEField
from diffsolve.solvers.initial_step import stochastic_step
from diffsolve.solvers.interpolation import DenseOutput
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.stochastic.method import PathInterpolant


class CompiledField:
    """What ``stochastic_step`` asks of a field, by the compiled functions."""

    def __init__(self, bound: RowBound, field: SDEField):
        self._bound, self.field = bound, field
        self.after, self.times, self.deviation = field.after, field.times, field.deviation
        self.nf = self.ng = 0
        self._known: dict[str, tuple[Tensor, Tensor]] = {}  # the first state, and its value

    def _evaluate(self, kind: str, t: Tensor, u: Tensor) -> Tensor:
        """Counted also where it is known, because the time has no part in it."""
        before, value = self._known.get(kind, (None, None))
        if value is None or before is not u or self._bound.program.routines.reads_time[kind]:
            value = self._bound.evaluate(kind, float(t), u, self.field.rows)
            self._known.setdefault(kind, (u, value))
        return value

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        self.nf += 1
        return self._evaluate("drift", t, u)

    def diffusion(self, t: Tensor, u: Tensor) -> Tensor:
        self.ng += 1
        field = self.field
        G = self._evaluate("diffusion", t, u)
        return G if field.is_diagonal else G.view(field.rows, field.d, field.m)


def first_step(
    bound: RowBound, context: SolveContext, u0: Tensor, order: float
) -> tuple[float, int, int]:
    """Size of the first step, and the evaluations of drift and diffusion that it took."""
    t0, t1, settings = context.t0, context.t1, context.settings
    field: Any = context.field
    direction = 1.0 if t1 >= t0 else -1.0
    view: Any = CompiledField(bound, field)
    f0 = view(field.after(t0, direction), u0)
    most = min(settings.dtmax, abs(t1 - t0))
    size = stochastic_step(view, t0, u0, f0, direction, order, settings.tolerance, most)
    # the kernel would guess one by Hairer's rule where it is NaN
    return math.inf if math.isnan(size) else size, view.nf, view.ng


def tell_path(path: Any, share: ThreadShare, t0: float) -> None:
    """Let a path know the points that the solve drew, as if it had been asked for them."""
    integers = share.integers
    count, serial = integers[L.LOGGED], integers[L.SERIAL]
    ends: list[float] = []
    if not integers[L.REMEMBERS]:
        starts, sizes = share.steps()[:2]
        ends = (starts + sizes).tolist()
        if serial > len(ends):  # the last one failed
            ends.append(share.reals[L.NOISE_END])
        if not count:
            forward = share.reals[L.DIRECTION] > 0
            times, pieces = [t0, *ends], range(serial)
            path.remember(
                *((times, pieces) if forward else (times[::-1], pieces[::-1])), [], serial
            )
            return
    intervals: dict[int, tuple[float, float]] = {}
    for piece, (last, end) in enumerate(pairwise([t0, *ends])):
        intervals[piece] = (last, end) if last < end else (end, last)
    divisions = []
    log, log_times = (
        share.arrays[L.LOG][:count].tolist(),
        share.arrays[L.LOG_TIMES][:count].tolist(),
    )
    for (parent, counter), (left, middle, right) in zip(log, log_times, strict=True):
        if parent == L.FRESH_INTERVAL:
            intervals[counter] = left, right
            continue
        k = len(divisions)
        divisions.append((parent, counter, left, middle, right))
        del intervals[parent]
        intervals[~(2 * k)], intervals[~(2 * k + 1)] = (left, middle), (middle, right)
    ordered = sorted((ends, piece) for piece, ends in intervals.items())
    points = [ordered[0][0][0], *(ends[1] for ends, _ in ordered)] if ordered else [t0]
    path.remember(points, [piece for _, piece in ordered], divisions, serial)


def dense_output(
    bound: RowBound,
    field: SDEField,
    trajectory: Trajectory,
    share: ThreadShare,
    t0: float,
    u0: Tensor,
) -> DenseOutput:
    """Interpolants along the path of the solve."""
    states = trajectory.u.clone()
    if L.DENSE in share.arrays:
        starts_of_steps = share.arrays[L.DENSE][: len(trajectory.steps), 0]
        states = torch.cat([torch.from_numpy(starts_of_steps), share.state()[None]])
    dense = DenseOutput(t0, share.reals[L.DIRECTION], u0)
    starts = share.steps()[0].tolist()
    dense.ends = [dense.direction * t for t in (*starts, trajectory.final_t)]
    dense.steps = _Interpolants(bound, field, trajectory, states)  # type: ignore[assignment]
    return dense


class _Interpolants(Sequence[PathInterpolant]):
    """Those of the steps of a solve, each made when it is asked for."""

    def __init__(self, bound: RowBound, field: SDEField, trajectory: Trajectory, states: Tensor):
        self._view = CompiledField(bound, field)
        self._states, (self._t, self._h) = states, trajectory.steps.times()

    def __len__(self) -> int:
        return len(self._t)

    def __getitem__(self, i: Any) -> Any:
        t, h, u = float(self._t[i]), float(self._h[i]), self._states[i]
        field = self._view.field
        G = self._view.diffusion(field.after(t, h), u)
        return PathInterpolant(field, t, h, u, self._states[i + 1], G)
