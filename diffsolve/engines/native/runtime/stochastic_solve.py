"""Solves of SDEs in machine code; ``engine.py`` for ODEs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.programs.bound import RowBound as NativeSDE
from diffsolve.engines.native.runtime.solve import (
    RETCODES,
    NativeTrajectory,
    StepColumns,
    message_of,
)
from diffsolve.engines.native.runtime.template import Wanted
from diffsolve.engines.native.runtime.threads import (
    FIRST_ROOM,
    Crew,
    Part,
    StochasticTemplate,
    share_out,
)
from diffsolve.engines.settings import Settings
from diffsolve.engines.trajectory import progress_bar
from diffsolve.problems.sde_field import SDEField
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.initial_step import stochastic_step
from diffsolve.solvers.interpolation import DenseOutput
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.stochastic.method import PathInterpolant
from diffsolve.solvers.stochastic.noise.draws import signed

_ROOM_IN_NUMBERS = 1_000_000  # for large states: less to begin with
_WORK_A_THREAD = 300_000  # operations that are worth another thread
_MOST_NOISE = 20_000_000  # numbers that are kept for a reverse pass rather than drawn again


def integrate(
    native: NativeSDE,
    field: SDEField,
    alg: Algorithm,
    u0: Tensor,
    t0: float,
    t1: float,
    settings: Settings,
    wanted: Wanted,
) -> NativeTrajectory:
    """Integrate from ``t0`` to ``t1`` in machine code; ``field.path`` knows the path afterwards.

    Returns
    -------
    NativeTrajectory
        With the partial result and the reason where the solve failed.
    """
    made: StochasticTemplate = native.template
    path: Any = field.path
    bar = progress_bar(t0, t1) if settings.progress else None
    started = time.perf_counter()
    try:
        parts = _shared(field.rows, made, settings, t0, t1)
        crew, statuses = _solved(native, field, parts, u0, t0, t1, settings, wanted, bar)
        if any(status != L.DONE for status in statuses) and len(parts) > 1:
            # the batch stops where its first path fails: one thread finds that
            parts = [(0, field.rows)]
            crew, statuses = _solved(native, field, parts, u0, t0, t1, settings, wanted, bar)
    finally:
        if bar is not None:
            bar.close()
    kernel_s = time.perf_counter() - started
    status, part = statuses[0], crew.parts[0]
    integers, reals = part.integers, part.reals
    count, saved = integers[L.ACCEPTED], integers[L.SAVED]
    table = part.held[L.STEP_T]
    estimates = _joined_estimates(crew, count)
    if estimates is not None:
        table[2:].view(part.dtype)[:, :count] = estimates
    if wanted.times is None:
        times: Any = [*part.steps()[0].tolist(), reals[L.T]][:saved]
    else:
        times = wanted.times if saved == integers[L.N_SAVES] else wanted.times[:saved]
    out = part.held[L.OUT_U]
    found = NativeTrajectory(
        t=times,
        u=torch.from_numpy(out if saved == len(out) else out[:saved]),
        columns=StepColumns(table, count, part.dtype),
        counts=(*part.counts(), integers[L.NG]),
        nreject=integers[L.REJECTED],
        final_t=reals[L.T],
        final_h=reals[L.LAST_H] if integers[L.ATTEMPTS] else math.nan,
        retcode=RETCODES[status],
        kernel_s=kernel_s,
        memory=crew,  # type: ignore[arg-type]
    )
    if status != L.DONE:
        found.message = message_of(status, part, alg, settings, (t0, t1), field)
    remember(path, part, t0)
    if wanted.dense:
        found.dense = _dense(native, field, found, part, t0, u0)
    for each in crew.parts:
        for slot in (L.WORK, L.START, L.AHEAD, L.NOISE, L.KNOWN_VALUES):
            each.held.pop(slot, None)
    return found


def _shared(
    rows: int, made: StochasticTemplate, settings: Settings, t0: float, t1: float
) -> list[tuple[int, int]]:
    """First path and number of paths of each thread."""
    if settings.adaptive or settings.progress or settings.dt is None:
        return [(0, rows)]
    work = made.operations(rows) * abs(t1 - t0) / settings.dt
    lanes = 16
    most = int(min(torch.get_num_threads(), work / _WORK_A_THREAD, rows // lanes))
    if most < 2:
        return [(0, rows)]
    each = -(-rows // (most * lanes)) * lanes
    return [(first, min(each, rows - first)) for first in range(0, rows, each)]


def _solved(
    native: NativeSDE,
    field: SDEField,
    shares: list[tuple[int, int]],
    u0: Tensor,
    t0: float,
    t1: float,
    settings: Settings,
    wanted: Wanted,
    bar: Any,
) -> tuple[Crew, list[int]]:
    made: StochasticTemplate = native.template
    program = native.program
    seed = field.path.seed  # type: ignore[union-attr]
    seeded = isinstance(seed, Tensor)
    seeds = (
        seed.reshape(-1).to("cpu", torch.int64).contiguous()
        if seeded
        else torch.tensor([signed(seed)], device="cpu")
    )
    parts = [Part(native, made, first, rows, field.breaks, seeds, seeded) for first, rows in shares]
    n, dtype = field.rows * program.d, parts[0].dtype
    noises = 2 if made.formulas.needs_area else 1
    if settings.adaptive:
        room = max(8, min(FIRST_ROOM, _ROOM_IN_NUMBERS // ((2 + noises) * n)))
    else:
        room = _count(settings, t0, t1)
        if wanted.checkpoints is not None or room * noises * field.rows * field.m > _MOST_NOISE:
            noises = 0  # drawn again
    sizes = [part.n + noises * part.integers[L.NOISE_SIZE] for part in parts]
    if settings.adaptive:  # errors as well: a regularizer of them needs no step again
        sizes = [2 * (part.n + part.integers[L.NOISE_SIZE]) for part in parts]
    saves = room + 1 if wanted.times is None else len(wanted.times)
    out = np.empty((saves, n), dtype)
    kept = room if wanted.checkpoints is None else min(wanted.checkpoints, room)
    states = np.empty(kept * sum(sizes), dtype) if wanted.states else None
    place = 0
    for part, size in zip(parts, sizes, strict=True):
        mine = None
        if states is not None:
            mine = states[place : place + kept * size].reshape(kept, size)
            place += kept * size
        part.want_part(wanted, room, out, mine)
        part.span(t0, t1, settings.tstops)
        reals, integers = part.reals, part.integers
        reals[L.NOISE_START] = reals[L.NOISE_END] = reals[L.KNOWN_FROM] = t0
        integers[L.NF] = 1  # the look at the start
        integers[L.NG] = 3 if field.noise == "additive" else 1
        share = u0.view(field.rows, program.d)[part.first : part.first + part.rows]
        part.start(share.reshape(-1))
        if settings.dt is None:
            reals[L.SIZE] = _first_step(native, field, u0, t0, t1, settings, part)
    return Crew(parts, states), share_out(parts, lambda part: part.advance(bar))


def _count(settings: Settings, t0: float, t1: float) -> int:
    """Room for the steps of a fixed size."""
    assert settings.dt is not None
    most = abs(t1 - t0) / min(settings.dt, settings.dtmax) + len(settings.tstops) + 2
    return int(min(most, settings.maxiters)) + 1


class _CompiledField:
    """What ``stochastic_step`` asks of a field, by the compiled functions."""

    def __init__(self, native: NativeSDE, field: SDEField):
        self._native, self.field = native, field
        self.after, self.times, self.deviation = field.after, field.times, field.deviation
        self.nf = self.ng = 0
        self._known: dict[str, tuple[Tensor, Tensor]] = {}  # the first state, and its value

    def _evaluate(self, kind: str, t: Tensor, u: Tensor) -> Tensor:
        """Counted also where it is known, because the time has no part in it."""
        before, value = self._known.get(kind, (None, None))
        if value is None or before is not u or self._native.program.routines.reads_time[kind]:
            value = self._native.evaluate(kind, float(t), u, self.field.rows)
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


def _first_step(
    native: NativeSDE,
    field: SDEField,
    u0: Tensor,
    t0: float,
    t1: float,
    settings: Settings,
    part: Part,
) -> float:
    direction = 1.0 if t1 >= t0 else -1.0
    view: Any = _CompiledField(native, field)
    f0 = view(field.after(t0, direction), u0)
    order = native.template.order
    most = min(settings.dtmax, abs(t1 - t0))
    size = stochastic_step(view, t0, u0, f0, direction, order, settings.tolerance, most)
    part.integers[L.NF] += view.nf - 1
    part.integers[L.NG] += view.ng
    return math.inf if math.isnan(size) else size  # the kernel would guess one by Hairer's rule


def _joined_estimates(crew: Crew, count: int) -> np.ndarray | None:
    """Error, its norm and stiffness of the steps of several parts, ``(3, count)``."""
    parts = crew.parts
    if len(parts) == 1 or not parts[0].integers[L.STEP_SUMS]:
        return None
    total = np.sum([part.sums() for part in parts], axis=0)
    for part in parts:
        part.hold_new(L.STEP_SUMS, total)
    scaled, plain, above, below = total[:count].T
    n = parts[0].integers[L.N_ALL]
    with np.errstate(all="ignore"):
        stiffness = np.where(below > 0, np.sqrt(above / below), 0.0)
    has = parts[0].template.formulas.has_estimate  # type: ignore[attr-defined]
    zero = np.zeros(count)
    rows = [np.sqrt(scaled / n) if has else zero, np.sqrt(plain / n) if has else zero, stiffness]
    return np.stack(rows).astype(parts[0].dtype)


def remember(path: Any, part: Part, t0: float) -> None:
    """Let a path know the points that the solve drew, as if it had been asked for them."""
    integers = part.integers
    count, serial = integers[L.LOGGED], integers[L.SERIAL]
    ends: list[float] = []
    if not integers[L.REMEMBERS]:
        starts, sizes = part.steps()[:2]
        ends = (starts + sizes).tolist()
        if serial > len(ends):  # the last one failed
            ends.append(part.reals[L.NOISE_END])
        if not count:
            forward = part.reals[L.DIRECTION] > 0
            times, pieces = [t0, *ends], range(serial)
            path.remember(
                *((times, pieces) if forward else (times[::-1], pieces[::-1])), [], serial
            )
            return
    intervals: dict[int, tuple[float, float]] = {}
    for piece, (last, end) in enumerate(pairwise([t0, *ends])):
        intervals[piece] = (last, end) if last < end else (end, last)
    divisions = []
    log, log_times = part.held[L.LOG][:count].tolist(), part.held[L.LOG_TIMES][:count].tolist()
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


def _dense(
    native: NativeSDE, field: SDEField, found: NativeTrajectory, part: Part, t0: float, u0: Tensor
) -> DenseOutput:
    states = found.u.clone()
    if L.DENSE in part.held:
        kept = part.held[L.DENSE][: found.naccept, 0]
        states = torch.cat([torch.from_numpy(kept), part.state()[None]])
    dense = DenseOutput(t0, part.reals[L.DIRECTION], u0)
    starts = part.steps()[0].tolist()
    dense.ends = [dense.direction * t for t in (*starts, found.final_t)]
    dense.steps = _Interpolants(native, field, found, states)  # type: ignore[assignment]
    return dense


class _Interpolants(Sequence[PathInterpolant]):
    """Those of the steps of a solve, each made when it is asked for."""

    def __init__(self, native: NativeSDE, field: SDEField, found: NativeTrajectory, states: Tensor):
        self._view = _CompiledField(native, field)
        self._states, (self._t, self._h) = states, found.columns.times()

    def __len__(self) -> int:
        return len(self._t)

    def __getitem__(self, i: Any) -> Any:
        t, h, u = float(self._t[i]), float(self._h[i]), self._states[i]
        field = self._view.field
        G = self._view.diffusion(field.after(t, h), u)
        return PathInterpolant(field, t, h, u, self._states[i + 1], G)
