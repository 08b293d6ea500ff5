"""Values saved inside of steps are as accurate as the steps, for every method.

Errors are in units of the tolerance. Among the problems are those on which steps are exact, and
therefore long: quadrature, a Riccati equation that Rodas3 solves exactly, stiff problems whose
stages are damped.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import diffsolve as ds
from diffsolve import ODEProblem, solve
from diffsolve.solvers.rosenbrock import tableaus as rosenbrock
from diffsolve.solvers.sdirk import tableaus as sdirk

DOUBLE = torch.float64
EXPLICIT = ["Heun", "Ralston", "BS3", "DP5", "Tsit5", "DP8", "Vern6", "Vern7", "Vern9"]
ROSENBROCK = ["Rosenbrock23", "ROS3P", "Rodas3", "Rodas4", "Rodas4P", "Rodas5", "Rodas5P"]
SDIRK = ["ImplicitEuler", "Trapezoid", "SDIRK2", "TRBDF2"]
SDIRK += ["Kvaerno3", "Kvaerno4", "Kvaerno5", "KenCarp3", "KenCarp4", "KenCarp5"]


def stiff_cosine(t, u):
    return -1e6 * (u - torch.cos(t)) - torch.sin(t)


def kaps(t, u):
    fast = -1e4 * (u[0] - u[1] ** 2) - 2 * u[0]
    return torch.stack([fast, u[0] - u[1] - u[1] ** 2])


#: Right-hand side, end, solution.
NONSTIFF = {
    "oscillator": (
        lambda t, u: torch.stack([u[1], -u[0]]),
        5.0,
        lambda t: torch.stack([torch.cos(t), -torch.sin(t)], 1),
    ),
    "cubic": (lambda t, u: t**3 + 0 * u, 10.0, lambda t: t[:, None] ** 4 / 4),
    "riccati": (lambda t, u: -u * u, 10.0, lambda t: 1 / (1 + t[:, None])),
}
STIFF = {
    "cosine": (stiff_cosine, 5.0, lambda t: torch.cos(t)[:, None]),
    "kaps": (kaps, 2.0, lambda t: torch.stack([torch.exp(-2 * t), torch.exp(-t)], 1)),
}
CASES = [
    (problem, method)
    for problem in NONSTIFF | STIFF
    for method in [*([] if problem in STIFF else EXPLICIT), *ROSENBROCK, *SDIRK]
]


def errors(name, method, tol, engine):
    """Errors of values at 100 times, and at the ends of steps that save nothing else."""
    f, end, exact = (NONSTIFF | STIFF)[name]
    u0 = exact(torch.zeros(1, dtype=DOUBLE))[0]
    prob = ODEProblem(f, u0, (0.0, end))
    alg, how = getattr(ds, method)(), {"rtol": tol, "atol": tol, "engine": engine}
    grid = torch.linspace(0, end, 101, dtype=DOUBLE)
    sols = [solve(prob, alg, saveat=grid, **how), solve(prob, alg, **how)]
    exacts = [exact(sol.t) for sol in sols]
    return [
        float(((sol.u - x).abs() / (tol + tol * x.abs())).max())
        for sol, x in zip(sols, exacts, strict=True)
    ]


def tolerances(method):
    order = getattr(ds, method)().order
    return [1e-4] if order == 1 else [1e-4, 1e-6] if order < 4 else [1e-4, 1e-6, 1e-8]


@pytest.mark.parametrize(("problem", "method"), CASES)
def test_saved_values_are_as_accurate_as_steps(problem, method):
    for tol in tolerances(method):
        inside, ends = errors(problem, method, tol, "native")
        assert inside <= 10 + 4 * ends, (tol, inside, ends)


@pytest.mark.parametrize(
    ("problem", "method"),
    [
        *(("riccati", method) for method in ("Tsit5", "Kvaerno5", "KenCarp5")),
        *(("cosine", method) for method in ("Rodas4", "Rodas5P", "TRBDF2", "Kvaerno4")),
    ],
)
def test_saved_values_are_as_accurate_as_steps_on_torch(problem, method):
    inside, ends = errors(problem, method, 1e-4, "torch")
    assert inside <= 10 + 4 * ends


@pytest.mark.parametrize(("method", "newton"), [("Rodas4P", 0), ("KenCarp5", 1e-3), ("TRBDF2", 0)])
def test_both_engines_take_the_same_steps(method, newton):
    prob = ODEProblem(stiff_cosine, torch.ones(1, dtype=DOUBLE), (0.0, 5.0))
    how = {"rtol": 1e-4, "atol": 1e-4, "saveat": 0.1}
    steps = [solve(prob, getattr(ds, method)(), engine=e, **how).steps for e in ("torch", "native")]
    np.testing.assert_allclose(steps[1].h, steps[0].h, rtol=1e-6 + newton)


@pytest.mark.parametrize("method", ["Rodas4P", "Kvaerno5", "TRBDF2"])
def test_only_values_inside_of_steps_cost_steps(method):
    prob = ODEProblem(stiff_cosine, torch.ones(1, dtype=DOUBLE), (0.0, 5.0))
    how = {"rtol": 1e-6, "atol": 1e-6}
    plain, ends, inside = (
        solve(prob, getattr(ds, method)(), saveat=saveat, **how).stats.naccept
        for saveat in (None, [0.0, 5.0], 0.1)
    )
    assert ends == plain < inside


def test_a_pair_whose_interpolant_is_hermite_s():
    """Fehlberg's pair 4(5), going on from order 5, as users give it."""
    fehlberg = ds.Tableau(
        "Fehlberg",
        "HNW, table II.5.1",
        order=5,
        a=(
            (),
            (1 / 4,),
            (3 / 32, 9 / 32),
            (1932 / 2197, -7200 / 2197, 7296 / 2197),
            (439 / 216, -8, 3680 / 513, -845 / 4104),
            (-8 / 27, 2, -3544 / 2565, 1859 / 4104, -11 / 40),
        ),
        b=(16 / 135, 0, 6656 / 12825, 28561 / 56430, -9 / 50, 2 / 55),
        c=(0, 1 / 4, 3 / 8, 12 / 13, 1, 1 / 2),
        b_error=(1 / 360, 0, -128 / 4275, -2197 / 75240, 1 / 50, 2 / 55),
    )
    f, end, exact = NONSTIFF["oscillator"]
    prob = ODEProblem(f, torch.tensor([1.0, 0.0], dtype=DOUBLE), (0.0, end))
    for engine in ("torch", "native"):
        how = {"rtol": 1e-8, "atol": 1e-8, "saveat": 0.01, "engine": engine}
        sol = solve(prob, ds.ExplicitRK(fehlberg), **how)
        off = (sol.u - exact(sol.t)).abs() / (1e-8 + 1e-8 * exact(sol.t).abs())
        assert float(off.max()) <= 10


# -- the estimate --------------------------------------------------------------------------------

TABLEAUS = {name: getattr(rosenbrock, name) for name in rosenbrock.__all__}
TABLEAUS |= {name: getattr(sdirk, name) for name in sdirk.__all__}


@pytest.mark.parametrize("name", TABLEAUS)
def test_estimates_see_what_steps_do_not(name):
    """Steps of stiff linear problems, for the lowest power of t that dense output misses."""
    form, z = TABLEAUS[name].stages, -1e7
    theta = np.linspace(0, 1, 41)
    for power in range(1, 7):
        slope = (power == 2) * 2.0 - (power == 1) * z
        rows = form.linear_rows(z, 0.0, lambda t, p=power: p * t ** (p - 1.0) - z * t**p, slope)
        error = np.abs(form.interpolant.weights(theta) @ rows - theta**power).max()
        if error > 1e-3:
            break
        # no rows of these two tell the power that is missed from the one below
        if form.b_dense is not None and name not in ("TRAPEZOID", "ROS3P"):
            assert abs(form.b_dense @ rows) <= 1e-2
    if form.b_dense is not None:
        assert abs(form.b_dense @ rows) >= 0.9 * error
    elif form.b_error is not None:
        assert abs(form.b_error @ rows) >= error
