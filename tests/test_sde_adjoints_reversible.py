"""``ReversibleAdjoint``: the gradient of the discrete adjoint, with states computed backward."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradients import assert_near, leaf
from torch import Tensor, nn

import diffsolve
from diffsolve import (
    BacksolveWarning,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ReversibleAdjoint,
    ReversibleHeun,
    SDEProblem,
)
from diffsolve.adjoints.reversible import ReversibleTape

solve = functools.partial(diffsolve.solve, engine="torch")
DOUBLE = torch.float64


def network(width: int = 3, out: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, out)).double()


def problem(noise: str) -> tuple[SDEProblem, list[Tensor]]:
    """Drift and diffusion by networks, for 4 paths of 3 components."""
    torch.manual_seed(1)
    columns = {"general": 2, "scalar": 1}.get(noise, 0)
    f, g = network(), network(out=3 * max(columns, 1))
    level = leaf([0.3, 0.5, 0.2])

    def drift(t: Tensor, u: Tensor) -> Tensor:
        return f(u) - u

    def diffusion(t: Tensor, u: Tensor) -> Tensor:
        if noise == "additive":
            return (level * torch.cos(t)).expand(u.shape)
        found = 0.3 * g(u)
        return found.view(*u.shape, columns) if columns else found

    u0 = torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)
    kind = {"noise": noise, "interpretation": "stratonovich"}
    prob = SDEProblem(drift, diffusion, u0, (0.0, 2.0), **kind)
    own = [level] if noise == "additive" else list(g.parameters())
    return prob, [u0, *f.parameters(), *own]


def both(noise: str, loss: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """Solutions and gradients of the reversible and of the discrete adjoint."""
    sols, grads = [], []
    for x in (ReversibleAdjoint(), DiscreteAdjoint()):
        prob, tensors = problem(noise)
        sols.append(solve(prob, ReversibleHeun(), sensealg=x, seed=1, **options))
        grads.append(torch.autograd.grad(loss(sols[-1]), tensors))
    return sols, grads


LOOSE = {"rtol": 1e-2, "atol": 1e-2}
OPTIONS = [
    {"dt": 0.01, "adaptive": False},
    {"dt": 0.03, "adaptive": False, "saveat": [0.5, 1.0, 1.77]},
    {"rtol": 1e-2, "atol": 1e-2},
    {"rtol": 1e-2, "atol": 1e-2, "tstops": [0.5, 1.1], "saveat": [0.0, 0.5, 0.77, 1.9]},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: ",".join(x))
@pytest.mark.parametrize("noise", ["diagonal", "scalar", "additive", "general"])
def test_gradient_is_that_of_the_steps(noise, options):
    def loss(sol):
        steps = sol.steps
        return (sol.u**2).sum() + 0.1 * steps.error.sum() + 1e-3 * steps.stiffness.mean()

    (sol, _), grads = both(noise, loss, **options)
    assert len(sol.steps) > 8
    for got, expected in zip(*grads, strict=True):
        assert_near(got, expected, 1e-9)


def test_against_differences():
    prob, (u0, *_) = problem("diagonal")
    options = {"dt": 0.05, "adaptive": False, "saveat": [2.0], "seed": 1}

    def loss(start: Tensor, sensealg: Any = None) -> Tensor:
        return (
            solve(prob.remake(u0=start), ReversibleHeun(), sensealg=sensealg, **options).u ** 2
        ).sum()

    (got,) = torch.autograd.grad(loss(u0, ReversibleAdjoint()), u0)
    direction = torch.randn(u0.shape, dtype=DOUBLE)
    with torch.no_grad():
        high, low = (loss(u0 + x * direction) for x in (1e-5, -1e-5))
    assert float((got * direction).sum()) == pytest.approx(float(high - low) / 2e-5, rel=1e-7)


def kept(sensealg: Any, steps: int, **options: Any) -> int:
    """Numbers that autograd keeps for the reverse pass, beside parameters."""
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    prob, tensors = problem("diagonal")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        options = {"dt": 2.0 / steps, "adaptive": False, "saveat": [2.0], "seed": 1, **options}
        solve(prob, ReversibleHeun(), sensealg=sensealg, **options)
    return sum(sizes) - sum(x.numel() for x in tensors)


def test_memory_does_not_grow_with_the_steps():
    assert kept(ReversibleAdjoint(), 160) == kept(ReversibleAdjoint(), 10)
    assert kept(DiscreteAdjoint(), 160) > 10 * kept(ReversibleAdjoint(), 160)
    state = 4 * 12  # u, v, and drift and diffusion there
    stops = kept(ReversibleAdjoint(), 160, tstops=[0.5, 1.0])
    assert stops - kept(ReversibleAdjoint(), 160) == 2 * 2 * state


def test_one_undone_and_one_repeated_evaluation_a_step():
    (sol, _), _ = both("diagonal", lambda sol: sol.u.sum(), dt=0.1, adaptive=False)
    assert sol.stats.adjoint.naccept == 20
    assert sol.stats.adjoint.nf <= 2 * 20 + 1
    assert sol.stats.adjoint.ng <= 2 * 20 + 1


def test_backward_twice_and_noise_that_stays():
    prob, (u0, *_) = problem("general")
    sol = solve(prob, ReversibleHeun(), sensealg=ReversibleAdjoint(), seed=1, **LOOSE)
    before = list(sol.noise.times), sol.noise.serial
    first, again = (
        torch.autograd.grad((sol.u**2).sum(), u0, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, again)
    assert before == (sol.noise.times, sol.noise.serial)


def test_backward_in_time_and_a_given_path():
    prob, (u0, *_) = problem("diagonal")
    path = solve(prob, ReversibleHeun(), dt=0.02, adaptive=False, seed=4).noise
    back = prob.remake(tspan=(2.0, 0.0))
    grads = [
        torch.autograd.grad(
            (solve(back, ReversibleHeun(), sensealg=x, noise=path, **LOOSE).u ** 2).sum(), u0
        )[0]
        for x in (ReversibleAdjoint(), DiscreteAdjoint())
    ]
    assert_near(*grads, 1e-9)


def test_pytrees_and_single_precision():
    def run(sensealg):
        u0 = {"x": torch.ones(3, requires_grad=True), "y": torch.ones(2, requires_grad=True)}
        prob = SDEProblem(
            lambda t, u: {"x": -u["x"], "y": torch.sin(u["x"][:2]) * u["y"]},
            lambda t, u: {"x": 0.2 * u["x"], "y": 0.1 * u["y"]},
            u0,
            (0.0, 1.0),
            interpretation="stratonovich",
        )
        sol = solve(prob, ReversibleHeun(), sensealg=sensealg, dt=0.02, adaptive=False, seed=2)
        return torch.autograd.grad(sol.u["y"].sum(), list(u0.values()))

    for got, expected in zip(run(ReversibleAdjoint()), run(DiscreteAdjoint()), strict=True):
        assert got.dtype == torch.float32
        assert_near(got, expected, 1e-4)


def contracting(rate: float) -> tuple[SDEProblem, Tensor]:
    u0 = torch.ones(4, 1, dtype=DOUBLE, requires_grad=True)
    prob = SDEProblem(
        lambda t, u: -rate * u,
        lambda t, u: 0.3 * u,
        u0,
        (0.0, 1.0),
        interpretation="stratonovich",
    )
    return prob, u0


def test_rounding_that_grew_is_told():
    prob, _ = contracting(40.0)
    options = {"dt": 1e-3, "adaptive": False, "saveat": [1.0], "seed": 1}
    sol = solve(prob, ReversibleHeun(), sensealg=ReversibleAdjoint(), **options)
    with pytest.warns(BacksolveWarning, match="relative error"):
        sol.u.sum().backward()


def test_a_good_reconstruction_is_not():
    prob, u0 = contracting(2.0)
    options = {"dt": 1e-2, "adaptive": False, "saveat": [1.0], "seed": 1}
    found = []
    for x in (ReversibleAdjoint(), DiscreteAdjoint()):
        sol = solve(prob, ReversibleHeun(), sensealg=x, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found += torch.autograd.grad(sol.u.sum(), u0)
    assert_near(*found, 1e-9)


@pytest.mark.filterwarnings("ignore::diffsolve.BacksolveWarning")
@pytest.mark.parametrize("which", [0, 1])
def test_a_function_that_changed_is_refused(which):
    scale = [1.0, 1.0]
    u0 = torch.ones(2, 2, dtype=DOUBLE, requires_grad=True)
    prob = SDEProblem(
        lambda t, u: -scale[0] * u,
        lambda t, u: 0.2 * scale[1] * u,
        u0,
        (0.0, 1.0),
        interpretation="stratonovich",
    )
    options = {"dt": 0.1, "adaptive": False, "seed": 1}
    sol = solve(prob, ReversibleHeun(), sensealg=ReversibleAdjoint(), **options)
    scale[which] = 1.01
    with pytest.raises(RuntimeError, match="gives other values now"):
        sol.u.sum().backward()


def test_other_continuous_adjoints_of_reversible_steps():
    prob, tensors = problem("diagonal")
    options = {"dt": 1 / 128, "adaptive": False, "saveat": [1.0, 2.0], "seed": 1}
    found = []
    for x in (InterpolatingAdjoint(), DiscreteAdjoint()):
        sol = solve(prob, ReversibleHeun(), sensealg=x, **options)
        found.append(torch.autograd.grad((sol.u**2).sum(), tensors))
    for got, expected in zip(*found, strict=True):
        assert_near(got, expected, 0.05)


def test_what_the_tape_keeps():
    class Seen(ReversibleTape):
        most = 0

        def append(self, record):
            super().append(record)
            self.most = max(self.most, sum(bool(r.state) for r in self.records))

    from diffsolve.adjoints.discrete import run_stepwise
    from diffsolve.engines.plan import SaveRequest
    from diffsolve.engines.torch.plan import TorchPlan

    prob, _ = problem("diagonal")
    sol = solve(prob, ReversibleHeun(), dt=0.01, adaptive=False, seed=1)
    tape = Seen()
    context = replace(sol._context, plan=TorchPlan())
    run_stepwise(context, SaveRequest(context.saves, True, tape=tape))
    assert len(tape.records) == 200
    assert tape.most <= 3
