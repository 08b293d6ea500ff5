"""Solves of SDEs in machine code, forward and reverse; ``engine.py`` and ``reverse.py`` for ODEs.

The paths of a batch are independent as long as the steps are fixed: they are then shared out among
threads, each with a memory of its own (`Part`). With adaptive steps the error of all of them
decides every step, and there is one part.
"""

from __future__ import annotations

import math
import os
import threading
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.engine import (
    RETCODES,
    Memory,
    NativeTrajectory,
    StepColumns,
    Wanted,
    message_of,
    write_tolerance,
)
from diffsolve.engines.native.kernels import kernel
from diffsolve.engines.native.method import address, set_controller
from diffsolve.engines.native.reverse import Swept
from diffsolve.engines.native.stochastic import Functions
from diffsolve.engines.native.stochastic_field import NativeSDE
from diffsolve.engines.native.stochastic_methods import Formulas, step_method
from diffsolve.engines.torch_engine import Settings, progress_bar
from diffsolve.problems.sde_field import SDEField
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.initial_step import stochastic_step
from diffsolve.solvers.interpolation import DenseOutput
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.stochastic.method import PathInterpolant
from diffsolve.solvers.stochastic.noise.draws import signed

_FIRST_ROOM = 256
_ROOM_IN_NUMBERS = 1_000_000
_MOST_AHEAD = 4_096  # normals that are drawn at once
_WORK_A_CALL = 1e8  # operations before a kernel returns to Python
_WORK_A_THREAD = 300_000  # operations that are worth another thread
_FIRST_INTERVALS = 8
_MOST_NOISE = 20_000_000  # numbers that are kept for a reverse pass rather than drawn again
_MOST_TEMPLATES = 50
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # whose threads stay behind


class _Method:
    """What ``Memory`` asks of a method; as ``method.Method``."""

    family = "stochastic"
    is_implicit = False
    degree = 1

    def __init__(self, formulas: Formulas):
        self.formulas = formulas
        self.n = self.rows = len(formulas.nodes)
        self._nodes = np.ascontiguousarray(formulas.nodes)
        self.integers = integers = np.zeros(L.N_INTEGERS, np.int64)
        integers[L.C] = address(self._nodes)
        integers[L.STAGES] = self.n
        integers[L.DENSE_ROWS] = 1 + self.n
        integers[L.B_ERROR] = formulas.has_estimate
        integers[L.AREA] = formulas.needs_area
        integers[L.READING] = -1


class StochasticTemplate:
    """What the kernels' arrays hold in all solves with a method and settings; see ``Template``.

    Raises
    ------
    Declined
        If such a solve cannot run as machine code.
    """

    other = stiff = None

    def __init__(self, compiled: Functions, alg: Algorithm, noise: str, settings: Settings):
        if settings.tolerance.norm is not None:
            raise Declined("it has a norm of its own")
        if settings.h_on_tape:
            raise Declined("through_step_size=True differentiates the step sizes on the tape")
        simple = compiled.is_diagonal or compiled.m == 1
        self.formulas = step_method(alg, noise, simple)
        self.method: Any = _Method(self.formulas)
        self.order = alg.order
        self.most_rows = self.most_stages = self.method.n
        self.compiled, self.settings = compiled, settings
        self.integers = integers = array("q", self.method.integers.tobytes())
        self.reals = reals = array("d", bytes(8 * L.N_REALS))
        set_controller(settings.controller, integers, reals)
        self.held: dict[int, Any] = {}
        single = compiled.single
        self.advance = kernel("advance", "stochastic", single)
        self.draw = kernel("draw", "stochastic/noise", False)
        integers[L.FUSED] = compiled.step(self.formulas)
        integers[L.DIFFUSION] = compiled.diffusion()
        integers[L.DRIFTS], integers[L.DIFFUSIONS] = compiled.counts(self.formulas)
        integers[L.DRAW] = self.draw.code.address  # type: ignore[attr-defined]
        integers[L.REMEMBERS] = settings.adaptive
        slots = L.RTOL, L.RTOL_STRIDE, L.ATOL, L.ATOL_STRIDE
        write_tolerance(settings.tolerance, slots, integers, self.held)
        integers[L.ADAPTIVE] = settings.adaptive
        integers[L.MAXITERS] = min(settings.maxiters, 2**62)
        reals[L.SIZE] = reals[L.DT] = math.nan if settings.dt is None else settings.dt
        reals[L.DTMIN], reals[L.DTMAX] = settings.dtmin, settings.dtmax
        self._reverse: dict[Any, tuple[int, int, Any]] = {}

    def work(self, rows: int) -> float:
        """Operations of a step of so many paths, about; a normal takes fifty."""
        compiled = self.compiled
        return rows * (compiled.size * self.method.n + 50.0 * compiled.m)

    def reverse(self, compiled: Functions, active: tuple[bool, ...], estimates: bool = False):
        """Addresses of a step's reverse and of the diffusion's product, and the kernel."""
        found = self._reverse.get((active, estimates))
        if found is None:
            found = self._reverse[active, estimates] = (
                compiled.step_vjp(self.formulas, active, estimates),
                compiled.diffusion_vjp(active),
                kernel("sweep", "stochastic", compiled.single),
            )
        return found


