"""Running the kernels: memory for a solve, calls of the compiled loop, and what comes out."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.diagnosis import explain
from diffsolve.engines.native.compiled import Compiled, Jacobian
from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.field import NativeField
from diffsolve.engines.native.kernels import Kernel, kernel
from diffsolve.engines.native.method import Method, address, method_of, set_controller
from diffsolve.engines.native.prepare import compile_sweep
from diffsolve.engines.native.switching import join_dense, switch
from diffsolve.engines.torch_engine import Settings, progress_bar
from diffsolve.solution import ReturnCode
from diffsolve.solvers.algorithm import Algorithm, Trouble
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.norms import Estimates, Tolerance
from diffsolve.solvers.switching import AutoSwitch

RETCODES = {
    L.DONE: ReturnCode.SUCCESS,
    L.MAX_ITERS: ReturnCode.MAX_ITERS,
    L.DT_LESS_THAN_MIN: ReturnCode.DT_LESS_THAN_MIN,
    L.UNSTABLE: ReturnCode.UNSTABLE,
    L.NEWTON_FAILED: ReturnCode.NEWTON_FAILED,
}
_TROUBLES = {
    L.NOT_CONVERGED: Trouble.DIVERGED,
    L.SINGULAR: Trouble.SINGULAR,
    L.JAC_NOT_FINITE: Trouble.JACOBIAN,
}
_FIRST_ROOM = 256  # steps; doubled when they are not enough
_ROOM_IN_NUMBERS = 1_000_000  # for large states: less to begin with
_MOST_TEMPLATES = 50
_MOST_KEPT_A_STEP = 1_000  # numbers
_MOST_STEPS = 2**62
_WORK_A_CALL = 1e8  # operations before a kernel returns to Python: a fraction of a second
_TIMES = (L.STEP_T, L.STEP_H)
_ESTIMATES = (L.ERROR, L.ERROR_NORM, L.STIFFNESS)
_RECORDS = (L.PARAMS, L.STEP_T, L.MARKS, L.SAVES, L.STOPS, L.BREAKS, L.RTOL, L.ATOL)


def _nothing() -> None:
    """No more than the method itself needs."""


def write_tolerance(
    tolerance: Tolerance, slots: Sequence[int], integers: np.ndarray, held: dict[int, Any]
) -> None:
    """Write both tolerances to the slots of ``rtol``, its stride, ``atol`` and its stride."""
    for values, slot, stride in zip(tolerance.doubles, slots[::2], slots[1::2], strict=True):
        held[slot] = values
        integers[slot], integers[stride] = address(values), len(values) > 1


class Template:
    """What the kernels' arrays hold whatever is solved: method, tolerances, limits, addresses.

    Made once for a right-hand side, a method and settings, and copied for each solve.

    Raises
    ------
    Declined
        If such a solve cannot run as machine code, whatever its right-hand side.
    """

    def __init__(self, compiled: Compiled, alg: Algorithm, settings: Settings):
        #: Makes the template of the stiff method, where two share a solve.
        self.other: Callable[[], Template] | None = None
        self.stiff: Algorithm | None = None
        if isinstance(alg, AutoSwitch):
            stiff, self.stability, alg = alg.stiff, alg.stability_size, alg.nonstiff
            own = settings.controller_stiff or settings.controller
            theirs = replace(settings, controller=own, controller_stiff=None)
            self.other = lambda: template(compiled, stiff, theirs)
            self.stiff = stiff
        self.method = method_of(alg)
        if settings.tolerance.norm is not None:
            raise Declined("it has a norm of its own")
        if settings.h_on_tape:
            raise Declined("through_step_size=True differentiates the step sizes on the tape")
        self.integers = integers = self.method.integers.copy()
        self.reals = reals = np.zeros(L.N_REALS)
        set_controller(settings.controller, integers, reals)
        self.held: dict[int, Any] = {}
        self.compiled = compiled
        self.settings = settings  # whose identities the cache goes by
        self.advance = kernel("advance", self.method.family, compiled.single)
        integers[L.FIELD] = compiled.field()
        if self.method.is_implicit:
            integers[L.JVP] = compiled.jvp() if self.method.needs_jvp else 0
        else:
            integers[L.FUSED] = compiled.step(self.method.stages)
        reals[L.NEWTON_ETA] = 1.0
        slots = L.RTOL, L.RTOL_STRIDE, L.ATOL, L.ATOL_STRIDE
        write_tolerance(settings.tolerance, slots, integers, self.held)
        integers[L.ADAPTIVE] = settings.adaptive
        integers[L.MAXITERS] = min(settings.maxiters, _MOST_STEPS)
        cost = (compiled.size + 10 * compiled.n) * self.method.n
        most = 50 if settings.progress else 1_000_000
        if self.method.is_implicit or self.stiff is not None:
            cost += 10 * compiled.size + compiled.n**3
        integers[L.CHUNK] = max(1, min(most, int(_WORK_A_CALL / cost)))
        reals[L.SIZE] = reals[L.DT] = math.nan if settings.dt is None else settings.dt
        reals[L.DTMIN], reals[L.DTMAX] = settings.dtmin, settings.dtmax


def template(compiled: Compiled, alg: Algorithm, settings: Settings) -> Template:
    """The template of such solves, from those that were made before."""
    methods = (alg.nonstiff, alg.stiff) if isinstance(alg, AutoSwitch) else (alg,)
    key = (
        *(getattr(x, "tableau", x) for x in methods),
        *map(type, methods),
        settings.controller,
        settings.controller_stiff,
        id(settings.tolerance),
        *(settings.adaptive, settings.dt, settings.dtmin, settings.dtmax),
        *(settings.maxiters, settings.progress, settings.h_on_tape),
    )
    known = compiled.templates
    try:
        found = known.get(key)
    except TypeError:  # a controller of the user's, with a list among its numbers
        return Template(compiled, alg, settings)
    if found is None:
        found = Template(compiled, alg, settings)
        if len(known) > _MOST_TEMPLATES:
            known.clear()
        known[key] = found
    return found


def evaluate(native: NativeField, t: float, u: Tensor) -> Tensor:
    """``f(t, u)`` by the compiled function."""
    compiled = native.compiled
    number = ctypes.c_float if compiled.single else ctypes.c_double
    pointer = ctypes.c_void_p
    function = ctypes.CFUNCTYPE(None, number, pointer, pointer, pointer)(compiled.field())
    u = u.detach().contiguous()
    out = torch.empty_like(u)
    function(t, u.data_ptr(), native.params.data_ptr(), out.data_ptr())
    return out


@dataclass
class Wanted:
    """What to keep of a solve.

    Attributes
    ----------
    times
        Ordered times to save; None: every step.
    steps
        Whether to note the steps and their estimates.
    states
        Whether to keep what the reverse sweep needs; ``checkpoints``: of that many steps.
    dense
        Whether to keep the stages; ``complete``: with the extra ones of the interpolant.
    """

    times: Sequence[float] | np.ndarray | None = None
    steps: bool = True
    states: bool = False
    checkpoints: int | None = None
    dense: bool = False
    complete: bool = False


class Memory:
    """The two arrays of a kernel, and every array that they point to.

    Parameters
    ----------
    native, template
        Right-hand side, and what is the same in all such solves.
    n
        Size of the state.
    params
        Flat parameters that ``field`` is given.
    field, jacobian
        Address of what is integrated, and its Jacobian; default: the right-hand side.
    """

    def __init__(
        self,
        native: NativeField,
        template: Template,
        n: int,
        params: Tensor,
        breaks: Sequence[float],
        field: int | None = None,
        jacobian: Callable[[], Jacobian] | None = None,
    ):
        self.native, self.template = native, template
        self.method: Method = template.method
        self.most_rows, self.most_stages = self.method.rows, self.method.n
        self.runs = [(0, template)]
        self.prepare_stiff: Callable[[], Any] = _nothing
        self.n = n
        self.dtype = torch.float32 if native.compiled.single else torch.float64
        self.item = 4 if native.compiled.single else 8
        self.integers = integers = template.integers.copy()
        self.reals = reals = template.reals.copy()
        self.held: dict[int, Any] = template.held.copy()
        self.arguments = address(integers), address(reals)
        integers[L.N] = n
        integers[L.N_BLOCKS], integers[L.BLOCK_ENDS] = 1, self.arguments[0] + 8 * L.N
        if field is not None:
            integers[L.FIELD], integers[L.FUSED] = field, 0
        self.fused = int(integers[L.FUSED])
        self.jacobian = jacobian or native.compiled.jacobian
        if template.stiff is not None:
            stiff = method_of(template.stiff)
            self.most_rows = max(self.most_rows, stiff.rows)
            self.most_stages = max(self.most_stages, stiff.n)
            integers[L.SWITCH], integers[L.DENSE_ROWS] = L.NONSTIFF, 1 + self.most_rows
            reals[L.STABILITY] = template.stability
        self.hold(L.PARAMS, params)
        if breaks:
            self.hold(L.BREAKS, np.asarray(breaks, dtype=np.float64))
            integers[L.N_BREAKS] = len(breaks)
        self.work()

    def work(self) -> None:
        """A work space, which each call of a kernel that may run beside others needs."""
        rows = self.most_rows
        size = (L.W_STAGES + 2 * rows + L.W_BARS) * self.n + rows
        self.hold(L.WORK, torch.empty(size, dtype=self.dtype))
        if self.method.is_implicit:
            self.work_of_systems()

    def work_of_systems(self) -> None:
        """Room for the Jacobian, its factors and the vectors that are solved for."""
        found, integers = self.jacobian(), self.integers
        integers[L.JAC], integers[L.HEAD] = found.address, found.head
        integers[L.JAC_ENTRIES], integers[L.TIME_TERMS] = found.entries, found.time_terms
        integers[L.JAC_ROWS], integers[L.JAC_COLUMNS] = address(found.rows), address(found.columns)
        values = found.entries + found.time_terms
        room = [(L.MATRIX, found.head**2), (L.PIVOTS, found.head), (L.VECTOR, 2 * self.n)]
        room += [(L.JAC_VALUES, values), (L.JAC_BAR, values)]
        table = np.zeros(sum(count for _, count in room))
        self.held[L.MATRIX], place = table, address(table)
        for slot, count in room:
            integers[slot] = place
            place += 8 * count
        for slot in (L.HAS_JAC, L.FRESH, L.STALE, L.FACTORED):
            integers[slot] = 0
        self.reals[L.NEWTON_ETA] = 1.0

    def records(self) -> Memory:
        """What is noted of the steps, to be kept: without states, stages and results."""
        if L.DENSE in self.held:  # which keeps this memory, too
            return self.copy()
        self.held = {slot: self.held[slot] for slot in _RECORDS if slot in self.held}
        return self

    def copy(self) -> Memory:
        """The records for a pass of its own: several may run at once."""
        copy = object.__new__(Memory)
        copy.__dict__.update(self.__dict__)
        copy.integers, copy.reals = self.integers.copy(), self.reals.copy()
        copy.arguments = address(copy.integers), address(copy.reals)
        copy.held = {slot: self.held[slot] for slot in _RECORDS if slot in self.held}
        copy.integers[L.BLOCK_ENDS] = copy.arguments[0] + 8 * L.N
        copy.integers[L.STOPS] = copy.arguments[1] + 8 * L.T_END  # read only while going forward
        return copy

    def steps(self) -> tuple[Tensor, Tensor]:
        """Start and size of each step."""
        t, h = self.held[L.STEP_T][:, : int(self.integers[L.ACCEPTED])].unbind()
        return t, h

    def give(self, slot: int) -> Tensor:
        """An array that something else keeps alive from now on."""
        return self.held[slot] if slot == L.DENSE else self.held.pop(slot)

    def hold(self, slot: int, array: Any) -> None:
        """Keep an array alive, and note its address."""
        self.held[slot] = array
        place = array.data_ptr() if isinstance(array, Tensor) else address(array)
        self.integers[slot] = place

    def hold_rows(self, slots: Sequence[int], table: Tensor) -> None:
        """The same for the rows of a table."""
        self.held[slots[0]] = table
        place, size = table.data_ptr(), table.shape[1] * table.element_size()
        for i, slot in enumerate(slots):
            self.integers[slot] = place + i * size

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
        return self.held[L.WORK][: self.n].clone()

    def want(self, wanted: Wanted) -> None:
        """Room for what is to be kept."""
        integers, n, rows = self.integers, self.n, self.most_rows
        times = wanted.times
        each = (2 if wanted.states else 0) * n + ((rows + 1) * n if wanted.dense else 0) + n
        room = max(8, min(_FIRST_ROOM, _ROOM_IN_NUMBERS // each))
        if times is None:
            integers[L.N_SAVES], integers[L.SAVE_ROOM] = -1, room
        else:
            saves = np.asarray(times, dtype=np.float64)
            self.hold(L.SAVES, saves)
            integers[L.N_SAVES] = integers[L.SAVE_ROOM] = len(saves)
        self.hold(L.OUT_U, torch.empty(int(integers[L.SAVE_ROOM]), n, dtype=self.dtype))
        if not wanted.steps:
            return
        integers[L.STEP_ROOM] = room
        self.hold_rows(_TIMES, torch.empty(2, room, dtype=torch.float64))
        self.hold_rows(_ESTIMATES, torch.empty(3, room, dtype=self.dtype))
        shapes: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        if wanted.states:
            shapes.append((L.MARKS, (4,), torch.int64))
            integers[L.STRIDE] = 1
            kept = room if wanted.checkpoints is None else wanted.checkpoints
            integers[L.STATE_ROOM] = kept
            integers[L.THINNING] = wanted.checkpoints is not None
            rows_kept = 1 + self.most_stages if self._keeps_stages(wanted) else 2
            integers[L.STATE_ROWS] = rows_kept
            self.hold(L.STATES, torch.empty(kept, rows_kept, n, dtype=self.dtype))
        if wanted.dense:
            shapes.append((L.DENSE, (rows + 1, n), self.dtype))
            shapes.append((L.COMPLETE, (), torch.int64))
            integers[L.ALWAYS_COMPLETE] = wanted.complete or self.template.stiff is not None
        for slot, shape, dtype in shapes:
            self.hold(slot, torch.empty(room, *shape, dtype=dtype))

    def _keeps_stages(self, wanted: Wanted) -> bool:
        """Whether the reverse sweep is to find the stages, rather than to evaluate them again.

        They take little memory for a small state; and a fused step makes them as fast anew. Those
        of an implicit step are its solution, which is not to be looked for again.
        """
        if wanted.checkpoints is not None:
            return False
        if self.method.is_implicit or self.template.stiff is not None:
            return True
        small = (1 + self.method.n) * self.n <= _MOST_KEPT_A_STEP
        return small and not self.integers[L.FUSED]

    def make_room(self) -> None:
        """Twice as much, for what is full."""
        integers = self.integers
        if integers[L.STEP_T] and integers[L.ACCEPTED] >= integers[L.STEP_ROOM]:
            integers[L.STEP_ROOM] *= 2
            for slots in (_TIMES, _ESTIMATES):
                old = self.held[slots[0]]
                new = torch.empty(len(old), 2 * old.shape[1], dtype=old.dtype)
                new[:, : old.shape[1]] = old
                self.hold_rows(slots, new)
            for slot in (L.MARKS, L.DENSE, L.COMPLETE):
                if slot in self.held:
                    self._double(slot)
        if integers[L.N_SAVES] < 0 and integers[L.SAVED] >= integers[L.SAVE_ROOM]:
            integers[L.SAVE_ROOM] *= 2
            self._double(L.OUT_U)
        kept = integers[L.ACCEPTED] // max(integers[L.STRIDE], 1)
        if L.STATES in self.held and not integers[L.THINNING] and kept >= integers[L.STATE_ROOM]:
            integers[L.STATE_ROOM] *= 2
            self._double(L.STATES)

    def _double(self, slot: int) -> None:
        old = self.held[slot]
        new = torch.empty(2 * len(old), *old.shape[1:], dtype=old.dtype)
        new[: len(old)] = old
        self.hold(slot, new)

    def advance(self, bar: Any = None) -> int:
        """Integrate until the end, with both of two methods; returns how it ended."""
        while True:
            status = self.run(self.runs[-1][1].advance, bar)
            if status != L.SWITCHED:
                return status
            switch(self)

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
            elif status != L.GO_ON:
                return status


@dataclass
class NativeTrajectory:
    """What a native solve gives back; as ``torch_engine.Trajectory``, with tensors for lists."""

    t: Sequence[float]
    u: Tensor
    step_t: Tensor
    step_h: Tensor
    error: Tensor
    error_norm: Tensor
    stiffness: Tensor
    nf: int
    njac: int
    nlu: int
    nsolve: int
    nnewton: int
    nreject: int
    final_t: float
    final_h: float
    retcode: ReturnCode
    kernel_s: float
    memory: Memory = field(repr=False)
    message: str = ""
    dense: NativeDense | None = None

    @property
    def naccept(self) -> int:
        return len(self.step_t)


def integrate(
    native: NativeField,
    alg: Algorithm,
    u0: Tensor,
    t0: float,
    t1: float,
    settings: Settings,
    wanted: Wanted,
    breaks: Sequence[float] = (),
) -> NativeTrajectory:
    """Integrate from ``t0`` to ``t1`` in machine code.

    Returns
    -------
    NativeTrajectory
        With the partial result and the reason where the solve failed.
    """
    memory = Memory(native, native.template, native.compiled.n, native.params, breaks)
    memory.span(t0, t1, settings.tstops)
    memory.want(wanted)
    memory.start(u0)
    if wanted.states and native.template.stiff is not None:
        memory.prepare_stiff = lambda: compile_sweep(native, native.template.stiff)
    bar = progress_bar(t0, t1) if settings.progress else None
    started = time.perf_counter()
    try:
        status = memory.advance(bar)
    finally:
        if bar is not None:
            bar.close()
    kernel_s = time.perf_counter() - started
    integers, reals, held = memory.integers, memory.reals, memory.held
    count, saved = int(integers[L.ACCEPTED]), int(integers[L.SAVED])
    # copies: the reverse pass and dense output go by these
    step_t, step_h = held[L.STEP_T][:, :count].clone().unbind()
    error, error_norm, stiffness = held[L.ERROR][:, :count].unbind()
    if wanted.times is None:
        ends = [*step_t.tolist(), float(reals[L.T])]
        times: Sequence[float] = ends[:saved]
    else:
        times = wanted.times if saved == integers[L.N_SAVES] else wanted.times[:saved]  # type: ignore[assignment]
    found = NativeTrajectory(
        t=times,
        u=held[L.OUT_U][:saved],
        step_t=step_t,
        step_h=step_h,
        error=error,
        error_norm=error_norm,
        stiffness=stiffness,
        nf=int(integers[L.NF]),
        njac=int(integers[L.NJAC]),
        nlu=int(integers[L.NLU]),
        nsolve=int(integers[L.NSOLVE]),
        nnewton=int(integers[L.NNEWTON]),
        nreject=int(integers[L.REJECTED]),
        final_t=float(reals[L.T]),
        final_h=float(reals[L.LAST_H]) if integers[L.ATTEMPTS] else math.nan,
        retcode=RETCODES[status],
        kernel_s=kernel_s,
        memory=memory,
    )
    if status != L.DONE:
        found.message = message_of(status, memory, alg, settings, t1)
    del held[L.WORK], held[L.START]
    held.pop(L.MATRIX, None)
    if wanted.dense:
        if len(memory.runs) > 1:
            join_dense(memory)
        found.dense = NativeDense(memory, t0, u0)
    return found


def message_of(status: int, memory: Memory, alg: Algorithm, settings: Settings, t1: float) -> str:
    reals = memory.reals
    last = None
    if memory.integers[L.ATTEMPTS]:
        last = Estimates(float(reals[L.LAST_ERROR]), 0.0, float(reals[L.LAST_STIFFNESS]))
    return explain(
        RETCODES[status],
        t=float(reals[L.T]),
        h=float(reals[L.SIZE]),
        t1=t1,
        alg=alg.name,
        estimates=last,
        dtmin=settings.dtmin,
        maxiters=settings.maxiters,
        state=memory.state(),
        trouble=_TROUBLES.get(int(memory.integers[L.FAILURE])),
    )


class NativeDense:
    """Continuous extension of a native solve; as ``DenseOutput``."""

    def __init__(self, memory: Memory, t0: float, u0: Tensor):
        self._memory = memory
        self.direction = float(memory.reals[L.DIRECTION])
        self.u0 = u0
        self.ends = [self.direction * t0, self.direction * float(memory.reals[L.T])]

    def __call__(self, times: Sequence[float], derivative: int = 0) -> Tensor:
        """States ``(m, N)`` at times in any order."""
        low, high = self.ends
        for t in times:
            if not low <= self.direction * t <= high:
                ends = sorted((self.direction * low, self.direction * high))
                raise ValueError(f"t = {t} is outside of the solved interval {ends}")
        memory = self._memory.copy()  # threads may read at once
        out = torch.empty(len(times), memory.n, dtype=memory.dtype)
        integers = memory.integers
        if not integers[L.ACCEPTED]:  # an empty span: every time is t0
            return self.u0.expand_as(out) if not derivative else torch.zeros_like(out)
        memory.hold(L.READ, np.asarray(times, dtype=np.float64))
        memory.hold(L.READ_OUT, out)
        integers[L.N_READ], integers[L.DERIVATIVE] = len(times), derivative
        memory.work()
        memory.run(kernel("read", memory.method.family, memory.native.compiled.single))
        return out
