"""ImplicitEM and ImplicitRKMil: orders, stiff drift, Newton's iteration, exact gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradients import assert_near
from sdes import DOUBLE, heisenberg, linear, linear_solution, rms, two_noises
from stochastic_runs import integral_of, observed, observed_against, one_step, same_path, solve
from torch import Tensor

from diffsolve import (
    EM,
    SOSRI,
    DiscreteAdjoint,
    ImplicitEM,
    ImplicitRKMil,
    LambaEM,
    ReturnCode,
    RKMil,
    SDEProblem,
    SolveError,
)

METHODS = [ImplicitEM(), ImplicitRKMil(), ImplicitRKMil("stratonovich")]
MILSTEIN = METHODS[1:]
COARSE = [16, 32, 64, 128]


def stiff(rows: int = 1, rate: float = 1000.0, **changes: Any) -> SDEProblem:
    """``du = -rate (u - cos t) dt + (0.2 + 0.1 u) dW``: fast decay onto a slow curve."""
    u0 = torch.full((rows, 1), 2.0, dtype=DOUBLE)
    prob = SDEProblem(
        lambda t, u: -rate * (u - torch.cos(t)), lambda t, u: 0.2 + 0.1 * u, u0, (0.0, 1.0)
    )
    return prob.remake(**changes)


# -- strong order --------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", METHODS, ids=repr)
@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
def test_strong_order(alg: Any, noise: str) -> None:
    prob = linear(rows=1000, noise=noise, interpretation=integral_of(alg))
    prob = prob.remake(p=torch.tensor([-0.5, 0.7], dtype=DOUBLE))
    order, errors = observed(prob, alg, lambda W: linear_solution(prob, 1.0, W), COARSE)
    assert order == pytest.approx(alg.strong_order, abs=0.12)
    assert errors[-1] < (0.03 if isinstance(alg, ImplicitEM) else 0.006)


@pytest.mark.parametrize("alg", MILSTEIN, ids=repr)
def test_strong_order_with_nonlinear_drift_and_noise(alg: Any) -> None:
    u0 = torch.full((300, 2), 0.5, dtype=DOUBLE)
    prob = SDEProblem(
        lambda t, u: torch.sin(3 * u.flip(-1)) - u**3 + t,
        lambda t, u: 0.3 + 0.3 * torch.cos(2 * u),
        u0,
        (0.0, 1.0),
        interpretation=integral_of(alg),
    )
    order, _ = observed_against(prob, alg, COARSE, RKMil(integral_of(alg)), 2048)
    assert order == pytest.approx(1.0, abs=0.12)


@pytest.mark.slow
def test_strong_order_with_additive_and_general_noise() -> None:
    def g(t: Tensor, u: Tensor) -> Tensor:
        return (1 + t) * torch.tensor([[0.5, 0.2], [0.0, 0.3]], dtype=DOUBLE).expand(*u.shape, 2)

    u0 = torch.ones(200, 2, dtype=DOUBLE)
    additive = SDEProblem(lambda t, u: torch.sin(u), g, u0, (0.0, 1.0), noise="additive")
    order, _ = observed_against(additive, ImplicitEM(), COARSE, EM(), 2048)
    assert order == pytest.approx(1.0, abs=0.12)
    order, _ = observed_against(heisenberg(500), ImplicitEM(), COARSE, EM(), 1024)
    assert order == pytest.approx(0.5, abs=0.1)
    commuting = linear(rows=500, g=two_noises, noise="general")
    order, _ = observed_against(commuting, ImplicitEM(), COARSE, EM(), 2048)
    assert order == pytest.approx(0.5, abs=0.12)


# -- stiff drift ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_steps_where_explicit_methods_explode(alg: Any) -> None:
    prob = stiff(50, interpretation=integral_of(alg))
    h = 0.05
    explicit = EM() if integral_of(alg) == "ito" else RKMil("stratonovich")
    lost = solve(prob, explicit, dt=h, adaptive=False, seed=1)
    assert float(lost.u[-1].abs().max()) > 1e10
    sol = solve(prob, alg, dt=h, adaptive=False, seed=1)
    curve = torch.cos(sol.t)[:, None, None]
    # after some steps the noise of the last one is left, damped by 1 + 1000 h
    assert float((sol.u - curve)[6:].abs().max()) < 0.06


def test_the_stationary_law_does_not_depend_on_the_rate() -> None:
    """An Ornstein-Uhlenbeck process: implicit Euler's variance is b^2 / (2 a + a^2 h)."""
    rate, size, h = 1000.0, 5.0, 0.01
    u0 = torch.zeros(4000, 1, dtype=DOUBLE)
    prob = SDEProblem(
        lambda t, u: -rate * u, lambda t, u: torch.full_like(u, size), u0, (0.0, 0.1),
        noise="additive",
    )  # fmt: skip
    sol = solve(prob, ImplicitEM(), dt=h, adaptive=False, seed=1)
    expected = size**2 / (2 * rate + rate**2 * h)
    assert float(sol.u[-1].var()) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_adaptive_steps_are_those_of_the_slow_part(alg: Any) -> None:
    prob = stiff(20, interpretation=integral_of(alg))
    tol = 1e-2
    sol = solve(prob, alg, rtol=tol, atol=tol, seed=2)
    assert float(sol.steps.h.max()) > 0.05  # explicit ones could not take more than 0.002
    assert len(sol.steps) < 60 and sol.stats.nreject <= 5
    off = sol.u[-1] - math.cos(1.0)
    assert float(off.abs().max()) < 5 * tol
    torch.testing.assert_close(sol.steps.stiffness, torch.full_like(sol.steps.h, 1000.0))
    if integral_of(alg) == "ito":
        explicit = solve(prob, LambaEM(), rtol=tol, atol=tol, seed=2, save_everystep=False)
        assert explicit.stats.nf > 3 * sol.stats.nf


