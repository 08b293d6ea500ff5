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

from diffsolve.engines.native.codegen.llvm import Output
from diffsolve.engines.native.graph.derivative import vjp
from diffsolve.engines.native.graph.expression import Node, Pool, needed, substitute
from diffsolve.solvers.rosenbrock.tableau import RosenbrockStages

#: Operations of a step, and of its reverse, up to which they are made one function.
MOST_IN_STEP = 8_000
MOST_IN_REVERSE = 16_000
Row = list[Node]
Entries = dict[tuple[int, int], Node]
Triangle = list[list[tuple[int, Node]]]


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
        self.lower: Triangle = []  # rows below each pivot, and their factors
        self.upper: Triangle = []  # columns behind each pivot, likewise in its units
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
        self.upper.append([(j, entry * inverse) for j, entry in row])

    def solve(self, b: Sequence[Node]) -> list[Node]:
        return self._substitute(b, self.lower, self.upper)

    def solve_transposed(self, b: Sequence[Node]) -> list[Node]:
        return self._substitute(b, self.upper, self.lower)

    def _substitute(self, b: Sequence[Node], down: Triangle, up: Triangle) -> list[Node]:
        x = list(b)
        for k, column in zip(self.order, down, strict=True):
            for i, factor in column:
                x[i] = x[i] - factor * x[k]
        for k, inverse in zip(self.order, self.inverse, strict=True):
            x[k] = x[k] * inverse
        for k, row in reversed(list(zip(self.order, up, strict=True))):
            for j, factor in sorted(row, key=lambda entry: -self.order.index(entry[0])):
                x[k] = x[k] - factor * x[j]  # the newest value last: the rest need not wait for it
        return x


