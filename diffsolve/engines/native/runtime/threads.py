"""SolveMemory of the kernels in a solve of an SDE.

The paths of a batch are independent as long as the steps are fixed: they are then shared out among
threads, each with a memory of its own (``ThreadShare``). With adaptive steps the error of all
of them decides every step, and there is one share.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.locks import tables
from diffsolve.engines.native.programs.bound import RowBound
from diffsolve.engines.native.runtime.blocks import Block
from diffsolve.engines.native.runtime.memory import Counts, SolveMemory
from diffsolve.engines.native.runtime.method import address
from diffsolve.engines.native.runtime.row_template import RowTemplate
from diffsolve.engines.native.runtime.template import STEPS, WORK_A_CALL
from diffsolve.engines.plan import SaveRequest
from diffsolve.solvers.kernels import layout as L

FIRST_ROOM = 256  # steps
_MOST_AHEAD = 4_096  # normals that are drawn at once
_FIRST_INTERVALS = 8
_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # whose threads stay behind


class ThreadShare(SolveMemory):
    """SolveMemory of the solve of some of the paths, which one thread works with.

    Parameters
    ----------
    bound, template
        The program of the SDE, and what is the same in all such solves.
    first, rows
        The paths.
    breaks
        As those of ``SolveMemory``.
    seeds, seeded
        The seed, or one for each path of the batch.
    """

    def __init__(
        self,
        bound: RowBound,
        template: RowTemplate,
        first: int,
        rows: int,
        breaks: Sequence[float],
        seeds: Tensor,
        seeded: bool,
    ):
        program = bound.program
        self.program, self.first_row, self.rows = program, first, rows
        self.first_entry = first * program.d
        self.sweep_kernel: Any = None
        self.stop = threading.Event()
        arguments = bound.arguments(rows)
        super().__init__(bound, template, rows * program.d, bound.params, breaks)
        self.arrays[L.PARAMS] = arguments
        integers = self.integers
        integers[L.PARAMS] = address(arguments) + 8
        integers[L.NOISE_SIZE] = size = rows * program.m
        integers[L.DIFFUSION_SIZE] = rows * program.width
        self.seeds, self.seeded = seeds, seeded
        integers[L.CHUNK] = max(1, int(WORK_A_CALL / template.operations(rows)))
        self.add_noise_room(max(1, min(256, _MOST_AHEAD // max(size, 1))))

    def add_noise_room(self, ahead: int) -> None:
        """Room for the noise of a step, and what it is made of."""
        integers, size, dtype = self.integers, self.integers[L.NOISE_SIZE], self.dtype
        program = self.program
        self.hold_new(L.SUMS, np.zeros(4, dtype))
        self.hold_new(L.NOISE, np.zeros(2 * size + self.n, dtype))  # and the error of the step
        self.hold_new(L.AHEAD, np.empty(2 * ahead * size))
        integers[L.AHEAD_COUNT], integers[L.AHEAD_FIRST] = ahead, -ahead
        draw = np.zeros(9, np.int64)
        draw[:7] = (
            *(self.seeds.data_ptr(), self.seeded, 0, 0),
            *(self.first_row, self.rows, program.m),
        )
        self.hold_new(L.DRAW_WITH, draw)

    def add_reading_room(self) -> None:
        """Room for values inside of steps, and for a path that is known ahead."""
        integers, size = self.integers, self.integers[L.NOISE_SIZE]
        rows = self.integers[L.DIFFUSION_SIZE]
        self.hold_new(L.SPARE_NORMALS, np.empty(2 * size))
        self.hold_new(L.READ_SUM, np.empty(size))
        self.hold_new(L.READ_NOISE, np.empty(size, self.dtype))
        self.hold_new(L.G_ROW, np.empty(2 * rows, self.dtype))
        self._grow_intervals(_FIRST_INTERVALS)
        inside = max(integers[L.N_SAVES], 0)
        self._grow_log(inside + 2 + (FIRST_ROOM if integers[L.REMEMBERS] else 0))

    def _grow_intervals(self, room: int) -> None:
        integers, size = self.integers, self.integers[L.NOISE_SIZE]
        for slot, new in (
            (L.KNOWN_END, np.zeros(room)),
            (L.KNOWN_PIECE, np.zeros(room, np.int64)),
            (L.KNOWN_PLACE, np.arange(room)),
            (L.KNOWN_VALUES, np.empty((room, 2 * size))),
        ):
            if slot in self.arrays:
                new[: integers[L.KNOWN_ROOM]] = self.arrays[slot]
            self.hold_new(slot, new)
        integers[L.KNOWN_ROOM] = room

    def _grow_log(self, room: int) -> None:
        integers, done = self.integers, self.integers[L.LOGGED]
        for slot, new in (
            (L.LOG, np.zeros((room, 2), np.int64)),
            (L.LOG_TIMES, np.zeros((room, 3))),
        ):
            if slot in self.arrays:
                new[:done] = self.arrays[slot][:done]
            self.hold_new(slot, new)
        integers[L.LOG_ROOM] = room

    def lay_out(self, request: SaveRequest, room: int, out: np.ndarray, states: np.ndarray | None):
        """Room for what is to be kept; ``out`` and ``states`` may be parts of larger arrays.

        Parameters
        ----------
        room
            Steps.
        out
            ``(saves, N)`` of all paths.
        states
            Rows of states and noise of this share.
        """
        integers = self.integers
        times = request.times
        if times is None:
            integers[L.N_SAVES], integers[L.SAVE_ROOM] = -1, len(out)
        else:
            self.hold_new(L.SAVES, np.asarray(times, dtype=np.float64))
            integers[L.N_SAVES] = integers[L.SAVE_ROOM] = len(out)
        self.arrays[L.OUT_U] = out
        integers[L.OUT_STRIDE], integers[L.N_ALL] = out.shape[1], out.shape[1]
        integers[L.OUT_U] = address(out) + self.first_entry * self.dtype.itemsize
        integers[L.STEP_ROOM] = room
        self.marked = states is not None
        self.hold_steps(np.empty((len(STEPS), room)))
        self.block = self.block_of(room).lay(integers)
        if states is not None:
            integers[L.STRIDE], integers[L.STATE_ROOM] = 1, len(states)
            integers[L.THINNING] = request.checkpoints is not None
            integers[L.STATE_SIZE] = states.shape[1]
            self.hold_new(L.STATES, states)
            if times is not None:
                size = integers[L.NOISE_SIZE]
                self.hold_new(L.SAVE_NOISE, np.empty((len(times), size), self.dtype))
        if request.dense and times is not None:
            rows = integers[L.DENSE_ROWS]
            self.hold_new(L.DENSE, np.empty((room, rows, self.n), self.dtype))
            self.hold_new(L.COMPLETE, np.empty(room, np.int64))
        self.add_reading_room()

    def block_of(self, room: int) -> Block:
        """Where the records of so many steps lie; their states lie with those of other shares."""
        reals, whole = np.dtype(np.float64), np.dtype(np.int64)
        parts: list[Any] = []
        formulas = self.template.formulas
        if formulas.has_estimate or formulas.has_stiffness:
            parts.append((L.STEP_SUMS, (room, 4), reals))
        if self.marked:
            parts.append((L.MARKS, (room, L.N_MARKS), whole))
        return Block(parts)

    def sums(self) -> np.ndarray:
        """What each step added up."""
        assert self.block is not None
        return self.block_of(self.integers[L.STEP_ROOM]).part(self.block, L.STEP_SUMS)

    def make_room(self) -> None:
        integers = self.integers
        super().make_room()
        if integers[L.KNOWN] + 2 > integers[L.KNOWN_ROOM]:
            self._grow_intervals(2 * integers[L.KNOWN_ROOM])
        inside = max(integers[L.N_SAVES] - integers[L.SAVED], 0)
        if integers[L.LOGGED] + inside + 2 > integers[L.LOG_ROOM]:
            self._grow_log(2 * integers[L.LOG_ROOM] + inside)

    def counts(self) -> Counts:
        return *super().counts(), self.integers[L.NG]

    def stopped(self) -> bool:
        """Whether another thread has failed."""
        return self.stop.is_set()


class ThreadShares:
    """The shares of one solve.

    Attributes
    ----------
    shares
        Of the paths in order.
    states
        What they keep for the reverse pass, one array.
    """

    def __init__(self, shares: list[ThreadShare], states: np.ndarray | None):
        self.shares, self.states = shares, states

    @property
    def integers(self) -> Any:
        return self.shares[0].integers

    def give_states(self) -> Tensor:
        """The states, which the caller keeps alive from now on."""
        slot = L.STATES
        if len(self.shares) > 1:
            states, self.states = self.states, None
            for share in self.shares:
                share.arrays.pop(slot, None)
            assert states is not None
            return torch.from_numpy(states)
        self.states = None
        return torch.from_numpy(self.shares[0].arrays.pop(slot)).reshape(-1)

    def records(self) -> ThreadShares:
        """What is noted of the steps, to be kept."""
        kept = []
        for share in self.shares:
            copy: Any = share.copy()
            copy.source = None
            slots = (
                *(L.PARAMS, L.STEP_T, L.SAVES, L.STOPS, L.BREAKS),
                *(L.STEP_SUMS, L.SAVE_NOISE),
            )
            copy.arrays = {slot: share.arrays[slot] for slot in slots if slot in share.arrays}
            copy.stop = threading.Event()
            kept.append(copy)
        return ThreadShares(kept, None)


def _pool(count: int) -> ThreadPoolExecutor:
    with tables:
        pool = _pools.get(count)
        if pool is None:
            pool = _pools[count] = ThreadPoolExecutor(count, "diffsolve")
        return pool


def run_in_threads(shares: list[ThreadShare], task: Callable[[ThreadShare], int]) -> list[int]:
    """The same task for all shares, each in a thread."""
    if len(shares) == 1:
        return [task(shares[0])]
    stop = threading.Event()
    for share in shares:
        share.stop = stop
    futures = [_pool(len(shares) - 1).submit(task, share) for share in shares[1:]]
    try:
        first = task(shares[0])
        return [first, *(future.result() for future in futures)]
    except BaseException:
        stop.set()
        for future in futures:
            future.exception()
        raise
