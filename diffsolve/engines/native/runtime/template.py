"""What the kernels' arrays hold in all solves with a method and settings."""

from __future__ import annotations

import math
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.programs.base import Program
from diffsolve.engines.native.programs.scalar import ScalarProgram, SparseJacobian
from diffsolve.engines.native.runtime.blocks import Block, Part, place
from diffsolve.engines.native.runtime.kernels import Kernel, kernel
from diffsolve.engines.native.runtime.method import (
    MethodNumbers,
    address,
    method_of,
    set_controller,
)
from diffsolve.engines.plan import SaveRequest
from diffsolve.engines.settings import Settings
from diffsolve.problems.vector_field import VectorField
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
_MOST_KEPT_A_STEP = 1_000  # numbers, of stages
_MOST_ATTEMPTS = 2**62
_MOST_SPARE, _MOST_SPARE_BYTES = 4, 100_000  # work spaces that wait for the next solve
WORK_A_CALL = 1e8  # operations before a kernel returns to Python: a fraction of a second
_FLOAT64, _FLOAT32 = np.dtype(np.float64), np.dtype(np.float32)
_INT64 = np.dtype(np.int64)
Reverse = tuple[int, int, int, Kernel]


def write_tolerance(
    tolerance: Tolerance, slots: Sequence[int], integers: Any, arrays: dict[int, Any]
) -> None:
    """Write both tolerances to the slots of ``rtol``, its stride, ``atol`` and its stride."""
    for values, slot, stride in zip(tolerance.doubles, slots[::2], slots[1::2], strict=True):
        arrays[slot] = values
        integers[slot], integers[stride] = address(values), len(values) > 1


class Template:
    """What the kernels' arrays hold whatever is solved: method, tolerances, limits, addresses.

    Made once for a program, a method and settings, and copied for each solve.

    Attributes
    ----------
    method
        Numbers of the method that takes the first steps.
    integers, reals
        The two arrays of a kernel.
    arrays
        What their addresses point to, by slot.
    advance
        The kernel that integrates.
    stiff, other
        Of two methods that share a solve the stiff one, and what makes its template.

    Raises
    ------
    Declined
        If such a solve cannot run as machine code, whatever its right-hand side.
    """

    stiff: Algorithm | None = None
    other: Callable[[], Template] | None = None

    def __init__(self, program: Program, method: MethodNumbers, settings: Settings):
        if settings.tolerance.norm is not None:
            raise Declined("it has a norm of its own")
        if settings.h_on_tape:
            raise Declined("through_step_size=True differentiates the step sizes on the tape")
        self.method, self.settings = method, settings  # the cache goes by identities of settings
        # Python reads and writes these one by one, faster than NumPy's arrays
        self.integers = integers = array("q", method.integers.tobytes())
        self.reals = reals = array("d", bytes(8 * L.N_REALS))
        set_controller(settings.controller, integers, reals)
        self.arrays: dict[int, Any] = {}
        self._program = weakref.ref(program)  # which keeps the template
        self.dtype = _FLOAT32 if program.is_float32 else _FLOAT64
        self.advance = kernel("advance", method.family, program.is_float32)
        integers[L.FUSED] = method.family.fused_step(program, method.stages)
        slots = L.RTOL, L.RTOL_STRIDE, L.ATOL, L.ATOL_STRIDE
        write_tolerance(settings.tolerance, slots, integers, self.arrays)
        integers[L.ADAPTIVE] = settings.adaptive
        integers[L.MAXITERS] = min(settings.maxiters, _MOST_ATTEMPTS)
        reals[L.SIZE] = reals[L.DT] = math.nan if settings.dt is None else settings.dt
        reals[L.DTMIN], reals[L.DTMAX] = settings.dtmin, settings.dtmax

    @property
    def program(self) -> Any:
        program = self._program()
        assert program is not None
        return program

    def work(self, n: int, jacobian: Any = None) -> Block:
        """Work space for states of ``n`` numbers; ``jacobian``: see ``ScalarTemplate``."""
        return Block(self.rows(n, self.method.rows))

    def rows(self, n: int, rows: int) -> list[Part]:
        """The part of the work space that every family has: ``rows`` of stages, and results."""
        size = (L.W_STAGES + 2 * rows + L.W_BARS) * n + rows
        return [(L.WORK, (size,), self.dtype)]

    def check_checkpoints(self) -> None:
        """Decline checkpoints where steps cannot be repeated from them.

        Raises
        ------
        Declined
            If they cannot.
        """