class RosenbrockStep:
    """Expressions of a step, and of its reverse.

    Parameters
    ----------
    outputs
        Those of the right-hand side.
    jacobian
        Its Jacobian and time derivative, a ``SparseJacobian`` of ``scalar.py``.
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
        if (size + 2 * stages.n * self.n) * stages.n > 4 * MOST_IN_STEP:
            raise TooLong
        self.pool = pool = Pool(outputs[0].pool.dtype, 20 * MOST_IN_STEP)
        self.h = h = pool.input("h", 0)
        self.u = list(pool.inputs("u", self.n))
        self.right = outputs
        table = {("u", i): x for i, x in enumerate(self.u)} | {("t", 0): pool.input("times", 0)}
        nodes = substitute(jacobian.nodes, table, pool)
        self.entries, self.slopes = nodes[: jacobian.entries], nodes[jacobian.entries :]
        self.places = list(zip(jacobian.rows.tolist(), jacobian.columns.tolist(), strict=True))
        unit = pool.const(1.0 / stages.gamma)
        matrix: Entries = {(i, i): unit for i in range(self.n)}
        terms = [unit] * self.n
        for place, entry in zip(self.places, self.entries, strict=True):
            term = h * entry
            if place[0] == place[1]:
                terms[place[0]] = terms[place[0]] + pool.unary("abs", term)
            matrix[place] = matrix[place] - term if place in matrix else -term
        self.lu = SymbolicLU(matrix, self.n, terms)

    def _sums(self, start: Sequence[Node], weights: Any, k: Sequence[Row]) -> Row:
        """``start`` and weighted stages, one by one: only the last has to wait for the newest."""
        total = list(start)
        for weight, row in zip(weights, k, strict=False):
            if weight:
                total = [x + float(weight) * y for x, y in zip(total, row, strict=True)]
        return total

    def state(self, i: int, k: Sequence[Row]) -> Row:
        """What ``f`` is given for row ``i``."""
        *weights, newest = self.stages.a[i, :i]
        sums = self._sums([self.pool.const(0.0)] * self.n, weights, k)
        g = [x + self.h * y if any(weights) else x for x, y in zip(self.u, sums, strict=True)]
        scale = self.h * float(newest)
        return [x + scale * y if newest else x for x, y in zip(g, k[i - 1], strict=True)]

    def at(
        self, i: int, g: Row, nodes: Sequence[Node | None], w: Sequence[Node] = ()
    ) -> list[Node | None]:
        """Expressions of ``u``, ``w`` and the time, with the values of these at row ``i``."""
        table = {("u", m): x for m, x in enumerate(g)} | {("w", m): x for m, x in enumerate(w)}
        table["t", 0] = self.pool.input("times", i)
        renamed = iter(substitute([x for x in nodes if x is not None], table, self.pool))
        return [x if x is None else next(renamed) for x in nodes]

    def field(self, i: int, g: Row) -> Row:
        return [x for x in self.at(i, g, self.right) if x is not None]

    def _right(self, i: int, k: Sequence[Row]) -> Row:
        """The right-hand side of the system of stage ``i``."""
        scale = self.h * float(self.stages.d[i])
        zero = self.pool.const(0.0)
        slopes = [scale * x for x in self.slopes] if self.stages.d[i] else []
        known = self._sums(slopes or [zero] * self.n, self.stages.coupling[i, :i], k)
        f = k[0] if i == 1 else self.field(i, self.state(i, k))
        return [x + y for x, y in zip(f, known, strict=True)]

    def outputs(self) -> list[Output]:
        """The stages, the new state, the Jacobian and its radius, the error and the check."""
        n, last = self.n, self.stages.n - 1
        k = [list(self.pool.inputs("k", n))]
        for i in range(1, last):
            k.append(self.lu.solve(self._right(i, k)))
            if len(needed([x for row in k for x in row])) > MOST_IN_STEP:
                raise TooLong
        new = self.state(last, k)
        k.append(self.field(last, new))
        outputs = [Output("k", n * i + m, k[i][m]) for i in range(1, last + 1) for m in range(n)]
        outputs += [Output("new", i, x) for i, x in enumerate(new)]
        outputs += [Output("jac", i, x) for i, x in enumerate(self.entries)]
        outputs.append(Output("jac", len(self.entries) + len(self.slopes), self._radius()))
        if self.stages.b_error is not None:
            sums = self._sums([self.pool.const(0.0)] * n, self.stages.b_error, k)
            outputs += [Output("error", i, self.h * x) for i, x in enumerate(sums)]
        return [*outputs, Output("check", 0, self.lu.cancellation)]

    def _radius(self) -> Node:
        """``spectral_radius`` of ``kernels/implicit.py``; not finite where that is to be asked."""
        pool = self.pool
        signs = [pool.const(1.0 - 2.0 * (i.bit_count() % 2)) for i in range(self.n)]
        first, _ = self._scaled_image(signs)
        second, peak = self._scaled_image(first)
        third = self._image(second)
        above, below = (pool.sum([x * x for x in row]) for row in (third, first))
        return pool.unary("sqrt", peak * pool.unary("sqrt", above / below))

    def _image(self, x: Sequence[Node]) -> Row:
        terms: list[Row] = [[] for _ in range(self.n)]
        for (row, column), entry in zip(self.places, self.entries, strict=True):
            terms[row].append(entry * x[column])
        return [self.pool.sum(row) for row in terms]

    def _scaled_image(self, x: Sequence[Node]) -> tuple[Row, Node]:
        """The image by the Jacobian in units of its largest magnitude, and that."""
        y = self._image(x)
        peak = self.pool.extreme("largest", [self.pool.unary("abs", z) for z in y])
        scale = 1.0 / peak
        return [z * scale for z in y], peak

    def reverse(self, entries: Sequence[int]) -> list[Output]:
        """Cotangents of the stages and of the new state, pulled back to the start of the step.

        The stages are read from ``k``: they solve their systems, which is all that is
        differentiated of them. Added to: ``bar`` of the state, row 0 of ``k_bar``, and ``p_bar``
        at ``entries``.
        """
        outputs = _Reverse(self, entries).outputs()
        if len(needed([x.node for x in outputs])) > MOST_IN_REVERSE:
            raise TooLong
        return outputs


class _Reverse:
    """Sums of the cotangents of a step, made from its last row to its first."""

    def __init__(self, step: RosenbrockStep, entries: Sequence[int]):
        self.step, self.pool, self.n = step, step.pool, step.n
        self.entries = entries
        n, rows = step.n, step.stages.n
        self.k = [[self.pool.input("k", n * i + m) for m in range(n)] for i in range(rows)]
        self.k_bar = [[self.pool.input("k_bar", n * i + m) for m in range(n)] for i in range(rows)]
        self.k_bar[0] = self._zeros(n)  # what is to be added to it
        self.u_bar, self.p_bar = self._zeros(n), self._zeros(len(entries))
        self.jac_bar, self.slope_bar = self._zeros(len(step.places)), self._zeros(len(step.slopes))
        self.state_bar = list(self.pool.inputs("new_bar", n))
        f, source = step.right, step.right[0].pool
        wrt = [*source.inputs("u", n), *(source.input("p", e) for e in entries)]
        self._products = vjp(f, list(source.inputs("w", n)), wrt)
        if not step.stages.at_end:
            self._through_field(rows - 1, self.k_bar[-1])
        for i in range(rows - 2, 0, -1):
            w = step.lu.solve_transposed(self.k_bar[i])
            self._through_system(i, w)
            if i == step.stages.at_end:  # its f is the last row
                w = [x + y for x, y in zip(w, self.k_bar[-1], strict=True)]
            self._through_field(i, w)
        self._through_jacobian()

    def _zeros(self, count: int) -> Row:
        return [self.pool.const(0.0)] * count

    def _through_system(self, i: int, w: Row) -> None:
        """From what a stage's right-hand side is to get: to its matrix, and the stages before."""
        for e, (row, column) in enumerate(self.step.places):
            self.jac_bar[e] = self.jac_bar[e] + w[row] * self.k[i][column]
        if self.step.stages.d[i]:
            _add(self.slope_bar, w, float(self.step.stages.d[i]))
        for j, c in enumerate(self.step.stages.coupling[i, :i]):
            if c:
                _add(self.k_bar[j], w, float(c))

    def _through_field(self, i: int, w: Row) -> None:
        """Through ``f`` at the state of row ``i``, and from there to the stages before."""
        if i == 1:  # it is row 0
            _add(self.k_bar[0], w)
            _add(self.u_bar, self.state_bar)
            return
        bars = self.step.at(i, self.step.state(i, self.k), self._products, w)
        _add(self.state_bar, bars[: self.n])
        _add(self.p_bar, bars[self.n :])
        a = self.step.stages.a
        # where the state before is a part of this one, what both give to the stages is given once
        shared = np.array_equal(a[i, : i - 1], a[i - 1, : i - 1])
        for j in range(i - 1 if shared else 0, i):
            if a[i, j]:
                _add(self.k_bar[j], self.state_bar, self.step.h * float(a[i, j]))
        if not shared:
            _add(self.u_bar, self.state_bar)
            self.state_bar = self._zeros(self.n)

    def _through_jacobian(self) -> None:
        step, n = self.step, self.n
        bars = [step.h * x for x in (*self.jac_bar, *self.slope_bar)]
        wrt = [*step.u, *(self.pool.input("p", e) for e in self.entries)]
        products = vjp([*step.entries, *step.slopes], bars, wrt)
        _add(self.u_bar, products[:n])
        _add(self.p_bar, products[n:])

    def outputs(self) -> list[Output]:
        places = [("bar", i, x) for i, x in enumerate(self.u_bar)]
        places += [("k_bar", i, x) for i, x in enumerate(self.k_bar[0])]
        places += [("p_bar", i, x) for i, x in zip(self.entries, self.p_bar, strict=True)]
        return [Output(block, i, x, add=True) for block, i, x in places if not x.is_const]


def _add(target: Row, row: Sequence[Node | None], factor: Node | float = 1.0) -> None:
    for m, x in enumerate(row[: len(target)]):
        if x is not None:
            target[m] = target[m] + factor * x
