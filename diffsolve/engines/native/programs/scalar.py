"""A right-hand side as machine code, with every function of it that the kernels call.

All are made from the expressions of one trace, when they are first asked for.
"""

from __future__ import annotations

import logging
import time
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffsolve.engines.native.codegen.llvm import FIELD, Code, Output, Signature, compile_function
from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.graph.derivative import jacobian, jvp, time_derivative, vjp
from diffsolve.engines.native.graph.expression import Node, Pool, needed, substitute
from diffsolve.engines.native.locks import compiling
from diffsolve.engines.native.programs.rosenbrock import RosenbrockStep, TooLong
from diffsolve.solvers.explicit_rk.step import stiffness_stage
from diffsolve.solvers.explicit_rk.tableau import Stages
from diffsolve.solvers.rosenbrock.tableau import RosenbrockStages

_VJP = Signature(("t",), ("u", "p", "w", "u_bar", "p_bar"))
_STEP = Signature(("h",), ("times", "u", "k", "p", "new", "stiff", "error", "low"))
_STEP_VJP = Signature(
    ("h",),
    (
        *("times", "u", "k", "p"),
        *("k_bar", "new_bar", "stiff_bar", "error_bar", "low_bar"),
        *("bar", "p_bar"),
    ),
)
_JVP = Signature(("t",), ("u", "p", "v", "out"))
_ROSENBROCK = Signature(("h",), ("times", "u", "k", "p", "new", "jac", "error", "check"))
_ROSENBROCK_VJP = Signature(("h",), ("times", "u", "k", "p", "k_bar", "new_bar", "bar", "p_bar"))
_log = logging.getLogger("diffsolve")
#: A derivative of more operations than this takes a second and more to compile.
_MOST_IN_DERIVATIVE = 25_000
#: A whole step is made one function where it has no more operations than this.
_MOST_IN_STEP = 3_000


class Jacobian:
    """The Jacobian of a right-hand side by the state, and its derivative by the time.

    Attributes
    ----------
    slots
        What kernels read of it, from ``layout.JAC`` to ``layout.HEAD``. The first is the address of
        ``jac(t, u, p, out)``: the entries that are not zero by structure, in the order of ``rows``
        and ``columns``; then, if ``time_terms``, all of the time derivative.
    rows, columns
        Where the entries belong.
    head
        Columns from this one on are zero: components that nothing depends on.
    entries, time_terms
        How many there are; no time terms where ``f`` does not depend on the time.
    nodes
        Expressions of all of them.
    """

    def __init__(
        self, pool: Pool, entries: dict[tuple[int, int], Node], slopes: Sequence[Node | None]
    ):
        self.rows, self.columns = (
            np.ascontiguousarray([place[i] for place in entries], dtype=np.int64) for i in (0, 1)
        )
        self.head = 1 + max(self.columns.tolist(), default=-1)
        zero = pool.const(0.0)
        slopes = [zero if x is None else x for x in slopes]
        self.entries, self.time_terms = len(entries), 0 if _are_zero(slopes) else len(slopes)
        self.nodes = [*entries.values(), *slopes[: self.time_terms]]
        self.slots = array("q")

    def place_at(self, address: int) -> None:
        """Note the address of the compiled function, and what kernels read besides."""
        places = self.rows.ctypes.data, self.columns.ctypes.data
        self.slots = array("q", (address, self.entries, *places, self.time_terms, self.head))

    def outputs(self) -> list[Output]:
        return [Output("out", i, x) for i, x in enumerate(self.nodes)]


def _are_zero(nodes: Sequence[Node]) -> bool:
    return all(x.is_const and x.data == 0 for x in nodes)


