"""How the drift and the diffusion of an SDE become a program.

Both are traced for two paths, and the expressions of the first are the code of all paths. Whether
every path is treated alike is seen by comparing it with torch at the whole batch, at a state that
varies from path to path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import cycle, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.graph.derivative import annuls
from diffsolve.engines.native.graph.expression import MOST_NODES, Node, needed, substitute
from diffsolve.engines.native.programs.bound import RowBound
from diffsolve.engines.native.programs.recipe import (
    DRAWN_ANEW,
    FROZEN,
    ProgramGraph,
    Recipe,
    key_of,
)
from diffsolve.engines.native.programs.rows import RowProgram
from diffsolve.engines.native.programs.traces import TraceEntry, code_of
from diffsolve.engines.native.tracing.fingerprint.fingerprint import Fingerprint
from diffsolve.engines.native.tracing.fingerprint.recorder import CodeRecorder
from diffsolve.engines.native.tracing.trace import Trace, flat_result, trace
from diffsolve.engines.native.tracing.tracer import Tracer
from diffsolve.problems.probe import Probe
from diffsolve.problems.sde_field import NOT_ADDITIVE, SDEField
from diffsolve.problems.structure import StateStructure

_MOST_BETWEEN = 20  # stops: times between two of them
_COUPLED = (
    "f or g treats the paths of a batch together, or has parameters of their own for each: {why}"
)


@dataclass
class _Facts:
    """What is known of a diffusion, and of batches.

    Attributes
    ----------
    m, is_diagonal
        Brownian motions of a path, and whether each entry of the state has its own.
    trailing
        Dimensions that the result of ``g`` has beside those of the state.
    width
        Entries of the drift of a path.
    verdicts
        Why the program is not that of every path, for each shape of a state; empty where it is.
    """

    m: int
    is_diagonal: bool
    trailing: tuple[int, ...]
    width: int
    verdicts: dict[torch.Size, str] = dataclass_field(default_factory=dict)


class RowRecipe(Recipe):
    """For a drift and a diffusion that treat all paths of a batch alike.

    It fills in what the field learns of ``g`` when it calls it first.
    """

    bound = RowBound
    judges_once = False

    def key(self, field: SDEField, leaves: list[Any]) -> Any:
        structure = _Rows.structure_of(field)
        return code_of(field.g), field.noise, *key_of(field.f, field.p, structure, leaves)

    def graph(
        self, field: SDEField, t: Tensor, u0: Tensor, leaves: list[Any], recorder: CodeRecorder
    ) -> ProgramGraph:
        """See ``Recipe.graph``.

        Raises
        ------
        ValueError
            If the noise is said to be additive, and ``g`` depends on the state.
        """
        rows = _Rows(field)

        def both(t: Tensor, u: Any, *args: Any) -> Any:
            return field.f(t, u, *args), field.g(t, u, *args)

        def flat(results: Any, structure: StateStructure, tracer: Tracer) -> list[Node]:
            du, g = results
            nodes = flat_result(du, structure, tracer)
            return nodes + _flat_diffusion(g, rows.field, tracer)

        try:
            u = rows.state(u0, field.d)
            result = trace(both, rows.structure, field.p, t, u, 2 * MOST_NODES, flat, recorder)
            diffusion_nodes = result.outputs[rows.count * field.d :]
            is_wrong = field.noise == "additive" and _depends(diffusion_nodes)
            drift, diffusion = _first_path(result, rows, field)
        except Declined:
            raise
        except Exception as error:  # f's or g's own, which the torch engine reports as it is
            raised = f"{type(error).__name__}: {error}"
            if rows.count < field.rows:
                why = f"for two paths alone they raise {raised}"
                raise Declined(_COUPLED.format(why=why)) from error
            raise Declined(f"f or g raised {raised}") from error
        if is_wrong:
            raise ValueError(NOT_ADDITIVE)
        m, is_diagonal, d = rows.field.m, rows.field.is_diagonal, len(drift)
        has_trailing = len(rows.field._g_shapes[0]) > len(rows.structure.shapes[0])
        facts = _Facts(m, is_diagonal, (m,) if has_trailing else (), d)
        kind = rows.count > 1, m, is_diagonal, d
        return ProgramGraph.of(result, [*drift, *diffusion], leaves, kind, facts)

    def program(self, graph: ProgramGraph) -> RowProgram:
        has_many_rows, m, is_diagonal, d = graph.kind
        drift, diffusion = graph.outputs[:d], graph.outputs[d:]
        return RowProgram(
            graph.pool,
            drift,
            diffusion,
            m,
            is_diagonal,
            graph.blocks,
            graph.is_float32,
            has_many_rows,
        )

    def bind(
        self,
        entry: TraceEntry,
        fingerprint: Fingerprint,
        field: SDEField,
        leaves: list[Any],
        trace_s: float = 0.0,
    ) -> RowBound:
        bound = super().bind(entry, fingerprint, field, leaves, trace_s)
        facts: _Facts = entry.facts
        field.m, field.is_diagonal = facts.m, facts.is_diagonal
        field._g_shapes = [torch.Size([*x, *facts.trailing]) for x in field.structure.shapes]
        return bound

    def is_confirmed(self, field: SDEField, bound: RowBound, t: Tensor, u0: Tensor) -> bool:
        look = torch.is_grad_enabled() and any(x.requires_grad for x in bound.tensors)
        eager, foreign = _by_torch(field, t, u0, look)
        return _agrees(field, bound, t, u0, eager) and bound.uses_all(foreign)

    def judge(
        self,
        entry: TraceEntry,
        field: SDEField,
        bound: RowBound,
        t: Tensor,
        u0: Tensor,
        direction: float,
    ) -> str:
        verdict = _why_not_every_path(field, bound, t, u0, direction)
        entry.facts.verdicts[field.structure.shapes[0]] = verdict
        return verdict

    def judge_again(
        self,
        entry: TraceEntry,
        field: SDEField,
        bound: RowBound,
        t: Tensor,
        u0: Tensor,
        direction: float,
    ) -> str:
        known = entry.facts.verdicts.get(field.structure.shapes[0])
        return self.judge(entry, field, bound, t, u0, direction) if known is None else known


class _Rows:
    """What is traced of a batch: two of its paths, or all where there is one.

    Attributes
    ----------
    structure
        Of their state: the same for every size of a batch.
    count
        How many.
    """

    def __init__(self, field: SDEField):
        self.count = 1 if field.rows == 1 else 2
        self.structure = self.structure_of(field)
        # what g returns for these rows is checked as the field checks it
        self.field = SDEField(
            field.f, field.g, field.p, self.structure, field.noise, field.interpretation
        )

    @staticmethod
    def structure_of(field: SDEField) -> StateStructure:
        if field.rows == 1:
            return field.structure
        shape = field.structure.shapes[0]
        blank = torch.empty(2, *[1] * (len(shape) - 2), shape[-1], dtype=field.dtype, device="cpu")
        return StateStructure.of(blank)

    def state(self, u0: Tensor, d: int) -> Tensor:
        """The first paths of a flat state."""
        return u0[: self.count * d].clone()


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


def _first_path(result: Trace, rows: _Rows, field: SDEField) -> tuple[list[Node], list[Node]]:
    """Drift and diffusion of the first path.

    Raises
    ------
    Declined
        If a path depends on another.
    """
    d, count = field.d, rows.count
    drift, diffusion = result.outputs[: count * d], result.outputs[count * d :]
    width = len(diffusion) // count
    if count == 2:
        for outputs, each in ((drift, d), (diffusion, width)):
            for i in range(count):
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


def _by_torch(
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
    field: SDEField, bound: RowBound, t: Tensor, u: Tensor, eager: tuple[Tensor, Tensor]
) -> bool:
    """Whether the compiled functions give what ``f`` and ``g`` give now; NaN where they do."""
    for kind, theirs in zip(("drift", "diffusion"), eager, strict=True):
        ours = bound.evaluate(kind, float(t), u, field.rows)
        if ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
            return False
        if torch.equal(ours, theirs):
            continue
        if not torch.equal(ours.isnan(), theirs.isnan()):
            return False
        if not bool(field.rounding_error(ours.nan_to_num(), theirs.nan_to_num()) <= 1):
            return False
    return True


def _why_not_every_path(
    field: SDEField, bound: RowBound, t: Tensor, u0: Tensor, direction: float
) -> str:
    """Why a trace that was just made is not that of ``f`` and ``g``; empty if it is."""
    eager, _ = _by_torch(field, t, u0)
    if not _agrees(field, bound, t, u0, eager):
        again, _ = _by_torch(field, t, u0)
        if not all(map(torch.equal, map(_plain, eager), map(_plain, again))):
            return DRAWN_ANEW
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
                eager, _ = _by_torch(field, at, state)
            except Exception:  # outside of where they are defined
                continue
            compared += 1
            why = _why_not_beside(field, bound, at, state, eager)
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
    field: SDEField, bound: RowBound, t: Tensor, u: Tensor, eager: tuple[Tensor, Tensor]
) -> str:
    roughly = 1e-3 if bound.program.is_float32 else 1e-6
    for kind, theirs in zip(("drift", "diffusion"), eager, strict=True):
        ours = bound.evaluate(kind, float(t), u, field.rows)
        there = theirs.isfinite()
        off = torch.where(there, ours - theirs, 0.0).abs().max()
        size = torch.where(there, theirs, 0.0).abs().max()
        if not float(off) <= roughly * max(float(size), 1e-3):
            if field.rows > 1:
                return _COUPLED.format(why="they differ where each path has a state of its own")
            return FROZEN
    return ""
