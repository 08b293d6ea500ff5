"""The functions of an SDE: drift, diffusion, whole steps and their reverse, over rows of a batch.

A step calls the routines of the drift and of the diffusion (short ones are put in by LLVM) and is
otherwise an expression of what they give, of the state and of the noise. Its reverse is made of the
same expressions: what a call gives is an input to them, and its cotangent goes through the routine
that is the product with its Jacobian.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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

    def as_state(self, w: Nodes) -> Nodes:
        """Noise as a factor of states, where it is diagonal or one number."""
        return w if self.is_diagonal else w * self.d

    def combined(self, weights: Sequence[Any], rows: Sequence[Nodes]) -> Nodes:
        """Sum of rows with weights, numbers or nodes; those that are zero are left out."""
        used = [
            (w, row)
            for w, row in zip(weights, rows, strict=True)
            if isinstance(w, Node) or float(w) != 0
        ]
        return [self.pool.sum([row[i] * _plain(w) for w, row in used]) for i in range(self.d)]

    def shifted(self, x: Nodes, y: Nodes) -> Nodes:
        return [a + b for a, b in zip(x, y, strict=True)]


def _plain(w: Any) -> Any:
    return w if isinstance(w, Node) else float(w)


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

    def _made(self, method: StepMethod) -> Step:
        found = self._steps.get(method)
        if found is None:
            found = Step(self)
            method.write(found)
            self._steps[method] = found
        return found

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

    def _noise_arrays(self) -> list[Array]:
        return [
            Array("times", "shared"),
            Array("u", "in", self.d),
            Array("W", "in", self.m),
            Array("H", "in", self.m),
            Array("p", "shared"),
        ]

    def _call(self, e: _Evaluation) -> Call:
        return Call(self._plain_routine(e.kind), [e.time], [e.state, "p", e.name])

    def _step_routine(self, method: StepMethod) -> Routine:
        step = self._made(method)
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
            *self._noise_arrays(),
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
        step = self._made(method)
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
            *self._noise_arrays(),
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


# -- the methods -----------------------------------------------------------------------------------


class StepMethod:
    """The formulas of a method; equal ones are one object, by which code is found.

    Attributes
    ----------
    nodes
        Of the evaluations, in units of the step.
    drifts, diffusions
        Evaluations a step.
    """

    nodes: np.ndarray
    drifts: int
    diffusions: int

    def write(self, step: Step) -> None:
        """Fill in the expressions of a step."""
        raise NotImplementedError


class EulerMaruyama(StepMethod):
    nodes = np.zeros(1)
    drifts = diffusions = 1

    def write(self, step: Step) -> None:
        f, G = step.drift(0, step.u), step.diffusion(0, step.u)
        drifted = [x + step.h * y for x, y in zip(step.u, f, strict=True)]
        step.new = step.shifted(drifted, step.product(G, step.W))


class RungeKutta(StepMethod):
    """A method of Rößler's type, from its program.

    Parameters
    ----------
    program
        ``solvers/stochastic/tableau.py: Program``.
    additive
        Whether it is for additive noise, of any shape.
    """

    def __init__(self, program: Any, additive: bool):
        self.program, self.additive = program, additive
        self.nodes = np.array([e.c for e in program.evaluations])
        self.drifts, self.diffusions = program.count("drift"), program.count("diffusion")

    def write(self, step: Step) -> None:
        program = self.program
        W, H = step.W, step.H
        area = [b + 0.5 * a for a, b in zip(W, H, strict=True)]  # I_(1,0) / h
        noise = [W, area] if self.additive else self._hermite(step, W, area)
        flat = step.is_diagonal or step.m == 1
        rows: list[Nodes] = []
        matrices: dict[int, Nodes] = {}
        drifts: list[tuple[Nodes, Nodes]] = []
        blank = [step.pool.const(0.0)] * step.d
        for i, e in enumerate(program.evaluations):
            state = step.u
            if not e.at_start:
                weights = [
                    self._weight(step, *w) for w in zip(e.by_h, e.by_root, e.plain, strict=True)
                ]
                state = step.shifted(step.u, step.combined(weights, rows[: len(weights)]))
            if e.kind == "drift":
                rows.append(step.drift(i, state))
                drifts.append((rows[-1], state))
                continue
            G = step.diffusion(i, state)
            matrices[len(rows)] = G
            rows.append(G if flat else blank)
            if e.weighted is not None:
                rows.append(step.product(G, area))
        weighed = []
        for beta, x in zip(program.beta, noise, strict=True):
            used = [(float(b), matrices[r]) for r, b in enumerate(beta) if b]
            G = [step.pool.sum([b * g[i] for b, g in used]) for i in range(step.functions.width)]
            weighed.append(step.product(G, x))
        by_drift = [step.h * x for x in step.combined(program.alpha, rows)]
        of_noise = [step.pool.sum(x) for x in zip(*weighed, strict=True)]
        step.new = [u + (a + b) for u, a, b in zip(step.u, by_drift, of_noise, strict=True)]
        by_drift = [step.h * x for x in step.combined(program.alpha_error, rows)]
        of_noise = [step.pool.sum(x) for x in zip(*weighed[len(weighed) // 2 :], strict=True)]
        step.error = step.shifted(by_drift, of_noise)
        if len(drifts) > 1:
            (f0, u0), (f1, u1) = drifts[-2:]
            step.slopes = (
                [a - b for a, b in zip(f1, f0, strict=True)],
                [a - b for a, b in zip(u1, u0, strict=True)],
            )

    @staticmethod
    def _weight(step: Step, by_h: float, by_root: float, plain: float) -> Any:
        terms = [x * float(w) for x, w in ((step.h, by_h), (step.root, by_root)) if w]
        if plain:
            terms.append(step.pool.const(float(plain)))
        return step.pool.sum(terms) if terms else 0.0

    @staticmethod
    def _hermite(step: Step, W: Nodes, area: Nodes) -> list[Nodes]:
        second = [(w * w / step.root - step.root) * 0.5 for w in W]
        third = [(w * w / (6.0 * step.size) - 0.5) * w for w in W]
        return [W, second, area, third]


class Lamba(StepMethod):
    """Lamba's error estimate of an Euler step; ``solvers/stochastic/low_order.py: LambaEM``.

    Parameters
    ----------
    additive
        Whether the noise is additive.
    """

    nodes = np.array([0.0, 1.0])
    drifts = 2

    def __init__(self, additive: bool):
        self.additive = additive
        self.diffusions = 1 if additive else 2

    def write(self, step: Step) -> None:
        pool, u, W = step.pool, step.u, step.W
        f, G = step.drift(0, u), step.diffusion(0, u)
        K = [x + step.h * y for x, y in zip(u, f, strict=True)]
        step.new = step.shifted(K, step.product(G, W))
        df = [a - b for a, b in zip(step.drift(1, K), f, strict=True)]
        error = [pool.unary("abs", step.h * 0.5 * x) for x in df]
        if not self.additive:
            error = step.shifted(error, self._of_noise(step, G))
        step.error = error
        step.slopes = df, [a - b for a, b in zip(K, u, strict=True)]

    @staticmethod
    def _of_noise(step: Step, G: Nodes) -> Nodes:
        pool, u, W = step.pool, step.u, step.W
        if step.is_diagonal or step.m == 1:
            beside = [x + step.root * g for x, g in zip(u, G, strict=True)]
            dG = [a - b for a, b in zip(step.diffusion(0, beside), G, strict=True)]
            factor = [(w * w / step.root - step.root) * 0.5 for w in W]
            return [pool.unary("abs", x) for x in step.product(dG, factor)]
        beside = step.shifted(u, step.product(G, W))
        dG = [a - b for a, b in zip(step.diffusion(0, beside), G, strict=True)]
        m = step.m
        squares = [pool.sum([x * x for x in dG[i * m : (i + 1) * m]]) for i in range(step.d)]
        scale = step.root * math.sqrt(0.5)
        # no slope where the row is zero, as in torch
        zero = [pool.binary("eq", x, 0.0) for x in squares]
        norms = [
            pool.where(z, 0.0, pool.unary("sqrt", pool.where(z, 1.0, x)))
            for z, x in zip(zero, squares, strict=True)
        ]
        return [scale * x for x in norms]
