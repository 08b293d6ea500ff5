"""Whole steps of an SDE, and their reverse, as routines over a vector of rows.

A step calls the routines of drift and diffusion (LLVM puts short ones in) and is otherwise an
expression of what they give, of the state and of the noise. Its reverse is made of the same
expressions: what a call gives is an input to them, and its cotangent goes through the routine that
is the product with the Jacobian.

Where the noise is diagonal or one Brownian motion, these expressions treat every entry of the state
alike. Of long rows they are written for one entry, and a loop goes over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffsolve.engines.native.codegen.llvm import Output
from diffsolve.engines.native.codegen.rows import ENTRY, Array, Call, Each, Routine
from diffsolve.engines.native.graph.derivative import vjp
from diffsolve.engines.native.graph.expression import Node, Pool, needed
from diffsolve.engines.native.programs.base import MOST_OPERATIONS
from diffsolve.engines.native.programs.row_routines import Nodes, RowRoutines

_MOST_UNROLLED = 8  # entries of rows without a loop over them


class StepMethod(Protocol):
    """The formulas of a method. Code is found by it: equal ones are one object."""

    needs_area: bool

    def write(self, step: RowStep, /) -> None:
        """Fill in the expressions of a step."""
        ...


@dataclass
class _Evaluation:
    """A call of the drift or of the diffusion within a step, and what it gives."""

    kind: str
    time: Node
    state: Nodes
    values: Nodes
    name: str


class RowStep:
    """Expressions of a step, filled by the method.

    Parameters
    ----------
    routines
        Drift and diffusion.
    needs_area
        Whether it uses ``H``.

    Attributes
    ----------
    h, size, root
        The step, its magnitude, and the square root of that.
    d, m, is_diagonal
        Entries of the state that are written, Brownian motions, and whether each entry has its own.
        With a loop over the entries: one, one and true.
    u, W, H
        State and noise of a row.
    new
        The new state.
    error
        Its error estimate, or None.
    slopes
        Two differences whose ratio of norms is the stiffness, or None.
    is_steady
        Whether the diffusion does not read the time.
    spared
        Evaluations of the diffusion that the torch engine needs, and this one does not: they are
        counted.
    """

    def __init__(self, routines: RowRoutines, needs_area: bool):
        self.needs_area = needs_area
        pool = self.pool = Pool(routines.pool.dtype, 10 * MOST_OPERATIONS)
        self.d, self.m, self.is_diagonal = routines.d, routines.m, routines.is_diagonal
        self.h = pool.input("h", 0)
        self.size = pool.unary("abs", self.h)
        self.root = pool.unary("sqrt", self.size)
        #: How many entries a loop goes over; 0: there is none.
        self.entries = 0
        of_noise: list[Any] = list(range(self.m))
        if self.d > _MOST_UNROLLED and (self.is_diagonal or self.m == 1):
            of_noise = [ENTRY if self.is_diagonal else 0]
            self.entries, self.d, self.m, self.is_diagonal = self.d, 1, 1, True
        self.u = self.inputs("u")
        self.W, self.H = ([pool.input(name, i) for i in of_noise] for name in ("W", "H"))
        self.evaluations: list[_Evaluation] = []
        self.new: Nodes = []
        self.error: Nodes | None = None
        self.slopes: tuple[Nodes, Nodes] | None = None
        self.is_steady, self.spared = not routines.reads_time["diffusion"], 0

    def inputs(self, name: str, width: int = 0) -> Nodes:
        """Those of an array: of the entry at hand, or all; default: as many as the state has."""
        if self.entries:
            return [self.pool.input(name, ENTRY)]
        return list(self.pool.inputs(name, width or self.d))

    def outputs(self, name: str, nodes: Nodes, add: bool = False) -> list[Any]:
        """Statements that write to an array of rows."""
        if self.entries:
            return [Each(self.entries, [Output(name, ENTRY, nodes[0], add)])]
        return [Output(name, i, x, add) for i, x in enumerate(nodes)]

    # -- what methods are written with -------------------------------------------------------------

    def drift(self, node: int, state: Nodes) -> Nodes:
        """``f`` at a node of the method, by its index."""
        return self._evaluate("drift", node, state, self.d)

    def diffusion(self, node: int, state: Nodes) -> Nodes:
        """``g``: ``(d)``, or ``(d, m)`` in rows where it is not diagonal."""
        width = self.d if self.is_diagonal else self.d * self.m
        return self._evaluate("diffusion", node, state, width)

    def _evaluate(self, kind: str, node: int, state: Nodes, width: int) -> Nodes:
        name = f"k{len(self.evaluations)}"
        values = self.inputs(name, width)
        time = self.pool.input("times", node)
        self.evaluations.append(_Evaluation(kind, time, list(state), values, name))
        return values

    def product(self, G: Nodes, w: Nodes) -> Nodes:
        """The diffusion applied to noise."""
        if self.is_diagonal:
            return [g * x for g, x in zip(G, w, strict=True)]
        m = self.m
        rows = [G[i * m : (i + 1) * m] for i in range(self.d)]
        return [self.pool.sum([g * x for g, x in zip(row, w, strict=True)]) for row in rows]

    def combined(self, weights: Any, rows: Sequence[Nodes]) -> Nodes:
        """Sum of rows with weights, numbers or nodes; those that are zero are left out."""
        used = [
            (w, row)
            for w, row in zip(weights, rows, strict=True)
            if isinstance(w, Node) or float(w) != 0
        ]
        return [self.pool.sum([row[i] * _plain(w) for w, row in used]) for i in range(self.d)]

    # -- what routines are made of -----------------------------------------------------------------

    def squares(self) -> Nodes:
        """Of both differences of the stiffness, and of the error, added up over what is written."""
        rows = [*(self.slopes or ([], [])), self.error or []]
        return [self.pool.sum([x * x for x in row]) for row in rows]

    def passed(self, routine: Routine, name: str, nodes: Nodes) -> Any:
        """Nodes as an argument of a call; of an entry they are written to an array before."""
        if not self.entries:
            return nodes
        node = nodes[0]
        if node.op == "input" and node.data[1] == ENTRY:
            return node.data[0]  # it is an array
        routine.locals[name] = self.entries
        routine.statements += self.outputs(name, nodes)
        return name


def _plain(w: Any) -> Any:
    return w if isinstance(w, Node) else float(w)


def _begun(routines: RowRoutines, step: RowStep, name: str) -> Routine:
    """A routine with the evaluations of the step."""
    routine = Routine(name, ("h",), ())
    for e in step.evaluations:
        state = step.passed(routine, f"{e.name}_state", e.state)
        called = routines.evaluation(e.kind)
        routine.locals[e.name] = called.arrays[-1].width
        routine.statements.append(Call(called, [e.time], [state, "p", e.name]))
    return routine


def _given(routines: RowRoutines, step: RowStep) -> list[Array]:
    return [
        Array("times", "shared"),
        Array("u", "in", routines.d),
        Array("W", "in", routines.m),
        Array("H", "in", routines.m if step.needs_area else 0),
        Array("p", "shared"),
    ]


def step_routine(routines: RowRoutines, step: RowStep) -> Routine:
    """``step(h, times, u, W, H, p, new, error, sums)``.

    The sums over all rows and entries: squares of both differences of the stiffness, squares of the
    error, and zero if the new state is finite, else NaN.
    """
    pool = step.pool
    routine = _begun(routines, step, "step")
    routine.statements += step.outputs("new", step.new)
    if step.error is not None:
        routine.statements += step.outputs("error", step.error)
    sums = [*step.squares(), pool.sum([x * 0.0 for x in step.new])]
    if step.entries:
        routine.statements += [Output("sums", i, pool.const(0.0)) for i in range(len(sums))]
        totals = [Output("sums", i, x, add=True) for i, x in enumerate(sums) if not x.is_const]
        routine.statements.append(Each(step.entries, totals))
    else:
        routine.statements += [Output("sums", i, x) for i, x in enumerate(sums)]
    routine.arrays = (
        *_given(routines, step),
        Array("new", "out", routines.d),
        Array("error", "out", 0 if step.error is None else routines.d),
        Array("sums", "sums", len(sums)),
    )
    return _trimmed(routine)


def reverse_routine(
    routines: RowRoutines, step: RowStep, active: tuple[bool, ...], whole: bool
) -> Routine:
    """Reverse of a step, of all that it gives or of the new state alone.

    ``step_vjp(h, times, u, W, H, p, new_bar, error_bar, sums_bar, bar, p_bar)``: the cotangent of
    the state is written to ``bar``, those of the active parameters are added to the lanes of
    ``p_bar``.
    """
    pool = step.pool
    outputs, bars = list(step.new), step.inputs("new_bar")
    if whole:
        if step.error is not None:
            outputs += step.error
            bars += step.inputs("error_bar")
        outputs += step.squares()[:2]
        there = pool.input("there", 0)
        bars += [there * x for x in pool.inputs("sums_bar", 2)]
    targets = [*step.u, *[x for e in step.evaluations for x in e.values]]
    totals: dict[int, Nodes] = {}

    def pull(outputs: Nodes, bars: Nodes) -> None:
        for x, bar in zip(targets, vjp(outputs, bars, targets), strict=True):
            if bar is not None:
                totals.setdefault(x.index, []).append(bar)

    def total(x: Node) -> Node:
        return pool.sum(totals.get(x.index, []))

    pull(outputs, bars)
    routine = _begun(routines, step, "step_vjp")
    states = [x.arrays[0] for x in routine.statements if isinstance(x, Call)]
    for e, state in reversed(list(zip(step.evaluations, states, strict=True))):
        if not any(x.index in totals for x in e.values):
            continue
        place = f"{e.name}_bar"
        w = step.passed(routine, f"{e.name}_w", [total(x) for x in e.values])
        routine.locals[place] = routines.d
        called = routines.product(e.kind, active)
        routine.statements.append(Call(called, [e.time], [state, "p", w, place, "p_bar"]))
        pull(e.state, step.inputs(place))
    routine.statements += step.outputs("bar", [total(x) for x in step.u])
    routine.arrays = (
        *_given(routines, step),
        Array("new_bar", "bar", routines.d),
        Array("error_bar", "bar", routines.d if whole and step.error is not None else 0),
        Array("sums_bar", "shared"),
        Array("there", "mask", 1),
        Array("bar", "out", routines.d),
        Array("p_bar", "lanes", len(routines.active_entries(active))),
    )
    return _trimmed(routine)


def _trimmed(routine: Routine) -> Routine:
    """Without the calls, and arrays of its own, whose results nothing uses."""
    used = {a.name for a in routine.arrays}
    kept: list[Any] = []
    for x in reversed(routine.statements):
        outputs = [x] if isinstance(x, Output) else x.outputs if isinstance(x, Each) else []
        nodes = [out.node for out in outputs]
        if isinstance(x, Call):
            written = {str(x.arrays[-1])}
            nodes += x.scalars
            for array in x.arrays:
                nodes += [] if isinstance(array, str) else array
        else:
            written = {out.block for out in outputs}
        if not written & used:
            routine.locals = {k: n for k, n in routine.locals.items() if k not in written}
            continue
        if isinstance(x, Call):
            used |= {array for array in x.arrays if isinstance(array, str)}
        used |= {y.data[0] for y in needed(nodes) if y.op == "input"}
        kept.append(x)
    routine.statements = kept[::-1]
    return routine
