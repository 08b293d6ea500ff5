"""What the kernels' arrays hold whatever is solved, and how large they are."""

from __future__ import annotations

import math
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.programs.scalar import ScalarProgram, SparseJacobian
from diffsolve.engines.native.runtime.blocks import Block, Part, place
from diffsolve.engines.native.runtime.kernels import Kernel, kernel
from diffsolve.engines.native.runtime.method import address, method_of, set_controller
from diffsolve.engines.settings import Settings
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.newton import kappa
from diffsolve.solvers.norms import Tolerance
from diffsolve.solvers.stable_steps import most_wait
from diffsolve.solvers.switching import LIMIT, STIFF_STEPS, AutoSwitch

#: Rows of the table of steps.
STEPS = (L.STEP_T, L.STEP_H, L.ERROR, L.ERROR_NORM, L.STIFFNESS)
_FIRST_ROOM = 256  # steps; doubled when they are not enough
_ROOM_IN_NUMBERS = 1_000_000  # for large states: less to begin with
_MOST_TEMPLATES = 50
_MOST_KEPT_A_STEP = 1_000  # numbers
_MOST_STEPS = 2**62
_MOST_SPARE, _MOST_SPARE_BYTES = 4, 100_000  # work spaces that wait for the next solve
_WORK_A_CALL = 1e8  # operations before a kernel returns to Python: a fraction of a second
_FLOAT64, _FLOAT32 = np.dtype(np.float64), np.dtype(np.float32)
_INT64 = np.dtype(np.int64)


@dataclass(slots=True)
class Wanted:
    """What to keep of a solve.

    Attributes
    ----------
    times
        Ordered times to save; None: every step.
    states
        Whether to keep what the reverse sweep needs; ``checkpoints``: of that many steps.
    dense
        Whether to keep the stages; ``complete``: with the extra ones of the interpolant.
    """

    times: Sequence[float] | np.ndarray | None = None
    states: bool = False
    checkpoints: int | None = None
    dense: bool = False
    complete: bool = False


def write_tolerance(
    tolerance: Tolerance, slots: Sequence[int], integers: Any, held: dict[int, Any]
) -> None:
    """Write both tolerances to the slots of ``rtol``, its stride, ``atol`` and its stride."""
    for values, slot, stride in zip(tolerance.doubles, slots[::2], slots[1::2], strict=True):
        held[slot] = values
        integers[slot], integers[stride] = address(values), len(values) > 1


Reverse = tuple[int, int, int, Kernel]


