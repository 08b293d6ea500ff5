"""Dense output meets the steps, and is as accurate between them as at their ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import diffsolve as ds
from diffsolve import ODEProblem, solve
from diffsolve.solvers.continuous_extension import Interpolant, elevated

DOUBLE, SINGLE = torch.float64, torch.float32
ENGINES = ["torch", "native"]
EXPLICIT = ["RK4", "BS3", "DP5", "Tsit5", "DP8", "Vern6", "Vern7", "Vern9"]
IMPLICIT = ["Rosenbrock23", "Rodas5P", "TRBDF2", "KenCarp5"]


def oscillator(t, u):
    return torch.stack([u[1], -u[0] * (1 + 0.1 * torch.cos(t))])


# -- the form of the polynomials -----------------------------------------------------------------


@pytest.mark.parametrize("derivative", range(6))
def test_weights_and_their_derivatives(derivative):
    rng = np.random.default_rng(1)
    polynomial = rng.standard_normal((3, 4))
    theta = np.array([0.0, 0.3, 0.5, 0.9, 1.0])
    expected = [np.polynomial.Polynomial([0, *row]) for row in polynomial]
    expected = [p.deriv(derivative)(theta) if derivative else p(theta) for p in expected]
    found = Interpolant(4, polynomial).weights(theta, derivative)
    np.testing.assert_allclose(found, np.transpose(expected), rtol=1e-13, atol=1e-12)


def test_a_higher_degree_has_the_same_values():
    dense = Interpolant(3, np.random.default_rng(2).standard_normal((2, 3)))
    theta, up = np.linspace(0, 1, 7)[:, None], np.arange(1, 6)
    values = (theta**up * (1 - theta) ** (5 - up)) @ elevated(dense.bernstein, 5).T
    np.testing.assert_allclose(values, dense.weights(theta[:, 0]), rtol=1e-13, atol=1e-14)


def test_the_end_is_the_solution_but_for_nothing():
    form = ds.Vern9().tableau.stages
    b = np.append(form.a[-1], np.zeros(len(form.interpolant.c_extra)))
    np.testing.assert_array_equal(form.interpolant.weights(1.0), b)
    by_powers = np.abs(ds.Vern9().tableau.interpolant.polynomial.sum(1) - b).max()
    assert by_powers > 1e-13  # rounding of the published coefficients


# -- solves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", EXPLICIT + IMPLICIT)
def test_dense_output_meets_the_steps(name, engine):
    method = getattr(ds, name)()
    how = {"rtol": 1e-4, "atol": 1e-4} if method.adaptive else {"dt": 0.1, "adaptive": False}
    u0 = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    sol = solve(ODEProblem(oscillator, u0, (0.0, 3.0)), method, engine=engine, dense=True, **how)
    # two orders of the same sum: half a unit of rounding of each of its terms
    form = method.tableau.stages
    h = float(sol.steps.h.abs().max())
    ulps = 2 + h * np.abs(form.a[-1]).sum()
    assert float((sol(sol.t) - sol.u).abs().max()) <= ulps * torch.finfo(DOUBLE).eps
    if name in EXPLICIT:
        slopes = torch.stack([oscillator(t, u) for t, u in zip(sol.t, sol.u, strict=True)])
        assert float((sol(sol.t, 1) - slopes).abs().max()) <= 4 * torch.finfo(DOUBLE).eps


@pytest.mark.parametrize("engine", ENGINES)
def test_dense_output_of_two_methods_meets_the_steps(engine):
    def van_der_pol(t, u):
        return torch.stack([u[1], 100 * ((1 - u[0] ** 2) * u[1] - u[0])])

    u0 = torch.tensor([2.0, 0.0], dtype=DOUBLE)
    switching = ds.AutoSwitch(ds.Vern7(), ds.Rodas5P())
    sol = solve(ODEProblem(van_der_pol, u0, (0.0, 1.0)), switching, engine=engine, dense=True)
    assert sol.stats.njac > 0
    gap = (sol(sol.t) - sol.u).abs() / sol.u.abs().clamp(min=1)
    assert float(gap.max()) <= 8 * torch.finfo(DOUBLE).eps


@pytest.mark.parametrize("name", ["DP8", "Vern6", "Vern7", "Vern9"])
@pytest.mark.parametrize("dtype", [SINGLE, torch.complex64])
def test_saved_values_in_single_precision(name, dtype):
    grid = torch.linspace(0, 10, 501, dtype=DOUBLE)
    rate = 1j if dtype.is_complex else -0.3
    prob = ODEProblem(lambda t, u: rate * u, torch.ones(1, dtype=dtype), (0.0, 10.0))
    how = {"rtol": 1e-5, "atol": 1e-5, "engine": "torch"}
    method = getattr(ds, name)()
    steps = solve(prob, method, **how)
    saved = solve(prob, method, saveat=grid, **how)

    def worst(sol):
        exact = torch.exp(rate * sol.t.to(saved.u.dtype if dtype.is_complex else DOUBLE))
        return float((sol.u[:, 0] - exact).abs().max())

    # rounding of a sum of stages with the weights of a step
    rounding = 8 * torch.finfo(SINGLE).eps * np.abs(method.tableau.stages.a[-1]).sum()
    assert worst(saved) <= 4 * worst(steps) + rounding


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["DP8", "Vern7", "Vern9"])
def test_single_precision_only_rounds_the_weights(name, engine):
    """Values and derivatives, beside those of the same steps in double precision."""
    method, grid = getattr(ds, name)(), torch.linspace(0, 3, 101, dtype=DOUBLE)
    how = {"dt": 0.25, "adaptive": False, "dense": True, "engine": engine}
    sols = [
        solve(
            ODEProblem(oscillator, torch.tensor([1.0, 0.0], dtype=dtype), (0.0, 3.0)), method, **how
        )
        for dtype in (DOUBLE, SINGLE)
    ]
    dense = method.tableau.stages.interpolant
    for derivative in range(3):
        exact, found = (sol(grid, derivative) for sol in sols)
        weights = np.abs(dense.weights(np.linspace(0, 1, 51), derivative)).sum(1).max()
        rounding = torch.finfo(SINGLE).eps * (8 + 4 * 0.25 ** (1 - derivative) * weights)
        assert float((found - exact).abs().max()) <= rounding
