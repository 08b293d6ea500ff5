"""SDEs on the native engine beside the torch engine, on the same path: steps, values, noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from native_sdes import (
    CASES,
    DOUBLE,
    assert_same,
    batch,
    both,
    drift,
    label,
    off,
    problem,
)
from torch import Tensor

from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    SRIW1,
    IController,
    LambaEM,
    PIDController,
    ReturnCode,
    RKMil,
    SDEProblem,
    SolveError,
    solve,
)
from diffsolve.engines.native.programs import rows as stochastic
from diffsolve.engines.native.programs.lookup import find
from diffsolve.engines.native.programs.recipes import recipe_of
from diffsolve.engines.native.runtime import row_solve
from diffsolve.problems.sde_field import SDEField

INSIDE = [0.0, 0.111, 0.23, 0.5, 0.77771, 1.0]
LOOSE = {"rtol": 1e-2, "atol": 1e-3}
each_case = pytest.mark.parametrize(("alg", "noise"), CASES, ids=label)


def burst(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Noise that grows and falls at once, so that steps are rejected."""
    return p[1] * (1 + 5 * torch.sin(20 * t) ** 8) * torch.sin(u)


# -- every method ----------------------------------------------------------------------------------


@each_case
def test_fixed_steps(alg, noise):
    options = {"dt": 0.05, "adaptive": False}
    prob = problem(noise, alg)
    reference, got = both(prob, alg, **options)
    assert_same(got, reference)
    reference, got = both(prob, alg, **options, saveat=INSIDE)
    assert_same(got, reference)


@pytest.mark.parametrize(("alg", "noise"), [x for x in CASES if x[0].adaptive], ids=label)
def test_adaptive_steps(alg, noise):
    prob = problem(noise, alg)
    reference, got = both(prob, alg, **LOOSE)
    assert_same(got, reference, 1e-10)
    assert got.stats.nf == reference.stats.nf or alg.carries_derivative
    reference, got = both(prob, alg, **LOOSE, saveat=INSIDE)
    assert_same(got, reference, 1e-10)


# -- what steps do with the path -------------------------------------------------------------------


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1(), LambaEM(), RKMil()], ids=label)
@pytest.mark.parametrize("span", [(0.0, 0.6), (0.6, 0.0)], ids=["forward", "backward"])
def test_rejected_steps_follow_one_path(alg, span):
    prob = problem(g=burst, tspan=span)
    reference, got = both(prob, alg, **LOOSE, dt=0.2)
    assert got.stats.nreject > 2 and got.noise.divisions
    assert_same(got, reference, 1e-7)
    inside = sorted(torch.linspace(0.01, 0.59, 23).tolist(), reverse=span[0] > span[1])
    more, fewer = both(prob, alg, **LOOSE, dt=0.2, saveat=inside)
    assert_same(fewer, more, 1e-7)
    assert off(fewer.steps.t, got.steps.t) == 0  # saving changes no step


def test_stops_within_the_span():
    for alg, options in ((EM(), {"dt": 0.1}), (SOSRI(), LOOSE)):
        more = {**options, "tstops": [0.33, 0.331, 0.8], "saveat": [0.05, 0.33, 0.5, 0.8]}
        reference, got = both(problem(), alg, **more)
        assert_same(got, reference, 1e-10)


@pytest.mark.parametrize("alg", [EM(), SRIW1(), RKMil()], ids=label)
@pytest.mark.parametrize(
    ("span", "dt", "steps"), [((1.7e9, 1.7e9 + 1), 0.2, 5), ((1e4, 1e4 + 0.1), 1e-4, 1000)]
)
def test_fixed_steps_at_large_times(alg, span, dt, steps):
    prob = problem(f=lambda t, u, p: -u, g=lambda t, u, p: p[1] * u, tspan=span, rows=2)
    reference, got = both(prob, alg, dt=dt, adaptive=False)
    assert got.stats.naccept == reference.stats.naccept == steps
    assert_same(got, reference)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "backward"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_no_stage_reaches_beyond_a_stop(span, adaptive):
    """SOSRI's nodes are at 3.75 and -0.042: no step may see the other side of a stop."""

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.where(t < 0.5, 0.0, 100.0) + p[0] * u

    saveat = [0.25, 0.5, 1.0] if span[1] > span[0] else [0.75, 0.5, 0.0]
    options = {"dt": 0.1, "adaptive": adaptive, "tstops": [0.3, 0.5, 0.51, 0.9], "saveat": saveat}
    prob = problem(f=f, g=lambda t, u, p: 0.1 + 0 * u, tspan=span, rows=2)
    assert_same(*reversed(both(prob, SOSRI(), **options)))

    # without a slope every stage is exact, and nothing is rejected
    flat, still = (torch.tensor(x, dtype=DOUBLE) for x in ((0.0, 0.3), (0.0, 0.0)))
    for sol in both(prob.remake(p=flat), SOSRI(), **options):
        without = solve(prob.remake(f=lambda t, u, p: 0 * u, p=still), SOSRI(), noise=sol.noise,
                        dt=0.1, adaptive=False, saveat=saveat)  # fmt: skip
        exact = 100 * ((torch.tensor(saveat) - 0.5).clamp(min=0) - max(span[0] - 0.5, 0.0))
        drift = (sol.u - without.u)[1:]  # the value inside of a step depends on its noise alone
        assert float((drift - exact[1:, None, None]).abs().max()) <= 1e-10
        assert sol.stats.nreject == 0


