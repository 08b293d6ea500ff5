"""Memory of the kernels in a solve of an SDE, as ``Template`` and ``Memory`` are for ODEs.

The paths of a batch are independent as long as the steps are fixed: they are then shared out among
threads, each with a memory of its own (`Part`). With adaptive steps the error of all of them
decides every step, and there is one part.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.locks import tables
from diffsolve.engines.native.programs.bound import RowBound as NativeSDE
from diffsolve.engines.native.programs.formulas import step_method
from diffsolve.engines.native.programs.rows import RowProgram
from diffsolve.engines.native.runtime.blocks import Block
from diffsolve.engines.native.runtime.kernels import kernel
from diffsolve.engines.native.runtime.memory import Memory
from diffsolve.engines.native.runtime.method import MethodNumbers, address, set_controller
from diffsolve.engines.native.runtime.template import STEPS, Wanted, remembered, write_tolerance
from diffsolve.engines.settings import Settings
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.stochastic.native import FAMILY
from diffsolve.solvers.stochastic.noise.native import NOISE

FIRST_ROOM = 256  # steps
_MOST_AHEAD = 4_096  # normals that are drawn at once
_WORK_A_CALL = 1e8  # operations before a kernel returns to Python
_FIRST_INTERVALS = 8
_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # whose threads stay behind


class StochasticTemplate:
    """What the kernels' arrays hold in all solves with a method and settings; see ``Template``.

    Raises
    ------
    Declined
        If such a solve cannot run as machine code.
    """

    other = stiff = None

    def __init__(self, program: RowProgram, alg: Algorithm, noise: str, settings: Settings):
        if settings.tolerance.norm is not None:
            raise Declined("it has a norm of its own")
        if settings.h_on_tape:
            raise Declined("through_step_size=True differentiates the step sizes on the tape")
        simple = program.is_diagonal or program.m == 1
        self.formulas = step_method(alg, noise, simple)
        self.method = MethodNumbers(FAMILY, self.formulas, alg.order)
        self.order = alg.order
        self._program = weakref.ref(program)  # which keeps the template
        self.settings = settings
        self.integers = integers = array("q", self.method.integers.tobytes())
        self.reals = reals = array("d", bytes(8 * L.N_REALS))
        set_controller(settings.controller, integers, reals)
        self.held: dict[int, Any] = {}
        single = program.is_float32
        self.dtype = np.dtype(np.float32 if single else np.float64)
        self.advance = kernel("advance", FAMILY, single)
        self.draw = kernel("draw", NOISE, False)
        integers[L.FUSED] = program.address("step", self.formulas)
        integers[L.DIFFUSION] = program.address("diffusion")
        integers[L.DRIFTS], integers[L.DIFFUSIONS] = program.evaluations(self.formulas)
        integers[L.DRAW] = self.draw.code.address  # type: ignore[attr-defined]
        integers[L.REMEMBERS] = settings.adaptive
        slots = L.RTOL, L.RTOL_STRIDE, L.ATOL, L.ATOL_STRIDE
        write_tolerance(settings.tolerance, slots, integers, self.held)
        integers[L.ADAPTIVE] = settings.adaptive
        integers[L.MAXITERS] = min(settings.maxiters, 2**62)
        reals[L.SIZE] = reals[L.DT] = math.nan if settings.dt is None else settings.dt
        reals[L.DTMIN], reals[L.DTMAX] = settings.dtmin, settings.dtmax
        self._reverse: dict[Any, tuple[int, int, Any]] = {}

    def work(self, n: int, jacobian: None = None) -> Block:
        """Work space for states of ``n`` numbers."""
        rows = self.method.n
        return Block([(L.WORK, ((L.W_STAGES + 2 * rows + L.W_BARS) * n + rows,), self.dtype)])

    def operations(self, rows: int) -> float:
        """Operations of a step of so many paths, about; a normal takes fifty."""
        program: Any = self._program()
        return rows * (program.size * self.method.n + 50.0 * program.m)

    def reverse(self, program: RowProgram, active: tuple[bool, ...], estimates: bool = False):
        """Addresses of a step's reverse and of the diffusion's product, and the kernel."""
        found = self._reverse.get((active, estimates))
        if found is None:
            found = self._reverse[active, estimates] = (
                program.address("step_vjp", self.formulas, active, estimates),
                program.address("diffusion_vjp", active),
                kernel("sweep", FAMILY, program.is_float32),
            )
        return found


def template(
    program: RowProgram, alg: Algorithm, noise: str, settings: Settings
) -> StochasticTemplate:
    """The template of such solves, from those that were made before."""
    key = (
        type(alg),
        getattr(alg, "tableau", None),
        getattr(alg, "integral", None),
        noise,
        settings.controller,
        id(settings.tolerance),
        *(settings.adaptive, settings.dt, settings.dtmin, settings.dtmax),
        *(settings.maxiters, settings.h_on_tape),
    )
    return remembered(
        program.templates, key, lambda: StochasticTemplate(program, alg, noise, settings)
    )


def check_checkpoints(template: StochasticTemplate) -> None:
    """Decline checkpoints where the noise of a step does not follow from its number.

    Raises
    ------
    Declined
        If the steps are adaptive.
    """
    if template.settings.adaptive:
        raise Declined("checkpoints of adaptive steps of an SDE have no compiled form")


def _no_jacobian() -> Any:
    raise NotImplementedError


class Part(Memory):
    """Memory of the solve of some of the paths, which one thread works with.

    Parameters
    ----------
    native, template
        The SDE, and what is the same in all such solves.
    first, rows
        The paths.
    breaks
        As those of ``Memory``.
    seeds, seeded
        The seed, or one for each path of the batch.
    """

    def __init__(
        self,
        native: NativeSDE,
        template: StochasticTemplate,
        first: int,
        rows: int,
        breaks: Sequence[float],
        seeds: Tensor,
        seeded: bool,
    ):
        program = native.program
        self.functions, self.first, self.rows = program, first, rows
        self.stop = threading.Event()
        arguments = native.arguments(rows)
        made: Any = template
        bound: Any = native
        super().__init__(bound, made, rows * program.d, native.params, breaks, None, _no_jacobian)
        self.held[L.PARAMS] = arguments
        integers = self.integers
        integers[L.PARAMS] = address(arguments) + 8
        integers[L.NOISE_SIZE] = size = rows * program.m
        integers[L.DIFFUSION_SIZE] = rows * program.width
        self.seeds, self.seeded = seeds, seeded
        integers[L.CHUNK] = max(1, int(_WORK_A_CALL / template.operations(rows)))
        self.work_of_noise(max(1, min(256, _MOST_AHEAD // max(size, 1))))

    def work_of_noise(self, ahead: int) -> None:
        """Room for the noise of a step, and what it is made of."""
        integers, size, dtype = self.integers, self.integers[L.NOISE_SIZE], self.dtype
        program = self.functions
        self.hold_new(L.SUMS, np.zeros(4, dtype))
        self.hold_new(L.NOISE, np.zeros(2 * size + self.n, dtype))  # and the error of the step
        self.hold_new(L.AHEAD, np.empty(2 * ahead * size))
        integers[L.AHEAD_COUNT], integers[L.AHEAD_FIRST] = ahead, -ahead
        draw = np.zeros(9, np.int64)
        draw[:7] = (
            *(self.seeds.data_ptr(), self.seeded, 0, 0),
            *(self.first, self.rows, program.m),
        )
        self.hold_new(L.DRAW_WITH, draw)

    def work_of_reading(self) -> None:
        """Room for values inside of steps, and for a path that is known ahead."""
        integers, size = self.integers, self.integers[L.NOISE_SIZE]
        rows = self.integers[L.DIFFUSION_SIZE]
        self.hold_new(L.SPARE_NORMALS, np.empty(2 * size))
        self.hold_new(L.READ_SUM, np.empty(size))
        self.hold_new(L.READ_NOISE, np.empty(size, self.dtype))
        self.hold_new(L.G_ROW, np.empty(2 * rows, self.dtype))
        self._intervals(_FIRST_INTERVALS)
        inside = max(integers[L.N_SAVES], 0)
        self._log(inside + 2 + (FIRST_ROOM if integers[L.REMEMBERS] else 0))

    def _intervals(self, room: int) -> None:
        integers, size = self.integers, self.integers[L.NOISE_SIZE]
        for slot, new in (
            (L.KNOWN_END, np.zeros(room)),
            (L.KNOWN_PIECE, np.zeros(room, np.int64)),
            (L.KNOWN_PLACE, np.arange(room)),
            (L.KNOWN_VALUES, np.empty((room, 2 * size))),
        ):
            if slot in self.held:
                new[: integers[L.KNOWN_ROOM]] = self.held[slot]
            self.hold_new(slot, new)
        integers[L.KNOWN_ROOM] = room

    def _log(self, room: int) -> None:
        integers, done = self.integers, self.integers[L.LOGGED]
        for slot, new in (
            (L.LOG, np.zeros((room, 2), np.int64)),
            (L.LOG_TIMES, np.zeros((room, 3))),
        ):
            if slot in self.held:
                new[:done] = self.held[slot][:done]
            self.hold_new(slot, new)
        integers[L.LOG_ROOM] = room

    def want_part(self, wanted: Wanted, room: int, out: np.ndarray, states: np.ndarray | None):
        """Room for what is to be kept; ``out`` and ``states`` may be parts of larger arrays.

        Parameters
        ----------
        room
            Steps.
        out
            ``(saves, N)`` of all paths.
        states
            Rows of states and noise of this part.
        """
        integers = self.integers
        times = wanted.times
        if times is None:
            integers[L.N_SAVES], integers[L.SAVE_ROOM] = -1, len(out)
        else:
            self.hold_new(L.SAVES, np.asarray(times, dtype=np.float64))
            integers[L.N_SAVES] = integers[L.SAVE_ROOM] = len(out)
        self.held[L.OUT_U] = out
        integers[L.OUT_STRIDE], integers[L.N_ALL] = out.shape[1], out.shape[1]
        integers[L.OUT_U] = address(out) + self.first * self.functions.d * self.dtype.itemsize
        integers[L.STEP_ROOM] = room
        self.marked = states is not None
        self.hold_steps(np.empty((len(STEPS), room)))
        self.block = self.block_of(room).lay(integers)
        if states is not None:
            integers[L.STRIDE], integers[L.STATE_ROOM] = 1, len(states)
            integers[L.THINNING] = wanted.checkpoints is not None
            integers[L.STATE_SIZE] = states.shape[1]
            self.hold_new(L.STATES, states)
            if times is not None:
                size = integers[L.NOISE_SIZE]
                self.hold_new(L.SAVE_NOISE, np.empty((len(times), size), self.dtype))
        if wanted.dense and times is not None:
            rows = integers[L.DENSE_ROWS]
            self.hold_new(L.DENSE, np.empty((room, rows, self.n), self.dtype))
            self.hold_new(L.COMPLETE, np.empty(room, np.int64))
        self.work_of_reading()

    def block_of(self, room: int) -> Block:
        """Where the records of so many steps lie; their states lie with those of other parts."""
        reals, whole = np.dtype(np.float64), np.dtype(np.int64)
        parts: list[Any] = []
        formulas = self.template.formulas  # type: ignore[attr-defined]
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
            self._intervals(2 * integers[L.KNOWN_ROOM])
        inside = max(integers[L.N_SAVES] - integers[L.SAVED], 0)
        if integers[L.LOGGED] + inside + 2 > integers[L.LOG_ROOM]:
            self._log(2 * integers[L.LOG_ROOM] + inside)

    def stopped(self) -> bool:
        """Whether another thread has failed."""
        return self.stop.is_set()


class Crew:
    """The parts of one solve.

    Attributes
    ----------
    parts
        Of the paths in order.
    states
        What they keep for the reverse pass, one array.
    """

    def __init__(self, parts: list[Part], states: np.ndarray | None):
        self.parts, self.states = parts, states

    @property
    def integers(self) -> Any:
        return self.parts[0].integers

    def give(self) -> Tensor:
        """The states, which autograd keeps alive from now on."""
        slot = L.STATES
        if len(self.parts) > 1:
            states, self.states = self.states, None
            for part in self.parts:
                part.held.pop(slot, None)
            assert states is not None
            return torch.from_numpy(states)
        self.states = None
        return torch.from_numpy(self.parts[0].held.pop(slot)).reshape(-1)

    def records(self) -> Crew:
        """What is noted of the steps, to be kept."""
        kept = []
        for part in self.parts:
            copy: Any = part.copy()
            copy.source = None
            slots = (
                *(L.PARAMS, L.STEP_T, L.SAVES, L.STOPS, L.BREAKS),
                *(L.STEP_SUMS, L.SAVE_NOISE),
            )
            copy.held = {slot: part.held[slot] for slot in slots if slot in part.held}
            copy.stop = threading.Event()
            kept.append(copy)
        return Crew(kept, None)


def _pool(count: int) -> ThreadPoolExecutor:
    with tables:
        found = _pools.get(count)
        if found is None:
            found = _pools[count] = ThreadPoolExecutor(count, "diffsolve")
        return found


def share_out(parts: list[Part], task: Callable[[Part], int]) -> list[int]:
    """The same task for all parts, each in a thread."""
    if len(parts) == 1:
        return [task(parts[0])]
    stop = threading.Event()
    for part in parts:
        part.stop = stop
    futures = [_pool(len(parts) - 1).submit(task, part) for part in parts[1:]]
    try:
        first = task(parts[0])
        return [first, *(future.result() for future in futures)]
    except BaseException:
        stop.set()
        for future in futures:
            future.exception()
        raise