class ScalarTemplate(Template):
    """That of an ODE: with what implicit methods, and two methods that share a solve, need.

    Attributes
    ----------
    most_rows, most_stages
        Of all methods.
    may_be_implicit, keeps_stages
        Whether one of the methods is implicit, and whether one keeps its stages.
    """

    def __init__(self, program: ScalarProgram, alg: Algorithm, settings: Settings):
        limit = math.nan
        if isinstance(alg, AutoSwitch):
            limit, stiff, alg = LIMIT * alg.stability_size, alg.stiff, alg.nonstiff
            own = settings.controller_stiff or settings.controller
            theirs = replace(settings, controller=own, controller_stiff=None)
            self.other = partial(_template_of, weakref.ref(program), stiff, theirs)
            self.stiff = stiff
        method = method_of(alg)
        methods = [method, method_of(self.stiff)] if self.stiff else [method]
        super().__init__(program, method, settings)
        self.may_be_implicit = any(x.family.is_implicit for x in methods)
        self.keeps_stages = any(x.family.keeps_stages for x in methods)
        self.most_rows = max(x.rows for x in methods)
        self.most_stages = max(x.n for x in methods)
        self._reverse: dict[tuple[bool, ...], Reverse] = {}
        self._work: dict[int, Block] = {}
        self._layouts: dict[Any, RecordLayout] = {}
        integers, reals = self.integers, self.reals
        integers[L.FIELD] = program.address("field")
        if method.family.needs_jvp:
            integers[L.JVP] = program.address("jvp")
        if method.family.is_implicit:
            integers[L.JAC : L.N_COLUMNS + 1] = program.jacobian().slots
        eps = float(np.finfo(np.float32 if program.is_float32 else np.float64).eps)
        integers[L.TO_ROUNDING], reals[L.KAPPA] = settings.to_rounding, 1.0
        if not settings.to_rounding:
            reals[L.KAPPA] = kappa(float(settings.tolerance.doubles[0].min()), eps)
        if self.stiff is not None:
            integers[L.SWITCH], integers[L.SWITCH_AFTER] = L.NONSTIFF, STIFF_STEPS
            integers[L.DENSE_ROWS], reals[L.STIFF_ABOVE] = 1 + self.most_rows, limit
        if settings.stable_steps and settings.adaptive and alg.stable_sizes is not None:
            sizes, evaluations = alg.stable_sizes
            self.arrays[L.STABLE] = sizes
            integers[L.STABLE] = address(sizes)
            integers[L.STABLE_MOST_WAIT] = most_wait(evaluations)
        integers[L.CHUNK] = self._steps_a_call(program)

    def _steps_a_call(self, program: ScalarProgram) -> int:
        """Attempted steps before a kernel returns to Python."""
        cost = (program.size + 10 * program.n) * self.method.n
        if self.may_be_implicit:
            cost += 10 * program.size + program.n**3
        most = 50 if self.settings.progress else 1_000_000
        return max(1, min(most, int(WORK_A_CALL / cost)))

    def reverse(self, active: tuple[bool, ...]) -> Reverse:
        """Product with the Jacobian, the reverse of a step and of the Jacobian, and the kernel."""
        addresses = self._reverse.get(active)
        if addresses is None:
            program, family = self.program, self.method.family
            sweep = kernel("sweep", family, program.is_float32)
            of_jacobian = program.address("jacobian_vjp", active) if family.is_implicit else 0
            fused = self.integers[L.FUSED]
            fused = family.fused_vjp(program, self.method.stages, active, fused)
            vjp = program.address("vjp", active)
            addresses = self._reverse[active] = vjp, fused, of_jacobian, sweep
        return addresses

    def work(self, n: int, jacobian: SparseJacobian | None = None) -> Block:
        """Work space for states of ``n`` numbers.

        ``jacobian``: of what is integrated, where that is not the right-hand side.
        """
        block = self._work.get(n)
        if block is None or jacobian is not None:
            parts, family = self.rows(n, self.most_rows), self.method.family
            if family.is_implicit:
                parts += family.room(n, jacobian or self.program.jacobian())
            block = Block(parts)
            if jacobian is None:
                self._work[n] = block
        return block

    def layout(self, request: SaveRequest) -> RecordLayout:
        """Where solves with such a request keep what it asks for."""
        key = (
            *(request.times is None, request.states, request.checkpoints),
            *(request.dense, request.complete),
        )
        layout = self._layouts.get(key)
        return layout or made_once(self._layouts, key, lambda: RecordLayout(self, request))


