"""Estimates of the error between the ends of a step, as weights of its rows.

A stiff problem damps the errors of stages, so that a step can be exact to rounding while it is
long: its own estimate then says nothing of dense output, whose error is that of a polynomial. The
estimate made here sees that error. For problems that are not stiff it is of as high an order as
dense output, and mostly far below the estimate of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from diffsolve.solvers.continuous_extension import Interpolant
from diffsolve.solvers.order_conditions import Array, rooted_trees

_STIFF = -1e6  # of the test equation, whose step has size 1
_SEEN = 1e-3  # errors of the test equation below this are rounding, or vanish with stiffness
_LARGEST = 10.0  # sums of weights up to this, beside that of the solution


class TableauRows(Protocol):
    """A tableau in the form of the step."""

    @property
    def a(self) -> Array: ...

    @property
    def b_error(self) -> Array | None: ...

    @property
    def interpolant(self) -> Interpolant: ...

    def elementary_weights(self, order: int) -> dict[tuple, Array]:
        """Elementary weights of the rows."""
        ...


class ImplicitTableauRows(TableauRows, Protocol):
    """One of an implicit method."""

    def linear_rows(self, z: float, u: float, g: Callable[[float], float], slope: float) -> Array:
        """Rows of a step of size 1 of ``u' = z u + g(t)`` from 0, where ``slope`` is ``g'(0)``."""
        ...


def interpolation_error(form: ImplicitTableauRows, smoothed: bool) -> Array | None:
    """Weights of an estimate of the interpolant's error, or None where the step's own will do.

    The estimate vanishes for the solutions that the interpolant follows exactly, smooth ones of
    stiff problems (Prothero and Robinson's test equation) among them; and equals its largest error
    for the lowest power of t that it does not follow there. Where that power and a lower one leave
    the same rows, both are seen.

    Parameters
    ----------
    form
        The tableau.
    smoothed
        Whether the step's own estimate goes through the matrix of its stages.

    References
    ----------
    Prothero, Robinson, On the stability and accuracy of one-step methods for solving stiff systems
    of ordinary differential equations, Math. Comp. 28 (1974) 145.
    """
    if form.b_error is None:
        return None
    dense, followed = form.interpolant, []
    theta = np.linspace(0, 1, 41)
    weights = dense.weights(theta)
    for power in range(1, dense.order + 4):
        rows = _smooth_rows(form, power)
        errors = weights @ rows - theta**power
        worst = int(np.abs(errors).argmax())
        if abs(errors[worst]) > _SEEN:
            break
        followed.append(rows)
    else:
        return None
    error, own = float(errors[worst]), float(form.b_error @ rows)
    if abs(own) >= abs(error) and not smoothed:
        return None
    apart = [x for x in followed if not _is_parallel(x, rows)]
    fast = form.linear_rows(_STIFF, 1.0, lambda t: 0.0, 0.0) / abs(_STIFF)
    largest = _LARGEST * max(1.0, _size(form.a[-1]))
    for order in range(dense.order, 0, -1):
        at_worst = _terms(form, order, weights[worst], float(theta[worst]))
        candidates = (_solved(at_worst, [*apart, *x], rows, error) for x in ([fast], []))
        found = min((x for x in candidates if x is not None), key=_size, default=None)
        if found is not None and _size(found) <= largest:
            return found
    return form.b_error * min(1.0, abs(error / own)) if abs(own) > _SEEN else None


def error_of_low_order(form: TableauRows, estimate_order: int) -> Array | None:
    """Weights of such an estimate for an explicit method, or None where the step's own will do.

    That is so unless the interpolant has a lower order than the embedded solution, as the cubic
    Hermite polynomial has beside a pair 5(4). Then its leading error in the middle of a step is
    estimated.

    Parameters
    ----------
    form
        The tableau.
    estimate_order
        Power of the step size that the step's own estimate falls with.
    """
    dense = form.interpolant
    if form.b_error is None or dense.order + 1 >= estimate_order:
        return None
    middle = dense.weights(0.5)[: len(form.b_error)]
    known, further, errors = _terms(form, dense.order, middle, 0.5)
    free = _null_space(known)
    found: Array = free.T @ np.linalg.lstsq(further @ free.T, errors, rcond=1e-10)[0]
    return found if np.abs(further @ found).max() > _SEEN * np.abs(errors).max() else None


def _null_space(conditions: Array) -> Array:
    _, scales, right = np.linalg.svd(conditions)
    return right[int((scales > 1e-9 * scales[0]).sum()) :]


def _size(weights: Array) -> float:
    return float(np.abs(weights).sum())


def _is_parallel(x: Array, y: Array) -> bool:
    return bool(abs(x @ y) > (1 - 1e-8) * np.linalg.norm(x) * np.linalg.norm(y))


def _smooth_rows(form: ImplicitTableauRows, power: int) -> Array:
    """Rows of the stiff test equation with the solution ``t**power``."""
    p = float(power)
    slope = (2.0 if power == 2 else 0.0) - (_STIFF if power == 1 else 0.0)
    return form.linear_rows(_STIFF, 0.0, lambda t: p * t ** (power - 1) - _STIFF * t**power, slope)


def _terms(
    form: TableauRows, order: int, weights: Array, theta: float
) -> tuple[Array, Array, Array]:
    """Elementary weights up to ``order``; those of the next; what the interpolant has there."""
    phi, sizes = form.elementary_weights(order + 1), rooted_trees(order + 1)
    known = np.array([v for tree, v in phi.items() if sizes[tree][0] <= order])
    further = [(v, sizes[tree]) for tree, v in phi.items() if sizes[tree][0] > order]
    errors = [weights @ v - theta**size / density for v, (size, density) in further]
    return known, np.array([v for v, _ in further]), np.array(errors)


def _solved(
    terms: tuple[Array, Array, Array], zero: list[Array], rows: Array, error: float
) -> Array | None:
    """Weights that vanish up to an order and for ``zero``, and give ``error`` for ``rows``.

    Of those, the ones whose terms of the next order are nearest to those of the interpolant.
    """
    known, further, errors = terms
    conditions = np.array([*known, *zero, rows])
    target = np.zeros(len(conditions))
    target[-1] = error
    found: Array = np.linalg.lstsq(conditions, target, rcond=1e-10)[0].astype(np.float64)
    if np.abs(conditions @ found - target).max() > 1e-2 * abs(error):
        return None
    free = _null_space(conditions)
    if len(free):
        left = np.vstack([further, 1e-3 * np.eye(len(found))])  # and no larger than need be
        lacks = np.concatenate([errors, np.zeros(len(found))]) - left @ found
        found += free.T @ np.linalg.lstsq(left @ free.T, lacks, rcond=None)[0]
    return found