def test_a_drift_that_jumps_at_a_stop():
    def jumping(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.where(t < 0.5, p[0], -3.0) * u

    for alg in (EM(), SOSRI(), RKMil()):
        options = {"dt": 0.125, "adaptive": False, "tstops": [0.5]}
        reference, got = both(problem(f=jumping), alg, **options)
        assert_same(got, reference)


def test_a_path_a_seed():
    seeds = torch.arange(13) * 7 + 3
    reference, got = both(problem(), SOSRI(), **LOOSE, seed=seeds)
    assert_same(got, reference, 1e-10)
    one = solve(problem(u0=batch(13)[4:5]), EM(), dt=0.1, seed=seeds[4:5], engine="native")
    all_ = solve(problem(), EM(), dt=0.1, seed=seeds, engine="native")
    torch.testing.assert_close(all_.u[:, 4:5], one.u)


def test_a_path_is_the_same_in_every_batch():
    whole = solve(problem(), EM(), dt=0.01, seed=2, engine="native")
    part = solve(problem(u0=batch(13)[:5]), EM(), dt=0.01, seed=2, engine="native")
    torch.testing.assert_close(whole.u[:, :5], part.u, rtol=1e-14, atol=1e-14)


def test_the_path_can_be_replayed():
    got = solve(problem(g=burst), SOSRI(), seed=1, engine="native", **LOOSE)
    again = solve(problem(g=burst), EM(), dt=0.01, noise=got.noise)
    assert again.stats.engine.startswith("torch, because native declined: it draws its noise")
    known = got.noise.times[::5]
    torch.testing.assert_close(again.noise.at(known), got.noise.at(known))
    assert off(again.u[-1], got.u[-1]) < 0.1
    fixed = solve(problem(), EM(), dt=0.05, seed=1, engine="native")
    again = solve(problem(), EM(), dt=0.05, noise=fixed.noise)
    assert off(again.u, fixed.u) < 1e-14
    finer = solve(problem(), EM(), dt=0.025, noise=fixed.noise)
    assert off(finer.u[-1], fixed.u[-1]) < 0.1


def test_no_seed_means_one_of_torchs():
    torch.manual_seed(3)
    first = solve(problem(), EM(), dt=0.1, engine="native")
    torch.manual_seed(3)
    again = solve(problem(), EM(), dt=0.1, engine="native")
    other = solve(problem(), EM(), dt=0.1, engine="native")
    assert torch.equal(first.u, again.u) and not torch.equal(first.u, other.u)
    assert first.noise.seed == again.noise.seed != other.noise.seed


# -- shapes and types ------------------------------------------------------------------------------

SHAPES = {
    "0-d": torch.tensor(0.7, dtype=DOUBLE),
    "one path": batch(1)[0],
    "a batch of one": batch(1),
    "one entry": batch(13)[:, :1].clone(),
    "three dimensions": batch(12).view(3, 4, 2),
    "as many as a vector": batch(16),
    "more entries": batch(5, 11),
}


@pytest.mark.parametrize("u0", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_of_the_state(u0):
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return -p[0] * u * torch.cos(t)

    prob = problem(u0=u0, f=f)
    reference, got = both(prob, SOSRI(), **LOOSE, saveat=[0.3, 0.61, 1.0])
    assert got.u.shape == (3, *u0.shape)
    assert_same(got, reference, 1e-10)


def test_trees():
    def f(t: Tensor, u: Any, p: Tensor) -> Any:
        return {"a": -u["a"] * p[0], "b": torch.cos(u["a"].sum()) * u["b"]}

    def g(t: Tensor, u: Any, p: Tensor) -> Any:
        return {"a": p[1] * u["a"], "b": 0.1 * u["b"]}

    def columns(t: Tensor, u: Any, p: Tensor) -> Any:
        return {
            "a": torch.stack([p[1] * u["a"], 0.1 * u["a"].roll(1)], -1),
            "b": torch.stack([0.1 * u["b"], torch.ones_like(u["b"])], -1),
        }

    u0 = {"a": torch.ones(3, dtype=DOUBLE), "b": torch.ones(2, 2, dtype=DOUBLE)}
    prob = SDEProblem(f, g, u0, (0.0, 1.0), torch.tensor([0.7, 0.3], dtype=DOUBLE))
    assert_same(*both(prob, SOSRI(), **LOOSE)[::-1], 1e-10)
    prob = prob.remake(g=columns, noise="general")
    assert_same(*both(prob, LambaEM(), **LOOSE, saveat=[0.2, 0.9])[::-1], 1e-10)


@pytest.mark.parametrize("alg", [EM(), SOSRI(), RKMil()], ids=label)
def test_single_precision(alg):
    prob = problem(u0=batch(13, dtype=torch.float32), p=torch.tensor([0.7, 0.3]))
    reference, got = both(prob, alg, dt=0.05, adaptive=False, saveat=INSIDE)
    assert got.u.dtype is torch.float32
    assert off(got.u, reference.u) < 1e-6
    assert got.noise.pieces == reference.noise.pieces


def test_single_precision_with_adaptive_steps():
    prob = problem(u0=batch(13, dtype=torch.float32), p=torch.tensor([0.7, 0.3]))
    reference, got = both(prob, SOSRI(), rtol=1e-1, atol=1e-2)
    assert got.stats.naccept == reference.stats.naccept
    assert off(got.u, reference.u) < 1e-4


# -- what else belongs to a solve ------------------------------------------------------------------


def test_tolerances_of_their_own_and_controllers():
    tolerances = {"rtol": torch.tensor([1e-2, 5e-2]), "atol": 1e-2 * torch.rand(13, 2)}
    assert_same(*both(problem(), SOSRI(), **tolerances)[::-1], 1e-10)
    for controller in (IController(exponent=0.4), PIDController.for_order(1.5)):
        reference, got = both(problem(), SOSRI(), **LOOSE, controller=controller)
        assert_same(got, reference, 1e-9)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "backward"])
