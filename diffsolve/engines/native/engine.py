"""Running the kernels: memory for a solve, calls of the compiled loop, and what comes out."""

from __future__ import annotations

import ctypes
import functools
import math
import time
from array import array
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
from diffsolve.engines.native.switching import Run, join_dense, switch
from diffsolve.engines.torch_engine import Settings, progress_bar
from diffsolve.solution import ReturnCode, Steps
from diffsolve.solvers.algorithm import Algorithm, Trouble
from diffsolve.solvers.interpolation import DenseOutput
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.newton import kappa
from diffsolve.solvers.norms import Estimates, Tolerance
from diffsolve.solvers.switching import LIMIT, STIFF_STEPS, AutoSwitch

RETCODES = {
    L.DONE: ReturnCode.SUCCESS,
    L.MAX_ITERS: ReturnCode.MAX_ITERS,
    L.DT_LESS_THAN_MIN: ReturnCode.DT_LESS_THAN_MIN,
    L.UNSTABLE: ReturnCode.UNSTABLE,
    L.NEWTON_FAILED: ReturnCode.NEWTON_FAILED,
}
_COUNTERS = (L.NF, L.NJAC, L.NLU, L.NSOLVE, L.NNEWTON)
_TROUBLES = {
    L.NOT_FINITE: Trouble.NOT_FINITE,
    L.NOT_CONVERGED: Trouble.DIVERGED,
    L.SINGULAR: Trouble.SINGULAR,
    L.JAC_NOT_FINITE: Trouble.JACOBIAN,
}
_NO_JACOBIAN = array("q", [0] * (L.FACTORED + 1 - L.HAS_JAC))
_FIRST_ROOM = 256  # steps; doubled when they are not enough
_ROOM_IN_NUMBERS = 1_000_000  # for large states: less to begin with
_MOST_TEMPLATES = 50
_MOST_KEPT_A_STEP = 1_000  # numbers
_MOST_STEPS = 2**62
_WORK_A_CALL = 1e8  # operations before a kernel returns to Python: a fraction of a second
_FLOAT64, _FLOAT32 = np.dtype(np.float64), np.dtype(np.float32)
_INT64 = np.dtype(np.int64)
_STEPS = (L.STEP_T, L.STEP_H, L.ERROR, L.ERROR_NORM, L.STIFFNESS)  # rows of one table
_BYTES = ctypes.c_char * 0
_RECORDS = (L.PARAMS, L.STEP_T, L.MARKS, L.SAVES, L.STOPS, L.BREAKS, L.RTOL, L.ATOL)


def write_tolerance(
    tolerance: Tolerance, slots: Sequence[int], integers: Any, held: dict[int, Any]
) -> None:
    """Write both tolerances to the slots of ``rtol``, its stride, ``atol`` and its stride."""
    for values, slot, stride in zip(tolerance.doubles, slots[::2], slots[1::2], strict=True):
        held[slot] = values
        integers[slot], integers[stride] = address(values), len(values) > 1