@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_the_error_follows_the_tolerance(alg: Any) -> None:
    prob = linear(rows=50, interpretation=integral_of(alg))
    for tol, most in ((1e-1, 10), (1e-2, 60), (1e-3, 550)):
        sol = solve(prob, alg, rtol=tol, atol=tol, seed=2, save_everystep=False)
        exact = linear_solution(prob, 1.0, sol.noise.at([1.0])[0])
        error = rms((sol.u[-1] - exact) / (tol + tol * exact.abs()))
        # errors of steps of Euler-Maruyama's method add up to the root of their number
        assert 0.02 < error < (math.sqrt(len(sol.steps)) if isinstance(alg, ImplicitEM) else 1.5)
        assert len(sol.steps) < most


@pytest.mark.parametrize("alg", [ImplicitEM(), ImplicitRKMil()], ids=repr)
def test_the_estimate_is_the_error_of_an_implicit_euler_step(alg: Any) -> None:
    prob, h = linear(rows=4000), 0.01
    step, noise = one_step(prob, alg, h)
    W = noise.increment(0.0, h).W
    euler = (1 + prob.p[1] * W) / (1 - prob.p[0] * h)
    error = (euler - linear_solution(prob, h, W)).abs().reshape(-1)
    assert rms(step.error - error) < 0.25 * rms(error)


def test_the_estimate_sees_levy_areas() -> None:
    step, _ = one_step(heisenberg(20_000), ImplicitEM(), 0.1)
    assert rms(step.error.reshape(-1, 3)[:, 2]) == pytest.approx(0.05, rel=0.03)  # h / 2


def test_small_noise_gives_what_the_implicit_euler_method_gives() -> None:
    prob = stiff(1, g=lambda t, u: 1e-9 * u)
    sol = solve(prob, ImplicitRKMil(), rtol=1e-3, atol=1e-3, seed=0)
    assert abs(float(sol.u[-1]) - math.cos(1.0)) < 2e-3
    assert len(sol.steps) < 150


