"""Regularizers on the steps of SDEs: global ones, and those of one step from a random time."""

from __future__ import annotations

import pytest
import torch
from gradients import assert_near, leaf
from sdes import DOUBLE, heisenberg, linear, rms, solve
from torch import Tensor, nn

from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    DiscreteAdjoint,
    LambaEM,
    LambaEulerHeun,
    SDEProblem,
    regularization,
)
from diffsolve.regularization import (
    error_estimate,
    local_error_estimate,
    local_stiffness_estimate,
    stiffness_estimate,
)

LOOSE = {"rtol": 1e-1, "atol": 1e-1, "seed": 2}
ADAPTIVE = [LambaEM(), LambaEulerHeun(), SOSRI()]


def problem(alg, **changes) -> SDEProblem:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return p[0] * torch.sin(2 * u)

    interpretation = next(iter(alg.interpretation))
    return linear(4, 2, f=f, p=leaf([1.0, 0.5]), interpretation=interpretation, **changes)


@pytest.mark.parametrize("alg", ADAPTIVE, ids=repr)
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_estimates_of_the_steps(alg, reduction) -> None:
    prob = problem(alg)
    sol = solve(prob, alg, **LOOSE)
    h = sol.steps.h.abs()
    reduce = getattr(torch, reduction)
    assert_near(error_estimate(sol, reduction), reduce(sol.steps.error.detach() * h), 1e-12)
    assert_near(stiffness_estimate(sol, reduction), reduce(sol.steps.stiffness.detach()), 1e-12)
    loss = error_estimate(sol, reduction) + stiffness_estimate(sol, reduction)
    (got,) = torch.autograd.grad(loss, prob.p)
    taped = solve(prob, alg, sensealg=DiscreteAdjoint(tape=True), **LOOSE)
    loss = error_estimate(taped, reduction) + stiffness_estimate(taped, reduction)
    assert_near(got, torch.autograd.grad(loss, prob.p)[0], 1e-11)


def test_they_make_dynamics_easier_to_solve() -> None:
    torch.manual_seed(0)
    drift = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        for p in drift.parameters():
            p.mul_(4)
    u0 = torch.ones(8, 2, dtype=DOUBLE)
    prob = SDEProblem(lambda t, u: drift(u), lambda t, u: 0.1 * u, u0, (0.0, 1.0))
    optimizer = torch.optim.Adam(drift.parameters(), lr=0.02)
    options = {"rtol": 1e-2, "atol": 1e-2, "save_everystep": False}
    before = solve(prob, SOSRI(), seed=1, **options).stats.nf
    for i in range(20):
        optimizer.zero_grad()
        error_estimate(solve(prob, SOSRI(), seed=i, **options), weight_by_step=False).backward()
        optimizer.step()
    assert solve(prob, SOSRI(), seed=1, **options).stats.nf < 0.8 * before


# -- one step from a random time -----------------------------------------------------------------


@pytest.mark.parametrize("alg", ADAPTIVE, ids=repr)
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_local_estimates(alg, sampling) -> None:
    prob = problem(alg)
    sol = solve(prob, alg, **LOOSE)
    points = list(sol.noise.times)

    def local(seed: int, p: Tensor | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        error = local_error_estimate(sol, sampling, generator=generator)
        return error + local_stiffness_estimate(sol, sampling, generator=generator)

    values = [local(i) for i in range(4)]
    assert len({float(v.detach()) for v in values}) == 4
    assert float(local(1).detach()) == float(values[1].detach())  # the generator decides all
    for value in values:
        (grad,) = torch.autograd.grad(value, prob.p)
        assert bool(torch.isfinite(grad).all()) and bool((grad != 0).any())
    # it looks at the path where the state is, and follows another one from there
    known = [t for t in sol.noise.times if t not in points]
    assert len(known) <= 8


def test_the_local_step_follows_a_path_of_its_own() -> None:
    prob = problem(LambaEM())
    sol = solve(prob, LambaEM(), **LOOSE)
    at = (0.25, torch.ones(4, 2, dtype=DOUBLE))
    torch.manual_seed(0)
    a, b = (local_error_estimate(sol, at=at).detach() for _ in range(2))
    torch.manual_seed(0)
    again = local_error_estimate(sol, at=at).detach()
    assert float(a) != float(b) and float(a) == float(again)


@pytest.mark.parametrize("alg", ADAPTIVE, ids=repr)
def test_the_gradient_of_a_local_estimate(alg, monkeypatch) -> None:
    """Against differences, along one path and with one size of the step."""
    monkeypatch.setattr(regularization, "initial_step", lambda *_: 0.05)
    u = torch.linspace(0.5, 1.5, 8, dtype=DOUBLE).reshape(4, 2)

    def estimate(p: Tensor) -> Tensor:
        sol = solve(problem(alg).remake(p=p), alg, dt=0.5, adaptive=False, **LOOSE)
        generator = torch.Generator().manual_seed(3)
        error = local_error_estimate(sol, at=(0.25, u), generator=generator)
        return error + local_stiffness_estimate(sol, at=(0.25, u), generator=generator)

    p = leaf([1.0, 0.5])
    (got,) = torch.autograd.grad(estimate(p), p)
    differences = []
    for i in range(2):
        eps = 1e-6 * torch.eye(2, dtype=DOUBLE)[i]
        values = [float(estimate(p.detach() + sign * eps)) for sign in (1, -1)]
        differences.append((values[0] - values[1]) / 2e-6)
    assert_near(got, differences, 1e-7)


def test_gradients_flow_through_the_state_of_a_local_step() -> None:
    prob = problem(SOSRI())
    sol = solve(prob, SOSRI(), saveat=[0.3, 1.0], **LOOSE)
    estimate = local_error_estimate(sol, at=(0.3, sol.u[0]))
    assert float(torch.autograd.grad(estimate, prob.p)[0].abs().sum()) > 0


def test_local_steps_of_general_noise_and_of_additive_noise() -> None:
    scale = leaf(1.2)
    prob = heisenberg(6)
    g = prob.g
    sol = solve(prob.remake(g=lambda t, u: scale * g(t, u)), LambaEM(), dt=0.1, **LOOSE)
    local_error_estimate(sol, generator=torch.Generator().manual_seed(1)).backward()
    assert float(scale.grad) != 0
    additive = problem(SOSRA()).remake(
        noise="additive", g=lambda t, u, p: p[1] * torch.ones_like(u)
    )
    sol = solve(additive, SOSRA(), **LOOSE)
    (grad,) = torch.autograd.grad(local_error_estimate(sol), additive.p)
    assert rms(grad) > 0


def test_what_a_method_does_not_estimate() -> None:
    prob = problem(EM())
    sol = solve(prob, EM(), dt=0.1, seed=1)
    with pytest.raises(ValueError, match="EM has no error estimate"):
        local_error_estimate(sol)
    with pytest.raises(ValueError, match="EM has no stiffness estimate"):
        local_stiffness_estimate(sol)
    with pytest.raises(RuntimeError, match=r"steps\.error has no gradient"):
        error_estimate(sol).backward()
    with pytest.raises(RuntimeError, match=r"steps\.stiffness has no gradient"):
        stiffness_estimate(sol).backward()
