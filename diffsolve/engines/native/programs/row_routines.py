"""Drift and diffusion of an SDE, and their products with a Jacobian, for a vector of rows.

All are routines of ``codegen/rows.py``, which steps (``row_steps.py``) call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffsolve.engines.native.codegen.llvm import Output
from diffsolve.engines.native.codegen.rows import Array, Routine
from diffsolve.engines.native.graph.derivative import vjp
from diffsolve.engines.native.graph.expression import Node, Pool, needed

Nodes = list[Node]


def _reads_time(nodes: Nodes) -> bool:
    return any(x.op == "input" and x.data[0] == "t" for x in needed(nodes))


class RowRoutines:
    """The routines of one SDE.

    Parameters
    ----------
    pool, drift, diffusion
        What they compute for one row, of inputs ``("t", 0)``, ``("u", i)`` and ``("p", j)``.
    m
        Brownian motions of a row.
    is_diagonal
        Whether the diffusion has the shape of the state, and a Brownian motion for each entry.
    active_entries
        Positions in the flat parameters of the blocks that are differentiated.

    Attributes
    ----------
    outputs
        ``"drift"`` and ``"diffusion"``.
    reads_time
        Whether the time is among their inputs.
    d, width
        Numbers in a row of the state, and of what the diffusion gives.
    """

    def __init__(
        self,
        pool: Pool,
        drift: Nodes,
        diffusion: Nodes,
        m: int,
        is_diagonal: bool,
        active_entries: Callable[[tuple[bool, ...]], Sequence[int]],
    ):
        self.pool, self.m, self.is_diagonal = pool, m, is_diagonal
        self.d, self.width = len(drift), len(diffusion)
        self.outputs: dict[str, Nodes] = {"drift": drift, "diffusion": diffusion}
        self.reads_time = {kind: _reads_time(nodes) for kind, nodes in self.outputs.items()}
        self.active_entries = active_entries
        self._routines: dict[Any, Routine] = {}

    def evaluation(self, kind: str) -> Routine:
        """``"drift"`` or ``"diffusion"`` of a vector of rows: ``(t, u, p, out)``."""
        routine = self._routines.get(kind)
        if routine is None:
            outputs = self.outputs[kind]
            arrays = (
                Array("u", "in", self.d),
                Array("p", "shared"),
                Array("out", "out", len(outputs)),
            )
            written: list[Any] = [Output("out", i, y) for i, y in enumerate(outputs)]
            routine = self._routines[kind] = Routine(kind, ("t",), arrays, written)
        return routine

    def product(self, kind: str, active: tuple[bool, ...]) -> Routine:
        """The product of a cotangent with its Jacobian: ``(t, u, p, w, u_bar, p_bar)``.

        ``p_bar`` has the active entries only, in lanes.
        """
        routine = self._routines.get((kind, active))
        if routine is None:
            routine = self._routines[kind, active] = self._new_product(kind, active)
        return routine

    def _new_product(self, kind: str, active: tuple[bool, ...]) -> Routine:
        outputs, pool = self.outputs[kind], self.pool
        entries = self.active_entries(active)
        w = list(pool.inputs("w", len(outputs)))
        bars = vjp(outputs, w, [*pool.inputs("u", self.d), *[pool.input("p", i) for i in entries]])
        zero = pool.const(0.0)
        written: list[Any] = [
            Output("u_bar", i, zero if x is None else x) for i, x in enumerate(bars[: self.d])
        ]
        written += [
            Output("p_bar", i, x, add=True) for i, x in enumerate(bars[self.d :]) if x is not None
        ]
        arrays = (
            Array("u", "in", self.d),
            Array("p", "shared"),
            Array("w", "bar", len(outputs)),
            Array("u_bar", "out", self.d),
            Array("p_bar", "lanes", len(entries)),
        )
        return Routine(f"{kind}_vjp", ("t",), arrays, written)
