"""Continuous extensions of a step, as polynomials over its stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import comb, perm

import numpy as np
from numpy.typing import ArrayLike

from diffsolve.solvers.order_conditions import TOLERANCE, Array, TableauError


@dataclass(frozen=True, eq=False)
class Interpolant:
    """Continuous extension ``u(t + theta h) = u + h sum_i w_i(theta) k_i``.

    Given by powers of theta, as the literature prints it. Powers with large coefficients cancel,
    by five digits for methods of high order, so it is evaluated in the form of Bernstein, whose
    terms are no larger than the weights, and which is exact at both ends.

    Parameters
    ----------
    order
        Order of the interpolant: its local error is ``O(h**(order + 1))``.
    polynomial
        ``(n, d)``: ``w_i(theta) = sum_j polynomial[i, j] * theta**(j + 1)``. The ``n`` rows are
        the stages of the method, the derivative at the new point, then the extra stages.
    a_extra, c_extra
        Rows and nodes of the extra stages, evaluated only when the interpolant is asked for. Each
        row covers the stages of the method, the derivative at the new point, and the extra stages
        before it.
    error
        Weights of an estimate of its error, over the stages of the method and the derivative at
        the new point; the step size keeps it below the tolerance where values inside of a step are
        saved. None: that of an implicit method is derived, one of an explicit method needs none.

    Attributes
    ----------
    bernstein
        ``(n, d)``: ``w_i(theta) = sum_j bernstein[i, j-1] * theta**j * (1-theta)**(d-j)``, the sum
        over ``j = 1, ..., d``.

    References
    ----------
    Farouki, Rajan, On the numerical condition of polynomials in Bernstein form, Comput. Aided
    Geom. Des. 4 (1987) 191.
    """

    order: int
    polynomial: Array
    a_extra: tuple[Array, ...] = ()
    c_extra: tuple[float, ...] = ()
    error: Array | None = None
    bernstein: Array = field(init=False, repr=False)

    def __init__(
        self,
        order: int,
        polynomial: ArrayLike,
        a_extra: ArrayLike | tuple = (),
        c_extra: ArrayLike | tuple = (),
        error: ArrayLike | None = None,
    ):
        rows = tuple(np.asarray(row, dtype=np.float64) for row in a_extra)  # type: ignore[union-attr]
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "polynomial", np.atleast_2d(np.asarray(polynomial, np.float64)))
        object.__setattr__(self, "a_extra", rows)
        object.__setattr__(self, "c_extra", tuple(float(c) for c in c_extra))  # type: ignore[union-attr]

        weights = None if error is None else np.asarray(error, dtype=np.float64)
        object.__setattr__(self, "error", weights)
        object.__setattr__(self, "bernstein", _by_bernstein(self.polynomial))

    def ending_at(self, b: Array) -> Interpolant:
        """The same where its end is the solution with weights ``b``, but for rounding: without it.

        Coefficients that are rounded leave a gap between the steps, as large as they are.
        """
        if self.error is not None and self.error.shape != b.shape:
            raise TableauError(
                f"the error of an interpolant has shape {self.error.shape}, for {len(b)} rows"
            )
        weights = np.append(b, np.zeros(max(0, len(self.polynomial) - len(b))))
        if len(weights) != len(self.polynomial) or not _close(weights, self.bernstein[:, -1]):
            return self
        made = Interpolant(self.order, self.polynomial, self.a_extra, self.c_extra, self.error)
        exact, d = made.bernstein, self.bernstein.shape[1]
        exact[:, -1] = weights
        slope = np.eye(len(weights))[len(b) - 1]  # the last row of a step is the derivative there
        if d > 2 and _close(d * weights - slope, exact[:, -2]):
            exact[:, -2] = d * weights - slope
        return made

    def coefficients(self, derivative: int = 0) -> Array:
        """``(n, 1 + m)``: of ``theta**j (1-theta)**(m-j)``, ``m = d - derivative``, in a weight."""
        d = self.bernstein.shape[1]
        m = max(d - derivative, 0)
        full = np.pad(self.bernstein, ((0, 0), (1, derivative)))
        found = np.zeros((len(full), 1 + m))
        for r in range(derivative + 1):  # Leibniz' rule
            for j in range(min(m, d - r) + 1):
                factor = comb(derivative, r) * perm(j + r, r) * perm(d - j - r, derivative - r)
                found[:, j] += (-1) ** (derivative - r) * factor * full[:, j + r]
        return found

    def weights(self, theta: float | Array, derivative: int = 0) -> Array:
        """Weights of the stages at ``theta``, or their derivative with respect to ``theta``."""
        coefficients = self.coefficients(derivative)
        theta = np.asarray(theta, dtype=np.float64)[..., None]
        j = np.arange(coefficients.shape[1])
        return (theta**j * (1 - theta) ** j[::-1]) @ coefficients.T


def elevated(bernstein: Array, degree: int) -> Array:
    """The same polynomials as ``Interpolant.bernstein`` has them for a higher degree."""
    while bernstein.shape[1] < degree:  # times theta + (1 - theta)
        bernstein = np.pad(bernstein, ((0, 0), (0, 1))) + np.pad(bernstein, ((0, 0), (1, 0)))
    return bernstein


def _by_bernstein(polynomial: Array) -> Array:
    """Coefficients by powers as those of the form of Bernstein, added up in extended precision."""
    d = polynomial.shape[1]
    terms = [
        [comb(d - j, i - j) if j <= i else 0 for j in range(1, d + 1)] for i in range(1, d + 1)
    ]
    exact = polynomial.astype(np.longdouble) @ np.array(terms, np.longdouble).T
    return np.ascontiguousarray(exact, dtype=np.float64)


def _close(x: Array, y: Array) -> bool:
    return bool(np.abs(x - y).max() <= TOLERANCE * max(1.0, np.abs(x).max()))


def nested_polynomial(b: ArrayLike, d: ArrayLike, new: int) -> Array:
    """Expand Hairer's nested form of a continuous extension into powers of theta.

    The extension is ``theta (f0 + (1-theta) (f1 + theta (f2 + (1-theta) (f3 + ...))))``. The first
    three coefficients are those of the cubic Hermite polynomial, the others are ``d @ k``.

    Parameters
    ----------
    b
        Weights of the solution, at most as many as there are stages.
    d
        One row per coefficient from ``f3`` on, one column per stage, extra stages included.
    new
        Index of the stage that is the derivative at the new point.

    Returns
    -------
    ndarray
        The polynomial as ``Interpolant`` takes it.
    """
    d = np.asarray(d, dtype=np.float64)
    unit = np.eye(d.shape[1])
    weights = np.zeros(d.shape[1])
    weights[: len(np.asarray(b))] = b
    first, last = unit[0], unit[new]
    coefficients = np.vstack([weights, first - weights, 2 * weights - first - last, d])
    # basis[m] holds the powers of the m-th product theta (1-theta) theta ..., exact integers
    basis = np.zeros((len(coefficients), len(coefficients)))
    product = np.array([1.0])
    for m in range(len(basis)):
        product = np.convolve(product, [0.0, 1.0] if m % 2 == 0 else [1.0, -1.0])
        basis[m, : m + 1] = product[1:]
    return coefficients.T @ basis


def cubic_hermite(b: ArrayLike, order: int, error: float | None = None) -> Interpolant:
    """Third-order Hermite polynomial through both ends, written with the stages.

    The estimate of its error is the fraction ``error`` of its cubic term.
    """
    b = np.asarray(b, dtype=np.float64)
    first, last = np.eye(len(b))[0], np.eye(len(b))[-1]
    columns = [first, 3 * b - 2 * first - last, first + last - 2 * b]
    of_cubic = None if error is None else error * columns[-1]
    return Interpolant(min(3, order), np.stack(columns, 1), error=of_cubic)