def test_dense_output_follows_the_path(span):
    times = torch.tensor([0.0, 0.013, 0.5, 0.77, 0.78, 1.0], dtype=DOUBLE)
    for alg, options in ((EM(), {"dt": 0.1}), (SOSRI(), LOOSE)):
        reference, got = both(problem(tspan=span), alg, **options)
        assert off(got(times), reference(times)) < 1e-10
        reference, got = both(problem(tspan=span), alg, **options, saveat=[0.5], dense=True)
        assert off(got(times), reference(times)) < 1e-10
        assert off(got(0.5), got.u[0]) < 1e-12
    with pytest.raises(ValueError, match="derivative"):
        got(0.5, derivative=1)
    with pytest.raises(ValueError, match="outside"):
        got(1.5)


def test_an_empty_span():
    reference, got = both(problem(tspan=(0.3, 0.3)), EM(), dt=0.1)
    assert off(got.u, reference.u) == 0 and off(got(0.3), reference(0.3)) == 0


def test_many_steps_and_saves_make_room():
    prob = problem(rows=2)
    got = solve(prob, SOSRI(), rtol=1e-3, atol=1e-4, dtmax=1e-3, seed=1, engine="native")
    assert len(got.t) == got.stats.naccept + 1 > 1000
    some = solve(
        prob, SOSRI(), rtol=1e-3, atol=1e-4, dtmax=1e-3, seed=1, engine="native",
        saveat=torch.linspace(0, 1, 3001),
    )  # fmt: skip
    assert some.stats.naccept == got.stats.naccept
    assert torch.equal(some.u[-1], got.u[-1])