# -- work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_work_of_a_linear_drift(alg: Any) -> None:
    """One Jacobian a step, and one iteration: the first solves a linear equation."""
    prob = stiff(3, 10.0, interpretation=integral_of(alg))
    few, many = (solve(prob, alg, dt=1 / n, adaptive=False, seed=0).stats for n in (10, 30))
    steps = 20
    per_step = 3 if repr(alg) == "ImplicitRKMil()" else 2
    assert many.ng - few.ng == per_step * steps
    assert many.njac - few.njac == many.nlu - few.nlu == steps
    assert many.nnewton - few.nnewton <= 2 * steps
    assert many.nf - few.nf == steps + many.nnewton - few.nnewton


def test_additive_noise_costs_two_evaluations() -> None:
    prob = linear(rows=3, g=lambda t, u, p: torch.ones_like(u), noise="additive")
    few, many = (solve(prob, ImplicitEM(), dt=1 / n, adaptive=False, seed=0) for n in (10, 30))
    assert many.stats.ng - few.stats.ng == 40


def test_the_jacobian_of_a_batch_is_a_block_a_path() -> None:
    count = 400
    prob = stiff(count, 100.0)
    sol = solve(prob, ImplicitRKMil(), dt=0.1, adaptive=False, seed=0)
    assert sol.success and sol.stats.njac == 10


@pytest.mark.parametrize("alg", METHODS[:2], ids=repr)
def test_an_equation_without_solution_fails(alg: Any) -> None:
    prob = SDEProblem(
        lambda t, u: 100 * (1 + u * u),
        lambda t, u: 0.1 * u,
        torch.ones(1, 1, dtype=DOUBLE),
        (0.0, 1.0),
    )
    with pytest.raises(SolveError) as failed:
        solve(prob, alg, dt=0.5, adaptive=False, seed=0)
    assert failed.value.retcode is ReturnCode.NEWTON_FAILED


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 2])
@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_noise_may_lead_far_from_where_the_matrix_was_taken(alg: Any, n: int) -> None:
    """A double well: the equation of a step has one solution for ``h < 1``, and it is found."""
    u0 = torch.ones(1000, 1, dtype=DOUBLE)
    prob = SDEProblem(
        lambda t, u: u - u**3, lambda t, u: torch.full_like(u, 0.7), u0, (0.0, 1.0),
        interpretation=integral_of(alg),
    )  # fmt: skip
    for seed in range(8):
        sol = solve(prob, alg, dt=1 / n, adaptive=False, seed=seed)
        starts, W = sol.u[:-1], sol.noise.at(sol.t.tolist()).diff(dim=0)
        new = sol.u[1:]
        # iterations leave a hundredth of the tolerance, 1e-3 |u|, of the solution
        assert rms(starts + 0.7 * W + (new - new**3) / n - new) < 5e-5


def test_gradients_and_estimates_of_steps_that_were_hard_to_solve() -> None:
    """The estimate is made with the matrix at the start of the step, on the tape and off it."""
    u0 = torch.ones(300, 1, dtype=DOUBLE)
    prob = SDEProblem(
        lambda t, u, p: p[0] * u - u**3, lambda t, u, p: p[1] * torch.ones_like(u), u0, (0.0, 1.0),
        torch.tensor([1.0, 0.7], dtype=DOUBLE), noise="additive",
    )  # fmt: skip
    options = {"dt": 0.5, "adaptive": False, "seed": 0, "rtol": 1e-9, "atol": 1e-9}
    plain = solve(prob, ImplicitEM(), **options)
    assert plain.stats.njac > len(plain.steps)  # the matrix was made anew
    grads = []
    for sensealg in SENSEALGS:
        p = prob.p.clone().requires_grad_()
        sol = solve(prob.remake(p=p), ImplicitEM(), sensealg=sensealg, **options)
        torch.testing.assert_close(sol.steps.error, plain.steps.error, rtol=1e-7, atol=0)
        torch.testing.assert_close(sol.steps.stiffness, plain.steps.stiffness, rtol=1e-7, atol=0)
        loss = sol.u[-1].square().mean() + sol.steps.error.sum()
        grads.append(torch.autograd.grad(loss, p)[0])
    for found in grads[1:]:
        assert_near(found, grads[0], 1e-6)


