"""The Butcher tableau of a singly diagonally implicit Runge-Kutta method.

A tableau is given as in the literature, with or without an explicit first stage.
``SDIRKTableau.stages`` is the form that the step and the kernels use: the derivative at the start
of the step is the first row, the derivative at the new point the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffsolve.solvers.continuous_extension import Interpolant, cubic_hermite
from diffsolve.solvers.order_conditions import Array, TableauError, check_order, require, triangle
from diffsolve.solvers.tableau import ImplicitRows, RungeKuttaTableau

#: Nodes from which ``f`` is extrapolated in time to a node beyond 1.
INSIDE = np.array([0.0, 1 / 3, 2 / 3, 1.0])


@dataclass(frozen=True, eq=False, kw_only=True)
class SDIRKStages(ImplicitRows):
    """A tableau in the form of the step, over ``n`` rows ``k_i = f(t + c_i h, g_i)``.

    In the last row ``g`` is the solution. Implicit rows solve
    ``g_i = u + h sum_{j<i} a_ij k_j + h gamma k_i``.

    Attributes
    ----------
    a
        With its diagonal.
    implicit
        ``n`` flags: whether the row is implicit.
    predictor
        ``(n, n)``, strictly lower triangular: Newton's iteration for row ``i`` starts from
        ``sum_j predictor_ij k_j``.
    inside
        ``(n, 4)``: weights of ``f`` at ``INSIDE`` that extrapolate it to a node beyond 1, where the
        step ends at a time beyond which ``f`` must not be evaluated; zero for the other rows.
    """

    implicit: np.ndarray
    predictor: Array
    inside: Array

    def linear_rows(self, z: float, u: float, g: Callable[[float], float], slope: float) -> Array:
        k = np.zeros(self.n)
        k[0] = z * u + g(0.0)
        for i in range(1, self.n):
            right = z * (u + self.a[i, :i] @ k[:i]) + g(float(self.c[i]))
            k[i] = right / (1 - z * self.a[i, i])
        return k


@dataclass(frozen=True, eq=False)
class SDIRKTableau(RungeKuttaTableau):
    """Coefficients of an SDIRK or ESDIRK method with ``s`` stages.

    Parameters
    ----------
    name
        Name of the method.
    source
        Where the numbers come from.
    order
        Order of the solution that is propagated.
    a
        ``s`` rows, lower triangular; the entries of the diagonal are zero in the first row of an
        ESDIRK method, and one positive number elsewhere.
    b
        ``s`` weights of the solution.
    c
        ``s`` nodes.
    b_error
        Weights of the error estimate, ``b - b_hat``: ``s`` of them, or one for each row of
        ``SDIRKStages``. None: there is none.
    error_order
        Order of the embedded solution ``b_hat``; default ``order - 1``.
    smoothed
        Whether to multiply the estimate by ``(I - h gamma J)^-1``: an estimate with the derivative
        at the start of the step is unbounded at infinity otherwise.
    predictor
        Starting values of Newton's iterations: the row of ``SDIRKStages`` to the weights of the
        rows before it. Others: extrapolation, see ``extrapolations``.
    interpolant
        Continuous extension over the rows of ``SDIRKStages``. Default: the cubic Hermite
        polynomial.
    checked
        Whether to check the conditions now, rather than in ``check``.

    Raises
    ------
    TableauError
        If shapes disagree or a condition fails.

    References
    ----------
    Hairer, Wanner, Solving Ordinary Differential Equations II (1996), sections IV.6 and IV.8;
    Hosea, Shampine, Analysis and implementation of TR-BDF2, Appl. Numer. Math. 20 (1996) 21.
    """

    a: Array
    c: Array
    smoothed: bool
    predictor: Mapping[int, ArrayLike] | None

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
        smoothed: bool = False,
        predictor: Mapping[int, ArrayLike] | None = None,
        interpolant: Interpolant | None = None,
        checked: bool = True,
    ):
        self._set_common(name, source, order, b, b_error, error_order, interpolant)
        nodes = np.asarray(c, dtype=np.float64)
        self._set(
            a=triangle(name, a, len(nodes), diagonal=True),
            c=nodes,
            smoothed=smoothed,
            predictor=predictor,
        )
        self._check_shapes()
        self._set(stages=self._extended())
        if checked:
            self.check()

    @property
    def explicit_first_stage(self) -> bool:
        """Whether the first stage is the derivative at the start of the step (ESDIRK)."""
        return bool(self.a[0, 0] == 0)

    @property
    def stiffly_accurate(self) -> bool:
        """Whether the last stage is the solution."""
        return bool(self.c[-1] == 1 and np.array_equal(self.a[-1], self.b))

    def _check_shapes(self) -> None:
        self._require_weights(len(self.c))
        diagonal = self.a.diagonal()
        gamma = diagonal[-1]
        if not gamma > 0 or np.any(diagonal[1:] != gamma) or diagonal[0] not in (0, gamma):
            raise TableauError(f"{self.name}: the diagonal of a is not one positive number")
        if self.explicit_first_stage:
            self._require_first_node(self.c[0])

    def _extended(self) -> SDIRKStages:
        s, first = len(self.c), int(not self.explicit_first_stage)
        n = first + s + (not self.stiffly_accurate)
        inner = slice(first, first + s)
        a, c = np.zeros((n, n)), np.ones(n)
        a[inner, inner] = self.a
        a[-1, inner] = self.b  # the last stage once more where it is stiffly accurate
        c[0], c[inner] = 0.0, self.c
        b_error = self.b_error
        if b_error is not None and b_error.shape != (n,):
            if b_error.shape != (s,):
                raise TableauError(
                    f"{self.name}: b_error has shape {b_error.shape}; "
                    f"expected ({s},), or ({n},) for all rows of the step"
                )
            b_error = np.zeros(n)
            b_error[inner] = self.b_error
        implicit = a.diagonal() != 0
        predictor = extrapolations(c, implicit)
        for i, weights in (self.predictor or {}).items():
            row = np.asarray(weights, dtype=np.float64)
            if not (0 < i < n and implicit[i] and row.ndim == 1 and len(row) <= i):
                raise TableauError(f"{self.name}: the predictor of row {i} does not fit")
            predictor[i] = np.pad(row, (0, n - len(row)))
        return SDIRKStages(
            gamma=float(self.a[-1, -1]),
            a=a,
            c=c,
            implicit=implicit,
            predictor=predictor,
            b_error=b_error,
            smoothed=self.smoothed,
            interpolant=(self.interpolant or cubic_hermite(a[-1], self.order)).ending_at(a[-1]),
            inside=np.array([_weights_inside(x) for x in c]),
        )

    def check(self) -> None:
        """Check the order conditions of the method, its estimate, its interpolant, its predictors.

        Raises
        ------
        TableauError
            If one fails.
        """
        form = self.stages
        a, b = form.a, form.a[-1]
        require(np.abs(a.sum(1) - form.c).max(), a, f"{self.name}: a row of a does not sum to c")
        check_order(self.name, a, b, self.order)
        self._check_embedded(form.c, a, b, form.b_error)
        predicted = form.predictor[form.implicit]
        require(np.abs(predicted.sum(1) - 1).max(), predicted, f"{self.name}: predictors")
        self._require_dense_rows()
        self._check_dense(a)


def _weights_inside(node: float) -> Array:
    """Lagrange's weights for ``node``, if that is beyond 1: an error of order 4 in a row."""
    weights = np.zeros(len(INSIDE))
    if node > 1:
        for i, a in enumerate(INSIDE):
            weights[i] = np.prod([(node - b) / (a - b) for b in INSIDE if b != a])
    return weights


def extrapolations(c: Array, implicit: np.ndarray) -> Array:
    """Starting values of Newton's iterations from the rows before.

    Where an earlier row has the same node, the latest such row; else the value at ``c_i`` of the
    polynomial through the latest rows, at most three, with distinct nodes.

    Parameters
    ----------
    c
        ``n`` nodes.
    implicit
        ``n`` flags: which rows to predict.

    Returns
    -------
    ndarray
        ``(n, n)``, row ``i`` with the weights of the rows before ``i``.
    """
    predictor = np.zeros((len(c), len(c)))
    for i in np.flatnonzero(implicit):
        same = np.flatnonzero(np.isclose(c[:i], c[i]))
        if len(same):
            predictor[i, same[-1]] = 1.0
            continue
        known: list[int] = []
        for j in range(i - 1, -1, -1):
            if len(known) < 3 and not np.any(np.isclose(c[j], c[known])):
                known.append(j)
        for j in known:
            others = [m for m in known if m != j]
            predictor[i, j] = np.prod([(c[i] - c[m]) / (c[j] - c[m]) for m in others])
    return predictor