class Template:
    """What the kernels' arrays hold whatever is solved: method, tolerances, limits, addresses.

    Made once for a right-hand side, a method and settings, and copied for each solve.

    Attributes
    ----------
    stiff, other
        Of two methods that share a solve the stiff one, and what makes its template.
    most_rows, most_stages
        Of all methods.
    may_be_implicit, keeps_stages
        Whether one of the methods is implicit, and whether one keeps its stages.

    Raises
    ------
    Declined
        If such a solve cannot run as machine code, whatever its right-hand side.
    """

    def __init__(self, program: ScalarProgram, alg: Algorithm, settings: Settings):
        self.other: Callable[[], Template] | None = None
        self.stiff: Algorithm | None = None
        limit = math.nan
        if isinstance(alg, AutoSwitch):
            limit, stiff, alg = LIMIT * alg.stability_size, alg.stiff, alg.nonstiff
            own = settings.controller_stiff or settings.controller
            theirs = replace(settings, controller=own, controller_stiff=None)
            self.other = partial(_template_of, weakref.ref(program), stiff, theirs)
            self.stiff = stiff
        self.method = method_of(alg)
        methods = [self.method, method_of(self.stiff)] if self.stiff else [self.method]
        self.may_be_implicit = any(method.family.is_implicit for method in methods)
        self.keeps_stages = any(method.family.keeps_stages for method in methods)
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
        self._program = weakref.ref(program)  # which keeps the template
        self.dtype = _FLOAT32 if program.is_float32 else _FLOAT64
        self.settings = settings  # whose identities the cache goes by
        self.advance = kernel("advance", self.method.family, program.is_float32)
        self._reverse: dict[tuple[bool, ...], Reverse] = {}
        integers[L.FIELD] = program.address("field")
        family = self.method.family
        integers[L.FUSED] = family.fused_step(program, self.method.stages)
        if family.needs_jvp:
            integers[L.JVP] = program.address("jvp")
        self._work: dict[int, Block] = {}
        self._kept: dict[Any, Kept] = {}
        if family.is_implicit:
            integers[L.JAC : L.HEAD + 1] = program.jacobian().slots
        eps = float(np.finfo(np.float32 if program.is_float32 else np.float64).eps)
        integers[L.TO_ROUNDING], reals[L.KAPPA] = settings.to_rounding, 1.0
        if not settings.to_rounding:
            reals[L.KAPPA] = kappa(float(settings.tolerance.doubles[0].min()), eps)
        if self.stiff is not None:
            integers[L.SWITCH], integers[L.SWITCH_AFTER] = L.NONSTIFF, STIFF_STEPS
            integers[L.DENSE_ROWS], reals[L.STIFF_ABOVE] = 1 + self.most_rows, limit
        if settings.stable_steps and settings.adaptive and alg.stable_sizes is not None:
            sizes, evaluations = alg.stable_sizes
            self.held[L.STABLE] = sizes
            integers[L.STABLE] = address(sizes)
            integers[L.STABLE_MOST_WAIT] = most_wait(evaluations)
        slots = L.RTOL, L.RTOL_STRIDE, L.ATOL, L.ATOL_STRIDE
        write_tolerance(settings.tolerance, slots, integers, self.held)
        integers[L.ADAPTIVE] = settings.adaptive
        integers[L.MAXITERS] = min(settings.maxiters, _MOST_STEPS)
        cost = (program.size + 10 * program.n) * self.method.n
        most = 50 if settings.progress else 1_000_000
        if self.may_be_implicit:
            cost += 10 * program.size + program.n**3
        integers[L.CHUNK] = max(1, min(most, int(_WORK_A_CALL / cost)))
        reals[L.SIZE] = reals[L.DT] = math.nan if settings.dt is None else settings.dt
        reals[L.DTMIN], reals[L.DTMAX] = settings.dtmin, settings.dtmax

    @property
    def program(self) -> ScalarProgram:
        found = self._program()
        assert found is not None
        return found

    def reverse(self, program: ScalarProgram, active: tuple[bool, ...]) -> Reverse:
        """Product with the Jacobian, the reverse of a step and of the Jacobian, and the kernel."""
        found = self._reverse.get(active)
        if found is None:
            family = self.method.family
            sweep = kernel("sweep", family, program.is_float32)
            of_jacobian = program.address("jacobian_vjp", active) if family.is_implicit else 0
            fused = self.integers[L.FUSED]
            fused = family.fused_vjp(program, self.method.stages, active, fused)
            found = self._reverse[active] = (
                program.address("vjp", active),
                fused,
                of_jacobian,
                sweep,
            )
        return found

    def work(self, n: int, jacobian: SparseJacobian | None = None) -> Block:
        """Work space for states of ``n`` numbers.

        ``jacobian``: of what is integrated, where that is not the right-hand side.
        """
        found = self._work.get(n)
        if found is None or jacobian is not None:
            rows = self.most_rows
            size = (L.W_STAGES + 2 * rows + L.W_BARS) * n + rows
            parts: list[Part] = [(L.WORK, (size,), self.dtype)]
            family = self.method.family
            if family.is_implicit:
                parts += family.room(n, jacobian or self.program.jacobian())
            found = Block(parts)
            if jacobian is None:
                self._work[n] = found
        return found

    def kept(self, wanted: Wanted) -> Kept:
        """Room for what solves keep that are to keep the same."""
        key = (
            *(wanted.times is None, wanted.states, wanted.checkpoints),
            *(wanted.dense, wanted.complete),
        )
        found = self._kept.get(key)
        return remembered(self._kept, key, lambda: Kept(self, wanted)) if found is None else found


class WorkSpace:
    """Work space, and a kernel's integers with its addresses."""

    __slots__ = ("array", "integers")

    def __init__(self, array: np.ndarray, integers: Any):
        self.array, self.integers = array, integers


