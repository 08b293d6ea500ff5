"""The tableaus do what they claim: measured orders, rejected corruptions, stability intervals.

Orders are measured in extended precision where the platform has it. The coefficients themselves
are double precision, so errors below 1e-15 or so, 1e-13 for the interpolants with the largest
coefficients, say nothing; step sizes are chosen to stay above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from diffsolve.solvers.continuous_extension import Interpolant
from diffsolve.solvers.explicit_rk import tableaus
from diffsolve.solvers.explicit_rk.tableau import Tableau
from diffsolve.solvers.order_conditions import TableauError

Real = np.longdouble
# Where the single steps start that local errors are taken from. The interpolant of Vern6 shows its
# order only on the early ones: elsewhere its next error term dominates down to rounding errors.
STARTS, EARLY = np.linspace(Real(0), Real(2), 7), np.linspace(Real(0.2), Real(0.4), 3)
NAMES = [name for name, value in vars(tableaus).items() if isinstance(value, Tableau)]
ADAPTIVE = [name for name in NAMES if getattr(tableaus, name).b_error is not None]


@dataclass(frozen=True)
class Problem:
    """An initial value problem with its solution."""

    f: Callable
    solution: Callable


def _logistic_f(t, u):
    return (1 + np.cos(2 * t) / 4) * u * (1 - u)


def _logistic_solution(t):
    return np.array([1 / (1 + 3 * np.exp(-t - np.sin(2 * t) / 8))])


def _spiral_f(t, u):
    growth, rate = 1 - u[0] ** 2 - u[1] ** 2, 1 + t / 2
    return np.array([growth * u[0] - rate * u[1], rate * u[0] + growth * u[1]])


def _spiral_solution(t):
    radius, angle = 1 / np.sqrt(1 + 3 * np.exp(-2 * t)), t + t**2 / 4
    return radius * np.array([np.cos(angle), np.sin(angle)])


# Both are nonlinear and depend on time; the spiral winds onto the unit circle at a growing rate.
LOGISTIC = Problem(_logistic_f, _logistic_solution)
SPIRAL = Problem(_spiral_f, _spiral_solution)

# Problem and step counts on [0, 2]. The leading error terms of the optimised methods are so small
# that they dominate only on some problems at accuracies that double precision can resolve.
GLOBAL = {
    "EULER": (LOGISTIC, (64, 128)),
    "MIDPOINT": (LOGISTIC, (32, 64)),
    "HEUN": (LOGISTIC, (32, 64)),
    "RALSTON": (LOGISTIC, (32, 64)),
    "RK4": (LOGISTIC, (32, 64)),
    "BS3": (LOGISTIC, (32, 64)),
    "DP5": (LOGISTIC, (32, 64)),
    "TSIT5": (LOGISTIC, (48, 96)),
    "DP8": (SPIRAL, (10, 20)),
    "VERN6": (LOGISTIC, (8, 24)),
    "VERN7": (SPIRAL, (16, 32)),
    "VERN9": (SPIRAL, (12, 24)),
}

# Problem, larger step (the other is half of it) and starting points for the local error of the
# interpolant.
DENSE = {
    "EULER": (LOGISTIC, 0.05, STARTS),
    "MIDPOINT": (LOGISTIC, 0.05, STARTS),
    "HEUN": (LOGISTIC, 0.05, STARTS),
    "RALSTON": (LOGISTIC, 0.05, STARTS),
    "RK4": (LOGISTIC, 0.1, STARTS),
    "BS3": (LOGISTIC, 0.1, STARTS),
    "DP5": (LOGISTIC, 0.1, STARTS),
    "TSIT5": (LOGISTIC, 0.1, STARTS),
    "DP8": (SPIRAL, 0.4, STARTS),
    "VERN6": (LOGISTIC, 0.3, EARLY),
    "VERN7": (SPIRAL, 0.3, STARTS),
    "VERN9": (LOGISTIC, 1.0, STARTS),
}

# Larger step for the error estimates, all on the logistic problem.
ESTIMATE = {
    "HEUN": 0.05,
    "RALSTON": 0.05,
    "BS3": 0.1,
    "DP5": 0.1,
    "TSIT5": 0.1,
    "DP8": 0.2,
    "VERN6": 0.2,
    "VERN7": 0.4,
    "VERN9": 0.3,
}


def combine(weights, stages):
    return sum(Real(w) * k for w, k in zip(weights, stages, strict=False) if w != 0)


def step(tableau: Tableau, f: Callable, t, u, h):
    """One step: the new state and all stages, the derivative at the new point last."""
    form = tableau.stages
    k = [f(t, u)]
    for row, c in zip(form.a[1:], form.c[1:], strict=True):
        state = u + h * combine(row, k)
        k.append(f(t + Real(c) * h, state))
    return state, k


def global_error(tableau: Tableau, problem: Problem, n: int) -> float:
    h, u, worst = Real(2) / n, problem.solution(Real(0)), 0.0
    for i in range(n):
        u, _ = step(tableau, problem.f, i * h, u, h)
        worst = max(worst, float(np.abs(u - problem.solution((i + 1) * h)).max()))
    return worst


def interpolation_error(tableau: Tableau, problem: Problem, h: float, starts) -> float:
    """Largest error inside a single step from the exact solution, over several starts."""
    dense, worst, h = tableau.stages.interpolant, 0.0, Real(h)
    powers = np.arange(1, dense.polynomial.shape[1] + 1)
    for t in starts:
        u = problem.solution(t)
        _, k = step(tableau, problem.f, t, u, h)
        for row, c in zip(dense.a_extra, dense.c_extra, strict=True):
            k.append(problem.f(t + Real(c) * h, u + h * combine(row, k)))
        for theta in np.linspace(Real(0.1), Real(1), 10):
            weights = dense.polynomial.astype(Real) @ theta**powers
            value = u + h * combine(weights, k)
            worst = max(worst, float(np.abs(value - problem.solution(t + theta * h)).max()))
    return worst


def estimate_size(tableau: Tableau, problem: Problem, h: float, weights) -> float:
    worst, h = 0.0, Real(h)
    for t in STARTS:
        _, k = step(tableau, problem.f, t, problem.solution(t), h)
        worst = max(worst, float(np.abs(h * combine(weights, k)).max()))
    return worst


def stability_function(tableau: Tableau) -> np.polynomial.Polynomial:
    """R(z) = 1 + z b (1 - z a)^-1 e, a polynomial because a is nilpotent."""
    a, coefficients = tableau.stages.a, [1.0]
    powers = np.ones(len(a))
    for _ in range(len(a)):
        coefficients.append(a[-1] @ powers)
        powers = a @ powers
    return np.polynomial.Polynomial(coefficients)


def rebuilt(tableau: Tableau, **changes) -> Tableau:
    names = (
        *("name", "source", "order", "a", "b", "c", "b_error", "error_order", "b_error_low"),
        *("stability_interval", "interpolant"),
    )
    return Tableau(**{name: getattr(tableau, name) for name in names} | changes)


def replaced(dense: Interpolant, **changes) -> Interpolant:
    names = ("order", "polynomial", "a_extra", "c_extra")
    return Interpolant(**{name: getattr(dense, name) for name in names} | changes)


def shifted(values, index, by=1e-7):
    """A copy with one entry changed: too little to see in a plot, too much for a rounding error."""
    copy = np.array(values, dtype=np.float64)
    copy[index] += by
    return copy


def test_the_list_is_complete():
    assert set(NAMES) == set(tableaus.__all__) == set(GLOBAL) == set(DENSE)
    assert set(ADAPTIVE) == set(ESTIMATE)


@pytest.mark.parametrize("name", NAMES)
def test_conditions(name):
    getattr(tableaus, name).check()  # those of high order are not checked when they are imported


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_solution(name):
    tableau, (problem, counts) = getattr(tableaus, name), GLOBAL[name]
    coarse, fine = (global_error(tableau, problem, n) for n in counts)
    observed = np.log(coarse / fine) / np.log(counts[1] / counts[0])
    assert observed == pytest.approx(tableau.order, abs=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_interpolant(name):
    tableau, (problem, h, starts) = getattr(tableaus, name), DENSE[name]
    coarse, fine = (interpolation_error(tableau, problem, x, starts) for x in (h, h / 2))
    assert np.log2(coarse / fine) == pytest.approx(tableau.stages.interpolant.order + 1, abs=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_interpolant_joins_the_steps(name):
    """It takes both end values, and both end derivatives, so that it is continuous with its slope.

    The derivative at the new point is not matched by every interpolant of every method, but it is
    by all of these.
    """
    form = getattr(tableaus, name).stages
    dense = form.interpolant
    units = np.eye(len(dense.polynomial))
    b = np.append(form.a[-1], np.zeros(len(dense.c_extra)))
    scale = np.abs(dense.polynomial).max()
    for found, expected in (
        (dense.weights(0.0), 0 * b),
        (dense.weights(1.0), b),
        (dense.weights(0.0, derivative=1), units[0]),
        (dense.weights(1.0, derivative=1), units[form.n - 1]),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_order_of_the_error_estimate(name):
    tableau, h = getattr(tableaus, name), ESTIMATE[name]
    weights = tableau.stages.b_error
    coarse, fine = (estimate_size(tableau, LOGISTIC, x, weights) for x in (h, h / 2))
    assert np.log2(coarse / fine) == pytest.approx(tableau.error_order + 1, abs=0.3)


def test_error_estimates_of_dp8():
    """Hairer's combination of the estimates of orders 5 and 3 falls like a local error h**8."""
    form, sizes = tableaus.DP8.stages, []
    for h in (0.2, 0.1):
        five, three = (
            estimate_size(tableaus.DP8, LOGISTIC, h, w) for w in (form.b_error, form.b_error_low)
        )
        sizes.append((five, three, five**2 / np.sqrt(five**2 + 0.01 * three**2)))
    observed = np.log2(np.divide(*sizes))
    np.testing.assert_allclose(observed, (6, 4, 8), rtol=0, atol=0.3)