def test_what_a_failure_says() -> None:
    """One size was tried, and there is no Rosenbrock method for SDEs."""
    prob = SDEProblem(
        lambda t, u: 100 * (1 + u * u), lambda t, u: 0.1 * u, torch.ones(1, 1, dtype=DOUBLE),
        (0.0, 1.0),
    )  # fmt: skip
    with pytest.raises(SolveError) as failed:
        solve(prob, ImplicitEM(), dt=0.5, adaptive=False, seed=0)
    message = str(failed.value)
    assert "any step size" not in message and "Rosenbrock" not in message
    assert "smaller dt" in message


def test_nothing_of_a_failed_step_stays() -> None:
    """A step that Newton's iteration could not solve is tried again, half as long."""
    prob = SDEProblem(
        lambda t, u: -50 * (torch.exp(4 * u) - 1),
        lambda t, u: 0.1 * u,
        torch.full((1, 1), 3.0, dtype=DOUBLE),
        (0.0, 0.1),
    )
    sol = solve(prob, ImplicitRKMil(), rtol=1e-2, atol=1e-2, dt=0.1, seed=0)
    assert sol.success and sol.stats.nreject > 0
    assert abs(float(sol.u[-1])) < 0.2


# -- gradients -----------------------------------------------------------------------------------

SENSEALGS = [DiscreteAdjoint(), DiscreteAdjoint(checkpoints=3), DiscreteAdjoint(tape=True)]


@pytest.mark.parametrize("sensealg", SENSEALGS, ids=["steps", "checkpoints", "tape"])
@pytest.mark.parametrize("stratonovich", [False, True])
def test_gradients_of_linear_equations_are_those_of_the_recursion(
    sensealg: Any, stratonovich: bool
) -> None:
    """``u_new = u (1 + b W + b^2 (W^2 - h) / 2) / (1 - a h)``: nothing is solved approximately."""
    alg = ImplicitRKMil("stratonovich" if stratonovich else "ito")
    prob, h, n = linear(rows=5, interpretation=integral_of(alg)), 0.125, 8
    p = torch.tensor([-3.0, 0.6], dtype=DOUBLE, requires_grad=True)
    u0 = torch.linspace(0.5, 1.5, 5, dtype=DOUBLE)[:, None].requires_grad_()
    sol = solve(
        prob.remake(p=p, u0=u0), alg, sensealg=sensealg, dt=h, adaptive=False, seed=1, rtol=1e-9,
        atol=1e-12,
    )  # fmt: skip
    weights = torch.linspace(1, 2, sol.u.numel(), dtype=DOUBLE).reshape(sol.u.shape)
    found = torch.autograd.grad((weights * sol.u**2).sum(), (p, u0))
    q, u = p.detach().clone().requires_grad_(), u0.detach().clone().requires_grad_()
    values = [u]
    for i in range(n):
        W = sol.noise.increment(i * h, (i + 1) * h).W
        noise = 1 + q[1] * W + q[1] ** 2 * (W * W - (0 if stratonovich else h)) / 2
        values.append(values[-1] * noise / (1 - q[0] * h))
    expected = torch.autograd.grad((weights * torch.stack(values) ** 2).sum(), (q, u))
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, 1e-12)


def nonlinear(kind: str, interpretation: str) -> SDEProblem:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return -p[0] * u**3 + torch.sin(3 * t) + 0.2 * u.flip(-1)

    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        size = p[1] * (1 + t)
        if kind == "general":
            return torch.stack([size * u.sin(), 0.2 * u.flip(-1), 0.1 * torch.ones_like(u)], -1)
        if kind == "additive":
            return size * torch.ones_like(u)
        return size * u.sin() if kind == "diagonal" else (size * u.cos())[..., None]

    u0 = torch.linspace(0.8, 1.4, 6, dtype=DOUBLE).reshape(3, 2)
    p = torch.tensor([1.0, 0.6], dtype=DOUBLE)
    return SDEProblem(f, g, u0, (0.0, 1.0), p, noise=kind, interpretation=interpretation)


