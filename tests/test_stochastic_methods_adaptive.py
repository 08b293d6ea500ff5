"""Stochastic methods: estimates of error and stiffness, adaptive solves, forms of problems."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from sdes import DOUBLE, linear, linear_solution, rms, slope
from stochastic_runs import one_step, solve
from strong_problems import SRA_METHODS, pendulum, rotation, sinh, sinh_solution
from torch import Tensor

from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    SRA1,
    SRIW1,
    ImplicitRKMil,
    RKMil,
    RKMilCommute,
    RKMilGeneral,
    SDEProblem,
)

# -- error and stiffness estimates ---------------------------------------------------------------


@pytest.mark.parametrize(("alg", "order"), [(SOSRI(), 1.5), (SRIW1(), 1.5), (RKMil(), 1.0)])
def test_estimates_have_the_order_by_which_steps_are_chosen(alg: Any, order: float) -> None:
    sizes = [0.04, 0.02, 0.01]
    errors = [rms(one_step(linear(rows=3000), alg, h)[0].error) for h in sizes]
    # the part of the drift in that of Milstein's method is of order 1.5
    assert slope([1 / h for h in sizes], errors) == pytest.approx(order, abs=0.07)
    assert alg.order + 0.5 == order


@pytest.mark.parametrize("alg", SRA_METHODS, ids=repr)
def test_estimates_of_sra(alg: Any) -> None:
    sizes = [0.04, 0.02, 0.01]
    errors = [rms(one_step(pendulum(2000, 3), alg, h)[0].error) for h in sizes]
    assert slope([1 / h for h in sizes], errors) == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1()], ids=repr)
def test_the_estimate_of_sri_is_the_error_of_milsteins_method(alg: Any) -> None:
    """The embedded solution is a Milstein scheme with Euler's drift: the magnitudes add up."""
    prob, h = linear(rows=4000), 0.01
    step, noise = one_step(prob, alg, h)
    W = noise.increment(0.0, h).W
    a, b = prob.p
    milstein = prob.u0 * (1 + a * h + b * W + b * b * (W * W - h) / 2)
    off = rms(milstein - linear_solution(prob, h, W))
    assert off < rms(step.error) < 3 * off


@pytest.mark.parametrize("alg", [RKMil(), RKMilCommute(), RKMilGeneral()], ids=repr)
def test_the_estimate_of_milstein_is_the_error_of_eulers_method(alg: Any) -> None:
    prob, h = linear(rows=4000), 0.01
    step, noise = one_step(prob, alg, h)
    W = noise.increment(0.0, h).W
    euler = 1 + prob.p[0] * h + prob.p[1] * W
    error = (euler - linear_solution(prob, h, W)).abs().reshape(-1)
    assert rms(step.error - error) < 0.25 * rms(error)


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1(), RKMil(), ImplicitRKMil()], ids=repr)
def test_stiffness_is_that_of_the_drift(alg: Any) -> None:
    prob = linear(rows=4, f=lambda t, u, p: -50 * u)
    sol = solve(prob, alg, rtol=1e-2, atol=1e-2, seed=0)
    torch.testing.assert_close(sol.steps.stiffness, torch.full_like(sol.steps.h, 50.0))


@pytest.mark.parametrize("alg", SRA_METHODS, ids=repr)
def test_stiffness_with_additive_noise(alg: Any) -> None:
    prob = pendulum(4, 3, f=lambda t, u: -50 * u)
    sol = solve(prob, alg, rtol=1e-2, atol=1e-2, seed=0)
    torch.testing.assert_close(sol.steps.stiffness, torch.full_like(sol.steps.h, 50.0))


# -- adaptive solves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alg", "limits"),
    [(SOSRI(), (30, 95, 275)), (SRIW1(), (16, 50, 145)), (RKMil(), (10, 50, 410))],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["linear", "sinh"])
def test_the_error_follows_the_tolerance(alg: Any, limits: tuple[int, ...], kind: str) -> None:
    prob = linear(rows=50) if kind == "linear" else sinh(50)
    errors = []
    for tol, most in zip((1e-1, 1e-2, 1e-3), limits, strict=True):
        sol = solve(prob, alg, rtol=tol, atol=tol, seed=2, save_everystep=False)
        W = sol.noise.at([1.0])[0]
        exact = linear_solution(prob, 1.0, W) if kind == "linear" else sinh_solution(1.0, W)
        errors.append(rms((sol.u[-1] - exact) / (tol + tol * exact.abs())))
        assert errors[-1] < 1.5
        assert sol.stats.nf < most and sol.stats.nreject <= 5
    assert min(errors) > 0.02  # and no work for nothing


@pytest.mark.slow
@pytest.mark.parametrize("alg", SRA_METHODS, ids=repr)
def test_the_error_follows_the_tolerance_with_additive_noise(alg: Any) -> None:
    prob = pendulum(50, 3)
    stages = 3 if isinstance(alg, SOSRA) else 2
    for tol, most in ((1e-1, 13), (1e-2, 40), (1e-3, 150)):
        sol = solve(prob, alg, rtol=tol, atol=tol, seed=2, save_everystep=False)
        fine = solve(prob, SRA1(), dt=1 / 512, adaptive=False, noise=sol.noise)
        error = rms((sol.u[-1] - fine.u[-1]) / (tol + tol * fine.u[-1].abs()))
        assert 0.02 < error < 1
        assert sol.stats.nf < stages * most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prob", "alg"),
    [(linear(rows=20), SOSRI()), (sinh(20), SRIW1()), (pendulum(20), SRA1())],
    ids=["linear", "sinh", "pendulum"],
)
def test_tighter_tolerances_on_the_same_path(prob: SDEProblem, alg: Any) -> None:
    """Replayed noise: the solutions converge to the one that knows most of the path."""
    fine = solve(prob, alg, rtol=2e-5, atol=2e-5, seed=7)
    errors = []
    for tol in (1e-2, 1e-3, 1e-4):
        sol = solve(prob, alg, rtol=tol, atol=tol, noise=fine.noise, save_everystep=False)
        errors.append(rms(sol.u[-1] - fine.u[-1]))
    assert errors[1] < 0.3 * errors[0] and errors[2] < 0.3 * errors[1]
    assert errors[2] < 2e-4