class Kept:
    """Room for what solves keep of their steps, and the kernels' integers with its sizes.

    Attributes
    ----------
    integers
        To be copied.
    work, work_slots
        Work space, which ``borrow`` gives, and its slots.
    room
        Steps, to begin with.
    block
        Of states and marks of the steps, and of the parameters; None: they are not kept.
    params
        How many parameters are copied there.
    dense
        Shape of the dense records; None: there are none.
    """

    def __init__(self, template: Template, wanted: Wanted):
        n, rows = template.program.n, template.most_rows
        self._dtype, self._n = template.dtype, n
        each = (2 if wanted.states else 0) * n + ((rows + 1) * n if wanted.dense else 0) + n
        self.room = room = max(8, min(_FIRST_ROOM, _ROOM_IN_NUMBERS // each))
        self.integers = integers = template.integers[:]
        integers[L.STEP_ROOM], integers[L.OUT_STRIDE] = room, n
        if wanted.times is None:
            integers[L.N_SAVES], integers[L.SAVE_ROOM] = -1, room
        self._checkpoints = wanted.checkpoints
        # dense output outlives the states, and the copy of the parameters that lies with them
        self.params = template.program.n_params if wanted.states and not wanted.dense else 0
        if wanted.states:
            stages = _keeps_stages(template, wanted)
            self._rows = 1 + template.most_stages if stages else 2
            integers[L.STRIDE] = 1
            integers[L.STATE_ROWS], integers[L.STATE_SIZE] = self._rows, self._rows * n
            integers[L.STATE_ROOM] = room if wanted.checkpoints is None else wanted.checkpoints
            integers[L.THINNING] = wanted.checkpoints is not None
        self.dense = (room, rows + 1, n) if wanted.dense else None
        integers[L.ALWAYS_COMPLETE] = wanted.complete or template.stiff is not None
        self._blocks: dict[int, Block] = {}
        self.block = self.block_of(room) if wanted.states else None
        self._times: tuple[np.ndarray, int] | None = None
        self.work = template.work(n)
        self._is_implicit, self.work_slots = template.method.is_implicit, self.work.slots
        self._spare: list[WorkSpace] = []

    def borrow(self) -> WorkSpace:
        """A work space that no other solve uses, often one that was used before.

        Of what lies there the kernels expect one thing: that ``JAC_BAR`` is zero. Each reverse step
        leaves it so; a pass that was broken off does not give its work space back.
        """
        try:
            return self._spare.pop()
        except IndexError:
            integers = self.integers[:]
            return WorkSpace(self.work.lay(integers, zero=self._is_implicit), integers)

    def give_back(self, work: WorkSpace) -> None:
        """Let another solve use it, where it is worth keeping."""
        if work.array.nbytes <= _MOST_SPARE_BYTES and len(self._spare) < _MOST_SPARE:
            self._spare.append(work)

    def block_of(self, room: int) -> Block:
        """Where those of so many steps lie."""
        found = self._blocks.get(room)
        if found is None:
            found = self._blocks[room] = self._new_block(room)
        return found

    def _new_block(self, room: int) -> Block:
        kept = room if self._checkpoints is None else self._checkpoints
        states = (L.STATES, (kept, self._rows, self._n), self._dtype)
        parts: list[Part] = [(L.MARKS, (room, L.N_MARKS), _INT64), states]
        if self.params:
            parts.append((L.PARAMS, (self.params,), self._dtype))
        return Block(parts)

    def placed(self, times: Any) -> tuple[np.ndarray, int]:
        """Times to save as an array, and its address, which is often that of the solve before."""
        known = self._times
        if known is None or known[0] is not times:
            array = np.asarray(times, dtype=np.float64)
            known = self._times = array, place(array)
        return known


def _keeps_stages(template: Template, wanted: Wanted) -> bool:
    """Whether the reverse sweep is to find the stages, rather than to evaluate them again.

    They take little memory for a small state; and a fused step makes them as fast anew. Those of
    an implicit step are its solution, which is not to be looked for again.
    """
    method, n = template.method, template.program.n
    if wanted.checkpoints is not None:
        return False
    if template.keeps_stages:
        return True
    small = (1 + method.n) * n <= _MOST_KEPT_A_STEP
    return small and not template.integers[L.FUSED]


def template(program: ScalarProgram, alg: Algorithm, settings: Settings) -> Template:
    """The template of such solves, from those that were made before."""
    key, latest = alg.key, program.latest_template
    if latest is not None and latest[0] is settings and latest[1] == key:
        return latest[2]
    found = _find_template(program, alg, settings)
    program.latest_template = settings, key, found
    return found


def _template_of(program: Callable[[], Any], alg: Algorithm, settings: Settings) -> Template:
    return template(program(), alg, settings)


def _find_template(program: ScalarProgram, alg: Algorithm, settings: Settings) -> Template:
    methods = (alg.nonstiff, alg.stiff) if isinstance(alg, AutoSwitch) else (alg,)
    key = (
        *(getattr(x, "tableau", x) for x in methods),
        *map(type, methods),
        settings.controller,
        settings.controller_stiff,
        id(settings.tolerance),
        *(settings.adaptive, settings.to_rounding, settings.dt, settings.dtmin, settings.dtmax),
        *(settings.maxiters, settings.progress, settings.h_on_tape, settings.stable_steps),
    )
    return remembered(program.templates, key, lambda: Template(program, alg, settings))


def remembered(known: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """What was made for a key before, or is made now."""
    try:
        found = known.get(key)
    except TypeError:  # a controller of the user's, with a list among its numbers
        return make()
    if found is None:
        if len(known) >= _MOST_TEMPLATES:
            known.clear()
        found = known[key] = make()
    return found
