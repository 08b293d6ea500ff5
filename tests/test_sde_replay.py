"""SDEs: paths that are replayed, the work of a solve, and failures."""

from __future__ import annotations

import math

import pytest
import torch
from sde_solves import ADAPTIVE, LOOSE, of
from sdes import DOUBLE, heisenberg, linear, linear_solution, rms, solve, two_noises
from torch import Tensor

from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    EulerHeun,
    ImplicitEM,
    LambaEM,
    ReturnCode,
    SDEProblem,
    SolveError,
    VirtualBrownianTree,
)

# -- replay --------------------------------------------------------------------------------------


def test_replay_gives_the_same_solution() -> None:
    for alg in ADAPTIVE:
        prob = linear(3, 2, interpretation=of(alg))
        sol = solve(prob, alg, seed=3, **LOOSE)
        before = list(sol.noise.times)
        again = solve(prob, alg, noise=sol.noise, **LOOSE)
        torch.testing.assert_close(again.u, sol.u, rtol=1e-13, atol=1e-13)
        tighter = solve(prob, alg, noise=sol.noise, rtol=1e-4, atol=1e-4)
        assert sol.noise.times == before and len(tighter.noise.times) > len(before)
        torch.testing.assert_close(
            tighter.noise.at([1.0]), sol.noise.at([1.0]), rtol=1e-13, atol=1e-13
        )


def test_replay_with_another_method_and_tolerance_converges() -> None:
    prob = linear(50)
    rough = solve(prob, LambaEM(), rtol=1e-1, atol=1e-1, seed=3)
    fine = solve(prob, SOSRI(), rtol=1e-4, atol=1e-4, noise=rough.noise)
    exact = linear_solution(prob, 1.0, rough.noise.at([1.0])[0])
    assert rms(fine.u[-1] - exact) < 2e-3 < 0.03 < rms(rough.u[-1] - exact)


def test_replay_in_another_precision() -> None:
    prob = linear(5, 2)
    sol = solve(prob, EM(), dt=0.1, seed=3)
    small = prob.remake(u0=prob.u0.float(), p=prob.p.float())
    again = solve(small, EM(), dt=0.1, noise=sol.noise)
    assert again.u.dtype == torch.float32
    torch.testing.assert_close(again.u.double(), sol.u, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alg", [EM(), *ADAPTIVE], ids=repr)
def test_a_virtual_tree_is_one_path_for_every_solve(alg) -> None:
    prob = linear(20, 2, interpretation=of(alg))
    tree = VirtualBrownianTree(5, 0.0, 1.0, rows=20, m=2)
    exact = linear_solution(prob, 1.0, tree.increment(0.0, 1.0).W)
    errors = []
    for fine in (False, True):
        tol = 1e-3 if fine else 1e-1
        options = {"rtol": tol, "atol": tol} if alg.adaptive else {"dt": tol}
        sol = solve(prob, alg, noise=tree, **options)
        errors.append(rms(sol.u[-1] - exact))
    assert errors[1] < 0.3 * errors[0] and errors[1] < 0.05
    # a value of the path does not depend on what was read before
    times = torch.rand(9, dtype=DOUBLE).sort().values
    saved = solve(prob, alg, noise=tree, saveat=times, **options)
    for i in reversed(range(9)):
        torch.testing.assert_close(sol(times[i]), saved.u[i], rtol=1e-10, atol=1e-10)


def test_a_tree_in_either_direction() -> None:
    prob = linear(50, interpretation="stratonovich")
    tree = VirtualBrownianTree(5, -1.0, 2.0, rows=50, m=1)
    there = solve(prob, EulerHeun(), noise=tree, dt=1 / 256)
    back = solve(prob.remake(u0=there.u[-1], tspan=(1.0, 0.0)), EulerHeun(), noise=tree, dt=1 / 200)
    assert rms(back.u[-1] - prob.u0) < 0.02


# -- work, and failures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alg", "nf", "ng"), [(EM(), 1, 1), (EulerHeun(), 2, 2), (LambaEM(), 2, 2), (SOSRI(), 4, 4)],
    ids=repr,
)  # fmt: skip
def test_evaluations_are_counted(alg, nf, ng) -> None:
    calls = [0, 0]

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        calls[0] += 1
        return p[0] * u

    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        calls[1] += 1
        return p[1] * u

    prob = linear(f=f, g=g, interpretation=of(alg))
    stats = solve(prob, alg, dt=0.1, adaptive=False, seed=0, tstops=[0.5]).stats
    assert [stats.nf, stats.ng] == calls == [1 + nf * 10, 1 + ng * 10]
    assert "ng=" in str(stats)


def test_a_number_of_steps_that_is_not_enough() -> None:
    with pytest.raises(SolveError, match="5 steps were not enough") as caught:
        solve(linear(), EM(), dt=0.1, seed=0, maxiters=5)
    partial = caught.value.solution
    assert partial is not None and len(partial.t) == 6
    again = solve(linear(), EM(), dt=0.1, seed=0)
    assert torch.equal(again.u[:6], partial.u)
    sol = solve(linear(), EM(), dt=0.1, seed=0, maxiters=5, throw=False)
    assert sol.retcode is ReturnCode.MAX_ITERS and torch.equal(sol.u, partial.u)


