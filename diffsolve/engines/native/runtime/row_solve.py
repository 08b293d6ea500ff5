"""Solves of SDEs in machine code, and the discrete adjoint of their steps."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.programs.bound import RowBound
from diffsolve.engines.native.programs.rows import RowProgram
from diffsolve.engines.native.runtime.noise_path import dense_output, first_step, tell_path
from diffsolve.engines.native.runtime.row_template import RowTemplate, template_for
from diffsolve.engines.native.runtime.solve import Runtime
from diffsolve.engines.native.runtime.threads import (
    FIRST_ROOM,
    ThreadShare,
    ThreadShares,
    run_in_threads,
)
from diffsolve.engines.plan import SaveRequest, SolveContext, Trajectory
from diffsolve.engines.settings import Settings
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.stochastic.noise.draws import signed

_ROOM_IN_NUMBERS = 1_000_000  # for large states: less to begin with
WORK_A_THREAD = 300_000  # operations that are worth another thread
MOST_NOISE = 20_000_000  # numbers that are kept for a reverse pass rather than drawn again
_FREED = (L.WORK, L.START, L.AHEAD, L.NOISE, L.KNOWN_VALUES)


class RowRuntime(Runtime):
    """What runs a ``RowProgram``: a memory for each thread, which has some of the paths."""

    def template(
        self, program: RowProgram, alg: Algorithm, field: VectorField, settings: Settings
    ) -> RowTemplate:
        return template_for(program, alg, field, settings)

    def run(
        self,
        bound: RowBound,
        template: RowTemplate,
        context: SolveContext,
        u0: Tensor,
        request: SaveRequest,
        bar: Any,
    ) -> tuple[ThreadShares, int, float]:
        started = time.perf_counter()
        rows = u0.numel() // bound.program.d
        for split in (_split(rows, template, context), [(0, rows)]):
            records = _laid_out(bound, template, context, split, u0, request)
            statuses = run_in_threads(records.shares, lambda x: x.run(template.advance, bar))
            # the batch stops where its first path fails: one thread finds that
            if all(status == L.DONE for status in statuses) or len(split) == 1:
                break
        _join_estimates(records.shares)
        return records, statuses[0], time.perf_counter() - started

    def first(self, records: ThreadShares) -> ThreadShare:
        return records.shares[0]

    def finish(
        self,
        records: ThreadShares,
        context: SolveContext,
        u0: Tensor,
        request: SaveRequest,
        trajectory: Trajectory,
    ) -> None:
        """See ``Runtime.finish``; ``field.path`` knows the path afterwards."""
        field: Any = context.field
        share, bound = records.shares[0], records.shares[0].bound
        tell_path(field.path, share, context.t0)
        if request.dense:
            trajectory.dense = dense_output(bound, field, trajectory, share, context.t0, u0)
        for share in records.shares:
            for slot in _FREED:
                share.arrays.pop(slot, None)

    def begin_sweep(
        self, records: ThreadShares, states: Tensor, active: tuple[bool, ...], whole: bool
    ) -> list[ThreadShare]:
        program, template = records.shares[0].program, records.shares[0].template
        step_vjp, diffusion_vjp, sweep_kernel = template.reverse(active, whole)
        entries = len(program.active_entries(active))
        passes: list[ThreadShare] = []
        place = 0
        for forward in records.shares:
            share: Any = forward.copy()
            share.stop = threading.Event()
            share.sweep_kernel = sweep_kernel
            share.work()
            integers, n, dtype = share.integers, share.n, share.dtype
            share.add_noise_room(integers[L.AHEAD_COUNT])
            share.hold_new(L.G_ROW, np.empty(2 * integers[L.DIFFUSION_SIZE], dtype))
            share.hold_new(L.SUMS_BAR, np.zeros(2, dtype))
            room = integers[L.STATE_ROOM] * integers[L.STATE_SIZE]
            share.hold(L.STATES, states[place : place + room])
            place += room
            share.restart_counts()
            integers[L.NG] = 0
            share.hold_new(L.STATE_BAR, np.zeros(n, dtype))
            share.hold_new(L.BAR, np.empty(n, dtype))
            share.hold_new(L.P_BAR, np.zeros(max(entries, 1) * program.lanes, dtype))
            if integers[L.STRIDE] > 1:
                each = n + 2 * integers[L.NOISE_SIZE]
                share.hold_new(L.SEGMENT, np.empty((integers[L.STRIDE], each), dtype))
            integers[L.FUSED_VJP], integers[L.DIFFUSION_VJP] = step_vjp, diffusion_vjp
            integers[L.STEPS_LEFT] = integers[L.ACCEPTED]
            integers[L.SWEEP_FROM] = integers[L.ACCEPTED] - 1
            passes.append(share)
        return passes

    def run_sweep(self, passes: list[ThreadShare], active: tuple[bool, ...]) -> int:
        return run_in_threads(passes, lambda share: share.run(share.sweep_kernel))[0]

    def end_sweep(
        self, passes: list[ThreadShare], active: tuple[bool, ...]
    ) -> tuple[np.ndarray, Tensor]:
        program = passes[0].program
        # the kernel writes the cotangent of a state to one of two rows by turns
        slot = L.BAR if passes[0].integers[L.ACCEPTED] % 2 else L.STATE_BAR
        u_bar = np.concatenate([share.arrays[slot] for share in passes])
        lanes = np.sum([share.arrays[L.P_BAR] for share in passes], axis=0)
        entries = program.active_entries(active)
        p_bar = np.zeros(program.n_params, passes[0].dtype)
        p_bar[entries] = lanes.reshape(-1, program.lanes).sum(1)[: len(entries)]
        return u_bar, torch.from_numpy(p_bar)


def _split(rows: int, template: RowTemplate, context: SolveContext) -> list[tuple[int, int]]:
    """First path and number of paths of each thread."""
    settings, span = context.settings, abs(context.t1 - context.t0)
    if settings.adaptive or settings.progress or settings.dt is None:
        return [(0, rows)]
    work = template.operations(rows) * span / settings.dt
    lanes = 16
    most = int(min(torch.get_num_threads(), work / WORK_A_THREAD, rows // lanes))
    if most < 2:
        return [(0, rows)]
    each = -(-rows // (most * lanes)) * lanes
    return [(first, min(each, rows - first)) for first in range(0, rows, each)]


def _laid_out(
    bound: RowBound,
    template: RowTemplate,
    context: SolveContext,
    split: list[tuple[int, int]],
    u0: Tensor,
    request: SaveRequest,
) -> ThreadShares:
    """Memories for a solve by as many threads, with room for what is to be kept."""
    field: Any = context.field
    t0, settings, program = context.t0, context.settings, bound.program
    seeds, has_many_seeds = _seeds_of(field.path.seed)
    shares = [
        ThreadShare(bound, template, first, rows, field.breaks, seeds, has_many_seeds)
        for first, rows in split
    ]
    n, dtype = field.rows * program.d, shares[0].dtype
    noises = 2 if template.formulas.needs_area else 1
    if settings.adaptive:
        room = max(8, min(FIRST_ROOM, _ROOM_IN_NUMBERS // ((2 + noises) * n)))
        # errors as well: a regularizer of them needs no step again
        sizes = [2 * (share.n + share.integers[L.NOISE_SIZE]) for share in shares]
    else:
        room = _count(settings, t0, context.t1)
        if request.checkpoints is not None or room * noises * field.rows * field.m > MOST_NOISE:
            noises = 0  # drawn again
        sizes = [share.n + noises * share.integers[L.NOISE_SIZE] for share in shares]
    out = np.empty((room + 1 if request.times is None else len(request.times), n), dtype)
    count = room if request.checkpoints is None else min(request.checkpoints, room)
    states = np.empty(count * sum(sizes), dtype) if request.states else None
    place = 0
    for share, size in zip(shares, sizes, strict=True):
        mine = None
        if states is not None:
            mine = states[place : place + count * size].reshape(count, size)
            place += count * size
        share.lay_out(request, room, out, mine)
        share.span(t0, context.t1, settings.tstops)
        reals, integers = share.reals, share.integers
        reals[L.NOISE_START] = reals[L.NOISE_END] = reals[L.KNOWN_FROM] = t0
        integers[L.NF] = 1  # the look at the start
        integers[L.NG] = 3 if field.noise == "additive" else 1
        rows = u0.view(field.rows, program.d)[share.first_row : share.first_row + share.rows]
        share.start(rows.reshape(-1))
        if settings.dt is None:
            reals[L.SIZE], nf, ng = first_step(bound, context, u0, template.order)
            integers[L.NF] += nf - 1
            integers[L.NG] += ng
    return ThreadShares(shares, states)


def _seeds_of(seed: Any) -> tuple[Tensor, bool]:
    """The seed as kernels read it, and whether there is one for each path."""
    if isinstance(seed, Tensor):
        return seed.reshape(-1).to("cpu", torch.int64).contiguous(), True
    return torch.tensor([signed(seed)], device="cpu"), False


def _count(settings: Settings, t0: float, t1: float) -> int:
    """Room for the steps of a fixed size."""
    assert settings.dt is not None
    most = abs(t1 - t0) / min(settings.dt, settings.dtmax) + len(settings.tstops) + 2
    return int(min(most, settings.maxiters)) + 1


def _join_estimates(shares: list[ThreadShare]) -> None:
    """Write error, its norm and stiffness of steps that several threads took to the first table."""
    if len(shares) == 1 or not shares[0].integers[L.STEP_SUMS]:
        return
    total = np.sum([share.sums() for share in shares], axis=0)
    for share in shares:
        share.hold_new(L.STEP_SUMS, total)
    first = shares[0]
    count, n = first.integers[L.ACCEPTED], first.integers[L.N_ALL]
    scaled, plain, above, below = total[:count].T
    with np.errstate(all="ignore"):
        stiffness = np.where(below > 0, np.sqrt(above / below), 0.0)
    has_estimate, zero = first.template.formulas.has_estimate, np.zeros(count)
    error, norm = (np.sqrt(x / n) if has_estimate else zero for x in (scaled, plain))
    first.arrays[L.STEP_T][2:].view(first.dtype)[:, :count] = np.stack([error, norm, stiffness])