def nan_later(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return torch.where(t < 0.43, -u, math.nan)


FAILURES: dict[str, tuple[Any, dict[str, Any], ReturnCode]] = {
    "fixed": (EM(), {"f": nan_later, "dt": 0.1}, ReturnCode.UNSTABLE),
    "adaptive": (SOSRI(), {"f": nan_later, **LOOSE}, ReturnCode.UNSTABLE),
    "maxiters": (SOSRI(), {**LOOSE, "maxiters": 10}, ReturnCode.MAX_ITERS),
    "fixed maxiters": (EM(), {"dt": 0.01, "maxiters": 30}, ReturnCode.MAX_ITERS),
    "dtmin": (
        SOSRI(), {"rtol": 1e-8, "atol": 1e-8, "dtmin": 0.1}, ReturnCode.DT_LESS_THAN_MIN
    ),
}  # fmt: skip


@pytest.mark.parametrize(("alg", "options", "code"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_are_those_of_torch(alg, options, code):
    options = dict(options)
    prob = problem(f=options.pop("f", drift))
    reference, got = both(prob, alg, **options, throw=False)
    assert got.retcode is code
    assert_same(got, reference, 1e-10)
    with pytest.raises(SolveError) as caught:
        solve(prob, alg, **options, seed=5, engine="native")
    assert caught.value.retcode is code


def test_nan_at_the_start():
    prob = problem(g=lambda t, u, p: math.nan * u)
    for alg, options in ((SOSRI(), {}), (SOSRI(), {"dt": 0.1}), (EM(), {"dt": 0.1})):
        got = solve(prob, alg, seed=1, engine="native", throw=False, **options)
        assert got.retcode is ReturnCode.UNSTABLE and got.stats.naccept == 0


# -- threads ---------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch):
    """Two threads even for little work."""
    monkeypatch.setattr(row_solve, "WORK_A_THREAD", 1)
    before = torch.get_num_threads()
    yield lambda count: torch.set_num_threads(count)
    torch.set_num_threads(before)


@pytest.mark.parametrize("alg", [EM(), SOSRI(), RKMil(), SOSRA()], ids=label)
def test_paths_are_shared_among_threads(threads, alg):
    noise = "additive" if alg.noise_types == {"additive"} else "diagonal"
    prob = problem(noise, alg, rows=70)
    for saveat, seed in ((None, 4), (INSIDE, 4), (INSIDE, torch.arange(70) + 9)):
        options = {"dt": 0.02, "adaptive": False, "engine": "native"}
        options |= {"saveat": saveat, "seed": seed}
        threads(1)
        one = solve(prob, alg, **options)
        for count in (2, 3):
            threads(count)
            several = solve(prob, alg, **options)
            assert torch.equal(several.u, one.u)
            assert off(several.steps.error, one.steps.error) < 1e-13
            assert off(several.steps.stiffness, one.steps.stiffness) < 1e-13
            assert several.noise.pieces == one.noise.pieces
            assert several.stats.nf == one.stats.nf


def test_where_one_path_fails_all_stop(threads):
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.where((t > 0.4) & (u[..., :1] > 1.45), math.nan * u, 0.0 * u)

    prob = problem(f=f, g=lambda t, u, p: 1e-6 * u, rows=70)
    threads(1)
    one = solve(prob, EM(), dt=0.02, seed=1, engine="native", throw=False)
    threads(2)
    two = solve(prob, EM(), dt=0.02, seed=1, engine="native", throw=False)
    assert one.retcode is two.retcode is ReturnCode.UNSTABLE
    assert torch.equal(one.u, two.u) and two.stats.naccept == one.stats.naccept < 25


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_registers_of_other_widths(monkeypatch, lanes):
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        found = drift(t, u, p)
        for _ in range(lanes):  # code of its own
            found = found + 1e-3 * torch.sin(found)
        return found

    monkeypatch.setattr(stochastic, "lanes_of", lambda single: lanes)
    prob = problem(f=f)
    for alg, options in ((EM(), {"dt": 0.1}), (SOSRI(), LOOSE)):
        assert_same(*both(prob, alg, **options, saveat=INSIDE)[::-1], 1e-10)
    assert native_lanes(prob) == lanes


def native_lanes(prob: SDEProblem) -> int:
    field = SDEField.of(prob)
    return find(field, recipe_of(field), 0.0, prob.u0.reshape(-1), 1.0, verify=False).program.lanes


def test_counts_and_times_of_the_kernel():
    got = solve(problem(), SOSRI(), dt=0.1, adaptive=False, seed=1, engine="native")
    assert (got.stats.nf, got.stats.ng) == (41, 41)
    assert got.stats.alg == "SOSRI" and 0 < got.stats.kernel_s < got.stats.wall_s