@pytest.mark.parametrize("which", ["f", "g"])
@pytest.mark.parametrize("alg", [EM(), *ADAPTIVE], ids=repr)
def test_nan_on_the_way_ends_the_solve(which, alg) -> None:
    def bad(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.where(t < 0.5, 0.1, math.nan) * u

    prob = linear(2, **{which: bad}, interpretation=of(alg))
    reason = "f gives NaN or Inf" if which == "f" else "f, g, or the state"
    with pytest.raises(SolveError, match="met NaN or Inf.*" + reason) as caught:
        solve(prob, alg, dt=0.04, seed=0, maxiters=2000, **LOOSE)
    assert caught.value.retcode is ReturnCode.UNSTABLE
    solution = caught.value.solution
    assert solution is not None and bool(torch.isfinite(solution.u).all())
    assert 0.3 < float(solution.t[-1]) < 0.55


def test_nan_from_g_at_once() -> None:
    prob = linear(g=lambda t, u, p: math.nan * u)
    with pytest.raises(SolveError) as caught:
        solve(prob, LambaEM(), seed=0)
    assert caught.value.retcode is ReturnCode.UNSTABLE


@pytest.mark.parametrize("alg", [LambaEM(), ImplicitEM(), SOSRA()], ids=repr)
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_infinite_noise_is_no_success(alg, engine) -> None:
    """Not even where the estimate of the error, of the drift alone, is finite."""

    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.where(t > 0.6, math.inf, 1.0) * torch.ones_like(u)

    prob = linear(2, 2, g=g, noise="additive")
    sol = solve(prob, alg, dt=0.25, seed=1, throw=False, engine=engine)
    assert sol.retcode is ReturnCode.UNSTABLE
    assert bool(sol.u.isfinite().all()) and 0.5 < sol.t[-1] < 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_steps_that_never_arrive(engine) -> None:
    prob = linear(2, 2)
    with pytest.raises(SolveError) as caught:
        solve(prob, EM(), dt=1e-310, adaptive=False, seed=1, engine=engine)
    assert caught.value.retcode in (ReturnCode.MAX_ITERS, ReturnCode.DT_LESS_THAN_MIN)


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_a_g_that_draws_is_named_when_the_gradient_is_refused(engine) -> None:
    p = torch.tensor([0.4, 0.7], dtype=DOUBLE, requires_grad=True)
    prob = linear(3, 2, p=p, g=lambda t, u, p: p[1] * torch.nn.functional.dropout(u, 0.5))
    sol = solve(prob, EM(), dt=0.1, seed=1, engine=engine)
    with pytest.raises(RuntimeError, match=r"^f or g gives other values now.* f or g draws random"):
        sol.u.sum().backward()


def test_a_sum_that_overflows_is_no_failure() -> None:
    u0 = torch.full((4, 1), 1e308, dtype=DOUBLE)
    sol = solve(linear(u0=u0, p=torch.tensor([0.0, 1e-3], dtype=DOUBLE)), EM(), dt=0.5, seed=0)
    assert sol.success


def test_exceptions_of_g_say_when() -> None:
    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        if t > 0.5:
            raise ZeroDivisionError
        return u

    with pytest.raises(ZeroDivisionError) as caught:
        solve(linear(g=g), EM(), dt=0.1, seed=0)
    assert "t = 0.6" in caught.value.__notes__[0]


def test_negative_roots_are_told_of() -> None:
    """The square-root process leaves its domain under Euler's method."""
    prob = linear(
        10, f=lambda t, u, p: 0.1 - u, g=lambda t, u, p: 2 * torch.sqrt(u), tspan=(0.0, 10.0)
    )
    with pytest.raises(SolveError, match="root or log of a negative number"):
        solve(prob, EM(), dt=0.1, seed=0)


def test_a_solution_tells_what_was_chosen() -> None:
    sol = solve(linear(), seed=7, **LOOSE)
    assert sol.stats.alg == "SOSRI" and sol.stats.engine == "torch"
    assert "SOSRI" in repr(sol) and "seed=7" in repr(sol.noise)


DEFAULTS = [
    ("diagonal", "ito", "SOSRI"),
    ("scalar", "ito", "SOSRI"),
    ("general", "ito", "LambaEM"),
    ("additive", "ito", "SOSRA"),
    ("diagonal", "stratonovich", "RKMil"),
    ("scalar", "stratonovich", "RKMil"),
    ("general", "stratonovich", "LambaEulerHeun"),
    ("additive", "stratonovich", "SOSRA"),
]


@pytest.mark.parametrize(("noise", "interpretation", "name"), DEFAULTS)
def test_the_default_method_suits_the_noise(noise, interpretation, name) -> None:
    changes = {}
    if noise == "general":
        changes["g"] = two_noises
    elif noise == "additive":
        changes["g"] = lambda t, u, p: torch.ones_like(u)
    prob = linear(3, noise=noise, interpretation=interpretation, **changes)
    sol = solve(prob, seed=0, rtol=0.1, atol=0.1)
    assert sol.stats.alg == name and sol.success


def test_autocast_holds_inside_of_both_functions() -> None:
    seen = []

    def f(t: Tensor, u: Tensor) -> Tensor:
        out = u @ torch.eye(2)
        seen.append(out.dtype)
        return out

    prob = SDEProblem(f, f, torch.ones(3, 2), (0.0, 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        sol = solve(prob, EM(), dt=0.25, seed=0)
    assert set(seen) == {torch.bfloat16} and sol.u.dtype == torch.float32


def test_levy_area_of_the_plane() -> None:
    """The third component of ``heisenberg`` at 1 has the variance 1/4 and no mean."""
    sol = solve(heisenberg(4000), EM(), dt=1 / 64, seed=1, save_everystep=False)
    z = sol.u[-1, :, 2]
    assert float(z.mean()) == pytest.approx(0, abs=4 * 0.5 / math.sqrt(4000))
    assert float(z.var()) == pytest.approx(0.25, rel=0.12)