@pytest.mark.parametrize(
    ("name", "index", "weight"),
    [
        ("HEUN", 0, 1),
        ("RALSTON", 0, 1),
        ("BS3", 3, 1 / 8),
        ("DP5", 6, 1 / 40),
        ("TSIT5", 6, 1 / 66),
        ("VERN6", 8, 1 / 30),
        ("VERN7", 9, 2152106665253777 / 106040260335225546),
    ],
)
def test_error_estimate_is_solution_minus_embedded_solution(name, index, weight):
    """The order conditions do not see the sign; a published weight of the embedded method does."""
    tableau = getattr(tableaus, name)
    found = tableau.stages.a[-1][index] - tableau.stages.b_error[index]
    assert found == pytest.approx(weight, abs=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_corrupted_coefficients_are_rejected(name):
    tableau = getattr(tableaus, name)
    dense = tableau.stages.interpolant
    last = len(tableau.c) - 1
    corruptions = [
        {"b": shifted(tableau.b, 0)},
        {"interpolant": replaced(dense, polynomial=shifted(dense.polynomial, (0, 0)))},
    ]
    if last > 0:
        corruptions.append({"c": shifted(tableau.c, last)})
        corruptions.append({"a": shifted(tableau.a, (last, 0))})
    # keeps the row sum, so that only the order conditions can see it; the last row of a "first
    # same as last" method is left alone because that stage matters only to the estimate
    row = last - tableau.first_same_as_last
    if row > 1:
        corruptions.append({"a": shifted(shifted(tableau.a, (row, 0)), (row, row - 1), -1e-7)})
    if tableau.b_error is not None:
        corruptions.append({"b_error": shifted(tableau.b_error, 0)})
    if dense.a_extra:
        rows = (shifted(dense.a_extra[0], 0), *dense.a_extra[1:])
        corruptions.append({"interpolant": replaced(dense, a_extra=rows)})
    rebuilt(tableau)  # unchanged, it passes
    for changes in corruptions:
        with pytest.raises(TableauError):
            rebuilt(tableau, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_claimed_orders_are_the_lowest(name):
    """One order more is refused, so the claims are not too modest either."""
    tableau = getattr(tableaus, name)
    with pytest.raises(TableauError):
        rebuilt(tableau, order=tableau.order + 1)
    if tableau.b_error is not None:
        with pytest.raises(TableauError, match="embedded"):
            rebuilt(tableau, error_order=tableau.error_order + 1)
    if tableau.interpolant is not None:
        finer = replaced(tableau.interpolant, order=tableau.interpolant.order + 1)
        with pytest.raises(TableauError, match="interpolant"):
            rebuilt(tableau, interpolant=finer)


@pytest.mark.parametrize("name", NAMES)
def test_stability_interval(name):
    tableau = getattr(tableaus, name)
    stability = stability_function(tableau)
    end = tableau.stability_interval
    inside = np.abs(stability(-np.linspace(0, end - 1e-4, 20_001)))
    assert inside.max() <= 1
    assert abs(stability(-(end + 1e-4))) > 1