class Compiled:
    """The functions of a right-hand side.

    Parameters
    ----------
    pool, n, outputs
        What it computes: of inputs ``("t", 0)``, ``("u", i)`` and ``("p", j)``, ``n`` outputs.
    blocks
        First entry and length of each tensor among the flat parameters.
    single
        Whether the state is float32 rather than float64.

    Attributes
    ----------
    n, n_params
        Numbers in the state, and in all that ``f`` uses besides.
    size
        Operations of one evaluation.
    pool
        Of all expressions that are kept.
    compile_s
        Seconds spent on tracing and compiling so far.
    """

    def __init__(
        self, pool: Pool, outputs: list[Node], blocks: Sequence[tuple[int, int]], single: bool
    ):
        self.single = single
        self.n = len(outputs)
        self.n_params = sum(count for _, count in blocks)
        self.size = len(needed(outputs))
        self.blocks = tuple(blocks)
        self.compile_s = 0.0
        self._outputs, self.pool = outputs, pool
        self.templates: dict[Any, Any] = {}  # of solves, kept by the engine
        self.latest_template: tuple[Any, Any, Any] | None = None  # settings, method, template
        self._codes: dict[Any, Code | None] = {}
        self._jacobians: dict[Any, Jacobian] = {}
        pool.most = 10 * _MOST_IN_DERIVATIVE
        weakref.finalize(self, pool.release).atexit = False

    def _code(self, key: Any, make: Callable[[], tuple[Signature, list[Output]] | None]) -> int:
        """Address of a function; 0 if ``make`` says that there is none."""
        code = self._codes.get(key, self)
        if code is self:
            with compiling:
                if key not in self._codes:
                    started = time.perf_counter()
                    self._codes[key] = self._compiled(make())
                    self.compile_s += time.perf_counter() - started
            code = self._codes[key]
        return 0 if code is None else code.address  # type: ignore[union-attr]

    def _compiled(self, made: tuple[Signature, list[Output]] | None) -> Code | None:
        if made is None:
            return None
        signature, outputs = made
        size = len(needed([y.node for y in outputs]))
        if size > _MOST_IN_DERIVATIVE:
            raise Declined(f"its derivative is too large: {size:,} scalar operations")
        try:
            code = compile_function(signature, outputs, self.single)
        except Exception as error:  # an LLVM that this was not written for
            reason = f"{type(error).__name__}: {error}"
            _log.warning("diffsolve: LLVM could not compile a right-hand side: %s", reason)
            raise Declined(f"LLVM could not compile it, {reason}") from error
        for pool in {y.node.pool for y in outputs} - {self.pool}:
            pool.release()
        return code

    # -- the right-hand side and its products ----------------------------------------------------

    def field(self) -> int:
        """``f(t, u, p, out)``."""
        return self._code(
            "field",
            lambda: (FIELD, [Output("out", i, y) for i, y in enumerate(self._outputs)]),
        )

    def vjp(self, active: tuple[bool, ...]) -> int:
        """``vjp(t, u, p, w, u_bar, p_bar)``; of the parameters only the active blocks."""
        return self._code(("vjp", active), lambda: (_VJP, self._vjp_outputs(active)))

    def _products(
        self, active: tuple[bool, ...], w: Sequence[Node]
    ) -> tuple[list[Node], dict[int, Node]]:
        """``J^T w``, and for entries of the parameters those of ``f_p^T w`` that are not zero."""
        pool, wanted = self.pool, self.active_entries(active)
        wrt = [*pool.inputs("u", self.n), *[pool.input("p", i) for i in wanted]]
        found = vjp(self._outputs, w, wrt)
        by_state = [pool.const(0.0) if x is None else x for x in found[: self.n]]
        by_entry = zip(wanted, found[self.n :], strict=True)
        return by_state, {i: x for i, x in by_entry if x is not None}

    def active_entries(self, active: tuple[bool, ...]) -> list[int]:
        """Positions in the flat parameters of the blocks that are differentiated."""
        blocks = zip(self.blocks, active, strict=True)
        return [i for (offset, count), on in blocks if on for i in range(offset, offset + count)]

    def _vjp_outputs(self, active: tuple[bool, ...]) -> list[Output]:
        w = list(self.pool.inputs("w", self.n))
        by_state, by_entry = self._products(active, w)
        outputs = [Output("u_bar", i, x) for i, x in enumerate(by_state)]
        return outputs + [Output("p_bar", i, x, add=True) for i, x in by_entry.items()]

    def backsolve(self, active: tuple[bool, ...]) -> int:
        """Right-hand side of ``[lambda, u, mu]``, backward in time."""
        return self._code(("backsolve", active), lambda: self._adjoint(active, True))

    def interpolating(self, active: tuple[bool, ...]) -> int:
        """Right-hand side of ``[lambda, mu]``; ``u`` is read behind the parameters."""
        return self._code(("interpolating", active), lambda: self._adjoint(active, False))

    def _adjoint(
        self, active: tuple[bool, ...], with_state: bool
    ) -> tuple[Signature, list[Output]]:
        pool, n = self.pool, self.n
        bars = list(pool.inputs("w", n))
        by_state, by_entry = self._products(active, bars)
        values = [-x for x in by_state]
        if with_state:
            values += self._outputs
        zero = pool.const(0.0)
        values += [-by_entry[i] if i in by_entry else zero for i in self.active_entries(active)]
        # the reverse state is what f calls u
        target = Pool(pool.dtype, pool.most)
        table = {("w", i): target.input("u", i) for i in range(n)}
        for i in range(n):
            place = ("u", n + i) if with_state else ("p", self.n_params + i)
            table["u", i] = target.input(*place)
        found = substitute(values, table, target)
        return FIELD, [Output("out", i, x) for i, x in enumerate(found)]

    # -- for implicit methods --------------------------------------------------------------------

    def jacobian(self) -> Jacobian:
        """``jac(t, u, p, out)`` of the right-hand side."""

        def make() -> Jacobian:
            pool = self.pool
            entries = jacobian(self._outputs, list(pool.inputs("u", self.n)))
            return Jacobian(pool, entries, time_derivative(self._outputs, pool.input("t", 0)))

        return self._jacobian("jacobian", make)

    def _jacobian(self, key: Any, make: Callable[[], Jacobian]) -> Jacobian:
        found = self._jacobians.get(key)
        if found is None:
            with compiling:
                found = self._jacobians.get(key)
                if found is None:
                    found = made = make()
                    made.place_at(self._code(key, lambda: (FIELD, made.outputs())))
                    self._jacobians[key] = made
        return found

    def jvp(self) -> int:
        """``jvp(t, u, p, v, out)``."""
        return self._code("jvp", lambda: (_JVP, self._jvp_outputs()))

    def _jvp_outputs(self) -> list[Output]:
        pool = self.pool
        pairs = zip(pool.inputs("u", self.n), pool.inputs("v", self.n), strict=True)
        found = jvp(self._outputs, dict(pairs))
        return [Output("out", i, pool.const(0.0) if x is None else x) for i, x in enumerate(found)]

    def jacobian_vjp(self, active: tuple[bool, ...]) -> int:
        """``jac_vjp(t, u, p, jac_bar, u_bar, p_bar)``, which adds to both."""
        return self._code(
            ("jacobian_vjp", active), lambda: (_VJP, self._jacobian_vjp_outputs(active))
        )

    def _jacobian_vjp_outputs(self, active: tuple[bool, ...]) -> list[Output]:
        pool, n = self.pool, self.n
        values = self.jacobian().nodes
        places = [("u", i) for i in range(n)] + [("p", i) for i in self.active_entries(active)]
        wrt = [pool.input(*place) for place in places]
        found = zip(places, vjp(values, list(pool.inputs("w", len(values))), wrt), strict=True)
        return [Output(f"{block}_bar", i, x, add=True) for (block, i), x in found if x is not None]

    def adjoint_jacobian(self, active: tuple[bool, ...], with_state: bool) -> Jacobian:
        """Jacobian of ``backsolve`` (``with_state``) or ``interpolating``.

        The time derivative of the latter goes through the forward solution, too, whose slope is
        read behind it.
        """

        def make() -> Jacobian:
            _, outputs = self._adjoint(active, with_state)
            nodes = [x.node for x in outputs]
            pool, n = nodes[0].pool, self.n
            tangents: dict[Node, Any] = {pool.input("t", 0): 1.0}
            if not with_state:
                path = [pool.input("p", self.n_params + i) for i in range(2 * n)]
                tangents |= dict(zip(path[:n], path[n:], strict=True))
            entries = jacobian(nodes, list(pool.inputs("u", len(nodes))))
            return Jacobian(pool, entries, jvp(nodes, tangents))

        return self._jacobian(("adjoint_jacobian", active, with_state), make)

    # -- whole steps -----------------------------------------------------------------------------

    def step(self, stages: Stages) -> int:
        """A step of this method as one function, or 0 where that would be too long."""
        return self._code(("step", stages), lambda: self._step_function(stages))

    def step_vjp(self, stages: Stages, active: tuple[bool, ...]) -> int:
        """Its reverse, or 0."""
        return self._code(
            ("step_vjp", stages, active), lambda: self._step_vjp_function(stages, active)
        )

    def rosenbrock_step(self, stages: RosenbrockStages) -> int:
        """A step of a Rosenbrock method as one function, or 0 where that would be too long."""
        return self._code(("rosenbrock", stages), lambda: self._rosenbrock_function(stages))

    def _rosenbrock_function(
        self, stages: RosenbrockStages
    ) -> tuple[Signature, list[Output]] | None:
        try:
            made = RosenbrockStep(self._outputs, self.jacobian(), stages)
            return _ROSENBROCK, made.outputs()
        except TooLong:
            return None

    def rosenbrock_vjp(self, stages: RosenbrockStages, active: tuple[bool, ...]) -> int:
        """Its reverse, or 0."""
        return self._code(
            ("rosenbrock_vjp", stages, active),
            lambda: self._rosenbrock_vjp_function(stages, active),
        )

    def _rosenbrock_vjp_function(
        self, stages: RosenbrockStages, active: tuple[bool, ...]
    ) -> tuple[Signature, list[Output]] | None:
        try:
            made = RosenbrockStep(self._outputs, self.jacobian(), stages)
            return _ROSENBROCK_VJP, made.reverse(self.active_entries(active))
        except TooLong:
            return None

    def _fits(self, stages: Stages) -> bool:
        return (self.size + stages.n * self.n) * stages.n <= _MOST_IN_STEP

    def _step_nodes(self, stages: Stages) -> tuple[Pool, dict[str, list[Node]]]:
        """Rows of results of a step: the stages from the second on, and what ``_STEP`` lists."""
        pool, n = Pool(self.pool.dtype, 20 * _MOST_IN_STEP), self.n
        h = pool.input("h", 0)
        u = list(pool.inputs("u", n))
        k = [list(pool.inputs("k", n))]

        def combined(weights: np.ndarray) -> list[Node]:
            used = [(float(w), row) for w, row in zip(weights, k, strict=False) if w != 0]
            return [pool.sum([w * row[m] for w, row in used]) for m in range(n)]

        g, stiff = u, u
        for i in range(1, stages.n):
            # the newest derivative comes last, alone: the rest of the sum need not wait for it
            g = [x + h * y for x, y in zip(u, combined(stages.a[i, : i - 1]), strict=True)]
            if stages.a[i, i - 1] != 0:
                newest = h * float(stages.a[i, i - 1])
                g = [x + newest * y for x, y in zip(g, k[-1], strict=True)]
            if i == stiffness_stage(stages):
                stiff = g
            table = {("u", m): g[m] for m in range(n)}
            table["t", 0] = pool.input("times", i)
            k.append(substitute(self._outputs, table, pool))
        results = {"new": g, "stiff": stiff, "k": [x for row in k[1:] for x in row]}
        for name, weights in (("error", stages.b_error), ("low", stages.b_error_low)):
            if weights is not None:
                results[name] = [h * x for x in combined(weights)]
        return pool, results

    def _step_function(self, stages: Stages) -> tuple[Signature, list[Output]] | None:
        if not self._fits(stages):
            return None
        _, results = self._step_nodes(stages)
        shift = {"k": self.n}
        return _STEP, [
            Output(block, i + shift.get(block, 0), x)
            for block, row in results.items()
            for i, x in enumerate(row)
        ]

    def _step_vjp_function(
        self, stages: Stages, active: tuple[bool, ...]
    ) -> tuple[Signature, list[Output]] | None:
        if not self._fits(stages):
            return None
        pool, results = self._step_nodes(stages)
        n = self.n
        outputs, bars = [], []
        for block, row in results.items():
            shift = n if block == "k" else 0
            outputs += row
            bars += [pool.input(f"{block}_bar", i + shift) for i in range(len(row))]
        places: list[tuple[str, str, Sequence[int]]] = [
            ("bar", "u", range(n)),
            ("k_bar", "k", range(n)),
            ("p_bar", "p", self.active_entries(active)),
        ]
        wrt = [pool.input(block, i) for _, block, entries in places for i in entries]
        targets = [(bar, i) for bar, _, entries in places for i in entries]
        found = zip(targets, vjp(outputs, bars, wrt), strict=True)
        return _STEP_VJP, [
            Output(block, i, x, add=True) for (block, i), x in found if x is not None
        ]
