"""A right-hand side as machine code, number by number, with every function that kernels call."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffsolve.engines.native.codegen.llvm import FIELD, Code, Output, Signature, compile_function
from diffsolve.engines.native.graph.derivative import jacobian, jvp, vjp
from diffsolve.engines.native.graph.expression import Node, Pool, needed, substitute
from diffsolve.engines.native.locks import compiling
from diffsolve.engines.native.programs.base import Program
from diffsolve.engines.native.programs.explicit_rk import STEP, STEP_VJP, ExplicitStep
from diffsolve.engines.native.programs.rosenbrock import RosenbrockStep, TooLong
from diffsolve.solvers.explicit_rk.tableau import Stages
from diffsolve.solvers.rosenbrock.tableau import RosenbrockStages

_VJP = Signature(("t",), ("u", "p", "w", "u_bar", "p_bar"))
_JVP = Signature(("t",), ("u", "p", "v", "out"))
_ROSENBROCK = Signature(("h",), ("times", "u", "k", "p", "new", "jac", "error", "check"))
_ROSENBROCK_VJP = Signature(("h",), ("times", "u", "k", "p", "k_bar", "new_bar", "bar", "p_bar"))
#: Arguments and results of a function that is to be compiled; None: it would be too long.
Source = tuple[Signature, list[Output]] | None


class SparseJacobian:
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


class ScalarProgram(Program):
    """The functions of a right-hand side of ``n`` numbers.

    ``address`` knows, for parameters in the blocks ``active`` that are differentiated:

    ==============================  ================================================================
    ``"field"``                     ``f(t, u, p, out)``
    ``"vjp", active``               ``vjp(t, u, p, w, u_bar, p_bar)``; it adds to ``p_bar``
    ``"jvp"``                       ``jvp(t, u, p, v, out)``
    ``"jacobian_vjp", active``      ``jac_vjp(t, u, p, jac_bar, u_bar, p_bar)``, which adds to both
    ``"backsolve", active``         right-hand side of ``[lambda, u, mu]``, backward in time
    ``"interpolating", active``     that of ``[lambda, mu]``; ``u`` is read behind the parameters
    ``"step", stages``              a whole step of an explicit method, see ``explicit_rk.STEP``
    ``"step_vjp", stages, active``  its reverse
    ``"rosenbrock_step", stages``   a whole step of a Rosenbrock method
    ``"rosenbrock_vjp", stages, active``  its reverse
    ==============================  ================================================================
    """

    def __init__(
        self, pool: Pool, outputs: list[Node], blocks: Sequence[tuple[int, int]], is_float32: bool
    ):
        super().__init__(pool, outputs, blocks, is_float32)
        self.n = len(outputs)
        self.latest_template: tuple[Any, Any, Any] | None = None  # settings, method, template
        self._outputs = outputs
        self._jacobians: dict[Any, SparseJacobian] = {}
        weakref.finalize(self, pool.release).atexit = False

    def operations(self, source: tuple[Signature, list[Output]]) -> int:
        return len(needed([y.node for y in source[1]]))

    def translate(self, source: tuple[Signature, list[Output]]) -> Code:
        signature, outputs = source
        code = compile_function(signature, outputs, self.is_float32)
        for pool in {y.node.pool for y in outputs} - {self.pool}:
            pool.release()
        return code

    # -- the right-hand side and its products ----------------------------------------------------

    def _field(self) -> Source:
        return FIELD, [Output("out", i, y) for i, y in enumerate(self._outputs)]

    def _products(
        self, active: tuple[bool, ...], w: Sequence[Node]
    ) -> tuple[list[Node], dict[int, Node]]:
        """``J^T w``, and for entries of the parameters those of ``f_p^T w`` that are not zero."""
        pool, entries = self.pool, self.active_entries(active)
        wrt = [*pool.inputs("u", self.n), *[pool.input("p", i) for i in entries]]
        bars = vjp(self._outputs, w, wrt)
        by_state = [pool.const(0.0) if x is None else x for x in bars[: self.n]]
        by_entry = zip(entries, bars[self.n :], strict=True)
        return by_state, {i: x for i, x in by_entry if x is not None}

    def _vjp(self, active: tuple[bool, ...]) -> Source:
        by_state, by_entry = self._products(active, list(self.pool.inputs("w", self.n)))
        outputs = [Output("u_bar", i, x) for i, x in enumerate(by_state)]
        return _VJP, outputs + [Output("p_bar", i, x, add=True) for i, x in by_entry.items()]

    def _jvp(self) -> Source:
        pool = self.pool
        pairs = zip(pool.inputs("u", self.n), pool.inputs("v", self.n), strict=True)
        rates = jvp(self._outputs, dict(pairs))
        zero = pool.const(0.0)
        return _JVP, [Output("out", i, zero if x is None else x) for i, x in enumerate(rates)]

    # -- adjoint equations -----------------------------------------------------------------------

    def _backsolve(self, active: tuple[bool, ...]) -> Source:
        return FIELD, self._adjoint(active, True)

    def _interpolating(self, active: tuple[bool, ...]) -> Source:
        return FIELD, self._adjoint(active, False)

    def _adjoint(self, active: tuple[bool, ...], with_state: bool) -> list[Output]:
        pool, n = self.pool, self.n
        by_state, by_entry = self._products(active, list(pool.inputs("w", n)))
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
        renamed = substitute(values, table, target)
        return [Output("out", i, x) for i, x in enumerate(renamed)]

    # -- Jacobians, for implicit methods ---------------------------------------------------------

    def jacobian(self) -> SparseJacobian:
        """That of the right-hand side."""

        def make() -> SparseJacobian:
            pool = self.pool
            entries = jacobian(self._outputs, list(pool.inputs("u", self.n)))
            slopes = jvp(self._outputs, {pool.input("t", 0): 1.0})
            return SparseJacobian(pool, entries, slopes)

        return self._jacobian(("jacobian",), make)

    def adjoint_jacobian(self, active: tuple[bool, ...], with_state: bool) -> SparseJacobian:
        """That of ``"backsolve"`` (``with_state``) or ``"interpolating"``.

        The time derivative of the latter goes through the forward solution, too, whose slope is
        read behind it.
        """

        def make() -> SparseJacobian:
            nodes = [x.node for x in self._adjoint(active, with_state)]
            pool, n = nodes[0].pool, self.n
            tangents: dict[Node, Any] = {pool.input("t", 0): 1.0}
            if not with_state:
                path = [pool.input("p", self.n_params + i) for i in range(2 * n)]
                tangents |= dict(zip(path[:n], path[n:], strict=True))
            entries = jacobian(nodes, list(pool.inputs("u", len(nodes))))
            return SparseJacobian(pool, entries, jvp(nodes, tangents))

        return self._jacobian(("adjoint_jacobian", active, with_state), make)

    def _jacobian(self, key: Any, make: Callable[[], SparseJacobian]) -> SparseJacobian:
        known = self._jacobians.get(key)
        if known is None:
            with compiling:
                known = self._jacobians.get(key)
                if known is None:
                    known = make()
                    known.place_at(self.address("jacobian", known))
                    self._jacobians[key] = known
        return known

    def _values(self, known: SparseJacobian) -> Source:
        return FIELD, known.outputs()

    def _jacobian_vjp(self, active: tuple[bool, ...]) -> Source:
        pool, n = self.pool, self.n
        values = self.jacobian().nodes
        places = [("u", i) for i in range(n)] + [("p", i) for i in self.active_entries(active)]
        wrt = [pool.input(*place) for place in places]
        bars = zip(places, vjp(values, list(pool.inputs("w", len(values))), wrt), strict=True)
        return _VJP, [
            Output(f"{block}_bar", i, x, add=True) for (block, i), x in bars if x is not None
        ]

    # -- whole steps -----------------------------------------------------------------------------

    def _step(self, stages: Stages) -> Source:
        if not ExplicitStep.fits(self.size, self.n, stages):
            return None
        return STEP, ExplicitStep(self._outputs, stages).outputs()

    def _step_vjp(self, stages: Stages, active: tuple[bool, ...]) -> Source:
        if not ExplicitStep.fits(self.size, self.n, stages):
            return None
        step = ExplicitStep(self._outputs, stages)
        return STEP_VJP, step.reverse(self.active_entries(active))

    def _rosenbrock_step(self, stages: RosenbrockStages) -> Source:
        try:
            step = RosenbrockStep(self._outputs, self.jacobian(), stages)
            return _ROSENBROCK, step.outputs()
        except TooLong:
            return None

    def _rosenbrock_vjp(self, stages: RosenbrockStages, active: tuple[bool, ...]) -> Source:
        try:
            step = RosenbrockStep(self._outputs, self.jacobian(), stages)
            return _ROSENBROCK_VJP, step.reverse(self.active_entries(active))
        except TooLong:
            return None

    makers = {  # noqa: RUF012
        "field": _field,
        "vjp": _vjp,
        "jvp": _jvp,
        "backsolve": _backsolve,
        "interpolating": _interpolating,
        "jacobian": _values,
        "jacobian_vjp": _jacobian_vjp,
        "step": _step,
        "step_vjp": _step_vjp,
        "rosenbrock_step": _rosenbrock_step,
        "rosenbrock_vjp": _rosenbrock_vjp,
    }
