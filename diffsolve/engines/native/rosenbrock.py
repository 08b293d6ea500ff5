"""A whole step of a Rosenbrock method as expressions, for systems that are small or sparse.

The matrix ``M = I / gamma - h J`` is eliminated symbolically, without exchanges of rows and in an
order that keeps it sparse. That is not stable for every matrix, so the function also tells by how
much its pivots cancelled: where that is much, the kernel takes the step again with factors that
exchange rows. The units of the state do not enter into that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffsolve.engines.native.derivative import vjp
from diffsolve.engines.native.expression import Node, Pool, needed, substitute
from diffsolve.engines.native.llvm import Output
from diffsolve.solvers.rosenbrock.tableau import RosenbrockStages

#: Operations of a step, and of its reverse, up to which they are made one function.
_MOST = 8_000
_MOST_IN_REVERSE = 16_000
Entries = dict[tuple[int, int], Node]


class TooLong(Exception):
    """The step has more operations than are worth compiling as one function."""


class SymbolicLU:
    """Factors of a sparse matrix of expressions, all pivots from the diagonal.

    Parameters
    ----------
    matrix, n
        Its entries, and how many rows it has.
    terms
        Sizes of what the entries of the diagonal are sums of.

    Attributes
    ----------
    cancellation
        Largest sum of the sizes of a pivot's terms, in units of the pivot.
    """

    def __init__(self, matrix: Entries, n: int, terms: Sequence[Node]):
        self.n, self._terms = n, list(terms)
        self.cancellation: Node = terms[0] * 0.0
        left = dict(matrix)
        self.order: list[int] = []
        self.lower: list[list[tuple[int, Node]]] = []  # rows below each pivot, and their factors
        self.upper: list[list[tuple[int, Node]]] = []  # columns behind each pivot
        self.inverse: list[Node] = []
        while len(self.order) < n:
            self._eliminate(left, self._next(left))

    def _next(self, left: Entries) -> int:
        """The pivot that fills in the least (Markowitz)."""
        rows, columns = np.zeros(self.n), np.zeros(self.n)
        for i, j in left:
            rows[i] += 1
            columns[j] += 1
        open_ones = [i for i in range(self.n) if i not in self.order]
        return min(open_ones, key=lambda i: (rows[i] - 1) * (columns[i] - 1))

    def _eliminate(self, left: Entries, k: int) -> None:
        inverse = 1.0 / left.pop((k, k))
        pool = inverse.pool
        lost = self._terms[k] * pool.unary("abs", inverse)
        self.cancellation = pool.binary("max", self.cancellation, lost)
        row = [(j, left.pop((i, j))) for i, j in list(left) if i == k]
        column = [(i, left.pop((i, j)) * inverse) for i, j in list(left) if j == k]
        for i, factor in column:
            for j, entry in row:
                product = factor * entry
                if i == j:
                    self._terms[i] = self._terms[i] + pool.unary("abs", product)
                left[i, j] = left[i, j] - product if (i, j) in left else -product
        self.order.append(k)
        self.inverse.append(inverse)
        self.lower.append(column)
        self.upper.append(row)

    def solve(self, b: Sequence[Node]) -> list[Node]:
        x = list(b)
        for k, column in zip(self.order, self.lower, strict=True):
            for i, factor in column:
                x[i] = x[i] - factor * x[k]
        backward = zip(self.order, self.upper, self.inverse, strict=True)
        for k, row, inverse in reversed(list(backward)):
            for j, entry in row:
                x[k] = x[k] - entry * x[j]
            x[k] = x[k] * inverse
        return x


class RosenbrockStep:
    """Expressions of a step.

    Parameters
    ----------
    outputs
        Those of the right-hand side.
    jacobian
        Its Jacobian and time derivative, a ``Jacobian`` of ``compiled.py``.
    stages
        The method.

    Raises
    ------
    TooLong
        If there are too many.
    """

    def __init__(self, outputs: Sequence[Node], jacobian: Any, stages: RosenbrockStages):
        self.n, self.stages = len(outputs), stages
        size = len(needed([*outputs, *jacobian.nodes]))
        if (size + 2 * stages.n * self.n) * stages.n > 4 * _MOST:
            raise TooLong
        self.pool = pool = Pool(outputs[0].pool.dtype, 20 * _MOST)
        self.h = h = pool.input("h", 0)
        self.u = list(pool.inputs("u", self.n))
        self._f = outputs
        table = {("u", i): x for i, x in enumerate(self.u)} | {("t", 0): pool.input("times", 0)}
        found = substitute(jacobian.nodes, table, pool)
        self.entries, slopes = found[: jacobian.entries], found[jacobian.entries :]
        unit = pool.const(1.0 / stages.gamma)
        matrix: Entries = {(i, i): unit for i in range(self.n)}
        terms = [unit] * self.n
        places = zip(jacobian.rows.tolist(), jacobian.columns.tolist(), strict=True)
        for place, entry in zip(places, self.entries, strict=True):
            term = h * entry
            if place[0] == place[1]:
                terms[place[0]] = terms[place[0]] + pool.unary("abs", term)
            matrix[place] = matrix[place] - term if place in matrix else -term
        lu = SymbolicLU(matrix, self.n, terms)
        self.check = lu.cancellation
        k = self.k = [list(pool.inputs("k", self.n))]
        for i in range(1, stages.n - 1):
            right = k[0] if i == 1 else self._evaluate(i)
            right = [pool.sum([x, *y]) for x, y in zip(right, self._coupled(i), strict=True)]
            if slopes and stages.d[i]:
                factor = h * float(stages.d[i])
                right = [x + factor * y for x, y in zip(right, slopes, strict=True)]
            k.append(lu.solve(right))
            if len(needed([x for row in k for x in row])) > _MOST:
                raise TooLong
        self.new = self._state(stages.n - 1)
        k.append(self._at(stages.n - 1, self.new))

    def _coupled(self, i: int) -> list[list[Node]]:
        row = self.stages.coupling[i]
        used = [(float(c), self.k[j]) for j, c in enumerate(row[:i]) if c]
        return [[c * values[m] for c, values in used] for m in range(self.n)]

    def _state(self, i: int) -> list[Node]:
        used = [(float(a), self.k[j]) for j, a in enumerate(self.stages.a[i, :i]) if a]
        sums = (self.pool.sum([a * values[m] for a, values in used]) for m in range(self.n))
        return [x + self.h * y for x, y in zip(self.u, sums, strict=True)]

    def _at(self, i: int, g: Sequence[Node]) -> list[Node]:
        table = {("u", m): x for m, x in enumerate(g)} | {("t", 0): self.pool.input("times", i)}
        return substitute(self._f, table, self.pool)

    def _evaluate(self, i: int) -> list[Node]:
        return self._at(i, self._state(i))

    def outputs(self) -> list[Output]:
        """The stages, the new state, the entries of the Jacobian, the error and the check."""
        flat = [x for row in self.k[1:] for x in row]
        found = [Output("k", self.n + i, x) for i, x in enumerate(flat)]
        found += [Output("new", i, x) for i, x in enumerate(self.new)]
        found += [Output("jac", i, x) for i, x in enumerate(self.entries)]
        if self.stages.b_error is not None:
            used = [(float(b), self.k[j]) for j, b in enumerate(self.stages.b_error) if b]
            for m in range(self.n):
                total = self.pool.sum([b * values[m] for b, values in used])
                found.append(Output("error", m, self.h * total))
        return [*found, Output("check", 0, self.check)]

    def reverse(self, entries: Sequence[int]) -> list[Output]:
        """Cotangents of the stages and of the new state, pulled back to the start of the step.

        Added to: ``bar`` of the state, row 0 of ``k_bar``, and ``p_bar`` at ``entries``.
        """
        pool, n = self.pool, self.n
        flat = [x for row in self.k[1:] for x in row]
        bars = [pool.input("k_bar", n + i) for i in range(len(flat))]
        bars += [pool.input("new_bar", i) for i in range(n)]
        places = [("u", "bar", i) for i in range(n)] + [("k", "k_bar", i) for i in range(n)]
        places += [("p", "p_bar", i) for i in entries]
        wrt = [pool.input(block, i) for block, _, i in places]
        found = vjp([*flat, *self.new], bars, wrt)
        if len(needed([x for x in found if x is not None])) > _MOST_IN_REVERSE:
            raise TooLong
        pairs = zip(places, found, strict=True)
        return [Output(bar, i, x, add=True) for (_, bar, i), x in pairs if x is not None]