Reverse = tuple[int, int, int, Kernel]
Counts = tuple[int, ...]  # as Stats.count takes them


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
        limit = math.nan
        if isinstance(alg, AutoSwitch):
            limit, stiff, alg = LIMIT * alg.stability_size, alg.stiff, alg.nonstiff
            own = settings.controller_stiff or settings.controller
            theirs = replace(settings, controller=own, controller_stiff=None)
            self.other = lambda: template(compiled, stiff, theirs)
            self.stiff = stiff
        self.method = method_of(alg)
        methods = [self.method, method_of(self.stiff)] if self.stiff else [self.method]
        self.most_rows = max(method.rows for method in methods)
        self.most_stages = max(method.n for method in methods)
        if settings.tolerance.norm is not None:
            raise Declined("it has a norm of its own")
        if settings.h_on_tape:
            raise Declined("through_step_size=True differentiates the step sizes on the tape")
        # Python reads and writes these one by one, faster than NumPy's arrays
        self.integers = integers = array("q", self.method.integers.tobytes())
        self.reals = reals = array("d", bytes(8 * L.N_REALS))
        set_controller(settings.controller, integers, reals)
        self.held: dict[int, Any] = {}
        self.compiled = compiled
        self.settings = settings  # whose identities the cache goes by
        self.advance = kernel("advance", self.method.family, compiled.single)
        self._reverse: dict[tuple[bool, ...], Reverse] = {}
        integers[L.FIELD] = compiled.field()
        family, stages = self.method.family, self.method.stages
        if family == "explicit_rk":
            integers[L.FUSED] = compiled.step(stages)
        elif family == "rosenbrock":
            integers[L.FUSED] = compiled.rosenbrock_step(stages)
        elif self.method.needs_jvp:
            integers[L.JVP] = compiled.jvp()
        if self.method.is_implicit:
            compiled.jacobian()
        reals[L.NEWTON_ETA] = 1.0
        eps = float(np.finfo(np.float32 if compiled.single else np.float64).eps)
        reals[L.KAPPA] = kappa(float(settings.tolerance.doubles[0].min()), eps)
        if self.stiff is not None:
            integers[L.SWITCH], integers[L.SWITCH_AFTER] = L.NONSTIFF, STIFF_STEPS
            integers[L.DENSE_ROWS], reals[L.STIFF_ABOVE] = 1 + self.most_rows, limit
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

    def reverse(self, compiled: Compiled, active: tuple[bool, ...]) -> Reverse:
        """Product with the Jacobian, the reverse of a step and of the Jacobian, and the kernel."""
        found = self._reverse.get(active)
        if found is None:
            sweep = kernel("sweep", self.method.family, compiled.single)
            stages, fused, of_jacobian = self.method.stages, 0, 0
            if self.method.family == "explicit_rk":
                fused = compiled.step_vjp(stages, active)
            else:
                of_jacobian = compiled.jacobian_vjp(active)
            if self.method.family == "rosenbrock":
                fused = compiled.rosenbrock_vjp(stages, active)
            found = self._reverse[active] = (compiled.vjp(active), fused, of_jacobian, sweep)
        return found


def template(compiled: Compiled, alg: Algorithm, settings: Settings) -> Template:
    """The template of such solves, from those that were made before."""
    key, latest = alg.key, compiled.latest_template
    if latest is not None and latest[0] is settings and latest[1] == key:
        return latest[2]
    found = _find_template(compiled, alg, settings)
    compiled.latest_template = settings, key, found
    return found


def _find_template(compiled: Compiled, alg: Algorithm, settings: Settings) -> Template:
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


def _place(array: Any) -> int:
    """``address`` of an array that may be written to, in a quarter of the time."""
    return ctypes.addressof(_BYTES.from_buffer(array))


@functools.lru_cache(maxsize=100)
def function_at(address: int, single: bool) -> Callable[[float, int, int, int], None]:
    """``f(t, u, p, out)`` at an address."""
    number, pointer = ctypes.c_float if single else ctypes.c_double, ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, number, pointer, pointer, pointer)(address)


