"""Which SDEs the native engine takes, and why not the others; what it notices of changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from native_sdes import DOUBLE, assert_same, batch, both, diagonal, drift, off, problem
from torch import Tensor, nn

from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    BacksolveAdjoint,
    DiscreteAdjoint,
    ImplicitEM,
    RKMilGeneral,
    SDEProblem,
    VirtualBrownianTree,
    solve,
)
from diffsolve.engines.native.programs import traces

TOGETHER = "treats the paths of a batch together"
RATES_OF_THEIR_OWN = torch.rand(13, 1, dtype=DOUBLE)


def engine_of(prob: SDEProblem, alg: Any = None, **options: Any) -> str:
    options = {"dt": 0.25, "seed": 1, **options}
    return solve(prob, alg or EM(), **options).stats.engine


def test_what_it_takes():
    assert engine_of(problem()) == "native"
    assert engine_of(problem(), SOSRI()) == "native"
    assert engine_of(problem(), engine="torch") == "torch"


@pytest.mark.parametrize(
    "f",
    [
        lambda t, u, p: p[0] * (u - u.mean(0)),
        lambda t, u, p: u / u.abs().max(),
        lambda t, u, p: torch.where(u.max() > 100, -u, u),
        lambda t, u, p: u.roll(1, 0),
        lambda t, u, p: -u * len(u),
        lambda t, u, p: RATES_OF_THEIR_OWN * u,
        lambda t, u, p: torch.cat([u[:3], -u[3:]]),
        lambda t, u, p: u * torch.tensor([1.0] * 12 + [2.0], dtype=DOUBLE)[: len(u), None],
    ],
    ids=["mean", "largest", "branch", "neighbour", "number", "own rate", "halves", "last one"],
)
def test_paths_that_depend_on_each_other_are_left_to_torch(f):
    assert TOGETHER in engine_of(problem(f=f))
    assert TOGETHER in engine_of(problem(g=f))
    reference = solve(problem(f=f), EM(), dt=0.25, seed=1, engine="torch")
    assert torch.equal(solve(problem(f=f), EM(), dt=0.25, seed=1).u, reference.u)
    with pytest.raises(ValueError, match=TOGETHER):
        engine_of(problem(f=f), engine="native")


def test_rates_of_their_own_for_two_paths():
    """As many as are traced."""
    rates = torch.tensor([[1.0], [2.0]], dtype=DOUBLE)
    prob = problem(u0=batch(2), f=lambda t, u, p: rates * u)
    assert TOGETHER in engine_of(prob)
    assert TOGETHER in engine_of(problem(u0=batch(2), p=rates, f=lambda t, u, p: p * u, g=noise_))


def noise_(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return 0.1 * u


DECLINED: dict[str, tuple[dict[str, Any], Any, dict[str, Any], str]] = {
    "branch": ({"f": lambda t, u, p: -u if u[0, 0] > 0 else u}, None, {}, "Tensor.item"),
    "sort in g": ({"g": lambda t, u, p: u.sort(-1).values}, None, {}, "torch.sort"),
    "random": ({"f": lambda t, u, p: u * torch.rand(())}, None, {}, "draws random numbers"),
    "python's random": ({"g": lambda t, u, p: u * random.random()}, None, {}, "each evaluation"),
    "norm": ({}, SOSRI(), {"norm": lambda e: e.abs().max()}, "norm of its own"),
    "implicit": ({}, ImplicitEM(), {}, "ImplicitEM has no compiled step"),
    "areas": (
        {"g": lambda t, u, p: torch.stack([u, u.roll(1, -1)], -1), "noise": "general"},
        RKMilGeneral(), {"adaptive": False}, "Levy areas",
    ),
    "wide": ({"u0": torch.ones(3, 6000, dtype=DOUBLE)}, None, {}, "too large"),
    "tape": ({}, None, {"sensealg": DiscreteAdjoint(tape=True)}, "tape=True"),
    "backsolve": ({}, None, {"sensealg": BacksolveAdjoint()}, "adjoint equation of an SDE"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLINED.values(), ids=DECLINED.keys())
def test_declined_with_a_reason(case):
    changes, alg, options, reason = case
    p = torch.tensor([0.7, 0.3], dtype=DOUBLE, requires_grad="sensealg" in options)
    prob = problem(p=p).remake(**changes)
    assert reason in engine_of(prob, alg, **options)
    with pytest.raises(ValueError, match='engine="native" cannot run'):
        engine_of(prob, alg, **options, engine="native")


def test_a_path_that_is_given():
    tree = VirtualBrownianTree(3, 0.0, 1.0, rows=13, m=2)
    assert "draws its noise itself" in engine_of(problem(), noise=tree, seed=None)


def test_additive_noise_that_is_not_is_refused_as_by_torch():
    prob = problem(noise="additive").remake(g=lambda t, u, p: p[1] * u)
    with pytest.raises(ValueError, match="depends on the state"):
        engine_of(prob)


@pytest.mark.parametrize("engine", ["auto", "native", "torch"])
def test_additive_noise_that_switches_with_the_state_is_refused(engine):
    for start in (1.0, -1.0, 0.0, 0.3, -0.3):
        prob = problem(noise="additive").remake(
            g=lambda t, u, p: torch.where(u < 0, 2.0, 1.0) * torch.ones_like(u),
            u0=torch.full((3, 2), start, dtype=DOUBLE),
        )
        with pytest.raises(ValueError, match=r'noise="additive", but g depends on the state.*say'):
            engine_of(prob, engine=engine)


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_additive_noise_that_does_not_change_at_a_fixed_point_is_refused(engine):
    # -2 is where 1.5 u + 1 is
    prob = problem(noise="additive").remake(
        g=lambda t, u, p: 0.1 * u, u0=torch.full((3, 2), -2.0, dtype=DOUBLE)
    )
    with pytest.raises(ValueError, match="depends on the state"):
        engine_of(prob, engine=engine)


def test_zero_times_the_state_is_additive():
    prob = problem(noise="additive").remake(g=lambda t, u, p: p[1] + 0 * u)
    reference, got = both(prob, SOSRA(), rtol=1e-2, atol=1e-3)
    assert_same(got, reference, 1e-10)


def test_a_wrong_g_is_refused_as_by_torch():
    for g in (lambda t, u, p: u[..., 0], lambda t, u, p: u.float(), lambda t, u, p: 1.0):
        with pytest.raises(ValueError, match=r"g\(t, u, p\) is wrong"):
            engine_of(problem(g=g))


def test_nan_at_the_start_is_no_reason():
    prob = problem(f=lambda t, u, p: torch.sqrt(u - 1.0))
    sol = solve(prob, EM(), dt=0.25, seed=1, throw=False)
    assert sol.stats.engine == "native" and not sol.success


def test_another_batch_needs_no_other_code():
    before = traces.cache_sizes()["programs"]
    compiled = set()
    for rows in (2, 5, 17, 100):
        sol = solve(problem(u0=batch(rows)), EM(), dt=0.25, seed=1, engine="native")
        compiled.add(sol.stats.compile_s > 0.01)
        assert sol.stats.engine == "native"
    assert traces.cache_sizes()["programs"] <= before + 1


class _Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_drift, self.of_noise = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        self.scale = 1.0

    def f(self, t: Tensor, u: Tensor) -> Tensor:
        return self.scale * self.of_drift(u)

    def g(self, t: Tensor, u: Tensor) -> Tensor:
        return self.of_noise(u)


@pytest.mark.parametrize("engine", ["auto", "native"])
def test_changes_are_noticed(engine):
    scale = 1.0

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return scale * p[0] * u

    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return scale * p[1] * u

    options = {"dt": 0.25, "seed": 1}
    for prob in (problem(f=f), problem(g=g), problem(f=f, g=g)):
        for scale in (1.0, 2.0, 2.0, 0.5):  # noqa: B007
            got = solve(prob, EM(), engine=engine, **options)
            assert got.stats.engine == "native"
            reference = solve(prob, EM(), engine="torch", **options)
            assert off(got.u, reference.u) < 1e-14
    module = _Both()
    prob = SDEProblem(module.f, module.g, batch(13), (0.0, 1.0))
    for value in (1.0, 3.0):
        module.scale = value
        with torch.no_grad():
            module.of_noise.weight.mul_(0.5)
        got = solve(prob, EM(), engine=engine, **options)
        assert got.stats.engine == "native"
        reference = solve(prob, EM(), engine="torch", **options)
        assert off(got.u.detach(), reference.u.detach()) < 1e-14


def test_drift_and_noise_of_one_function():
    """Which of the two it is called for is no part of it."""
    prob = problem(f=diagonal, g=diagonal)
    got, reference = (solve(prob, EM(), dt=0.1, seed=1, engine=e) for e in ("native", "torch"))
    assert off(got.u, reference.u) < 1e-14
    prob = problem(f=drift, g=drift)
    got, reference = (solve(prob, EM(), dt=0.1, seed=1, engine=e) for e in ("native", "torch"))
    assert off(got.u, reference.u) < 1e-14


def test_solves_of_a_compiled_sde_call_no_function():
    calls = [0, 0]

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        calls[0] += 1
        return p[0] * u

    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        calls[1] += 1
        return p[1] * u

    prob = problem(f=f, g=g)
    solve(prob, EM(), dt=0.25, seed=1, engine="native")
    assert calls[0] == calls[1] <= 9  # traced, looked at, and compared at several times
    before = list(calls)
    solve(prob, SOSRI(), seed=1, engine="native")
    assert calls == before
    solve(prob, SOSRI(), seed=1)
    assert calls == [before[0] + 1, before[1] + 1]


def late(t, u):
    return torch.relu(t - 0.5) * torch.arange(u.shape[0], dtype=u.dtype)[:, None]


def odd_one(t, u):
    return torch.relu(t - 0.5) * (torch.arange(u.shape[0]) == 2).to(u.dtype)[:, None]


def beyond(t, u):
    return torch.relu(u - 1.4) * torch.arange(u.shape[0], dtype=u.dtype)[:, None]


def inner(t, u):
    return torch.relu(t - 0.5) * torch.arange(u.shape[-2], dtype=u.dtype)[:, None]


@pytest.mark.parametrize(
    "part, shape",
    [(late, (4, 1)), (odd_one, (5, 1)), (beyond, (4, 1)), (inner, (2, 3, 2))],
    ids=["late", "one of them", "beyond a threshold", "inner dimension"],
)
def test_paths_that_differ_where_the_start_does_not_show_it_run_on_torch(part, shape):
    prob = SDEProblem(
        lambda t, u: -u,
        lambda t, u: 0.2 * u + part(t, u),
        torch.ones(shape, dtype=torch.float64),
        (0.0, 1.0),
    )
    options = {"dt": 0.1, "adaptive": False, "seed": 1}
    sol = solve(prob, EM(), **options)
    assert "native declined" in sol.stats.engine
    assert torch.equal(sol.u, solve(prob, EM(), engine="torch", **options).u)


def test_another_size_of_a_batch_is_compared_anew():
    def f(t, u):
        return -u * u.shape[0]

    def prob(rows):
        u0 = torch.ones(rows, 1, dtype=torch.float64)
        return SDEProblem(f, lambda t, u: 0.2 * u, u0, (0.0, 1.0))

    options = {"dt": 0.05, "adaptive": False, "seed": 1}
    first = prob(2)
    assert solve(first, EM(), engine="native", **options).stats.engine == "native"
    with pytest.raises(ValueError, match="paths of a batch"):
        solve(prob(17).remake(g=first.g), EM(), engine="native", **options)


class Scale:
    value = 1.0


SCALE = Scale()


def scaled(t, u):
    return SCALE.value * u


def test_a_plain_attribute_of_a_global_object_is_seen():
    u0 = torch.ones(4, 1, dtype=torch.float64)
    prob = SDEProblem(lambda t, u: -u, scaled, u0, (0.0, 1.0))
    options = {"dt": 0.1, "adaptive": False, "seed": 1}
    for value in (0.2, 0.7):
        SCALE.value = value
        got = solve(prob, EM(), engine="native", **options)
        assert off(got.u, solve(prob, EM(), engine="torch", **options).u) < 1e-14
