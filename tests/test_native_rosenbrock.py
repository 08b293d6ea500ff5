"""A whole Rosenbrock step as one function, its systems solved by expressions."""

from __future__ import annotations

import pytest
import torch
from gradients import DOUBLE, label, leaf
from native_runs import off
from native_stiff import ROSENBROCK, forced, forced_problem, weigh

from diffsolve import (
    AutoTsit5,
    DiscreteAdjoint,
    ODEProblem,
    Rodas4,
    Rodas5P,
    Rosenbrock23,
    solve,
)
from diffsolve.engines.native.programs import rosenbrock
from diffsolve.problems import library

# -- the systems of a Rosenbrock step, solved by expressions -------------------------------------


@pytest.mark.parametrize("alg", [Rodas5P(), Rosenbrock23()], ids=label)
def test_a_pivot_that_vanishes(alg):
    """Elimination without exchanges of rows divides by zero: the kernel's own has to step in."""
    dt = 0.05
    grads = []
    for engine in ("torch", "native"):
        growth = 1 / (alg.tableau.stages.gamma * dt)
        p = leaf([[growth, 100.0], [-120.0, -1.0]])
        u0 = leaf([1.0, 2.0])
        prob = ODEProblem(lambda t, u, p: p @ u, u0, (0.0, 2 * dt), p)
        sol = solve(prob, alg, adaptive=False, dt=dt, engine=engine)
        assert sol.stats.engine == engine
        loss = sol.u.square().sum() + sol.steps.error_norm.sum()
        grads.append((sol.u.detach(), *torch.autograd.grad(loss, [u0, p])))
    for got, reference in zip(*grads[::-1], strict=True):
        assert off(got, reference) <= 1e-9


@pytest.mark.parametrize("checkpoints", [None, 4])
@pytest.mark.parametrize("alg", ROSENBROCK, ids=label)
def test_reverse_of_a_step_as_one_function(monkeypatch, alg, checkpoints):
    """The same as the loops', and both as torch's."""
    prob, grads = forced_problem(requires_grad=True), []
    options = {"adaptive": False, "dt": 0.07, "saveat": 0.05, "rtol": 1e-6, "atol": 1e-8}
    runs = [(16_000, 1.0, "native"), (-1, 2.0, "native"), (16_000, 3.0, "torch")]
    for most, shift, engine in runs:
        monkeypatch.setattr(rosenbrock, "MOST_IN_REVERSE", most)
        # a function of its own each time
        changed = prob.remake(f=lambda t, u, p, c=shift: forced(t, u, p) + 1e-300 * c)
        sensealg = DiscreteAdjoint(checkpoints=checkpoints)
        sol = solve(changed, alg, sensealg=sensealg, engine=engine, **options)
        loss = sum(weigh(sol, name) for name in ("u", "error", "error_norm", "stiffness"))
        grads.append(torch.cat(torch.autograd.grad(loss, [prob.u0, prob.p])))
    one, loops, reference = grads
    assert not torch.equal(one, loops)  # they are two ways
    assert off(one, loops) <= 1e-11
    assert off(one, reference) <= 1e-10


def test_steps_that_are_too_long_for_one_function(monkeypatch):
    found = []
    for most in (8_000, 0):
        monkeypatch.setattr(rosenbrock, "MOST_IN_STEP", most)
        prob = library.hires(tspan=(0.0, 10.0))  # a function of its own each time
        p = prob.p.clone().requires_grad_()
        f, shift = prob.f, float(most)
        prob = prob.remake(p=p, f=lambda t, u, p, f=f, c=shift: f(t, u, p) + 1e-300 * c)
        sol = solve(prob, Rodas4(), rtol=1e-5, atol=1e-8, saveat=2.0, engine="native")
        (grad,) = torch.autograd.grad(weigh(sol, "u") + weigh(sol, "stiffness"), p)
        found.append((sol.stats.nf, sol.stats.njac, sol.stats.nlu, sol.u.detach(), grad))
    one, loops = found
    assert one[:3] == loops[:3]
    assert not torch.equal(one[4], loops[4])  # they are two ways
    assert off(one[3], loops[3]) <= 1e-10
    assert off(one[4], loops[4]) <= 1e-8


@pytest.mark.parametrize("n", [13, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 30))])
@pytest.mark.parametrize("alg", [Rosenbrock23(), Rodas5P(), AutoTsit5()], ids=label)
def test_steps_that_turn_out_to_be_too_long(alg, n):
    """Their systems are short, their stages are not."""
    generator = torch.Generator().manual_seed(n)
    weights = torch.randn(n, n, generator=generator, dtype=DOUBLE) / n - 30 * torch.eye(n)
    grads = []
    for engine in ("torch", "native"):
        u0 = torch.linspace(0.1, 1, n, dtype=DOUBLE, requires_grad=True)
        prob = ODEProblem(lambda t, u: torch.tanh(weights @ u), u0, (0.0, 3.0))
        sol = solve(prob, alg, rtol=1e-5, atol=1e-8, saveat=1.0, engine=engine)
        grads.append(torch.autograd.grad(sol.u.square().sum(), u0)[0])
        assert engine in sol.stats.engine
    assert off(grads[1], grads[0]) <= 1e-6