def evaluate(native: NativeField, t: float, u: Tensor) -> Tensor:
    """``f(t, u)`` by the compiled function."""
    compiled = native.compiled
    function = function_at(compiled.field(), compiled.single)
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

    source: Memory | None = None  # keeps alive what a copy points to
    jacobian_at_work: Jacobian | None = None
    identity: np.ndarray | None = None  # so do polynomials that stand for stages

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
        self.most_rows, self.most_stages = template.most_rows, template.most_stages
        self.runs = [Run(template, 0)]
        self.n = n
        self.dtype = _FLOAT32 if native.compiled.single else _FLOAT64
        self.item = self.dtype.itemsize
        self.integers = integers = template.integers[:]
        self.reals = reals = template.reals[:]
        self.held: dict[int, Any] = template.held.copy()
        self.arguments = integers.buffer_info()[0], reals.buffer_info()[0]
        integers[L.N] = n
        integers[L.N_BLOCKS], integers[L.BLOCK_ENDS] = 1, self.arguments[0] + 8 * L.N
        if field is not None:
            integers[L.FIELD], integers[L.FUSED], integers[L.JVP] = field, 0, 0
        self.is_own_field = field is not None
        self.jacobian = jacobian or native.compiled.jacobian
        self.hold(L.PARAMS, params)
        if breaks:
            self.hold(L.BREAKS, np.asarray(breaks, dtype=np.float64))
            integers[L.N_BREAKS] = len(breaks)
        self.work()

    def prepare_stiff(self) -> Any:
        """Make what the reverse pass of the stiff method needs; where one is wanted, set anew."""

    def work(self) -> None:
        """A work space, which each call of a kernel that may run beside others needs."""
        rows = self.most_rows
        size = (L.W_STAGES + 2 * rows + L.W_BARS) * self.n + rows
        self.hold_new(L.WORK, np.empty(size, self.dtype))
        if self.method.is_implicit:
            self.work_of_systems()

    def work_of_systems(self) -> None:
        """Room for the Jacobian, its factors and the vectors that are solved for."""
        found, integers = self.jacobian(), self.integers
        self.jacobian_at_work = found  # whose arrays the kernels read
        integers[L.JAC : L.HEAD + 1] = found.slots
        values = found.entries + found.time_terms
        matrix = np.zeros(found.head * (found.head + 1) + self.n + 2 * values)
        self.hold_new(L.MATRIX, matrix)
        place = integers[L.MATRIX] + 8 * found.head**2
        integers[L.PIVOTS] = place
        integers[L.VECTOR] = place = place + 8 * found.head
        integers[L.JAC_VALUES] = place = place + 8 * self.n
        integers[L.JAC_BAR] = place + 8 * values
        integers[L.HAS_JAC : L.FACTORED + 1] = _NO_JACOBIAN
        self.reals[L.NEWTON_ETA] = 1.0

    def records(self) -> Memory:
        """What is noted of the steps, to be kept: without states, stages and results."""
        kept = {slot: self.held[slot] for slot in _RECORDS if slot in self.held}
        records = self
        if L.DENSE in self.held:  # which keeps this memory, too
            records = self.copy()
            records.source = None
        records.held = kept
        return records

    def copy(self) -> Memory:
        """The same for a pass of its own: several may run at once."""
        copy = object.__new__(type(self))
        copy.__dict__ = self.__dict__.copy()
        copy.integers, copy.reals = self.integers[:], self.reals[:]
        copy.arguments = copy.integers.buffer_info()[0], copy.reals.buffer_info()[0]
        copy.source, copy.held = self, {}
        copy.integers[L.BLOCK_ENDS] = copy.arguments[0] + 8 * L.N
        copy.integers[L.STOPS] = copy.arguments[1] + 8 * L.T_END  # read only while going forward
        return copy

    def counts(self) -> Counts:
        """Work done, for ``Stats.count``."""
        integers = self.integers
        return (integers[L.NF], *integers[L.NJAC : L.NNEWTON + 1])

    def restart_counts(self) -> None:
        for slot in _COUNTERS:
            self.integers[slot] = 0

    def steps(self) -> np.ndarray:
        """Start, size and estimates of each step, in rows."""
        return self.held[L.STEP_T][:, : self.integers[L.ACCEPTED]]

    def give(self, slot: int) -> Tensor:
        """An array that something else keeps alive from now on."""
        return torch.from_numpy(self.held[slot] if slot == L.DENSE else self.held.pop(slot))

    def hold(self, slot: int, array: Any) -> None:
        """Keep an array alive, and note its address."""
        self.held[slot] = array
        place = array.data_ptr() if isinstance(array, Tensor) else address(array)
        self.integers[slot] = place

    def hold_new(self, slot: int, array: np.ndarray) -> None:
        """The same, for an array that was made for this."""
        self.held[slot] = array
        self.integers[slot] = _place(array)

    def hold_steps(self, table: np.ndarray) -> None:
        """The same for the rows of the table of steps; float32 numbers fill half of a row."""
        self.held[L.STEP_T] = table
        place, size = _place(table), 8 * table.shape[1]
        for slot in _STEPS:
            self.integers[slot] = place
            place += size

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
        return torch.from_numpy(self.held[L.WORK][: self.n].copy())

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
            self.hold_new(L.SAVES, saves)
            integers[L.N_SAVES] = integers[L.SAVE_ROOM] = len(saves)
        integers[L.OUT_STRIDE] = n
        self.hold_new(L.OUT_U, np.empty((integers[L.SAVE_ROOM], n), self.dtype))
        if not wanted.steps:
            return
        integers[L.STEP_ROOM] = room
        self.hold_steps(np.empty((len(_STEPS), room)))
        if wanted.states:
            self.hold_new(L.MARKS, np.empty((room, L.N_MARKS), _INT64))
            integers[L.STRIDE] = 1
            kept = room if wanted.checkpoints is None else wanted.checkpoints
            integers[L.STATE_ROOM] = kept
            integers[L.THINNING] = wanted.checkpoints is not None
            rows_kept = 1 + self.most_stages if self._keeps_stages(wanted) else 2
            integers[L.STATE_ROWS], integers[L.STATE_SIZE] = rows_kept, rows_kept * n
            self.hold_new(L.STATES, np.empty((kept, rows_kept, n), self.dtype))
        if wanted.dense:
            self.hold_new(L.DENSE, np.empty((room, rows + 1, n), self.dtype))
            self.hold_new(L.COMPLETE, np.empty(room, _INT64))
            integers[L.ALWAYS_COMPLETE] = wanted.complete or self.template.stiff is not None

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
            old = self.held[L.STEP_T]
            new = np.empty((len(old), 2 * old.shape[1]))
            new[:, : old.shape[1]] = old
            self.hold_steps(new)
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
        new = np.empty((2 * len(old), *old.shape[1:]), old.dtype)
        new[: len(old)] = old
        self.hold_new(slot, new)

    def advance(self, bar: Any = None) -> int:
        """Integrate until the end, with both of two methods; returns how it ended."""
        while True:
            status = self.run(self.runs[-1].template.advance, bar)
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
            elif status != L.GO_ON or self.stopped():
                return status

    def stopped(self) -> bool:
        """Whether to end early, at the next return of a kernel."""
        return False


