"""From the drift and the diffusion of an SDE to their machine code; ``field.py`` for ODEs.

Both are traced for two paths of a batch. The expressions tell whether a path depends on the other;
those of the first are the code of all paths. Whether every path is treated alike is seen by
comparing it with torch at the whole batch, at a state that varies from path to path.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.graph.derivative import annuls
from diffsolve.engines.native.graph.expression import (
    MOST_NODES,
    Node,
    content,
    needed,
    substitute,
)
from diffsolve.engines.native.locks import tables
from diffsolve.engines.native.programs import lookup as fields
from diffsolve.engines.native.programs.lookup import NativeField
from diffsolve.engines.native.programs.remembered import (
    HIDDEN,
    Entry,
    Graph,
    Known,
    around_of,
    code_of,
    described,
    keep,
    key_of,
    known_of,
    match,
    refuse_known,
    remember,
    settle,
)
from diffsolve.engines.native.programs.remembered import refused as refused_as
from diffsolve.engines.native.programs.rows import Functions
from diffsolve.engines.native.tracing.fingerprint.fingerprint import Fingerprint
from diffsolve.engines.native.tracing.fingerprint.recorder import CodeRecorder
from diffsolve.engines.native.tracing.trace import Trace, flat_result, trace
from diffsolve.engines.native.tracing.tracer import Tracer
from diffsolve.problems.autocast import Autocasting
from diffsolve.problems.capture import reachable_tensors
from diffsolve.problems.probe import Probe
from diffsolve.problems.sde_field import NOT_ADDITIVE, SDEField
from diffsolve.problems.structure import StateStructure

_MOST_BETWEEN = 20  # stops: times between two of them
_MOST_KEPT = 64
_by_content: OrderedDict[Any, Functions] = OrderedDict()
_COUPLED = (
    "f or g treats the paths of a batch together, or has parameters of their own for each: {why}"
)


@dataclass
class _Entry(Entry):
    """What is remembered of a drift and a diffusion, with the shape of what ``g`` returns."""

    m: int = 0
    is_diagonal: bool = False
    trailing: tuple[int, ...] = ()
    #: Why it is not the code of every path, for each shape of a state; empty where it is.
    judged: dict[torch.Size, str] = dataclass_field(default_factory=dict)


class NativeSDE(NativeField):
    """The machine code of an SDE with the tensors of one solve.

    Attributes
    ----------
    compiled
        Its functions.
    tensors, params, template
        As those of ``NativeField``.
    """

    compiled: Functions  # type: ignore[assignment]

    def _reachable_anew(self, field: Any) -> list[Tensor]:
        return reachable_tensors((field.f, field.g))

    def arguments(self, rows: int) -> np.ndarray:
        """The flat parameters behind the number of rows; compiled functions get the second entry's
        address, which is that of ``places``."""
        numbers = self.params.numpy()
        item = numbers.itemsize
        whole = np.empty(8 // item + len(numbers), numbers.dtype)
        whole[: 8 // item].view(np.int64)[0] = rows
        whole[8 // item :] = numbers
        return whole

    def evaluate(self, kind: str, t: float, u: Tensor, rows: int) -> Tensor:
        """``"drift"`` or ``"diffusion"`` of the flat state by the compiled function."""
        from diffsolve.engines.native.runtime.solve import function_at

        compiled = self.compiled
        address = compiled.field() if kind == "drift" else compiled.diffusion()
        width = compiled.d if kind == "drift" else compiled.width
        arguments = self.arguments(rows)
        u = u.detach().contiguous()
        out = torch.empty(rows * width, dtype=u.dtype, device="cpu")
        function_at(address, compiled.single)(
            t, u.data_ptr(), arguments.ctypes.data + 8, out.data_ptr()
        )
        return out


def find(field: SDEField, t0: float, u0: Tensor, direction: float, guard: bool) -> NativeSDE:
    """The machine code of drift and diffusion, made where it is not known yet.

    Fills in what ``field`` learns of ``g`` when it calls it first.

    Parameters
    ----------
    field, t0, u0, direction
        The problem, flat state at the start, and which way the time goes.
    guard
        Whether to compare what was compiled before with one evaluation by torch.

    Raises
    ------
    Declined
        If it cannot be compiled.
    ValueError
        If the noise is said to be additive, and ``g`` depends on the state.
    """
    if isinstance(field.f, Autocasting) or isinstance(field.g, Autocasting):
        raise Declined("autocast is active")
    u0 = u0.detach()
    one = _Rows(field)
    leaves = [field.p] if isinstance(field.p, Tensor) else pytree.tree_leaves(field.p)
    key = code_of(field.g), field.noise, *key_of(one.of_key, leaves)
    around = (field.f, field.g, *around_of(field.p, leaves, field.dtype))
    known = known_of(key)
    found = match(known, around)
    t = field.after(t0, direction)
    shape = field.structure.shapes[0]
    doubtful = None
    if found is not None:
        entry, fingerprint = found
        native = _ready(entry, field, fingerprint, leaves, 0.0)
        if shape not in entry.judged:
            entry.judged[shape] = _why_not_itself(field, native, t, u0, direction)
        _refuse_judged(entry, shape)
        keep(field.f, entry)
        if not guard:
            return native
        look = torch.is_grad_enabled() and any(x.requires_grad for x in native.tensors)
        eager, foreign = _eager(field, t, u0, look)
        if _agrees(field, native, t, u0, eager) and native.holds_all(foreign):
            return native
        doubtful, entry.is_current = entry, False
    if guard:
        refuse_known(known, around)
    started = time.perf_counter()
    entry, fingerprint = _traced(field, one, t, u0, around, known, guard)
    if not entry.declined:
        native = _ready(entry, field, fingerprint, leaves, time.perf_counter() - started)
        entry.judged[shape] = _why_not_itself(field, native, t, u0, direction)
        settle(entry, fingerprint, around, "")
        if doubtful is not None and doubtful.compiled is not entry.compiled:
            known.doubt = HIDDEN
        entry.unknown = entry.unknown or known.doubt
    remember(known, entry)
    keep(field.f, entry)
    native = _ready(entry, field, fingerprint, leaves, time.perf_counter() - started)
    _refuse_judged(entry, shape)
    return native


def _refuse_judged(entry: _Entry, shape: torch.Size) -> None:
    """Refuse a batch of a shape for which the code was found not to be that of every path."""
    if entry.judged[shape]:
        raise Declined(entry.judged[shape])


class _Rows:
    """What is traced of a batch: two of its paths, or all where there is one.

    Attributes
    ----------
    structure
        Of the state.
    rows
        How many.
    of_key
        Stands for the field where a key is made of it: the same for every size of a batch.
    """

    def __init__(self, field: SDEField):
        structure = field.structure
        self.rows = 1 if field.rows == 1 else 2
        if self.rows == 2:
            shape = structure.shapes[0]
            blank = torch.empty(
                2, *[1] * (len(shape) - 2), shape[-1], dtype=field.dtype, device="cpu"
            )
            structure = StateStructure.of(blank)
        self.structure = structure
        # what g returns for these rows is judged as the field judges it
        self.field = SDEField(
            field.f, field.g, field.p, structure, field.noise, field.interpretation
        )
        self.of_key: Any = _OfKey(field.f, field.p, structure)

    def state(self, u0: Tensor, d: int) -> Tensor:
        """The first paths of a flat state."""
        return u0[: self.rows * d].clone()


@dataclass
class _OfKey:
    f: Any
    p: Any
    structure: StateStructure


def _ready(
    entry: _Entry, field: SDEField, fingerprint: Fingerprint, leaves: list[Any], trace_s: float
) -> NativeSDE:
    if entry.declined:
        raise Declined(entry.declined)
    field.m, field.is_diagonal = entry.m, entry.is_diagonal
    field._g_shapes = [torch.Size([*x, *entry.trailing]) for x in field.structure.shapes]
    return NativeSDE(entry, fingerprint, leaves, trace_s)


def _traced(
    field: SDEField, one: _Rows, t: Tensor, u0: Tensor, around: Any, known: Known, guard: bool
) -> tuple[_Entry, Fingerprint]:
    dtype, recorder = field.structure.dtype, CodeRecorder()

    def refused(reason: str) -> tuple[_Entry, Fingerprint]:
        return refused_as(_Entry, recorder, around, known, dtype, reason)

    def both(t: Tensor, u: Any, *args: Any) -> Any:
        return field.f(t, u, *args), field.g(t, u, *args)

    def flat(found: Any, structure: StateStructure, tracer: Tracer) -> list[Node]:
        du, g = found
        nodes = flat_result(du, structure, tracer)
        return nodes + _flat_diffusion(g, one.field, tracer)

    u = one.state(u0, field.d)
    try:
        fields.refuse_torchscript(around)
        found = trace(both, one.structure, field.p, t, u, 2 * MOST_NODES, flat, recorder)
        misnamed = field.noise == "additive" and _depends(found.outputs[one.rows * field.d :])
        drift, diffusion = _first_path(found, one, field)
    except Declined as reason:
        return refused(str(reason))
    except Exception as error:  # f's or g's own, which the torch engine reports as it is
        raised = f"{type(error).__name__}: {error}"
        if one.rows < field.rows:
            return refused(_COUPLED.format(why=f"for two paths alone they raise {raised}"))
        return refused(f"f or g raised {raised}")
    if misnamed:
        raise ValueError(NOT_ADDITIVE)
    single, several = dtype is torch.float32, one.rows > 1
    m, is_diagonal = one.field.m, one.field.is_diagonal
    kind = several, m, is_diagonal, len(drift)
    graph = Graph.of(found, [*drift, *diffusion], pytree.tree_leaves(field.p), kind)
    drift, diffusion = graph.outputs[: len(drift)], graph.outputs[len(drift) :]
    key = (single, *kind, graph.blocks, content(graph.outputs))
    try:
        with tables:
            compiled = _by_content.get(key)
            if compiled is None:
                known.must_compile(guard)
                compiled = _by_content[key] = Functions(
                    graph.pool, drift, diffusion, m, is_diagonal, graph.blocks, single, several
                )
                if len(_by_content) > _MOST_KEPT:
                    _by_content.popitem(last=False)
            else:
                known.compiled = 0
                _by_content.move_to_end(key)
    except Declined as reason:
        return refused(str(reason))
    entry, fingerprint = described(_Entry, recorder, around, known, dtype, found, graph, compiled)
    whole = len(one.field._g_shapes[0]) > len(one.structure.shapes[0])
    entry.hook, entry.compares = fields.look(field, [field.f, field.g], t, u0)
    entry.m, entry.is_diagonal = m, is_diagonal
    entry.trailing = (m,) if whole else ()
    return entry, fingerprint


def _flat_diffusion(g: Any, field: SDEField, tracer: Tracer) -> list[Node]:
    """Nodes of what ``g`` returned, a row of each path after the other."""
    try:
        field._g_shapes = field._shapes_of(g)
    except ValueError as error:
        raise Declined(str(error)) from None
    nodes: list[Node] = []
    for leaf in field._leaves_of(g):
        tracer.meets(leaf)
        nodes += [tracer.pool.number(x) for x in tracer.nodes(leaf).reshape(-1)]
    return nodes


def _first_path(found: Trace, one: _Rows, field: SDEField) -> tuple[list[Node], list[Node]]:
    """Drift and diffusion of the first path.

    Raises
    ------
    Declined
        If a path depends on another.
    """
    d, rows = field.d, one.rows
    drift, diffusion = found.outputs[: rows * d], found.outputs[rows * d :]
    width = len(diffusion) // rows
    if rows == 2:
        for outputs, each in ((drift, d), (diffusion, width)):
            for i in range(rows):
                own = range(i * d, (i + 1) * d)
                moved_by = _state_inputs(outputs[i * each : (i + 1) * each])
                if not moved_by.issubset(own):
                    raise Declined(_COUPLED.format(why="one depends on the state of another"))
        first, second = (
            [*drift[i * d : (i + 1) * d], *diffusion[i * width : (i + 1) * width]] for i in range(2)
        )
        if not _same_functions(first, second, d):
            raise Declined(_COUPLED.format(why="the first two are functions of their own"))
    drift, diffusion = drift[:d], diffusion[:width]
    if len(needed([*drift, *diffusion])) > MOST_NODES:
        raise Declined(f"it is too large: more than {MOST_NODES:,} scalar operations")
    return drift, diffusion


def _same_functions(first: list[Node], second: list[Node], d: int) -> bool:
    """Whether the second path's state in the place of the first's gives the same expressions."""
    pool = first[0].pool
    table = {("u", d + i): pool.input("u", i) for i in range(d)}
    renamed = substitute(second, table, pool)
    return all(x is y for x, y in zip(substitute(first, {}, pool), renamed, strict=True))


def _depends(outputs: list[Node]) -> bool:
    """Whether the state has a part in them, other than being multiplied by zero."""
    stack, seen = list(outputs), set[int]()
    while stack:
        node = stack.pop()
        if node.op == "input" and node.data[0] == "u":
            return True
        if node.index not in seen:
            seen.add(node.index)
            stack += [x for i, x in enumerate(node.args) if not annuls(node, i)]
    return False


def _state_inputs(outputs: list[Node]) -> set[int]:
    data = (x.data for x in needed(outputs) if x.op == "input")
    return {i for block, i in data if block == "u"}


# -- comparing with torch --------------------------------------------------------------------------


def _eager(
    field: SDEField, t: Tensor, u: Tensor, look: bool = False
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Drift and diffusion by torch, and where one looks the tensors that require a gradient."""
    structure = field.structure
    with torch.no_grad():
        state = structure.unravel(u)
        probe = Probe(t, pytree.tree_leaves(state))
        if look:
            with probe:
                du, g = (f(t, state, *field._args) for f in (field.f, field.g))
        else:
            du, g = (f(t, state, *field._args) for f in (field.f, field.g))
        mismatch = structure.describe_mismatch(du)
        if mismatch is not None:
            raise Declined(mismatch)
        try:
            g = field._normalised(g)
        except ValueError as error:
            raise Declined(str(error)) from None
        return (structure.ravel(du).clone(), g.reshape(-1).clone()), probe.foreign