def test_burst_of_noise_is_resolved() -> None:
    """Steps are short where noise acts, and long where it does not."""

    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return 2 * torch.exp(-((t - 0.5) ** 2) / 0.002) * u

    sol = solve(linear(rows=20, g=g), SOSRI(), rtol=1e-2, atol=1e-2, seed=0, dtmax=0.05)
    t, h = sol.steps.t, sol.steps.h
    inside = (t - 0.5).abs() < 0.05
    assert sol.stats.nreject > 0
    assert float(h[inside].min()) < 0.2 * float(h[~inside].max())


def test_rejections_leave_the_law_of_the_path_alone() -> None:
    prob = linear(p=torch.tensor([0.0, 2.0], dtype=DOUBLE))
    ends, rejected = [], 0
    for seed in range(300):
        sol = solve(prob, SRIW1(), rtol=0.1, atol=0.1, seed=seed, save_everystep=False, dt=0.5)
        ends.append(float(sol.noise.at([1.0])[0, 0, 0]))
        rejected += sol.stats.nreject
    assert rejected > 100
    assert stats.kstest(ends, "norm").pvalue > 0.01


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1(), RKMil()], ids=repr)
def test_small_noise_gives_what_an_ode_gives(alg: Any) -> None:
    prob = linear(p=torch.tensor([0.4, 1e-9], dtype=DOUBLE))
    sol = solve(prob, alg, rtol=1e-6, atol=1e-6, seed=0)
    off = abs(float(sol.u[-1]) - math.exp(0.4))
    # the drift has order 2 in SRI methods, order 1 in Milstein's, whose errors of n steps add up
    assert off < (1e-3 if isinstance(alg, RKMil) else 1e-6)
    assert len(sol.steps) < 700


# -- forms of problems ---------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1(), RKMil(), ImplicitRKMil()], ids=repr)
def test_both_shapes_of_scalar_noise_are_one(alg: Any) -> None:
    flat, matrix = (
        solve(rotation(3, shape), alg, rtol=1e-2, atol=1e-2, seed=4) for shape in (2, 3)
    )
    torch.testing.assert_close(flat.u, matrix.u)
    torch.testing.assert_close(flat.steps.error, matrix.steps.error)


@pytest.mark.parametrize("alg", [SOSRI(), RKMil()], ids=repr)
def test_states_of_other_forms(alg: Any) -> None:
    """A pytree and a flat state: the same numbers as a batch of one."""
    p = torch.tensor([0.4, 0.7], dtype=DOUBLE)
    batch = linear(d=3)
    flat = batch.remake(u0=torch.ones(3, dtype=DOUBLE))
    tree = SDEProblem(
        lambda t, u, p: {k: p[0] * x for k, x in u.items()},
        lambda t, u, p: {k: p[1] * x for k, x in u.items()},
        {"a": torch.ones(2, dtype=DOUBLE), "b": torch.ones((), dtype=DOUBLE)}, (0.0, 1.0), p,
    )  # fmt: skip
    ends = [solve(x, alg, seed=1, rtol=1e-2, atol=1e-2).u for x in (batch, flat, tree)]
    torch.testing.assert_close(ends[0][-1, 0], ends[1][-1])
    torch.testing.assert_close(torch.cat([ends[2]["a"][-1], ends[2]["b"][-1:]]), ends[1][-1])


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1(), RKMil(), ImplicitRKMil()], ids=repr)
def test_single_precision(alg: Any) -> None:
    prob = linear(rows=20).remake(u0=torch.ones(20, 1), p=torch.tensor([0.4, 0.7]))
    sol = solve(prob, alg, dt=1 / 64, adaptive=False, seed=1)
    double = solve(linear(rows=20), alg, dt=1 / 64, adaptive=False, seed=1)
    assert sol.u.dtype == torch.float32 and sol.steps.error.dtype == torch.float32
    torch.testing.assert_close(sol.u.double(), double.u, rtol=1e-4, atol=1e-5)


def test_saved_values_follow_the_path() -> None:
    prob = linear(rows=200)
    times = torch.linspace(0, 1, 41, dtype=DOUBLE)
    sol = solve(prob, SOSRI(), rtol=1e-2, atol=1e-2, seed=5, saveat=times, dtmax=0.05)
    W = sol.noise.at(times.tolist())
    off = [
        rms(u - linear_solution(prob, float(t), w)) for t, u, w in zip(times, sol.u, W, strict=True)
    ]
    assert max(off) < 0.03
    # a straight line between the steps, without the path, would be far off
    euler = solve(prob, EM(), dt=0.025, adaptive=False, noise=sol.noise)
    assert max(off) < 0.5 * rms(euler.u[-1] - linear_solution(prob, 1.0, W[-1]))
