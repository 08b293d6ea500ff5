"""Gradients of SDEs on the native engine: beside torch's, closed forms and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_sdes import CASES, DOUBLE, NOISES, batch, label, off, problem
from torch import Tensor, nn

from diffsolve import EM, SOSRA, SOSRI, SRIW1, DiscreteAdjoint, LambaEM, RKMil, SDEProblem, solve
from diffsolve.engines.native.runtime import row_solve

INSIDE = [0.013, 0.1, 0.55, 0.56, 0.57, 1.0]
LOOSE = {"rtol": 1e-2, "atol": 1e-2, "dt": 0.2}


def weighed(x: Tensor) -> Tensor:
    return (x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum()


def estimates(sol: Any, alg: Any) -> Tensor:
    """A loss of all that the steps estimate."""
    total = torch.zeros((), dtype=sol.u.dtype)
    if alg.adaptive:
        total = total + weighed(sol.steps.error.square()) + weighed(sol.steps.error_norm)
    if alg.estimates_stiffness:
        total = total + weighed(sol.steps.stiffness)
    return total


def gradients(
    prob: SDEProblem, alg: Any, engine: str = "native", of_steps: bool = True, **options: Any
) -> tuple[Any, list[Tensor]]:
    u0 = prob.u0.clone().requires_grad_()
    p = prob.p.clone().requires_grad_()
    sol = solve(prob.remake(u0=u0, p=p), alg, engine=engine, **{"seed": 3, **options})
    loss = weighed(sol.u)
    if of_steps:
        loss = loss + estimates(sol, alg)
    return sol, list(torch.autograd.grad(loss, [u0, p]))


def assert_like_torch(prob: SDEProblem, alg: Any, within: float = 1e-11, **options: Any) -> None:
    reference, expected = gradients(prob, alg, "torch", **options)
    sol, got = gradients(prob, alg, **options)
    assert sol.stats.engine == "native"
    for x, y in zip(got, expected, strict=True):
        assert off(x, y) < within
    if not (options.get("adaptive", True) or alg.carries_derivative):
        looks = 3 if prob.noise == "additive" else 1
        counted = sol.stats.adjoint.nf, sol.stats.adjoint.ng
        assert counted == (sol.stats.nf - 1, sol.stats.ng - looks)
    assert len(sol.steps) == len(reference.steps)


# -- every method ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("alg", "noise"), CASES, ids=label)
def test_fixed_steps(alg, noise):
    assert_like_torch(problem(noise, alg), alg, dt=0.1, adaptive=False, saveat=INSIDE)


@pytest.mark.parametrize(("alg", "noise"), [x for x in CASES if x[0].adaptive], ids=label)
def test_adaptive_steps(alg, noise):
    assert_like_torch(problem(noise, alg), alg, 1e-9, **LOOSE)
    assert_like_torch(problem(noise, alg), alg, 1e-9, **LOOSE, saveat=INSIDE)


@pytest.mark.parametrize("alg", [EM(), SOSRI(), RKMil()], ids=label)
def test_backward_in_time_and_stops(alg):
    inside = sorted(INSIDE[:-1], reverse=True)
    options = {"dt": 0.05, "adaptive": False}
    assert_like_torch(problem(tspan=(1.0, 0.0)), alg, **options, saveat=inside)
    assert_like_torch(problem(), alg, **options, tstops=[0.333, 0.55], saveat=INSIDE)
    assert_like_torch(problem(), alg, **options)


@pytest.mark.parametrize("alg", [EM(), SOSRI()], ids=label)
def test_single_precision(alg):
    prob = problem(u0=batch(13, dtype=torch.float32), p=torch.tensor([0.7, 0.3]))
    # estimates are differences of numbers that are nearly equal
    options = {"dt": 0.05, "adaptive": False, "saveat": INSIDE, "of_steps": False}
    assert_like_torch(prob, alg, 3e-6, **options)


LONG = [(EM(), "diagonal"), (SOSRI(), "diagonal"), (SOSRI(), "scalar"), (RKMil(), "column"),
        (LambaEM(), "diagonal"), (SOSRA(), "additive"), (EM(), "matrix")]  # fmt: skip


@pytest.mark.parametrize(("alg", "noise"), LONG, ids=label)
@pytest.mark.parametrize("rows", [1, 13])
def test_rows_with_many_entries(alg, noise, rows):
    """Whose steps loop over the entries."""
    prob = problem(noise, alg, u0=batch(rows, 12))
    assert_like_torch(prob, alg, dt=0.1, adaptive=False, saveat=INSIDE)
    if alg.adaptive:
        assert_like_torch(prob, alg, 1e-9, **LOOSE)


def test_tolerances_of_their_own():
    """The scaled error is differentiated by the states that scale it."""
    options = {"rtol": torch.tensor([1e-2, 5e-2]), "atol": 1e-3 * (1 + torch.rand(13, 2))}
    assert_like_torch(problem(), SOSRI(), dt=0.1, adaptive=False, **options)


# -- beside what is not torch's adjoint ------------------------------------------------------------


def test_the_closed_form_of_geometric_brownian_motion():
    u0 = batch(20, 1).clone().requires_grad_()
    p = torch.tensor([0.4, 0.7], dtype=DOUBLE, requires_grad=True)
    prob = SDEProblem(lambda t, u, p: p[0] * u, lambda t, u, p: p[1] * u, u0, (0.0, 1.0), p)
    for alg, dt, within in ((SOSRI(), 2e-3, 1e-3), (EM(), 1e-4, 3e-2)):
        sol = solve(prob, alg, dt=dt, adaptive=False, save_everystep=False, seed=1, engine="native")
        got = torch.autograd.grad(sol.u[-1].sum(), [u0, p])
        W = sol.noise.at([1.0])[0]
        exact = u0 * torch.exp(p[0] - p[1] ** 2 / 2 + p[1] * W)
        for x, y in zip(got, torch.autograd.grad(exact.sum(), [u0, p]), strict=True):
            assert off(x, y) < within


@pytest.mark.parametrize("alg", [EM(), SRIW1(), LambaEM(), RKMil(), SOSRA()], ids=label)
def test_finite_differences(alg):
    """Also by a time of the drift that only ``p`` holds, and along one path."""
    noise = "additive" if alg.noise_types == {"additive"} else "diagonal"
    prob = problem(noise, alg, rows=3)
    options = {"dt": 0.1, "adaptive": False, "seed": 3, "engine": "native", "saveat": INSIDE}
    _, (by_u, by_p) = gradients(prob, alg, **options)

    def loss(u0: Tensor, p: Tensor) -> float:
        sol = solve(prob.remake(u0=u0, p=p), alg, **options)
        return float(weighed(sol.u) + estimates(sol, alg))

    torch.manual_seed(0)
    for _ in range(3):
        du, dp = torch.randn(3, 2, dtype=DOUBLE), torch.randn(2, dtype=DOUBLE)
        h = 1e-6
        ahead = loss(prob.u0 + h * du, prob.p + h * dp)
        behind = loss(prob.u0 - h * du, prob.p - h * dp)
        slope = float((by_u * du).sum() + (by_p * dp).sum())
        assert abs((ahead - behind) / (2 * h) - slope) < 1e-6 * max(1.0, abs(slope))


# -- parameters ------------------------------------------------------------------------------------


def neural() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    drift = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    return drift, nn.Linear(2, 2).double()


@pytest.mark.parametrize(
    ("alg", "options"),
    [(EM(), {"dt": 0.1}), (SOSRI(), {"dt": 0.1, "adaptive": False}), (SOSRI(), LOOSE)],
    ids=["EM", "SOSRI", "SOSRI adaptive"],
)
def test_modules_and_captured_tensors(alg, options):
    drift, diffusion = neural()
    scale = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    unused = torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
    u0 = batch(21).requires_grad_()
    prob = SDEProblem(
        lambda t, u, p: drift(u**3), lambda t, u, p: scale * diffusion(u), u0, (0.0, 1.0), unused
    )
    wanted = [u0, scale, *drift.parameters(), *diffusion.parameters(), unused]
    found = []
    for engine in ("native", "torch"):
        sol = solve(prob, alg, seed=1, engine=engine, saveat=INSIDE, **options)
        loss = weighed(sol.u) + estimates(sol, alg)
        found.append(torch.autograd.grad(loss, wanted))
    for x, y in zip(*found, strict=True):
        assert off(x, y) < 1e-10
    assert float(found[0][-1]) == 0


def test_only_some_parameters():
    a = torch.tensor(0.7, dtype=DOUBLE)
    b = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    prob = problem(
        p=(a, b),
        f=lambda t, u, p: p[0] * u,
        g=lambda t, u, p: p[1] * u,
    )
    found = []
    for engine in ("native", "torch"):
        sol = solve(prob, SOSRI(), dt=0.1, adaptive=False, seed=1, engine=engine)
        found.append(torch.autograd.grad(sol.u[-1].sum(), b)[0])
    assert off(*found) < 1e-12


def test_saved_values_at_the_start_and_no_cotangent():
    prob = problem()
    u0 = prob.u0.clone().requires_grad_()
    sol = solve(prob.remake(u0=u0), EM(), dt=0.1, saveat=[0.0, 1.0], seed=1, engine="native")
    (of_start,) = torch.autograd.grad(sol.u[0].sum(), u0, retain_graph=True)
    assert torch.equal(of_start, torch.ones_like(u0))
    (of_error,) = torch.autograd.grad(sol.u[1].sum() * 0, u0)
    assert not of_error.any()


# -- memory and threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [EM(), SOSRI()], ids=label)
@pytest.mark.parametrize("checkpoints", [1, 3, 7, 1000])
def test_checkpoints_change_nothing(alg, checkpoints):
    options = {"dt": 0.03, "adaptive": False, "saveat": INSIDE, "tstops": [0.5]}
    _, expected = gradients(problem(), alg, **options)
    kept = DiscreteAdjoint(checkpoints=checkpoints)
    sol, got = gradients(problem(), alg, sensealg=kept, **options)
    assert sol.stats.engine == "native"
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def test_checkpoints_of_adaptive_steps_need_torch():
    sol, _ = gradients(problem(), SOSRI(), "auto", sensealg=DiscreteAdjoint(checkpoints=3), **LOOSE)
    assert "checkpoints of adaptive steps" in sol.stats.engine


@pytest.mark.parametrize("alg", [EM(), SOSRI()], ids=label)
@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "backward"])
def test_noise_that_is_not_kept_is_drawn_again(monkeypatch, alg, span):
    options = {"dt": 0.03, "adaptive": False}
    _, expected = gradients(problem(tspan=span), alg, **options)
    monkeypatch.setattr(row_solve, "MOST_NOISE", 0)
    _, got = gradients(problem(tspan=span), alg, **options)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("alg", [EM(), SOSRI(), SOSRA()], ids=label)
def test_threads_share_the_reverse_pass(monkeypatch, alg):
    noise = "additive" if alg.noise_types == {"additive"} else "diagonal"
    prob = problem(noise, alg, rows=70)
    monkeypatch.setattr(row_solve, "WORK_A_THREAD", 1)
    before = torch.get_num_threads()
    options = {"dt": 0.05, "adaptive": False, "saveat": INSIDE}
    try:
        torch.set_num_threads(1)
        _, expected = gradients(prob, alg, **options)
        for count in (2, 3):
            torch.set_num_threads(count)
            sol, got = gradients(prob, alg, **options)
            assert sol.stats.engine == "native"
            for x, y in zip(got, expected, strict=True):
                assert off(x, y) < 1e-12
    finally:
        torch.set_num_threads(before)


def test_several_reverse_passes_of_one_solve():
    u0 = problem().u0.clone().requires_grad_()
    sol = solve(problem(u0=u0), SOSRI(), seed=1, engine="native", saveat=INSIDE, **LOOSE)
    (first,) = torch.autograd.grad(sol.u[-1].sum(), u0, retain_graph=True)
    (other,) = torch.autograd.grad(sol.u[2].sum(), u0, retain_graph=True)
    (again,) = torch.autograd.grad(sol.u[-1].sum(), u0)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_backward_uses_the_values_of_the_solve():
    p = torch.tensor([0.7, 0.3], dtype=DOUBLE, requires_grad=True)
    factor = 1.0

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return factor * p[0] * u

    sol = solve(problem(f=f, p=p), EM(), dt=0.1, seed=1, engine="native")
    (expected,) = torch.autograd.grad(sol.u[-1].sum(), p)
    sol = solve(problem(f=f, p=p), EM(), dt=0.1, seed=1, engine="native")
    factor = 5.0
    (got,) = torch.autograd.grad(sol.u[-1].sum(), p)
    assert torch.equal(got, expected)
    sol = solve(problem(p=p), EM(), dt=0.1, seed=1, engine="native")
    with torch.no_grad():
        p.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sol.u[-1].sum().backward()


def test_a_failed_solve_has_gradients_of_its_part():
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.where(t < 0.5, p[0] * u, torch.full_like(u, torch.nan))

    found = []
    for engine in ("native", "torch"):
        p = torch.tensor([0.7, 0.3], dtype=DOUBLE, requires_grad=True)
        sol = solve(problem(f=f, p=p), EM(), dt=0.1, seed=1, engine=engine, throw=False)
        assert not sol.success and 3 < len(sol.t) < 8
        found.append(torch.autograd.grad(sol.u[-1].sum(), p)[0])
    assert off(*found) < 1e-12
    assert set(NOISES) == {noise for _, noise in CASES}
