"""A whole step of an explicit Runge-Kutta method as one function, and its reverse."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffsolve.engines.native.codegen.llvm import Output, Signature
from diffsolve.engines.native.graph.derivative import vjp
from diffsolve.engines.native.graph.expression import Node, Pool, substitute
from diffsolve.solvers.explicit_rk.step import stiffness_stage
from diffsolve.solvers.explicit_rk.tableau import Stages

STEP = Signature(("h",), ("times", "u", "k", "p", "new", "stiff", "error", "low"))
STEP_VJP = Signature(
    ("h",),
    (
        *("times", "u", "k", "p"),
        *("k_bar", "new_bar", "stiff_bar", "error_bar", "low_bar"),
        *("bar", "p_bar"),
    ),
)
#: A step is one function where it has no more operations than this.
MOST_IN_STEP = 3_000


class ExplicitStep:
    """Expressions of a step.

    Parameters
    ----------
    outputs
        Those of the right-hand side.
    stages
        Of the method.
    """

    def __init__(self, outputs: Sequence[Node], stages: Stages):
        self.n = n = len(outputs)
        pool = self.pool = Pool(outputs[0].pool.dtype, 20 * MOST_IN_STEP)
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
            k.append(substitute(outputs, table, pool))
        #: Rows of results: the stages from the second on, and what ``STEP`` lists.
        self.results = {"new": g, "stiff": stiff, "k": [x for row in k[1:] for x in row]}
        for name, weights in (("error", stages.b_error), ("low", stages.b_error_low)):
            if weights is not None:
                self.results[name] = [h * x for x in combined(weights)]

    @staticmethod
    def fits(size: int, n: int, stages: Stages) -> bool:
        """Whether the step of a right-hand side of ``size`` operations is short enough."""
        return (size + stages.n * n) * stages.n <= MOST_IN_STEP

    def outputs(self) -> list[Output]:
        """What ``STEP`` writes."""
        return [
            Output(block, i + (self.n if block == "k" else 0), x)
            for block, row in self.results.items()
            for i, x in enumerate(row)
        ]

    def reverse(self, entries: Sequence[int]) -> list[Output]:
        """What ``STEP_VJP`` adds, of the parameters for those ``entries``."""
        pool, n = self.pool, self.n
        outputs, bars = [], []
        for block, row in self.results.items():
            shift = n if block == "k" else 0
            outputs += row
            bars += [pool.input(f"{block}_bar", i + shift) for i in range(len(row))]
        places: list[tuple[str, str, Sequence[int]]] = [
            ("bar", "u", range(n)),
            ("k_bar", "k", range(n)),
            ("p_bar", "p", entries),
        ]
        wrt = [pool.input(block, i) for _, block, indices in places for i in indices]
        targets = [(bar, i) for bar, _, indices in places for i in indices]
        cotangents = zip(targets, vjp(outputs, bars, wrt), strict=True)
        return [Output(block, i, x, add=True) for (block, i), x in cotangents if x is not None]