def template(
    compiled: Functions, alg: Algorithm, noise: str, settings: Settings
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
    known = compiled.templates
    try:
        found = known.get(key)
    except TypeError:  # a controller of the user's, with a list among its numbers
        return StochasticTemplate(compiled, alg, noise, settings)
    if found is None:
        found = StochasticTemplate(compiled, alg, noise, settings)
        if len(known) > _MOST_TEMPLATES:
            known.clear()
        known[key] = found
    return found


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
        compiled = native.compiled
        self.functions, self.first, self.rows = compiled, first, rows
        self.stop = threading.Event()
        arguments = native.arguments(rows)
        made: Any = template
        super().__init__(native, made, rows * compiled.d, native.params, breaks, None, _no_jacobian)
        self.held[L.PARAMS] = arguments
        integers = self.integers
        integers[L.PARAMS] = address(arguments) + 8
        integers[L.NOISE_SIZE] = size = rows * compiled.m
        integers[L.DIFFUSION_SIZE] = rows * compiled.width
        self.seeds, self.seeded = seeds, seeded
        integers[L.CHUNK] = max(1, int(_WORK_A_CALL / template.work(rows)))
        self.work_of_noise(max(1, min(256, _MOST_AHEAD // max(size, 1))))

    def work_of_noise(self, ahead: int) -> None:
        """Room for the noise of a step, and what it is made of."""
        integers, size, dtype = self.integers, self.integers[L.NOISE_SIZE], self.dtype
        compiled = self.functions
        self.hold_new(L.SUMS, np.zeros(4, dtype))
        self.hold_new(L.NOISE, np.zeros(2 * size + self.n, dtype))  # and the error of the step
        self.hold_new(L.AHEAD, np.empty(2 * ahead * size))
        integers[L.AHEAD_COUNT], integers[L.AHEAD_FIRST] = ahead, -ahead
        draw = np.zeros(9, np.int64)
        draw[:7] = (
            *(self.seeds.data_ptr(), self.seeded, 0, 0),
            *(self.first, self.rows, compiled.m),
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
        self._log(inside + 2 + (_FIRST_ROOM if integers[L.REMEMBERS] else 0))

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
        integers[L.OUT_U] = address(out) + self.first * self.functions.d * self.item
        integers[L.STEP_ROOM] = room
        self.hold_steps(np.empty((5, room)))
        formulas = self.template.formulas  # type: ignore[attr-defined]
        if formulas.has_estimate or formulas.has_stiffness:
            self.hold_new(L.STEP_SUMS, np.empty((room, 4)))
        if states is not None:
            self.hold_new(L.MARKS, np.empty((room, L.N_MARKS), np.int64))
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

    def make_room(self) -> None:
        integers = self.integers
        full = integers[L.ACCEPTED] >= integers[L.STEP_ROOM]
        super().make_room()
        if full and L.STEP_SUMS in self.held:
            self._double(L.STEP_SUMS)
        if integers[L.KNOWN] + 2 > integers[L.KNOWN_ROOM]:
            self._intervals(2 * integers[L.KNOWN_ROOM])
        inside = max(integers[L.N_SAVES] - integers[L.SAVED], 0)
        if integers[L.LOGGED] + inside + 2 > integers[L.LOG_ROOM]:
            self._log(2 * integers[L.LOG_ROOM] + inside)

    def run(self, function: Any, bar: Any = None) -> int:
        """As ``Memory.run``; where another thread has failed, it ends as well."""
        reals = self.reals
        here, there = self.arguments
        while True:
            before = reals[L.T]
            status = function(here, there)
            if bar is not None:
                bar.update(abs(reals[L.T] - before))
            if status == L.NEED_ROOM:
                self.make_room()
            elif status != L.GO_ON or self.stop.is_set():
                return status


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

    def give(self, slot: int) -> Tensor:
        """The states, which autograd keeps alive from now on."""
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
                L.PARAMS, L.STEP_T, L.MARKS, L.SAVES, L.STOPS, L.BREAKS, L.RTOL, L.ATOL,
                L.STEP_SUMS, L.SAVE_NOISE,
            )  # fmt: skip
            copy.held = {slot: part.held[slot] for slot in slots if slot in part.held}
            copy.stop = threading.Event()
            kept.append(copy)
        return Crew(kept, None)


def _pool(count: int) -> ThreadPoolExecutor:
    with _lock:
        found = _pools.get(count)
        if found is None:
            found = _pools[count] = ThreadPoolExecutor(count, "diffsolve")
        return found


def _work(parts: list[Part], task: Any) -> list[int]:
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
    table = part.steps().copy()
    estimates = _joined_estimates(crew, count)
    if estimates is not None:
        table[2:].view(part.dtype)[:, :count] = estimates
    if wanted.times is None:
        times: Any = [*table[0].tolist(), reals[L.T]][:saved]
    else:
        times = wanted.times if saved == integers[L.N_SAVES] else wanted.times[:saved]
    out = part.held[L.OUT_U]
    found = NativeTrajectory(
        t=times,
        u=torch.from_numpy(out if saved == len(out) else out[:saved]),
        columns=StepColumns(table, part.dtype),
        counts=(*part.counts(), integers[L.NG]),
        nreject=integers[L.REJECTED],
        final_t=reals[L.T],
        final_h=reals[L.LAST_H] if integers[L.ATTEMPTS] else math.nan,
        retcode=RETCODES[status],
        kernel_s=kernel_s,
        memory=crew,  # type: ignore[arg-type]
    )
    if status != L.DONE:
        found.message = message_of(status, part, alg, settings, t1)
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
    work = made.work(rows) * abs(t1 - t0) / settings.dt
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
    compiled = native.compiled
    seed = field.path.seed  # type: ignore[union-attr]
    seeded = isinstance(seed, Tensor)
    seeds = (
        seed.reshape(-1).to("cpu", torch.int64).contiguous()
        if seeded
        else torch.tensor([signed(seed)])
    )
    parts = [Part(native, made, first, rows, field.breaks, seeds, seeded) for first, rows in shares]
    n, dtype = field.rows * compiled.d, parts[0].dtype
    noises = 2 if made.formulas.needs_area else 1
    if settings.adaptive:
        room = max(8, min(_FIRST_ROOM, _ROOM_IN_NUMBERS // ((2 + noises) * n)))
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
        share = u0.view(field.rows, compiled.d)[part.first : part.first + part.rows]
        part.start(share.reshape(-1))
        if settings.dt is None:
            reals[L.SIZE] = _first_step(native, field, u0, t0, t1, settings, part)
    return Crew(parts, states), _work(parts, lambda part: part.advance(bar))


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

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        self.nf += 1
        return self._native.evaluate("drift", float(t), u, self.field.rows)

    def diffusion(self, t: Tensor, u: Tensor) -> Tensor:
        self.ng += 1
        field = self.field
        G = self._native.evaluate("diffusion", float(t), u, field.rows)
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
    if len(parts) == 1 or L.STEP_SUMS not in parts[0].held:
        return None
    total = np.sum([part.held[L.STEP_SUMS] for part in parts], axis=0)
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
    dense.ends = [dense.direction * t for t in (*found.columns.table[0].tolist(), found.final_t)]
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


# -- reverse ---------------------------------------------------------------------------------------


def sweep(
    crew: Crew, states: Tensor, cotangents: Sequence[Tensor | None], active: tuple[bool, ...]
) -> Swept:
    """Pull cotangents of the saved states and of the estimates back to the start.

    Parameters
    ----------
    crew, states
        Of the forward solve.
    cotangents
        Of the saved states ``(T, N)`` and of ``error, error_norm, stiffness`` ``(n,)``.
    active
        Which tensors of the parameters are differentiated.
    """
    native: Any = crew.parts[0].native
    compiled: Functions = native.compiled
    made: Any = crew.parts[0].template
    bars = [x if x is None or not x.numel() else x.contiguous() for x in cotangents]
    estimates = any(x is not None and x.numel() for x in bars[1:])
    step_vjp, diffusion_vjp, function = made.reverse(compiled, active, estimates)
    entries = compiled.active_entries(active)
    parts: list[Any] = []
    place = 0
    started = time.perf_counter()
    for forward in crew.parts:
        part: Any = forward.copy()
        part.stop = threading.Event()
        part.work()
        integers, n, dtype = part.integers, part.n, part.dtype
        part.work_of_noise(integers[L.AHEAD_COUNT])
        part.hold_new(L.G_ROW, np.empty(2 * integers[L.DIFFUSION_SIZE], dtype))
        part.hold_new(L.SUMS_BAR, np.zeros(2, dtype))
        room = integers[L.STATE_ROOM] * integers[L.STATE_SIZE]
        part.hold(L.STATES, states[place : place + room])
        place += room
        part.restart_counts()
        integers[L.NG] = 0
        part.hold_new(L.STATE_BAR, np.zeros(n, dtype))
        part.hold_new(L.BAR, np.empty(n, dtype))
        part.buffers = part.held[L.STATE_BAR], part.held[L.BAR]
        part.hold_new(L.P_BAR, np.zeros(max(len(entries), 1) * compiled.lanes, dtype))
        if bars[0] is not None and bars[0].numel():
            part.hold(L.SAVED_BARS, bars[0])
            integers[L.SAVED_BARS] += part.first * compiled.d * part.item
        for slot, bar in zip(
            (L.ERROR_BARS, L.ERROR_NORM_BARS, L.STIFFNESS_BARS), bars[1:], strict=True
        ):
            if bar is not None and bar.numel():
                part.hold(slot, bar)
        if integers[L.STRIDE] > 1:
            each = n + 2 * integers[L.NOISE_SIZE]
            part.hold_new(L.SEGMENT, np.empty((integers[L.STRIDE], each), dtype))
        integers[L.FUSED_VJP], integers[L.DIFFUSION_VJP] = step_vjp, diffusion_vjp
        integers[L.SWEPT] = integers[L.ACCEPTED]
        integers[L.SWEEP_LAST] = integers[L.ACCEPTED] - 1
        parts.append(part)
    _work(parts, lambda part: part.run(function))
    kernel_s = time.perf_counter() - started
    swapped = parts[0].integers[L.ACCEPTED] % 2
    u_bar = np.concatenate([part.buffers[swapped] for part in parts])
    lanes = np.sum([part.held[L.P_BAR] for part in parts], axis=0)
    p_bar = np.zeros(compiled.n_params, parts[0].dtype)
    p_bar[entries] = lanes.reshape(-1, compiled.lanes).sum(1)[: len(entries)]
    counts = (*parts[0].counts(), parts[0].integers[L.NG])
    return Swept(torch.from_numpy(u_bar), torch.from_numpy(p_bar), counts, kernel_s)
