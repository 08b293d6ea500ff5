"""The discrete adjoint of SDEs: pathwise gradients, against closed forms and differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import assert_near, leaf
from sde_gradients import (
    SAVES,
    SENSEALGS,
    differences,
    each_sensealg,
    gradients,
    nonlinear,
    weighted,
)
from sdes import DOUBLE, heisenberg, linear, linear_solution, solve
from torch import Tensor

import diffsolve.engines.torch.parallel as parallel
from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    DiscreteAdjoint,
    Euler,
    EulerHeun,
    LambaEM,
    LambaEulerHeun,
    ODEProblem,
    RKMil,
)

METHODS = [EM(), LambaEM(), SOSRI(), EulerHeun(), LambaEulerHeun(), RKMil("stratonovich")]


def of(alg) -> str:
    return next(iter(alg.interpretation))


# -- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [SOSRI(), RKMil("stratonovich")], ids=repr)
@each_sensealg
def test_the_linear_equation(alg, sensealg) -> None:
    """``u = u0 exp((a - b**2/2) t + b W)``: gradients at saved times, by all three."""
    prob = linear(
        20, interpretation=of(alg), u0=torch.linspace(0.5, 1.5, 20, dtype=DOUBLE)[:, None]
    )
    times = [0.25, 0.5, 1.0]
    u0_grad, p_grad, sol = gradients(
        prob, alg, sensealg, saveat=times, seed=3, dt=1 / 1024, adaptive=False
    )
    u0, p = (x.detach().clone().requires_grad_() for x in (prob.u0, prob.p))
    exact = prob.remake(u0=u0, p=p)
    W = sol.noise.at(times)
    u = torch.stack([linear_solution(exact, t, w) for t, w in zip(times, W, strict=True)])
    weighted(u).backward()
    bound = 1e-3 if isinstance(alg, SOSRI) else 2e-3
    assert_near(sol.u, u.detach(), bound)
    assert_near(p_grad, p.grad, 5 * bound)
    assert_near(u0_grad, u0.grad, 5 * bound)


def test_gradients_converge_with_the_order_of_the_method() -> None:
    prob = linear(200)
    errors = []
    for n in (32, 128):
        _, p_grad, sol = gradients(
            prob, SOSRI(), DiscreteAdjoint(), saveat=[1.0], seed=3, dt=1 / n, adaptive=False
        )
        p = prob.p.clone().requires_grad_()
        W = sol.noise.at([1.0])[0]
        weighted(linear_solution(prob.remake(p=p), 1.0, W)[None]).backward()
        errors.append(float((p_grad - p.grad).abs().max()))
    assert errors[0] / errors[1] > 4  # of order 1 at least


def test_additive_noise_in_closed_form() -> None:
    """``du = a dt + b dW``: exact in every step, so the gradient is exact too."""
    prob = linear(
        4, 2, noise="additive", f=lambda t, u, p: p[0] * torch.ones_like(u),
        g=lambda t, u, p: p[1] * torch.ones_like(u),
    )  # fmt: skip
    for alg in (EM(), LambaEM(), SOSRA()):
        _, p_grad, sol = gradients(
            prob, alg, None, lambda s: s.u[-1].sum(), seed=1, dt=0.1, adaptive=False
        )
        expected = torch.stack([torch.tensor(8.0, dtype=DOUBLE), sol.noise.at([1.0]).sum()])
        assert_near(p_grad, expected, 1e-12)


# -- differences along the same path -------------------------------------------------------------


def for_kinds(methods, kinds):
    """Each method with each kind of noise that it takes."""
    cases = [(alg, kind) for alg in methods for kind in kinds if kind in alg.noise_types]
    return pytest.mark.parametrize(("alg", "kind"), cases, ids=[f"{a!r}-{k}" for a, k in cases])


@for_kinds(METHODS, ["diagonal", "scalar", "general", "additive"])
def test_central_differences(alg, kind) -> None:
    prob = nonlinear(kind, of(alg))
    options = {"seed": 3, "dt": 0.05, "adaptive": False, "saveat": SAVES}
    expected = differences(prob, alg, **options)
    for sensealg in SENSEALGS:
        u0_grad, p_grad, _ = gradients(prob, alg, sensealg, **options)
        assert_near(p_grad, expected, 1e-7)
        assert bool((u0_grad != 0).all())


@pytest.mark.parametrize("alg", METHODS, ids=repr)
@pytest.mark.parametrize("batched", [True, False], ids=["at once", "one by one"])
def test_sensealgs_agree_on_adaptive_steps(alg, batched, monkeypatch) -> None:
    """With values saved within steps and rejected steps; steps run again at once and one by one."""
    if not batched:
        monkeypatch.setattr(parallel, "_WORK_WORTH_A_CALL", -1)
    kind = "diagonal" if isinstance(alg, (SOSRI, RKMil)) else "general"
    options = {"seed": 3, "saveat": SAVES, "rtol": 1e-2, "atol": 1e-2}
    options["dt"] = 1.0 if alg.adaptive else 0.03
    prob = nonlinear(kind, of(alg))
    *expected, tape = gradients(prob, alg, DiscreteAdjoint(tape=True), **options)
    assert tape.stats.nreject or not alg.adaptive
    for sensealg in SENSEALGS[:2]:
        *found, sol = gradients(prob, alg, sensealg, **options)
        torch.testing.assert_close(sol.u, tape.u, rtol=1e-13, atol=1e-13)
        for got, wanted in zip(found, expected, strict=True):
            assert_near(got, wanted, 1e-12)


@pytest.mark.parametrize("noisy", [True, False], ids=["SDE", "ODE"])
def test_many_values_in_one_step_do_not_fill_the_memory(noisy, monkeypatch) -> None:
    """Steps that are run at once have as many values inside as the one that has the most."""
    prob: Any = nonlinear("diagonal")
    alg: Any = EM()
    if not noisy:
        prob, alg = ODEProblem(prob.f, prob.u0, prob.tspan, prob.p), Euler()
    # in the fifth of 64 steps, and one in every fourth
    many = [4 / 64 + (i + 0.5) / 64 / 101 for i in range(100)]
    options = {"dt": 1 / 64, "adaptive": False, "engine": "torch"} | ({"seed": 1} if noisy else {})
    options["saveat"] = sorted([*many, *((4 * i + 2.5) / 64 for i in range(16))])
    expected = gradients(prob, alg, DiscreteAdjoint(tape=True), **options)
    run_again, sizes = parallel.ParallelSweep._run_again, []

    def counted(self: Any, times: Tensor, *rest: Tensor) -> Any:
        found = run_again(self, times, *rest)
        if times.ndim == 2:  # not a step alone
            sizes.append((len(times), found[3].numel()))
        return found

    monkeypatch.setattr(parallel.ParallelSweep, "_run_again", counted)
    whole = gradients(prob, alg, DiscreteAdjoint(), **options)
    assert sizes == [(64, 64 * 100 * 6)]
    sizes.clear()
    monkeypatch.setattr(parallel, "_MOST_WORK", 8000)
    parts = gradients(prob, alg, DiscreteAdjoint(), **options)
    assert sum(steps for steps, _ in sizes) == 64
    assert max(entries for _, entries in sizes) <= 8000
    assert len(sizes) <= 4  # the other steps are run at once as ever
    for found in (whole, parts):
        for got, wanted in zip(found[:2], expected[:2], strict=True):
            assert_near(got, wanted, 1e-12)


@pytest.mark.parametrize("saveat", [None, [0.013, 0.5, 0.512, 0.515]], ids=["every", "some"])
@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_small_systems_are_swept_at_once(alg, saveat) -> None:
    """Evaluations of the reverse pass are counted for each step, its calls are few."""
    calls = [0, 0]
    prob = nonlinear("diagonal", of(alg))
    drift, noise = prob.f, prob.g

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        calls[0] += 1
        return drift(t, u, p)

    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        calls[1] += 1
        return noise(t, u, p)

    *_, sol = gradients(
        prob.remake(f=f, g=g), alg, None, seed=1, dt=0.01, adaptive=False, saveat=saveat
    )
    forward, reverse = sol.stats, sol.stats.adjoint
    assert reverse is not None and len(sol.steps) == 100
    anew = 100 if alg.carries_derivative else 0  # each step begins with its derivative
    assert (reverse.nf, reverse.ng) == (forward.nf - 1 + anew, forward.ng - 1)
    assert calls[0] < forward.nf + 10 and calls[1] < forward.ng + 10


def test_many_paths_are_swept_at_once_and_in_float32() -> None:
    prob = linear(500)
    small = prob.remake(u0=prob.u0.float(), p=prob.p.float())
    options = {"seed": 1, "dt": 0.01, "save_everystep": False}
    expected = gradients(prob, EM(), None, lambda s: s.u[-1].mean(), **options)
    found = gradients(small, EM(), None, lambda s: s.u[-1].mean(), **options)
    assert_near(found[1].double(), expected[1], 1e-4)


# -- estimates of the steps ----------------------------------------------------------------------


def estimates(sol) -> Tensor:
    steps = sol.steps
    return steps.error.sum() + 3 * steps.error_norm.sum() + 0.1 * steps.stiffness.sum()


@for_kinds([LambaEM(), LambaEulerHeun(), SOSRI(), RKMil("stratonovich")], ["diagonal", "general"])
def test_estimates_have_gradients(alg, kind) -> None:
    prob = nonlinear(kind, of(alg))
    options = {"seed": 3, "dt": 0.05, "adaptive": False, "rtol": 1e-2, "atol": 1e-2}

    expected = differences(prob, alg, estimates, **options)
    for sensealg in SENSEALGS:
        _, p_grad, _ = gradients(prob, alg, sensealg, estimates, **options)
        assert_near(p_grad, expected, 1e-6)


def test_estimates_of_noncommutative_noise_have_gradients_where_they_vanish() -> None:
    """Rows of the estimate are zero where ``g`` is constant: norms have no slope there."""
    scale = leaf(1.3)
    prob = heisenberg(5)
    g = prob.g
    prob = prob.remake(g=lambda t, u: scale * g(t, u))
    sol = solve(prob, LambaEM(), dt=0.1, adaptive=False, seed=1)
    sol.steps.error_norm.sum().backward()
    # u and M are proportional to the scale, and so is the estimate to its square
    expected = 2 * float(sol.steps.error_norm.detach().sum()) / 1.3
    assert float(scale.grad) == pytest.approx(expected, rel=1e-10)