def _agrees(
    field: SDEField, native: NativeSDE, t: Tensor, u: Tensor, eager: tuple[Tensor, Tensor]
) -> bool:
    """Whether the compiled functions give what ``f`` and ``g`` give now; NaN where they do."""
    for kind, theirs in zip(("drift", "diffusion"), eager, strict=True):
        ours = native.evaluate(kind, float(t), u, field.rows)
        if ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
            return False
        if torch.equal(ours, theirs):
            continue
        if not torch.equal(ours.isnan(), theirs.isnan()):
            return False
        if not bool(field.rounding_error(ours.nan_to_num(), theirs.nan_to_num()) <= 1):
            return False
    return True


def _why_not_itself(
    field: SDEField, native: NativeSDE, t: Tensor, u0: Tensor, direction: float
) -> str:
    """Why a trace that was just made is not that of ``f`` and ``g``; empty if it is."""
    eager, _ = _eager(field, t, u0)
    if not _agrees(field, native, t, u0, eager):
        again, _ = _eager(field, t, u0)
        if not all(map(torch.equal, map(_plain, eager), map(_plain, again))):
            return fields._NOT_ITSELF
        if field.rows > 1:
            return _COUPLED.format(why="the first paths alone give other values")
    # a shift of its own for each path: what they share, they show
    beside = float(t) + math.copysign(1e-3 * max(1.0, abs(float(t))), direction)
    numbers = torch.arange(field.rows, dtype=u0.dtype, device="cpu")
    share = (1.0 + (numbers * 0.6180339887).frac())[:, None]
    rows = u0.view(field.rows, field.d)
    compared = 0
    # then what hides behind a threshold of the time or of the state
    points = [(beside, 1e-3), *zip(_times_within(field, float(t), direction), cycle((0.3, -1.5)))]
    for value, size in points:
        at, shift = field.time(value), size * share
        for moved in (rows * (1 + shift) + shift, rows * (1 + shift)):
            state = moved.reshape(-1)
            try:
                eager, _ = _eager(field, at, state)
            except Exception:  # outside of where they are defined
                continue
            compared += 1
            why = _why_not_beside(field, native, at, state, eager)
            if why:
                return why
            break
    alone = field.rows == 1 or compared
    return "" if alone else "it could not be compared with torch beside the start"


