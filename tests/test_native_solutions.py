"""Native solves that fail, spans and states of all sizes, and copies of solutions."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from gradients import CONTINUOUS, DOUBLE, each, leaf, linear
from native_runs import REVERSIBLE, ones, program_of, run
from torch import nn

from diffsolve import (
    BS3,
    DP5,
    RK4,
    BacksolveAdjoint,
    DiscreteAdjoint,
    Euler,
    InterpolatingAdjoint,
    ODEProblem,
    ReturnCode,
    SolveError,
    Tsit5,
    Vern7,
    solve,
)
from diffsolve.engines.native.runtime import template as template_module
from diffsolve.problems import library

# -- failures ------------------------------------------------------------------------------------


def root(t, u):
    return torch.sqrt(0.5 - t) * u


def blow_up(t, u):
    return u * u


def singular(t, u):
    return u / u.abs() * 1e3 / (t - 0.37).abs() ** 1.5


FAILURES = {
    "steps": (lambda t, u: -1000 * u, {"maxiters": 20}, ReturnCode.MAX_ITERS),
    "stiff": (lambda t, u: -1e7 * (u - t), {"maxiters": 200, "alg": Tsit5()}, ReturnCode.MAX_ITERS),
    "blow up": (blow_up, {"u0": 2 * ones()}, ReturnCode.DT_LESS_THAN_MIN),
    "dtmin": (lambda t, u: -300 * torch.sin(300 * t) * u, {"dtmin": 0.05},
              ReturnCode.DT_LESS_THAN_MIN),
    "NaN in a step": (root, {"dtmin": 1e-4}, ReturnCode.UNSTABLE),
    "NaN at the start": (lambda t, u: torch.log(u - 2), {}, ReturnCode.UNSTABLE),
    "NaN at the start, given dt": (lambda t, u: torch.log(u - 2), {"dt": 0.1},
                                   ReturnCode.UNSTABLE),
    "Inf at the start": (lambda t, u: u / (u - 1), {}, ReturnCode.UNSTABLE),
    "fixed": (root, {"adaptive": False, "dt": 0.1}, ReturnCode.UNSTABLE),
    "fixed Euler": (lambda t, u: u * u * 1e200, {"alg": Euler(), "dt": 0.1}, ReturnCode.UNSTABLE),
    "no limit": (blow_up, {"u0": 2 * ones(), "maxiters": 10**20}, ReturnCode.DT_LESS_THAN_MIN),
    "fixed, too many": (lambda t, u: -u, {"adaptive": False, "dt": 0.01, "maxiters": 7},
                        ReturnCode.MAX_ITERS),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("saveat", [None, [0.0, 0.01, 0.3, 1.0]], ids=["every step", "saveat"])
def test_failures_are_those_of_torch(name, saveat):
    f, options, code = FAILURES[name]
    options = {"alg": DP5(), "saveat": saveat, "rtol": 1e-4, "atol": 1e-4, **options}
    theirs, ours = (run(f, engine, throw=False, **options) for engine in ("torch", "native"))
    assert ours.retcode is theirs.retcode is code
    assert not ours.success
    assert ours.stats.naccept == theirs.stats.naccept
    assert ours.stats.nreject == theirs.stats.nreject
    assert ours.stats.nf == theirs.stats.nf
    assert ours.u.shape == theirs.u.shape
    assert torch.allclose(ours.t, theirs.t, rtol=1e-9)
    assert torch.allclose(ours.u, theirs.u, rtol=1e-6)
    errors = []
    for engine in ("torch", "native"):
        with pytest.raises(SolveError) as caught:
            run(f, engine, **options)
        errors.append(caught.value)
    theirs, ours = errors
    assert ours.retcode is code
    assert without_digits(str(ours)) == without_digits(str(theirs))
    assert ours.t == pytest.approx(theirs.t, rel=1e-6, abs=1e-12)
    assert ours.h == pytest.approx(theirs.h, rel=1e-3, nan_ok=True)
    assert ours.solution.retcode is code


def without_digits(message):
    """A message without the digits that may differ by rounding."""
    words = []
    for word in message.split():
        try:
            words.append(f"{float(word.strip(',.;')):.2g}")
        except ValueError:
            words.append(word)
    return " ".join(words)


@each(REVERSIBLE)
def test_gradient_of_a_partial_solution(sensealg):
    found = []
    for engine in ("torch", "native"):
        u0, p = leaf([1.0]), leaf([1.3])
        prob = ODEProblem(lambda t, u, p: p * torch.sqrt(0.5 - t) * u, u0, (0.0, 1.0), p)
        sol = solve(
            prob, BS3(), sensealg=sensealg, engine=engine, throw=False, saveat=[0.2, 0.4, 0.9],
            dt=0.05, adaptive=False,
        )  # fmt: skip
        assert sol.t.tolist() == [0.2, 0.4]
        found.append(torch.autograd.grad(sol.u.sum(), (u0, p)))
    for a, b in zip(*found, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-12)


def test_failed_at_once():
    """No step was taken: nothing to go back through, or to read."""
    for sensealg in REVERSIBLE:
        for dense in (False, True):
            u0 = leaf([1.0])
            options = {"sensealg": sensealg, "throw": False, "dense": dense}
            sol = run(lambda t, u: torch.log(u - 2), "native", u0, **options)
            assert sol.u.tolist() == [[1.0]]
            assert torch.autograd.grad(3 * sol.u.sum(), u0)[0].tolist() == [3.0]
            if dense:
                assert sol(0.0).tolist() == [1.0]
            sol = run(lambda t, u: torch.log(u - 2), "native", u0, saveat=[0.5], **options)
            assert sol.u.shape == (0, 1)
            assert len(sol.steps.t) == 0


def test_failure_of_the_reverse_solve_is_explained():
    for sensealg in CONTINUOUS:
        hard = dataclasses.replace(sensealg, rtol=1e-13, atol=1e-13)
        said = []
        for engine in ("torch", "native"):
            u0, p = leaf([1.0, 0.5]), leaf([[-1.0, 4.3], [-5.1, -0.7]])
            prob = ODEProblem(linear, u0, (0.0, 3.0), p)
            sol = solve(prob, BS3(), saveat=[3.0], engine=engine, sensealg=hard, maxiters=100)
            with pytest.raises(
                SolveError, match=f"reverse solve of {type(hard).__name__}"
            ) as caught:
                sol.u.sum().backward()
            assert caught.value.retcode is ReturnCode.MAX_ITERS
            said.append(without_digits(str(caught.value)))
        assert said[0] == said[1]


# -- sizes, spans and long solves ----------------------------------------------------------------


@each([None, *REVERSIBLE])
def test_empty_span(sensealg):
    found = []
    for engine in ("torch", "native"):
        u0, p = leaf([1.0, 2.0]), leaf([[-1.0, 0.3], [0.1, -0.7]])
        for saveat in (None, [0.5]):
            prob = ODEProblem(linear, u0, (0.5, 0.5), p)
            sol = solve(prob, Tsit5(), sensealg=sensealg, engine=engine, saveat=saveat, dense=True)
            assert sol.t.tolist() == [0.5]
            assert torch.equal(sol.u[0], u0)
            assert torch.equal(sol(0.5), u0)
            grads = torch.autograd.grad((sol.u * 3).sum(), (u0, p))
            found.append([g.tolist() for g in grads])
            assert sol.stats.naccept == 0
    assert found == [[[3.0, 3.0], [[0.0, 0.0], [0.0, 0.0]]]] * 4


@pytest.mark.parametrize("alg", [RK4(), Vern7()], ids=["RK4", "Vern7"])
def test_buffers_grow(alg):
    """3000 steps, where there is room for 256 at first."""
    prob = library.lotka_volterra_time(tspan=(0.0, 3.0))
    options = {"adaptive": False, "dt": 0.001}
    reference = solve(prob, alg, engine="torch", **options)
    sol = solve(prob, alg, engine="native", **options)
    assert sol.stats.naccept == 3000
    assert float((sol.u - reference.u).abs().max()) < 1e-10
    assert torch.equal(sol.steps.t, reference.steps.t)
    times = torch.linspace(0.0, 3.0, 1001, dtype=DOUBLE)
    assert float((sol(times) - reference(times)).abs().max()) < 1e-10
    for name in ("error_norm", "stiffness"):
        a, b = getattr(sol.steps, name), getattr(reference.steps, name)
        assert a.shape == b.shape == (3000,)
    sol = solve(prob, alg, engine="native", saveat=times, **options)
    assert float((sol.u - reference(times)).abs().max()) < 1e-10


def test_a_solve_in_many_chunks_is_the_same(monkeypatch):
    """The kernels return to Python after some steps, and go on as if they had not."""
    results = []
    for work in (template_module.WORK_A_CALL, 1.0):
        monkeypatch.setattr(template_module, "WORK_A_CALL", work)
        program_of(linear, ones(2), -torch.eye(2, dtype=DOUBLE)).templates.clear()
        for sensealg in REVERSIBLE:
            u0, p = leaf([1.0, 0.5]), leaf([[-1.0, 4.3], [-5.1, -0.7]])
            prob = ODEProblem(linear, u0, (0.0, 3.0), p)
            sol = solve(
                prob, Tsit5(), sensealg=sensealg, saveat=[1.0, 2.5, 3.0], tstops=[1.3],
                engine="native",
            )  # fmt: skip
            grads = torch.autograd.grad(sol.u.sum() + sol.u[1, 0], (u0, p))
            results.append([sol.u, sol.steps.error, *grads])
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_progress_bar(capsys):
    sol = run(lambda t, u: -u, progress=True)
    assert "100%" in capsys.readouterr().err
    assert sol.success


@pytest.mark.parametrize("n", [1, 1000])
def test_large_and_small_states_have_gradients(n):
    u0 = torch.linspace(0.1, 1.0, n, dtype=DOUBLE).requires_grad_()
    for sensealg in (DiscreteAdjoint(), InterpolatingAdjoint(), BacksolveAdjoint()):
        sol = run(lambda t, u: -u * u, u0=u0, sensealg=sensealg, alg=Tsit5(), saveat=[1.0])
        (g,) = torch.autograd.grad(sol.u.sum(), u0)
        assert torch.allclose(g, (1 + u0.detach()) ** -2, rtol=1e-5)


# -- copies --------------------------------------------------------------------------------------


def test_copies_of_problems_and_solutions():
    net = nn.Linear(2, 2).double()
    prob = ODEProblem(library.lotka_volterra().f, ones(2), (0.0, 1.0), library.lotka_volterra().p)
    sol = solve(prob, Tsit5(), engine="native")
    again = solve(copy.deepcopy(prob), Tsit5(), engine="native")
    assert torch.equal(sol.u, again.u)

    class F(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, u):
            return self.net(u)

    f = F()
    first = run(f, u0=ones(2)).u
    other = copy.deepcopy(f)
    with torch.no_grad():
        other.net.weight.mul_(2.0)
    assert not torch.equal(run(other, u0=ones(2)).u[-1], first[-1])
    assert torch.equal(run(f, u0=ones(2)).u, first)


def test_solution_can_be_copied_like_that_of_torch():
    prob = ODEProblem(linear, ones(2), (0.0, 1.0), -torch.eye(2, dtype=DOUBLE))
    for dense in (True, False):
        outcomes = []
        for engine in ("torch", "native"):
            sol = solve(prob, Tsit5(), engine=engine, dense=dense)
            found = []
            for copied in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
                try:
                    twin = copied(sol)
                    found.append((twin.u[-1].tolist(), dense and twin(0.3).tolist()))
                except Exception as error:
                    found.append(type(error).__name__)
            outcomes.append(found)
        for theirs, ours in zip(*outcomes, strict=True):
            assert isinstance(theirs, str) == isinstance(ours, str), outcomes
            if not isinstance(ours, str):
                assert np.allclose(ours[0], theirs[0], rtol=1e-12)
                assert np.allclose(ours[1], theirs[1], rtol=1e-12)
