"""The functions of an SDE: drift, diffusion, whole steps and their reverse, over rows of a batch.

A step calls the routines of the drift and of the diffusion (short ones are put in by LLVM) and is
otherwise an expression of what they give, of the state and of the noise. Its reverse is made of the
same expressions: what a call gives is an input to them, and its cotangent goes through the routine
that is the product with its Jacobian.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.derivative import vjp
from diffsolve.engines.native.expression import Node, Pool, needed
from diffsolve.engines.native.llvm import Code, Output
from diffsolve.engines.native.rows import Array, Call, Routine, TooWide, compile_rows, lanes_of

_log = logging.getLogger("diffsolve")
#: Scalar operations of drift and diffusion, and of their products with a Jacobian, at most.
_MOST_IN_DERIVATIVE = 25_000
Nodes = list[Node]


@dataclass
class _Evaluation:
    """A call of the drift or of the diffusion within a step, and what it gives."""

    kind: str
    time: Node
    state: Nodes
    values: Nodes
    name: str


class Step:
    """Expressions of a step, filled by the method.

    Parameters
    ----------
    functions
        Drift and diffusion.

    Attributes
    ----------
    h, size, root
        The step, its magnitude, and the square root of that.
    u, W, H
        State and noise of a row.
    new
        The new state.
    error
        Its error estimate, or None.
    slopes
        Two differences whose ratio of norms is the stiffness, or None.
    """

    def __init__(self, functions: Functions):
        self.functions = functions
        pool = self.pool = Pool(functions.pool.dtype, 10 * _MOST_IN_DERIVATIVE)
        self.d, self.m, self.is_diagonal = functions.d, functions.m, functions.is_diagonal
        self.h = pool.input("h", 0)
        self.size = pool.unary("abs", self.h)
        self.root = pool.unary("sqrt", self.size)
        self.u, self.W, self.H = (
            list(pool.inputs(name, n)) for name, n in (("u", self.d), ("W", self.m), ("H", self.m))
        )
        self.evaluations: list[_Evaluation] = []
        self.new: Nodes = []
        self.error: Nodes | None = None
        self.slopes: tuple[Nodes, Nodes] | None = None

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
        values = list(self.pool.inputs(name, width))
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


def _plain(w: Any) -> Any:
    return w if isinstance(w, Node) else float(w)


class StepMethod(Protocol):
    """The formulas of a method. Code is found by it: equal ones are one object."""

    needs_area: bool

    def write(self, step: Step, /) -> None:
        """Fill in the expressions of a step."""
        ...


class Functions:
    """The compiled functions of one SDE, found by the content of its graph.

    Parameters
    ----------
    pool, drift, diffusion
        What they compute for one row, of inputs ``("t", 0)``, ``("u", i)`` and ``("p", j)``.
    m
        Brownian motions of a row.
    is_diagonal
        Whether the diffusion has the shape of the state, and a Brownian motion for each entry.
    blocks
        First entry and length of each tensor among the flat parameters.
    single
        Whether the state is float32 rather than float64.
    several
        Whether there may be more rows than one.
    """

    def __init__(
        self,
        pool: Pool,
        drift: Nodes,
        diffusion: Nodes,
        m: int,
        is_diagonal: bool,
        blocks: Sequence[tuple[int, int]],
        single: bool,
        several: bool,
    ):
        self.pool, self.m, self.is_diagonal, self.single = pool, m, is_diagonal, single
        self.d = len(drift)
        self.width = len(diffusion)
        self.blocks = tuple(blocks)
        self.n_params = sum(count for _, count in blocks)
        self.lanes = lanes_of(single) if several else 1
        self.compile_s = 0.0
        self.size = len(needed([*drift, *diffusion]))
        self.templates: dict[Any, Any] = {}  # of solves, kept by the engine
        self._outputs = {"drift": drift, "diffusion": diffusion}
        self._codes: dict[Any, Code] = {}
        self._routines: dict[Any, Routine] = {}
        self._steps: dict[Any, Step] = {}
        self._lock = threading.RLock()
        pool.most = 10 * _MOST_IN_DERIVATIVE

    # -- code --------------------------------------------------------------------------------------

    def _code(self, key: Any, make: Callable[[], Routine]) -> int:
        code = self._codes.get(key)
        if code is None:
            with self._lock:
                code = self._codes.get(key)
                if code is None:
                    started = time.perf_counter()
                    code = self._codes[key] = self._compiled(make())
                    self.compile_s += time.perf_counter() - started
        return code.address

    def _compiled(self, routine: Routine) -> Code:
        size = sum(
            len(needed([x.node for x in each.statements if isinstance(x, Output)]))
            for each in routine.routines()
        )
        if size > _MOST_IN_DERIVATIVE:
            raise Declined(f"its derivative is too large: {size:,} scalar operations")
        try:
            return compile_rows(routine, self.lanes, self.single)
        except TooWide:
            raise Declined(f"a row of {self.d:,} entries is too long") from None
        except Exception as error:  # an LLVM that this was not written for
            reason = f"{type(error).__name__}: {error}"
            _log.warning("diffsolve: LLVM could not compile an SDE: %s", reason)
            raise Declined(f"LLVM could not compile it, {reason}") from error

    def active_entries(self, active: tuple[bool, ...]) -> list[int]:
        """Positions in the flat parameters of the blocks that are differentiated."""
        blocks = zip(self.blocks, active, strict=True)
        return [i for (offset, count), on in blocks if on for i in range(offset, offset + count)]

    # -- drift and diffusion -----------------------------------------------------------------------

    def field(self) -> int:
        """``f(t, u, p, out)``."""
        return self._code("drift", lambda: self._plain_routine("drift"))

    def diffusion(self) -> int:
        """``g(t, u, p, out)``; rows of ``width`` numbers."""
        return self._code("diffusion", lambda: self._plain_routine("diffusion"))

    def diffusion_vjp(self, active: tuple[bool, ...]) -> int:
        """``g_vjp(t, u, p, w, u_bar, p_bar)``; ``p_bar`` in lanes, of the active entries."""
        key = "diffusion_vjp", active
        return self._code(key, lambda: self._vjp_routine("diffusion", active))

    def _plain_routine(self, kind: str) -> Routine:
        found = self._routines.get(kind)
        if found is None:
            outputs = self._outputs[kind]
            arrays = (
                Array("u", "in", self.d),
                Array("p", "shared"),
                Array("out", "out", len(outputs)),
            )
            written: list[Any] = [Output("out", i, y) for i, y in enumerate(outputs)]
            found = self._routines[kind] = Routine(kind, ("t",), arrays, written)
        return found

    def _vjp_routine(self, kind: str, active: tuple[bool, ...]) -> Routine:
        key = kind, active
        found = self._routines.get(key)
        if found is None:
            outputs, pool = self._outputs[kind], self.pool
            entries = self.active_entries(active)
            w = list(pool.inputs("w", len(outputs)))
            wrt = [*pool.inputs("u", self.d), *[pool.input("p", i) for i in entries]]
            bars = vjp(outputs, w, wrt)
            zero = pool.const(0.0)
            written: list[Any] = [
                Output("u_bar", i, zero if x is None else x) for i, x in enumerate(bars[: self.d])
            ]
            written += [
                Output("p_bar", i, x, add=True)
                for i, x in enumerate(bars[self.d :])
                if x is not None
            ]
            arrays = (
                Array("u", "in", self.d),
                Array("p", "shared"),
                Array("w", "bar", len(outputs)),
                Array("u_bar", "out", self.d),
                Array("p_bar", "lanes", len(entries)),
            )
            found = self._routines[key] = Routine(f"{kind}_vjp", ("t",), arrays, written)
        return found

    # -- steps -------------------------------------------------------------------------------------

    def made(self, method: StepMethod) -> Step:
        """The expressions of a step."""
        found = self._steps.get(method)
        if found is None:
            found = Step(self)
            method.write(found)
            self._steps[method] = found
        return found

    def counts(self, method: StepMethod) -> tuple[int, int]:
        """Evaluations of drift and diffusion in a step."""
        kinds = [e.kind for e in self.made(method).evaluations]
        return kinds.count("drift"), kinds.count("diffusion")

    def step(self, method: StepMethod) -> int:
        """``step(h, times, u, W, H, p, new, error, sums)``.

        The sums over all rows and entries: squares of both differences of the stiffness, squares of
        the error, and zero if the new state is finite, else NaN.
        """
        return self._code(("step", method), lambda: self._step_routine(method))

    def step_vjp(self, method: StepMethod, active: tuple[bool, ...], estimates: bool) -> int:
        """Reverse of ``step``; see ``_reverse_routine``."""
        key = "step_vjp", method, active, estimates
        return self._code(key, lambda: self._reverse_routine(method, active, estimates))

    def _noise_arrays(self, method: StepMethod) -> list[Array]:
        return [
            Array("times", "shared"),
            Array("u", "in", self.d),
            Array("W", "in", self.m),
            Array("H", "in", self.m if method.needs_area else 0),
            Array("p", "shared"),
        ]

    def _call(self, e: _Evaluation) -> Call:
        return Call(self._plain_routine(e.kind), [e.time], [e.state, "p", e.name])

    def _step_routine(self, method: StepMethod) -> Routine:
        step = self.made(method)
        pool = step.pool
        routine = Routine("step", ("h",), ())
        for e in step.evaluations:
            routine.locals[e.name] = len(e.values)
            routine.statements.append(self._call(e))
        results = [Output("new", i, x) for i, x in enumerate(step.new)]
        if step.error is not None:
            results += [Output("error", i, x) for i, x in enumerate(step.error)]
        check = pool.sum([x * 0.0 for x in step.new])
        results += [Output("sums", i, x) for i, x in enumerate([*self._squares(step), check])]
        routine.statements += results
        routine.arrays = (
            *self._noise_arrays(method),
            Array("new", "out", self.d),
            Array("error", "out", 0 if step.error is None else self.d),
            Array("sums", "sums", 4),
        )
        return _trimmed(routine)

    def _squares(self, step: Step) -> Nodes:
        """Of both differences of the stiffness, and of the error, of one row."""
        rows = [*(step.slopes or ([], [])), step.error or []]
        return [step.pool.sum([x * x for x in row]) for row in rows]

    def _reverse_routine(
        self, method: StepMethod, active: tuple[bool, ...], estimates: bool
    ) -> Routine:
        """Reverse of a step, of all that it gives or of the new state alone.

        ``step_vjp(h, times, u, W, H, p, new_bar, error_bar, sums_bar, bar, p_bar)``: the cotangent
        of the state is written to ``bar``, those of the active parameters are added to the lanes of
        ``p_bar``.
        """
        step = self.made(method)
        pool = step.pool
        outputs, bars = list(step.new), list(pool.inputs("new_bar", self.d))
        if estimates:
            if step.error is not None:
                outputs += step.error
                bars += list(pool.inputs("error_bar", self.d))
            outputs += self._squares(step)[:2]
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
        routine = Routine("step_vjp", ("h",), ())
        for e in step.evaluations:
            routine.locals[e.name] = len(e.values)
            routine.statements.append(self._call(e))
        for e in reversed(step.evaluations):
            if not any(x.index in totals for x in e.values):
                continue
            w, place = [total(x) for x in e.values], f"{e.name}_bar"
            routine.locals[place] = self.d
            routine.statements.append(
                Call(self._vjp_routine(e.kind, active), [e.time], [e.state, "p", w, place, "p_bar"])
            )
            pull(e.state, list(pool.inputs(place, self.d)))
        routine.statements += [Output("bar", i, total(x)) for i, x in enumerate(step.u)]
        routine.arrays = (
            *self._noise_arrays(method),
            Array("new_bar", "bar", self.d),
            Array("error_bar", "bar", self.d if estimates and step.error is not None else 0),
            Array("sums_bar", "shared"),
            Array("there", "mask", 1),
            Array("bar", "out", self.d),
            Array("p_bar", "lanes", len(self.active_entries(active))),
        )
        return _trimmed(routine)


def _trimmed(routine: Routine) -> Routine:
    """Without the calls whose results nothing uses."""
    used: set[str] = set()

    def note(nodes: Sequence[Node]) -> None:
        used.update(x.data[0] for x in needed(nodes) if x.op == "input")

    kept: list[Any] = []
    for x in reversed(routine.statements):
        if isinstance(x, Output):
            note([x.node])
        else:
            plain = "p_bar" not in x.arrays
            if plain and x.arrays[-1] not in used:
                routine.locals.pop(str(x.arrays[-1]))
                continue
            note(
                [
                    *x.scalars,
                    *[y for nodes in x.arrays if not isinstance(nodes, str) for y in nodes],
                ]
            )
        kept.append(x)
    routine.statements = kept[::-1]
    return routine
