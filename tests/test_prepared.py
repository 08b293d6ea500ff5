"""What is kept with a problem is used for the same arguments only."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsolve import (
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    PIController,
    Rodas5P,
    Tsit5,
    Vern7,
    solve,
)
from diffsolve.problems.solve_cache import SolveCache

F64 = torch.float64
ENGINES = pytest.mark.parametrize("engine", ["auto", "native", "torch"])


def decay(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return -p * u


def problem(**changes: Any) -> ODEProblem:
    prob = ODEProblem(decay, torch.ones(2, dtype=F64), (0.0, 1.0), torch.tensor(1.0, dtype=F64))
    return prob.remake(**changes)


def same_as_new(prob: ODEProblem, *args: Any, **options: Any) -> None:
    """A solve of a problem that was solved before is that of a new one."""
    found, new = solve(prob, *args, **options), solve(prob.remake(), *args, **options)
    torch.testing.assert_close(found.u, new.u, rtol=0, atol=0)
    assert torch.equal(found.t, new.t)
    names = ("alg", "sensealg", "engine", "nf", "naccept", "nreject")
    for name in names:
        assert getattr(found.stats, name) == getattr(new.stats, name), name


@ENGINES
@pytest.mark.parametrize(
    "options",
    [
        {"rtol": 1e-9},
        {"rtol": 1e-9, "atol": 1e-12},
        {"atol": torch.tensor([1e-9, 1e-3], dtype=F64)},
        {"rtol": torch.tensor(1e-9, dtype=F64)},
        {"dt": 0.01},
        {"dt": 0.01, "adaptive": False},
        {"dtmax": 0.05},
        {"tstops": [0.3]},
        {"tstops": (0.3,)},
        {"tstops": np.array([0.3])},
        {"norm": lambda x: 100 * x.abs().max()},
        {"controller": PIController.for_order(2)},
        {"saveat": [0.5, 1.0]},
        {"saveat": 0.25},
        {"save_everystep": False},
        {"dense": False},
    ],
    ids=lambda given: "-".join(given),
)
def test_options(engine: str, options: dict[str, Any]) -> None:
    prob = problem()
    for given in ({}, options, {}, options):
        if engine == "native" and "norm" in given:
            with pytest.raises(ValueError, match="norm"):
                solve(prob, Tsit5(), engine=engine, **given)
        else:
            same_as_new(prob, Tsit5(), engine=engine, **given)


@ENGINES
def test_methods(engine: str) -> None:
    prob = problem()
    for alg in (None, Tsit5(), Vern7(), Tsit5(), Rodas5P(), None):
        same_as_new(prob, alg, engine=engine)
    same_as_new(prob, None, rtol=1e-9, engine=engine)


@ENGINES
def test_mistakes_are_found_after_a_solve(engine: str) -> None:
    prob = problem()
    solve(prob, Tsit5(), engine=engine)
    for options in (
        {"rtol": -1.0},
        {"rtol": math.nan},
        {"dt": 0.0},
        {"maxiters": 0},
        {"adaptive": False},
        {"saveat": [2.0]},
        {"tstops": [math.nan]},
        {"dt": torch.tensor(0.1, requires_grad=True)},
    ):
        with pytest.raises(ValueError):
            solve(prob, Tsit5(), engine=engine, **options)
    with pytest.raises(TypeError):
        solve(prob, Tsit5, engine=engine)
    solve(prob, Tsit5(), engine=engine)


@ENGINES
def test_times_that_are_changed_in_place(engine: str) -> None:
    prob, times = problem(), torch.tensor([0.5, 1.0], dtype=F64)
    solve(prob, Tsit5(), saveat=times, engine=engine)
    times.numpy()[0] = 0.25  # which no version counter sees
    sol = solve(prob, Tsit5(), saveat=times, engine=engine)
    assert sol.t.tolist() == [0.25, 1.0]
    torch.testing.assert_close(
        sol.u[0], torch.full((2,), math.exp(-0.25), dtype=F64), rtol=1e-3, atol=0
    )


@ENGINES
def test_tensors_that_are_changed(engine: str) -> None:
    prob = problem()
    same_as_new(prob, Tsit5(), engine=engine)
    prob.p.fill_(2.0)
    same_as_new(prob, Tsit5(), engine=engine)
    prob.p.data = torch.tensor([1.0, 3.0], dtype=F64)
    same_as_new(prob, Tsit5(), engine=engine)
    prob.u0.mul_(2)
    same_as_new(prob, Tsit5(), engine=engine)
    prob.p.data = torch.tensor(1.0, dtype=F64)
    prob.u0.data = torch.ones(2, 3, dtype=F64)
    same_as_new(prob, Tsit5(), engine=engine)
    prob.u0.data, prob.p.data = torch.ones(3), torch.ones(3)
    same_as_new(prob, Tsit5(), engine=engine)
    assert solve(prob, Tsit5(), engine=engine).u.dtype == torch.float32


@ENGINES
def test_gradients_that_are_wanted_later(engine: str) -> None:
    prob = problem()
    for _ in range(2):
        assert not solve(prob, Tsit5(), engine=engine).u.requires_grad
    prob.p.requires_grad_()
    for sensealg in (None, DiscreteAdjoint(checkpoints=2), InterpolatingAdjoint(), None):
        sol = solve(prob, Tsit5(), rtol=1e-8, sensealg=sensealg, engine=engine)
        (g,) = torch.autograd.grad(sol.u[-1].sum(), prob.p)
        assert float(g) == pytest.approx(-2 * math.exp(-1.0), rel=1e-4)
    prob.u0.requires_grad_()
    sol = solve(prob, Tsit5(), engine=engine)
    g, by_p = torch.autograd.grad(sol.u[-1].sum(), [prob.u0, prob.p])
    assert g.tolist() == pytest.approx(2 * [math.exp(-1.0)], rel=1e-3) and float(by_p) < 0
    with torch.no_grad():
        assert not solve(prob, Tsit5(), engine=engine).u.requires_grad
    prob.u0.requires_grad_(False), prob.p.requires_grad_(False)
    same_as_new(prob, Tsit5(), engine=engine)


def test_autocast_and_transforms() -> None:
    w = torch.eye(2)
    prob = ODEProblem(lambda t, u, p: -(u @ p), torch.ones(2), (0.0, 1.0), w)
    same_as_new(prob, Tsit5())
    with torch.autocast("cpu", torch.bfloat16):
        same_as_new(prob, Tsit5())
        assert "autocast" in solve(prob, Tsit5()).stats.engine
    same_as_new(prob, Tsit5())
    assert solve(prob, Tsit5()).stats.engine == "native"

    def last(x: Tensor) -> Tensor:
        return solve(prob.remake(u0=x)).u[-1].sum()

    torch.func.grad(last)(torch.ones(2))

    def through(scale: Tensor) -> Tensor:  # the same problem, looked on by a transform
        return scale * solve(prob).u[-1].sum()

    same_as_new(prob)
    torch.func.grad(through)(torch.tensor(1.0))
    same_as_new(prob)


def test_a_trace_that_was_replaced_is_not_used_by_another_problem() -> None:
    hidden = {"rate": [[[[[[1.0]]]]]]}  # deeper than a fingerprint looks

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -hidden["rate"][0][0][0][0][0][0] * u

    first = ODEProblem(f, torch.ones(1, dtype=F64), (0.0, 1.0))
    second = first.remake()
    for prob in (first, second, first):
        assert float(solve(prob, Tsit5(), engine="native").u[-1]) == pytest.approx(
            math.exp(-1.0), rel=1e-3
        )
    hidden["rate"][0][0][0][0][0][0] = 2.0
    assert float(solve(second, Tsit5()).u[-1]) == pytest.approx(math.exp(-2.0), rel=1e-2)
    assert float(solve(first, Tsit5(), engine="native").u[-1]) == pytest.approx(
        math.exp(-2.0), rel=1e-2
    )


def test_copies_of_a_problem_that_was_solved() -> None:
    prob = problem()
    solve(prob, Tsit5())
    for other in (copy.copy(prob), copy.deepcopy(prob), pickle.loads(pickle.dumps(prob))):
        assert not any(isinstance(x, SolveCache) for x in vars(other).values())
        assert "SolveCache" not in repr(prob)
        torch.testing.assert_close(solve(other, Tsit5()).u, solve(prob, Tsit5()).u)


def test_what_is_kept_is_not_a_part_of_f() -> None:
    """Where f reaches its problem, a solve with other options does not make it another f."""

    class Model:
        def __init__(self) -> None:
            self.rate = torch.tensor(1.0, dtype=F64)
            self.prob = ODEProblem(self.f, torch.ones(2, dtype=F64), (0.0, 1.0))

        def f(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.rate * u

    prob, seconds = Model().prob, []
    for rtol in (1e-3, 1e-6, 1e-3, 1e-6):
        seconds.append(solve(prob, Tsit5(), rtol=rtol, engine="native").stats.compile_s)
    assert seconds[0] > 0 and seconds[1:] == [0, 0, 0]  # traced once