CASES = [(alg, kind) for alg in METHODS for kind in ("diagonal", "scalar", "general", "additive")
         if kind in alg.noise_types]  # fmt: skip


def weighed(sol: Any) -> Tensor:
    """Of values in and between the steps, and of the estimates."""
    weights = torch.linspace(0.5, 2.0, sol.u.numel(), dtype=DOUBLE).reshape(sol.u.shape)
    steps = sol.steps
    return (
        (weights * sol.u**2).sum() + 1e-9 * steps.error.sum() + steps.error_norm.sum()
        + 0.1 * steps.stiffness.sum()
    )  # fmt: skip


@pytest.mark.parametrize(("alg", "kind"), CASES, ids=[f"{a!r}-{k}" for a, k in CASES])
def test_gradients_against_differences(alg: Any, kind: str) -> None:
    prob = nonlinear(kind, integral_of(alg))
    # iterations go on to rounding where the tolerance is tight
    options = {
        "alg": alg, "dt": 0.02, "adaptive": False, "seed": 3, "rtol": 1e-9, "atol": 1e-9,
        "saveat": [0.13, 0.5, 0.51, 1.0],
    }  # fmt: skip
    eps, expected = 1e-6, []
    for i in range(2):
        values = []
        for sign in (1, -1):
            p = prob.p.clone()
            p[i] += sign * eps
            values.append(float(weighed(solve(prob.remake(p=p), **options))))
        expected.append((values[0] - values[1]) / (2 * eps))
    for sensealg in SENSEALGS:
        p = prob.p.clone().requires_grad_()
        sol = solve(prob.remake(p=p), sensealg=sensealg, **options)
        (found,) = torch.autograd.grad(weighed(sol), p)
        assert_near(found, torch.tensor(expected, dtype=DOUBLE), 2e-6)


def test_the_reverse_pass_does_not_iterate() -> None:
    prob = nonlinear("diagonal", "ito")
    p = prob.p.clone().requires_grad_()
    sol = solve(prob.remake(p=p), ImplicitRKMil(), dt=0.1, adaptive=False, seed=0)
    sol.u[-1].sum().backward()
    assert sol.stats.nnewton > 0 and sol.stats.adjoint is not None
    assert sol.stats.adjoint.nnewton == 0


@pytest.mark.parametrize(
    "options",
    [{"rtol": 1e-2, "atol": 1e-2}, {"dt": 0.05, "adaptive": False}],
    ids=["adaptive", "fixed"],
)
def test_gradients_of_all_sensealgs_agree(options: Any) -> None:
    """Up to what iterations leave: a hundredth of the tolerance."""
    prob = nonlinear("diagonal", "ito")
    grads = []
    # the tape corrects each solution once more, and adaptive steps follow from the solutions
    for sensealg in SENSEALGS[: 2 if "rtol" in options else 3]:
        p = prob.p.clone().requires_grad_()
        sol = solve(prob.remake(p=p), ImplicitRKMil(), sensealg=sensealg, seed=0, **options)
        grads.append(torch.autograd.grad(sol.u[-1].sum() + sol.steps.error.sum(), p)[0])
    for found in grads[1:]:
        assert_near(found, grads[0], 1e-4)


@pytest.mark.slow
def test_many_stiff_paths_agree_with_short_explicit_steps() -> None:
    prob = stiff(20, 100.0)
    (fine,) = same_path(prob, SOSRI(), [2000])
    errors = []
    for n in (100, 200, 400):
        sol = solve(prob, ImplicitRKMil(), dt=1 / n, adaptive=False, noise=fine.noise)
        errors.append(rms(sol.u[-1] - fine.u[-1]))
    assert errors[2] < 0.6 * errors[1] < 0.4 * errors[0]
    assert errors[2] < 3e-3
