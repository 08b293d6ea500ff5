"""The reversible Heun method: its step, the inverse of that, orders, adaptive solves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sdes import DOUBLE, heisenberg, linear, linear_solution, rms, two_noises
from stochastic_runs import field_of, observed, observed_against, solve
from torch import Tensor

from diffsolve import SRA1, EulerHeun, ReversibleHeun, SDEProblem
from diffsolve.solvers.stochastic.noise.path import BrownianPath

COARSE = [16, 32, 64, 128]
ALG = ReversibleHeun()


def strat(**changes: Any) -> SDEProblem:
    return linear(interpretation="stratonovich", **changes)


def curved(noise: str, rows: int = 4) -> SDEProblem:
    """Nonlinear, depending on time, with noise of a shape."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.sin(2 * u.flip(-1)) - u + t

    def g(t: Tensor, u: Tensor) -> Tensor:
        size = 0.3 + 0.2 * torch.cos(3 * t)
        if noise == "general":
            return size * torch.stack([u.sin(), u.flip(-1), torch.ones_like(u)], -1)
        return size * (torch.ones_like(u) if noise == "additive" else torch.cos(u))

    u0 = torch.linspace(-1, 1, 2 * rows, dtype=DOUBLE).reshape(rows, 2)
    return SDEProblem(f, g, u0, (0.0, 1.0), noise=noise, interpretation="stratonovich")


NOISES = ["diagonal", "scalar", "additive", "general"]


@pytest.mark.parametrize("noise", NOISES)
def test_the_step_is_that_of_the_paper(noise: str) -> None:
    """Kidger et al. (2021), algorithm 1, over two steps: in the first ``v`` is ``u``."""
    prob, h = curved(noise), 0.1
    sol = solve(prob, ALG, dt=h, adaptive=False, seed=1)
    z = z_hat = prob.u0

    def apply(G: Tensor, W: Tensor) -> Tensor:
        if noise == "general":
            return torch.einsum("rdm,rm->rd", G, W)
        return G * W

    def at(t: float, x: Tensor) -> tuple[Tensor, Tensor]:
        time = torch.tensor(t, dtype=DOUBLE)
        return prob.f(time, x), prob.g(time, x)

    mu, sigma = at(0.0, z_hat)
    for i in range(2):
        W = sol.noise.increment(i * h, (i + 1) * h).W
        z_hat = 2 * z - z_hat + mu * h + apply(sigma, W)
        mu_new, sigma_new = at((i + 1) * h, z_hat)
        z = z + (mu + mu_new) * h / 2 + apply(sigma + sigma_new, W) / 2
        mu, sigma = mu_new, sigma_new
        torch.testing.assert_close(sol.u[i + 1], z, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("h", [0.05, -0.05])
def test_steps_can_be_undone(noise: str, h: float) -> None:
    prob = curved(noise)
    field = field_of(prob)
    field.path = BrownianPath(1, field.rows, field.m)
    u = field.structure.ravel(prob.u0)
    with torch.no_grad():
        states = [ALG.init(field, 0.0, u)]
        for i in range(20):
            states.append(ALG.step(field, i * h, h, states[-1]).state)
        before = field.nf, field.ng
        state = states[-1]
        for i in reversed(range(20)):
            state = ALG.inverse(field, i * h, h, state)
            for x, y in zip(state, states[i], strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert field.nf - before[0] == field.ng - before[1] == 20


@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
def test_strong_order_one_where_noises_commute(noise: str) -> None:
    prob = strat(rows=1000, noise=noise)
    order, errors = observed(prob, ALG, lambda W: linear_solution(prob, 1.0, W), COARSE)
    assert order == pytest.approx(1.0, abs=0.12)
    assert errors[-1] < 0.02
    prob = strat(rows=1000, g=two_noises, noise="general")
    order, _ = observed(
        prob, ALG, lambda W: torch.exp(0.4 + 0.7 * W[:, :1] + 0.3 * W[:, 1:]), COARSE
    )
    assert order == pytest.approx(1.0, abs=0.12)


def test_strong_order_with_additive_noise_and_without_commutativity() -> None:
    prob = curved("additive", 200).remake(g=lambda t, u: torch.ones_like(u))
    order, _ = observed_against(prob, ALG, [32, 64, 128, 256], SRA1(), 1024)
    assert order == pytest.approx(1.0, abs=0.1)
    prob = heisenberg(500, interpretation="stratonovich")
    order, _ = observed_against(prob, ALG, COARSE, EulerHeun(), 1024)
    assert order == pytest.approx(0.5, abs=0.1)


def test_without_noise_the_order_is_two() -> None:
    prob = strat(g=lambda t, u, p: torch.zeros_like(u), f=lambda t, u, p: u * torch.cos(2 * t))
    exact = math.exp(math.sin(2.0) / 2)
    errors = [
        abs(float(solve(prob, ALG, dt=1 / n, adaptive=False, seed=0).u[-1]) - exact)
        for n in (32, 64)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("noise", ["diagonal", "general"])
def test_the_error_follows_the_tolerance(noise: str) -> None:
    changes = {"g": two_noises} if noise == "general" else {}
    prob = strat(rows=50, noise=noise, **changes)
    for tol, most in ((1e-1, 14), (1e-2, 110), (1e-3, 660)):
        sol = solve(prob, ALG, rtol=tol, atol=tol, seed=2, save_everystep=False)
        W = sol.noise.at([1.0])[0]
        drive = 0.7 * W[:, :1] + (0.3 * W[:, 1:] if noise == "general" else 0)
        exact = torch.exp(0.4 + drive)
        error = rms((sol.u[-1] - exact) / (tol + tol * exact.abs()))
        assert 0.02 < error < 2
        assert sol.stats.nf < most and sol.stats.nreject <= 15


def test_a_stop_begins_anew() -> None:
    """Where ``f`` and ``g`` may jump, ``v`` is ``u`` again."""
    prob = curved("diagonal")
    stopped = solve(prob, ALG, dt=0.1, adaptive=False, seed=1, tstops=[0.5])
    half = solve(prob.remake(tspan=(0.0, 0.5)), ALG, dt=0.1, adaptive=False, seed=1)
    rest = prob.remake(u0=half.u[-1], tspan=(0.5, 1.0))
    other = solve(rest, ALG, dt=0.1, adaptive=False, noise=stopped.noise)
    torch.testing.assert_close(stopped.u[-1], other.u[-1], rtol=1e-12, atol=1e-13)


def test_the_stiffness_is_that_of_the_drift() -> None:
    prob = strat(rows=4, f=lambda t, u, p: -20 * u)
    sol = solve(prob, ALG, dt=0.01, adaptive=False, seed=0)
    torch.testing.assert_close(sol.steps.stiffness, torch.full_like(sol.steps.h, 20.0))


def test_solutions_go_back_where_they_came_from() -> None:
    """A Stratonovich equation solved along the reversed path, up to the order of the method."""
    prob = strat(rows=200)
    sol = solve(prob, ALG, dt=1 / 256, adaptive=False, seed=1)
    back = prob.remake(u0=sol.u[-1], tspan=(1.0, 0.0))
    end = solve(back, ALG, dt=1 / 256, adaptive=False, noise=sol.noise)
    assert rms(end.u[-1] - prob.u0) < 0.02
