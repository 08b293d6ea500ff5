"""Continuous extensions of a step, as polynomials over its stages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffsolve.solvers.order_conditions import Array


@dataclass(frozen=True, eq=False)
class Interpolant:
    """Continuous extension ``u(t + theta h) = u + h sum_i w_i(theta) k_i``.

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
    """

    order: int
    polynomial: Array
    a_extra: tuple[Array, ...] = ()
    c_extra: tuple[float, ...] = ()

    def __init__(
        self,
        order: int,
        polynomial: ArrayLike,
        a_extra: ArrayLike | tuple = (),
        c_extra: ArrayLike | tuple = (),
    ):
        rows = tuple(np.asarray(row, dtype=np.float64) for row in a_extra)  # type: ignore[union-attr]
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "polynomial", np.atleast_2d(np.asarray(polynomial, np.float64)))
        object.__setattr__(self, "a_extra", rows)
        object.__setattr__(self, "c_extra", tuple(float(c) for c in c_extra))  # type: ignore[union-attr]

    def weights(self, theta: float | Array, derivative: int = 0) -> Array:
        """Weights of the stages at ``theta``, or their derivative with respect to ``theta``."""
        theta = np.asarray(theta, dtype=np.float64)
        powers = np.arange(1, self.polynomial.shape[1] + 1)
        factors = np.ones(len(powers))
        for i in range(derivative):
            factors = factors * (powers - i)
        exponents = np.maximum(powers - derivative, 0)
        return (factors * theta[..., None] ** exponents) @ self.polynomial.T


def cubic_hermite(b: Array, order: int) -> Interpolant:
    """Third-order Hermite polynomial through both ends, written with the stages."""
    first, last = np.eye(len(b))[0], np.eye(len(b))[-1]
    columns = [first, 3 * b - 2 * first - last, first + last - 2 * b]
    return Interpolant(min(3, order), np.stack(columns, 1))
