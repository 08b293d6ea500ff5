"""The compiled functions of an SDE: drift, diffusion, steps and their reverse, over many rows.

Drift and diffusion are routines of ``rows.py``, and so are their products with the Jacobian; steps
(``stochastic_step.py``) call them.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from diffsolve.engines.native.codegen.llvm import Code, Output, lanes_of
from diffsolve.engines.native.codegen.row_functions import TooWide, compile_rows
from diffsolve.engines.native.codegen.rows import Array, Each, Routine
from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.graph.derivative import vjp
from diffsolve.engines.native.graph.expression import Node, Pool, needed
from diffsolve.engines.native.locks import compiling
from diffsolve.engines.native.programs.row_steps import (
    MOST_IN_DERIVATIVE,
    Step,
    StepMethod,
    reverse_routine,
    step_routine,
)

_log = logging.getLogger("diffsolve")
#: Bytes of the stack that vectors of wide rows may take; beyond it fewer rows go together.
_STACK = 800_000
_LOCALS = 40  # arrays of vectors in a step, at most
Nodes = list[Node]


def _reads_time(nodes: Nodes) -> bool:
    return any(x.op == "input" and x.data[0] == "t" for x in needed(nodes))


def _release(pool: Pool, steps: dict[Any, Step]) -> None:
    pool.release()
    for step in steps.values():
        step.pool.release()


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

    Attributes
    ----------
    outputs
        ``"drift"`` and ``"diffusion"``.
    reads_time
        Whether the time is among their inputs.
    d, width
        Numbers in a row of the state, and of what the diffusion gives.
    lanes
        Rows that are computed at a time.
    size
        Operations of both.
    compile_s
        Seconds spent on compiling so far.
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
        while self.lanes > 1 and 8 * _LOCALS * self.lanes * max(self.d, self.width) > _STACK:
            self.lanes //= 2
        self.compile_s = 0.0
        self.size = len(needed([*drift, *diffusion]))
        self.templates: dict[Any, Any] = {}  # of solves, kept by the engine
        self.outputs: dict[str, Nodes] = {"drift": drift, "diffusion": diffusion}
        self.reads_time = {kind: _reads_time(nodes) for kind, nodes in self.outputs.items()}
        self._codes: dict[Any, Code] = {}
        self._routines: dict[Any, Routine] = {}
        self._steps: dict[Any, Step] = {}
        pool.most = 10 * MOST_IN_DERIVATIVE
        weakref.finalize(self, _release, pool, self._steps).atexit = False

    # -- code --------------------------------------------------------------------------------------

    def _code(self, key: Any, make: Callable[[], Routine]) -> int:
        code = self._codes.get(key)
        if code is None:
            with compiling:
                code = self._codes.get(key)
                if code is None:
                    started = time.perf_counter()
                    code = self._codes[key] = self._compiled(make())
                    self.compile_s += time.perf_counter() - started
        return code.address

    def _compiled(self, routine: Routine) -> Code:
        size = sum(map(_operations, routine.routines()))
        if size > MOST_IN_DERIVATIVE:
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
        return self._code("drift", lambda: self.routine("drift"))

    def diffusion(self) -> int:
        """``g(t, u, p, out)``; rows of ``width`` numbers."""
        return self._code("diffusion", lambda: self.routine("diffusion"))

    def diffusion_vjp(self, active: tuple[bool, ...]) -> int:
        """``g_vjp(t, u, p, w, u_bar, p_bar)``; ``p_bar`` in lanes, of the active entries."""
        key = "diffusion_vjp", active
        return self._code(key, lambda: self.vjp_routine("diffusion", active))

    def routine(self, kind: str) -> Routine:
        """``"drift"`` or ``"diffusion"`` of a vector of rows."""
        found = self._routines.get(kind)
        if found is None:
            outputs = self.outputs[kind]
            arrays = (
                Array("u", "in", self.d),
                Array("p", "shared"),
                Array("out", "out", len(outputs)),
            )
            written: list[Any] = [Output("out", i, y) for i, y in enumerate(outputs)]
            found = self._routines[kind] = Routine(kind, ("t",), arrays, written)
        return found

    def vjp_routine(self, kind: str, active: tuple[bool, ...]) -> Routine:
        """Its product with the Jacobian, as ``diffusion_vjp``."""
        key = kind, active
        found = self._routines.get(key)
        if found is None:
            outputs, pool = self.outputs[kind], self.pool
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
            found = Step(self, method.needs_area)
            method.write(found)
            self._steps[method] = found
        return found

    def counts(self, method: StepMethod) -> tuple[int, int]:
        """Evaluations of drift and diffusion in a step."""
        step = self.made(method)
        kinds = [e.kind for e in step.evaluations]
        return kinds.count("drift"), kinds.count("diffusion") + step.spared

    def step(self, method: StepMethod) -> int:
        """``step(h, times, u, W, H, p, new, error, sums)``; see ``step_routine``."""
        return self._code(("step", method), lambda: step_routine(self, self.made(method)))

    def step_vjp(self, method: StepMethod, active: tuple[bool, ...], estimates: bool) -> int:
        """Reverse of ``step``; see ``reverse_routine``."""
        key = "step_vjp", method, active, estimates
        return self._code(key, lambda: reverse_routine(self, self.made(method), active, estimates))


def _operations(routine: Routine) -> int:
    outputs = [x for x in routine.statements if isinstance(x, Output)]
    for x in routine.statements:
        outputs += x.outputs if isinstance(x, Each) else []
    return len(needed([x.node for x in outputs]))
