"""EM, EulerHeun, LambaEM and LambaEulerHeun: orders, error estimates, adaptive solves."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from sdes import (
    DOUBLE,
    heisenberg,
    linear,
    linear_solution,
    rms,
    same_path,
    slope,
    solve,
    two_noises,
)
from torch import Tensor

from diffsolve import (
    EM,
    DiscreteAdjoint,
    EulerHeun,
    LambaEM,
    LambaEulerHeun,
    ODEProblem,
    SDEProblem,
    Tsit5,
)
from diffsolve.problems.sde_field import SDEField
from diffsolve.solvers.stochastic.noise.path import BrownianPath

METHODS = [EM(), LambaEM(), EulerHeun(), LambaEulerHeun()]
STRATONOVICH = METHODS[2:]


def of(alg) -> str:
    return next(iter(alg.interpretation))


# -- strong order --------------------------------------------------------------------------------

COARSE = [8, 16, 32, 64]


@pytest.mark.parametrize("alg", METHODS, ids=repr)
@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
def test_strong_order_on_the_linear_equation(alg, noise) -> None:
    prob = linear(rows=1500, noise=noise, interpretation=of(alg))
    sols = same_path(prob, alg, COARSE)
    exact = linear_solution(prob, 1.0, sols[-1].noise.at([1.0])[0])
    errors = [rms(sol.u[-1] - exact) for sol in sols]
    if of(alg) == "ito":
        assert slope(COARSE, errors) == pytest.approx(0.5, abs=0.06)
        # b**2 sqrt(h/2) of the solution, whose mean square is exp(2 a + b**2)
        assert errors[-1] == pytest.approx(0.49 / math.sqrt(128) * math.exp(0.4 + 0.245), rel=0.1)
    else:
        assert slope(COARSE, errors) == pytest.approx(1.0, abs=0.12)
        assert errors[-1] < 0.02


@pytest.mark.parametrize("alg", STRATONOVICH, ids=repr)
def test_strong_order_one_where_noises_commute(alg) -> None:
    prob = linear(rows=1500, g=two_noises, noise="general", interpretation="stratonovich")
    sols = same_path(prob, alg, COARSE)
    W = sols[-1].noise.at([1.0])[0]
    exact = torch.exp(0.4 + 0.7 * W[:, :1] + 0.3 * W[:, 1:])
    assert slope(COARSE, [rms(s.u[-1] - exact) for s in sols]) == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_strong_order_half_without_commutativity(alg) -> None:
    prob = heisenberg(2000, interpretation=of(alg))
    *sols, fine = same_path(prob, alg, [*COARSE, 1024])
    errors = [rms(sol.u[-1] - fine.u[-1]) for sol in sols]
    assert slope(COARSE, errors) == pytest.approx(0.5, abs=0.06)
    # the Levy areas of the steps are what is left out: their variance is h**2 / 4 each
    assert errors[0] == pytest.approx(math.sqrt(1 / 8 / 4 / 3), rel=0.05)


@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_strong_order_one_with_additive_noise(alg) -> None:
    def g(t: Tensor, u: Tensor) -> Tensor:
        return (1 + t) * torch.tensor([[0.5, 0.2], [0.0, 0.3]], dtype=DOUBLE).expand(*u.shape, 2)

    u0 = torch.ones(400, 2, dtype=DOUBLE)
    prob = SDEProblem(
        lambda t, u: torch.sin(u), g, u0, (0.0, 1.0), noise="additive", interpretation=of(alg)
    )
    *sols, fine = same_path(prob, alg, [*COARSE, 1024])
    errors = [rms(sol.u[-1] - fine.u[-1]) for sol in sols]
    assert slope(COARSE, errors) == pytest.approx(1.0, abs=0.1)


# -- weak order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [EM(), EulerHeun()], ids=repr)
def test_weak_order(alg) -> None:
    rates = [1.5, 0.3] if isinstance(alg, EM) else [0.1, 0.8]  # where first order shows
    prob = linear(rows=20_000, interpretation=of(alg), p=torch.tensor(rates, dtype=DOUBLE))
    counts = [4, 8, 16, 32]
    sols = same_path(prob, alg, counts)
    exact = linear_solution(prob, 1.0, sols[-1].noise.at([1.0])[0])
    # the same paths in both, so that their own scatter cancels
    errors = [abs(float((sol.u[-1] - exact).mean())) for sol in sols]
    assert slope(counts, errors) == pytest.approx(1.0, abs=0.15)


# -- without noise, and exactly ------------------------------------------------------------------


@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_a_step_is_its_formula(alg) -> None:
    prob = linear(rows=3, d=2, interpretation=of(alg), tspan=(0.0, 0.1))
    sol = solve(prob, alg, dt=0.1, adaptive=False, seed=5)
    W, u, h = sol.noise.increment(0.0, 0.1).W, prob.u0, 0.1
    a, b = prob.p
    expected = u + h * a * u + b * u * W
    if of(alg) == "stratonovich":
        expected = u + h / 2 * a * (u + expected) + b / 2 * (u + expected) * W
    torch.testing.assert_close(sol.u[-1], expected)


@pytest.mark.parametrize("alg", [LambaEM(), LambaEulerHeun()], ids=repr)
def test_without_noise_the_error_is_that_of_eulers_method(alg) -> None:
    prob = linear(g=lambda t, u, p: torch.zeros_like(u), interpretation=of(alg))
    sol = solve(prob, alg, dt=0.05, adaptive=False, seed=0, rtol=0.0, atol=1.0)
    u, h, a = sol.u[:-1, 0, 0], 0.05, 0.4
    torch.testing.assert_close(sol.steps.error, h * h / 2 * a * a * u)
    torch.testing.assert_close(sol.steps.stiffness, torch.full_like(u, a))


# -- error estimates -----------------------------------------------------------------------------


def one_step(prob: SDEProblem, alg, h: float, seed: int = 3):
    """A step from the start of a batch of paths, and their values after very small ones."""
    fixed = EM() if of(alg) == "ito" else EulerHeun()
    sol = solve(prob.remake(tspan=(0.0, h)), fixed, dt=h / 256, seed=seed)
    field = SDEField.of(prob)
    field.discover(0.0, field.structure.ravel(prob.u0), 1.0, False)
    field.path = sol.noise
    step = alg.step(field, 0.0, h, (field.structure.ravel(prob.u0),))
    error = step.error.reshape(prob.u0.shape)
    return error, step.state[0].reshape(prob.u0.shape) - sol.u[-1]


def test_the_estimate_of_lamba_em_is_the_error_of_each_path() -> None:
    prob = linear(rows=2000)
    h = 1e-3
    W = BrownianPath(3, 2000, t0=0.0)
    for i in range(256):
        W.increment(i * h / 256, (i + 1) * h / 256)
    exact = linear_solution(prob, h, W.increment(0.0, h).W)
    estimate, _ = one_step(prob, LambaEM(), h)
    euler = prob.u0 * (1 + 0.4 * h + 0.7 * W.increment(0.0, h).W)
    off = estimate - (euler - exact).abs()
    assert rms(off) < 0.15 * rms(estimate)  # terms of order h**1.5 beside those of order h


@pytest.mark.parametrize("alg", [LambaEM(), LambaEulerHeun()], ids=repr)
def test_the_estimate_sees_levy_areas(alg) -> None:
    # the symmetric part of the noise's derivatives vanishes: only Levy areas are left out
    estimate, error = one_step(heisenberg(20_000, interpretation=of(alg)), alg, 0.1)
    assert rms(estimate[:, 2]) == pytest.approx(rms(error[:, 2]), rel=0.03)
    assert rms(estimate[:, 2]) == pytest.approx(0.05, rel=0.03)  # h / 2
    assert rms(estimate[:, :2]) == 0


def test_the_estimate_for_general_noise_has_the_mean_square_of_the_error() -> None:
    def g(t: Tensor, u: Tensor) -> Tensor:
        x, y = u[..., 0], u[..., 1]
        rows = [torch.stack([x * y, 0.5 * y * y], -1), torch.stack([0.3 * x, x + y], -1)]
        return torch.stack(rows, -2)

    u0 = torch.tensor([1.0, 0.5], dtype=DOUBLE).repeat(20_000, 1)
    prob = SDEProblem(lambda t, u: torch.zeros_like(u), g, u0, (0.0, 1.0), noise="general")
    estimate, error = one_step(prob, LambaEM(), 1e-3)
    for i in range(2):
        assert rms(estimate[:, i]) == pytest.approx(rms(error[:, i]), rel=0.05)


@pytest.mark.parametrize("alg", [LambaEM(), LambaEulerHeun()], ids=repr)
@pytest.mark.parametrize("noise", ["diagonal", "general"])
def test_estimates_are_proportional_to_the_step(alg, noise) -> None:
    g = two_noises if noise == "general" else None
    changes = {} if g is None else {"g": g}
    prob = linear(rows=4000, noise=noise, interpretation=of(alg), **changes)
    sizes = [0.04, 0.02, 0.01]
    errors = [rms(one_step(prob, alg, h)[0]) for h in sizes]
    assert slope([1 / h for h in sizes], errors) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("alg", [LambaEM(), LambaEulerHeun()], ids=repr)
def test_additive_noise_costs_two_evaluations(alg) -> None:
    prob = linear(
        rows=5, g=lambda t, u, p: torch.ones_like(u), noise="additive", interpretation=of(alg)
    )
    sol = solve(prob, alg, dt=0.1, adaptive=False, seed=0)
    assert sol.stats.ng == 3 + 10 * 2  # three at the start, to see that it is additive
    assert float(sol.steps.error_norm.max()) < 0.05


# -- adaptive solves -----------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [LambaEM(), LambaEulerHeun()], ids=repr)
def test_the_error_follows_the_tolerance(alg) -> None:
    prob = linear(rows=50, interpretation=of(alg))
    for tol, most in ((1e-1, 30), (1e-2, 200), (1e-3, 1600)):
        sol = solve(prob, alg, rtol=tol, atol=tol, seed=2, save_everystep=False)
        exact = linear_solution(prob, 1.0, sol.noise.at([1.0])[0])
        error = rms((sol.u[-1] - exact) / (tol + tol * exact.abs()))
        # errors of steps are independent: those of n add up to the root of n
        assert error < math.sqrt(len(sol.steps))
        assert sol.stats.nf < most


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("u0", [0.0, 1.0])
def test_the_first_step_suits_the_tolerance(tol, scale, u0) -> None:
    def drift(t: Tensor, u: Tensor) -> Tensor:
        return (1 - u) / scale

    def noise(t: Tensor, u: Tensor) -> Tensor:
        return 0.4 * torch.sqrt(1 + u * u) / math.sqrt(scale)

    start = torch.full((50, 1), u0, dtype=DOUBLE)
    prob = SDEProblem(drift, noise, start, (0.0, scale))
    sol = solve(prob, LambaEM(), rtol=tol, atol=tol, seed=0)
    assert float(sol.steps.h[0]) > 0.05 * float(sol.steps.h.median())
    assert sol.stats.nreject <= 2 + 0.1 * len(sol.steps)
    assert float(sol.steps.error[0]) <= 1


def test_a_first_step_without_noise_or_drift() -> None:
    prob = linear(f=lambda t, u, p: 0 * u, g=lambda t, u, p: 0 * u)
    sol = solve(prob, LambaEM(), seed=0)
    assert len(sol.steps) == 1 and torch.equal(sol.u[-1], prob.u0)


def test_rejections_leave_the_law_of_the_path_alone() -> None:
    """The noise is largest where the step is rejected: without memory the law would be bent."""
    prob = linear(p=torch.tensor([0.0, 2.0], dtype=DOUBLE))
    ends, rejected = [], 0
    for seed in range(400):
        sol = solve(prob, LambaEM(), rtol=0.3, atol=0.3, seed=seed, save_everystep=False, dt=0.25)
        ends.append(float(sol.noise.at([1.0])[0, 0, 0]))
        rejected += sol.stats.nreject
    assert rejected > 200
    assert stats.kstest(ends, "norm").pvalue > 0.01


def test_stiffness_is_that_of_the_drift() -> None:
    prob = linear(rows=4, f=lambda t, u, p: -50 * u)
    sol = solve(prob, LambaEM(), rtol=1e-2, atol=1e-2, seed=0)
    torch.testing.assert_close(sol.steps.stiffness, torch.full_like(sol.steps.h, 50.0))


def test_small_noise_gives_what_an_ode_gives() -> None:
    sde = linear(p=torch.tensor([0.4, 1e-9], dtype=DOUBLE), interpretation="stratonovich")
    ode = ODEProblem(lambda t, u: 0.4 * u, sde.u0, (0.0, 1.0))
    sol = solve(sde, LambaEulerHeun(), rtol=1e-7, atol=1e-7, seed=0)
    exact = solve(ode, Tsit5(), rtol=1e-10, atol=1e-10)
    assert abs(float(sol.u[-1] - exact.u[-1])) < 1e-6
    assert DiscreteAdjoint().handles_noise
