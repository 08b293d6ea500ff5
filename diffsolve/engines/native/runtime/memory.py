"""The memory of a solve that runs as machine code, and calls of the kernels with it."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.programs.bound import BoundProgram
from diffsolve.engines.native.programs.scalar import SparseJacobian
from diffsolve.engines.native.runtime.blocks import Block, place
from diffsolve.engines.native.runtime.kernels import Kernel
from diffsolve.engines.native.runtime.method import MethodNumbers, address
from diffsolve.engines.native.runtime.runs import Run
from diffsolve.engines.native.runtime.template import STEPS, RecordLayout
from diffsolve.engines.plan import SaveRequest
from diffsolve.solvers.kernels import layout as L

_NO_COUNTS = array("q", [0] * (L.NNEWTON + 1 - L.NJAC))
_NO_JACOBIAN = array("q", [0] * (L.FACTORED + 1 - L.HAS_JAC))
_INT64 = np.dtype(np.int64)
_RECORDS = (L.PARAMS, L.STEP_T, L.SAVES, L.STOPS, L.BREAKS)
Counts = tuple[int, ...]  # as Stats.count takes them


class SolveMemory:
    """The two arrays of a kernel, and every array that they point to.

    Parameters
    ----------
    bound, template
        The program, and what is the same in all such solves.
    n
        Size of the state.
    params
        Flat parameters that ``field`` is given; a copy of them where states are kept.
    field, jacobian
        Address of what is integrated, and its Jacobian; default: the right-hand side.
    request
        What to keep; None: nothing but the state.
    """

    first_entry = 0  # of the state, among those of all threads
    source: SolveMemory | None = None  # keeps alive what a copy points to
    jacobian_at_work: SparseJacobian | None = None
    identity: np.ndarray | None = None  # so do polynomials that stand for stages
    block: np.ndarray | None = None  # states and marks of the steps

    def __init__(
        self,
        bound: BoundProgram,
        template: Any,
        n: int,
        params: Tensor,
        breaks: Sequence[float],
        field: int | None = None,
        jacobian: Callable[[], SparseJacobian] | None = None,
        request: SaveRequest | None = None,
    ):
        self.bound: Any = bound
        self.template: Any = template
        self.method: MethodNumbers = template.method
        self.runs = [Run(template, 0)]
        self.n = n
        self.dtype = template.dtype
        self.layout = layout = None if request is None else template.layout(request)
        self.work_space = work = None if layout is None else layout.borrow()
        self.integers = integers = (template if work is None else work).integers[:]
        self.reals = reals = template.reals[:]
        self.arguments = here, _ = integers.buffer_info()[0], reals.buffer_info()[0]
        integers[L.N], integers[L.N_BLOCKS], integers[L.BLOCK_ENDS] = n, 1, here + 8 * L.N
        self.solves_other = field is not None
        self.jacobian: Any = jacobian or getattr(bound.program, "jacobian", None)
        other_jacobian = None
        if field is not None:
            integers[L.FIELD], integers[L.FUSED], integers[L.JVP] = field, 0, 0
            if self.method.is_implicit:
                self.jacobian_at_work = other_jacobian = self.jacobian()
                integers[L.JAC : L.N_COLUMNS + 1] = other_jacobian.slots
        self._work = template.work(n, other_jacobian) if layout is None else layout.work
        self.arrays: dict[int, Any] = {L.PARAMS: params}  # beside what the template holds
        integers[L.PARAMS] = params.data_ptr()
        if breaks:
            self.hold(L.BREAKS, np.asarray(breaks, dtype=np.float64))
            integers[L.N_BREAKS] = len(breaks)
        if layout is not None and request is not None and work is not None:  # all, or none
            self.arrays[L.WORK] = work.array
            self._make_first_room(layout, request.times)
        else:
            self.work()

    def prepare_stiff(self) -> Any:
        """Make what the reverse pass of the stiff method needs; replaced where there is one."""

    def work(self) -> None:
        """A work space, which each call of a kernel that may run beside others needs."""
        implicit = self.template.method.is_implicit
        self.arrays[L.WORK] = self._work.lay(self.integers, zero=implicit)
        if implicit:
            self._forget_jacobian()

    def borrow_work(self) -> None:
        """The same, one that may have been used before; to be given back."""
        assert self.layout is not None
        self.work_space = work = self.layout.borrow()
        integers, theirs = self.integers, work.integers
        for slot in self.layout.work_slots:
            integers[slot] = theirs[slot]
        if self.template.method.is_implicit:
            self._forget_jacobian()

    def give_back_work(self) -> None:
        """Let another solve use it."""
        self.arrays.pop(L.WORK, None)
        if self.layout is not None and self.work_space is not None:
            self.layout.give_back(self.work_space)
            self.work_space = None

    def add_linear_systems(self) -> None:
        """Room for the linear systems of a method that takes its turn."""
        self.jacobian_at_work = jacobian = self.jacobian()  # whose arrays the kernels read
        self.integers[L.JAC : L.N_COLUMNS + 1] = jacobian.slots
        block = Block(self.method.family.room(self.n, jacobian))
        self.arrays[L.MATRIX] = block.lay(self.integers, zero=True)
        self._forget_jacobian()

    def _forget_jacobian(self) -> None:
        self.integers[L.HAS_JAC : L.FACTORED + 1] = _NO_JACOBIAN

    def records(self) -> SolveMemory:
        """What is noted of the steps, to be kept: without states, stages and results."""
        if L.DENSE not in self.arrays:
            self.arrays.pop(L.OUT_U, None)
            return self
        records = self.copy()  # dense output keeps this memory, too
        records.source = None
        records.arrays = {slot: self.arrays[slot] for slot in _RECORDS if slot in self.arrays}
        return records

    def copy(self) -> SolveMemory:
        """The same for a pass of its own: several may run at once."""
        copy = object.__new__(type(self))
        copy.__dict__ = self.__dict__.copy()
        copy.integers, copy.reals = self.integers[:], self.reals[:]
        copy.arguments = copy.integers.buffer_info()[0], copy.reals.buffer_info()[0]
        copy.source, copy.arrays = self, {}
        copy.integers[L.BLOCK_ENDS] = copy.arguments[0] + 8 * L.N
        copy.integers[L.STOPS] = copy.arguments[1] + 8 * L.T_END  # read only while going forward
        return copy

    def counts(self) -> Counts:
        """Work done, for ``Stats.count``."""
        integers = self.integers
        return (integers[L.NF], *integers[L.NJAC : L.NNEWTON + 1])

    def restart_counts(self) -> None:
        self.integers[L.NF] = 0
        self.integers[L.NJAC : L.NNEWTON + 1] = _NO_COUNTS

    def steps(self) -> np.ndarray:
        """Start, size and estimates of each step, in rows."""
        return self.arrays[L.STEP_T][:, : self.integers[L.ACCEPTED]]

    def give_states(self) -> Tensor:
        """States and marks of the steps, which the caller keeps alive from now on."""
        block, self.block = self.block, None
        assert block is not None
        return torch.from_numpy(block)

    def take_states(self, records: Tensor) -> None:
        """Use what ``give_states`` gave, which may have been moved in between."""
        self.arrays[L.STATES] = records
        self.block_of(self.integers[L.STEP_ROOM]).lay_at(records.data_ptr(), self.integers)

    def give_dense(self) -> Tensor:
        """The dense records, which the caller keeps alive."""
        return torch.from_numpy(self.arrays[L.DENSE])

    def hold(self, slot: int, array: Any) -> None:
        """Keep an array alive, and note its address."""
        self.arrays[slot] = array
        self.integers[slot] = array.data_ptr() if isinstance(array, Tensor) else address(array)

    def hold_new(self, slot: int, array: np.ndarray) -> None:
        """The same, for an array that was made for this."""
        self.arrays[slot] = array
        self.integers[slot] = place(array)

    def hold_steps(self, table: np.ndarray) -> None:
        """The same for the rows of the table of steps; float32 numbers fill half of a row."""
        self.arrays[L.STEP_T] = table
        start, size = place(table), 8 * table.shape[1]
        for slot in STEPS:
            self.integers[slot] = start
            start += size

    def blocks(self, ends: Sequence[int]) -> None:
        """Parts of the state whose norms are taken one by one."""
        self.hold(L.BLOCK_ENDS, np.asarray(ends, dtype=np.int64))
        self.integers[L.N_BLOCKS] = len(ends)

    def span(self, t0: float, t1: float, stops: Sequence[float]) -> None:
        reals, integers = self.reals, self.integers
        reals[L.T] = reals[L.ANCHOR] = t0
        reals[L.T_LOW], reals[L.T_HIGH] = min(t0, t1), max(t0, t1)
        reals[L.DIRECTION] = 1.0 if t1 >= t0 else -1.0
        reals[L.T_END] = t1
        integers[L.N_STOPS] = len(stops) + 1
        if stops:
            self.hold(L.STOPS, np.asarray([*stops, t1], dtype=np.float64))
        else:
            integers[L.STOPS] = self.arguments[1] + 8 * L.T_END

    def start(self, u: Tensor) -> None:
        """Begin with this state."""
        self.hold(L.START, u.contiguous())

    def state(self) -> Tensor:
        return torch.from_numpy(self.arrays[L.WORK].view(self.dtype)[: self.n].copy())

    def _make_first_room(self, layout: RecordLayout, times: Any) -> None:
        integers, room = self.integers, layout.room
        if times is not None:
            self.arrays[L.SAVES], integers[L.SAVES] = layout.placed(times)
            integers[L.N_SAVES] = integers[L.SAVE_ROOM] = room = len(times)
        self.hold_new(L.OUT_U, np.empty((room, self.n), self.dtype))
        self.hold_steps(np.empty((len(STEPS), layout.room)))
        if layout.block is not None:
            self.block = layout.block.lay(integers)
            if layout.params:
                params = self.arrays.pop(L.PARAMS)
                size = layout.params * self.dtype.itemsize
                ctypes.memmove(integers[L.PARAMS], params.data_ptr(), size)
        if layout.dense is not None:
            self.hold_new(L.DENSE, np.empty(layout.dense, self.dtype))
            self.hold_new(L.COMPLETE, np.empty(layout.room, _INT64))

    def make_room(self) -> None:
        """Twice as much, for what is full."""
        integers = self.integers
        if integers[L.STEP_T] and integers[L.ACCEPTED] >= integers[L.STEP_ROOM]:
            before = integers[L.STEP_ROOM]
            integers[L.STEP_ROOM] = after = 2 * before
            table = np.empty((len(STEPS), after))
            table[:, :before] = self.arrays[L.STEP_T]
            self.hold_steps(table)
            if self.block is not None:
                wider = self.block_of(after)
                self.block = self.block_of(before).move(self.block, wider, integers)
            for slot in (L.DENSE, L.COMPLETE):
                if slot in self.arrays:
                    self._double(slot)
        if integers[L.N_SAVES] < 0 and integers[L.SAVED] >= integers[L.SAVE_ROOM]:
            integers[L.SAVE_ROOM] *= 2
            self._double(L.OUT_U)
        count = integers[L.ACCEPTED] // max(integers[L.STRIDE], 1)
        if integers[L.STRIDE] and not integers[L.THINNING] and count >= integers[L.STATE_ROOM]:
            integers[L.STATE_ROOM] *= 2
            if L.STATES in self.arrays:
                self._double(L.STATES)

    def block_of(self, room: int) -> Block:
        """Layout of the records of so many steps."""
        assert self.layout is not None
        return self.layout.block_of(room)

    def _double(self, slot: int) -> None:
        old = self.arrays[slot]
        new = np.empty((2 * len(old), *old.shape[1:]), old.dtype)
        new[: len(old)] = old
        self.hold_new(slot, new)

    def run(self, function: Kernel, bar: Any = None) -> int:
        """Call a kernel until it is done; returns how it ended."""
        reals = self.reals
        here, there = self.arguments
        while True:
            before = reals[L.T]
            status = function(here, there)
            if bar is not None:
                bar.update(abs(reals[L.T] - before))
            if status == L.NEED_ROOM:
                self.make_room()
            elif status != L.GO_ON or self.stopped():
                return status

    def stopped(self) -> bool:
        """Whether to end early, at the next return of a kernel."""
        return False