def _times_within(field: SDEField, t0: float, direction: float) -> list[float]:
    """Times of the span at which all paths are compared with torch; none for one path."""
    if field.rows == 1:
        return []
    t1 = t0 + math.copysign(field.span, direction)
    edges = sorted({t0, t1, *field.breaks})
    between = [(a + b) / 2 for a, b in pairwise(edges)]
    return [t0 + (t1 - t0) * share for share in (0.29, 0.53, 0.79, 1.0)] + between[:_MOST_BETWEEN]


def _plain(x: Tensor) -> Tensor:
    """With numbers for NaN, so that it is equal to itself."""
    return x.nan_to_num()


def _why_not_beside(
    field: SDEField, native: NativeSDE, t: Tensor, u: Tensor, eager: tuple[Tensor, Tensor]
) -> str:
    roughly = 1e-3 if native.compiled.single else 1e-6
    for kind, theirs in zip(("drift", "diffusion"), eager, strict=True):
        ours = native.evaluate(kind, float(t), u, field.rows)
        there = theirs.isfinite()
        off = torch.where(there, ours - theirs, 0.0).abs().max()
        size = torch.where(there, theirs, 0.0).abs().max()
        if not float(off) <= roughly * max(float(size), 1e-3):
            if field.rows > 1:
                return _COUPLED.format(why="they differ where each path has a state of its own")
            return fields._FROZEN
    return ""
