"""The Butcher tableau of an explicit Runge-Kutta method, checked when it is built.

A tableau is given as in the literature. ``Tableau.stages`` is the form that the step and the
kernels use: the derivative at the new point is always the last stage, so that "first same as
last" methods and others look alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from diffsolve.solvers.continuous_extension import Interpolant, cubic_hermite
from diffsolve.solvers.interpolation_error import error_of_low_order
from diffsolve.solvers.order_conditions import Array, TableauError, check_order, require, triangle
from diffsolve.solvers.tableau import RungeKuttaTableau, StepRows, as_array


@dataclass(frozen=True, eq=False, kw_only=True)
class Stages(StepRows):
    """A tableau in the form of the step: ``n`` stages, the last one at the new point.

    ``a`` is strictly lower triangular. ``b_error`` falls with the step size to the power
    ``estimate_order``.
    """

    estimate_order: int

    def dense_error(self) -> Array | None:
        return error_of_low_order(self, self.estimate_order)


@dataclass(frozen=True, eq=False)
class Tableau(RungeKuttaTableau):
    """Coefficients of an explicit Runge-Kutta method.

    Parameters
    ----------
    name
        Name of the method.
    source
        Where the numbers come from.
    order
        Order of the solution that is propagated.
    a
        ``s`` rows; row ``i`` holds at least its ``i`` coefficients left of the diagonal.
    b
        ``s`` weights of the solution.
    c
        ``s`` nodes.
    b_error
        Weights of the error estimate, ``b - b_hat``: ``s`` of them, or ``s + 1`` where the
        derivative at the new point takes part. None: the method has no embedded error estimate.
    error_order
        Order of the embedded solution ``b_hat``; default ``order - 1``.
    b_error_low
        Weights of a second estimate, of lower order, that damps the first where the first is by far
        the smaller, as in Hairer's 8(5,3) method: the error is
        ``e**2 / sqrt(e**2 + 0.01 e_low**2)`` with their norms.
    stability_interval
        Length of the real interval of absolute stability, where known.
    interpolant
        Continuous extension. Default: the cubic Hermite polynomial.
    checked
        Whether to check the conditions now, rather than in ``check``.

    Raises
    ------
    TableauError
        If shapes disagree, a row does not sum to its node, the order conditions up to ``order``
        fail, or the error weights do not sum to zero.

    References
    ----------
    Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I (1993), sections II.2 and
    II.6.
    """

    a: Array
    c: Array
    b_error_low: Array | None
    stability_interval: float | None

    def __init__(
        self,
        name: str,
        source: str,
        order: int,
        a: ArrayLike | tuple,
        b: ArrayLike,
        c: ArrayLike,
        b_error: ArrayLike | None = None,
        error_order: int | None = None,
        b_error_low: ArrayLike | None = None,
        stability_interval: float | None = None,
        interpolant: Interpolant | None = None,
        checked: bool = True,
    ):
        self._set_common(name, source, order, b, b_error, error_order, interpolant)
        nodes = np.asarray(c, dtype=np.float64)
        self._set(
            a=triangle(name, a, len(nodes)),
            c=nodes,
            b_error_low=as_array(b_error_low),
            stability_interval=stability_interval,
        )
        self._check_shapes()
        self._set(stages=self._extended())
        if checked:
            self.check()

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is the derivative at the new point."""
        return bool(self.b[-1] == 0 and self.c[-1] == 1 and np.array_equal(self.a[-1], self.b))

    def _check_shapes(self) -> None:
        s = len(self.c)
        self._require_weights(s)
        for label, weights in (("b_error", self.b_error), ("b_error_low", self.b_error_low)):
            if weights is not None and weights.shape not in ((s,), (s + 1,)):
                raise TableauError(
                    f"{self.name}: {label} has shape {weights.shape}; "
                    f"expected ({s},), or ({s + 1},) with the derivative at the new point"
                )
        self._require_first_node(self.c[0])

    def _extended(self) -> Stages:
        s = len(self.c)
        if self.first_same_as_last:
            a, c = self.a, self.c
        else:
            a = np.zeros((s + 1, s + 1))
            a[:s, :s], a[s, :s] = self.a, self.b
            c = np.append(self.c, 1.0)
        n = len(c)

        def padded(weights: Array | None) -> Array | None:
            if weights is None:
                return None
            if len(weights) > n:
                raise TableauError(f"{self.name}: {len(weights)} error weights for {n} stages")
            return np.append(weights, np.zeros(n - len(weights)))

        return Stages(
            a=a,
            c=c,
            b_error=padded(self.b_error),
            b_error_low=padded(self.b_error_low),
            interpolant=(self.interpolant or cubic_hermite(a[-1], self.order)).ending_at(a[-1]),
            estimate_order=self.estimate_order,
        )

    def check(self) -> None:
        """Check the order conditions of the method, its estimates and its interpolant.

        Raises
        ------
        TableauError
            If one fails.
        """
        a, c = self.stages.a, self.stages.c
        # but for the last row: that is b, whose sum is an order condition
        nodes = np.abs(a.sum(1) - c)[:-1].max()
        require(nodes, a, f"{self.name}: a row of a does not sum to its node")
        check_order(self.name, a, a[-1], self.order)
        self._check_embedded(c, a, a[-1], self.stages.b_error)
        if self.stages.b_error_low is not None:
            check_order(f"{self.name}: second estimate", a, a[-1] - self.stages.b_error_low, 1)
        self._check_interpolant()

    def _check_interpolant(self) -> None:
        dense, n = self.stages.interpolant, self.stages.n
        total = n + len(dense.c_extra)
        if len(dense.a_extra) != len(dense.c_extra):
            raise TableauError(f"{self.name}: a_extra and c_extra differ in length")
        if dense.polynomial.shape[0] != total:
            raise TableauError(
                f"{self.name}: the interpolant has {len(dense.polynomial)} rows for {total} stages"
            )
        a = np.zeros((total, total))
        a[:n, :n] = self.stages.a
        for i, row in enumerate(dense.a_extra):
            a[n + i, : len(row)] = row
        c = np.append(self.stages.c, dense.c_extra)
        require(np.abs(a.sum(1) - c).max(), a, f"{self.name}: interpolant row sums")
        self._check_dense(a)


def settle_rounding(a: ArrayLike | tuple, b: ArrayLike, c: ArrayLike) -> tuple[Array, Array]:
    """``a`` and ``b`` with sums and first moments that hold to the last digit.

    Large coefficients of opposite signs leave rounding errors in the sums of their rows that the
    weights magnify. The conditions ``sum_j a_ij = c_i`` and ``sum_j a_ij c_j = c_i**2 / 2``, which
    methods of high order meet from their fifth stage on, are restored by tiny changes of two
    coefficients of each row, in exact arithmetic.
    """
    nodes = [Fraction(float(x)) for x in np.asarray(c, np.float64)]
    rows = triangle("settle_rounding", a, len(nodes))
    weights = np.array(b, dtype=np.float64)
    half = Fraction(1, 2)
    targets = [(row, x, x * x * half) for row, x in zip(rows[4:], nodes[4:], strict=True)]
    for row, total, moment in [*targets, (weights, Fraction(1), half)]:
        for _ in range(3):  # each change rounds
            known = [Fraction(float(x)) for x in row]
            defect = moment - sum((x * n for x, n in zip(known, nodes, strict=True)), Fraction(0))
            row[3] = float(known[3] + defect / nodes[3])
            known[3] = Fraction(float(row[3]))
            row[0] = float(known[0] + total - sum(known, Fraction(0)))
    return rows, weights