@dataclass(slots=True)
class StepColumns:
    """Start, size and estimates of the steps: rows of a table, which are made tensors when asked.

    Attributes
    ----------
    table
        ``(5, n)`` float64; single numbers fill the first half of a row.
    dtype
        Of the estimates.
    """

    table: np.ndarray
    dtype: np.dtype

    def times(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.table[0]), torch.from_numpy(self.table[1])

    def estimates(self) -> tuple[Tensor, Tensor, Tensor]:
        """``error, error_norm, stiffness``."""
        if self.dtype is _FLOAT64:
            _, _, e, norm, stiffness = self.table
        else:
            e, norm, stiffness = self.table[2:].view(self.dtype)[:, : self.table.shape[1]]
        return torch.from_numpy(e), torch.from_numpy(norm), torch.from_numpy(stiffness)

    def steps(self, *estimates: Tensor) -> Steps:
        """The columns of all, or the times with estimates that are differentiated."""
        return Steps(*self.times(), *(estimates or self.estimates()))


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
        return self.columns.table.shape[1]


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
    other = native.template.other
    if wanted.states and other is not None:
        memory.prepare_stiff = lambda: other().reverse(native.compiled, native.active)
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
    # a copy: the reverse pass and dense output go by these
    table = memory.steps().copy()
    if wanted.times is None:
        ends = [*table[0].tolist(), reals[L.T]]
        times: Sequence[float] = ends[:saved]
    else:
        times = wanted.times if saved == integers[L.N_SAVES] else wanted.times[:saved]  # type: ignore[assignment]
    out = held[L.OUT_U]
    found = NativeTrajectory(
        t=times,
        u=torch.from_numpy(out if saved == len(out) else out[:saved]),
        columns=StepColumns(table, memory.dtype),
        counts=memory.counts(),
        nreject=integers[L.REJECTED],
        final_t=reals[L.T],
        final_h=reals[L.LAST_H] if integers[L.ATTEMPTS] else math.nan,
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
        last = Estimates(reals[L.LAST_ERROR], 0.0, reals[L.LAST_STIFFNESS])
    return explain(
        RETCODES[status],
        t=reals[L.T],
        h=reals[L.SIZE],
        t1=t1,
        alg=alg.name,
        estimates=last,
        dtmin=settings.dtmin,
        maxiters=settings.maxiters,
        adaptive=settings.adaptive,
        state=memory.state(),
        trouble=_TROUBLES.get(int(memory.integers[L.FAILURE])),
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
        memory.run(kernel("read", memory.method.family, memory.native.compiled.single))
        return out