class WorkSpace:
    """Work space, and a kernel's integers with its addresses."""

    __slots__ = ("array", "integers")

    def __init__(self, array: np.ndarray, integers: Any):
        self.array, self.integers = array, integers


class RecordLayout:
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

    def __init__(self, template: ScalarTemplate, request: SaveRequest):
        n, rows = template.program.n, template.most_rows
        self._dtype, self._n = template.dtype, n
        each = (2 if request.states else 0) * n + ((rows + 1) * n if request.dense else 0) + n
        self.room = room = max(8, min(_FIRST_ROOM, _ROOM_IN_NUMBERS // each))
        self.integers = integers = template.integers[:]
        integers[L.STEP_ROOM], integers[L.OUT_STRIDE] = room, n
        if request.times is None:
            integers[L.N_SAVES], integers[L.SAVE_ROOM] = -1, room
        self._checkpoints = request.checkpoints
        # dense output outlives the states, and the copy of the parameters that lies with them
        self.params = template.program.n_params if request.states and not request.dense else 0
        if request.states:
            stages = _keeps_stages(template, request)
            self._rows = 1 + template.most_stages if stages else 2
            integers[L.STRIDE] = 1
            integers[L.STATE_SIZE] = self._rows * n
            integers[L.STATE_ROOM] = room if request.checkpoints is None else request.checkpoints
            integers[L.THINNING] = request.checkpoints is not None
        self.dense = (room, rows + 1, n) if request.dense else None
        integers[L.ALWAYS_COMPLETE] = request.complete or template.stiff is not None
        self._blocks: dict[int, Block] = {}
        self.block = self.block_of(room) if request.states else None
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
        block = self._blocks.get(room)
        if block is None:
            block = self._blocks[room] = self._new_block(room)
        return block

    def _new_block(self, room: int) -> Block:
        count = room if self._checkpoints is None else self._checkpoints
        states = (L.STATES, (count, self._rows, self._n), self._dtype)
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


def _keeps_stages(template: ScalarTemplate, request: SaveRequest) -> bool:
    """Whether the reverse sweep is to find the stages, rather than to evaluate them again.

    They take little memory for a small state; and a fused step makes them as fast anew. Those of
    an implicit step are its solution, which is not to be looked for again.
    """
    method, n = template.method, template.program.n
    if request.checkpoints is not None:
        return False
    if template.keeps_stages:
        return True
    small = (1 + method.n) * n <= _MOST_KEPT_A_STEP
    return small and not template.integers[L.FUSED]


def template_for(
    program: ScalarProgram, alg: Algorithm, field: VectorField | None, settings: Settings
) -> ScalarTemplate:
    """The template of such solves, from those that were made before."""
    key, latest = alg.key, program.latest_template
    if latest is not None and latest[0] is settings and latest[1] == key:
        return latest[2]
    template = _find_template(program, alg, settings)
    program.latest_template = settings, key, template
    return template


def _template_of(
    program: Callable[[], ScalarProgram | None], alg: Algorithm, settings: Settings
) -> ScalarTemplate:
    alive = program()
    assert alive is not None
    return _find_template(alive, alg, settings)


def _find_template(program: ScalarProgram, alg: Algorithm, settings: Settings) -> ScalarTemplate:
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
    return made_once(program.templates, key, lambda: ScalarTemplate(program, alg, settings))


def made_once(known: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """What was made for a key before, or is made now."""
    try:
        value = known.get(key)
    except TypeError:  # a controller of the user's, with a list among its numbers
        return make()
    if value is None:
        if len(known) >= _MOST_TEMPLATES:
            known.clear()
        value = known[key] = make()
    return value
