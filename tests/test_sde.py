"""Solving SDEs: shapes of states and noise, seeds, saving, dense output, replay, failures."""

from __future__ import annotations

import math

import pytest
import torch
from sdes import DOUBLE, heisenberg, linear, linear_solution, rms, solve, two_noises
from torch import Tensor, nn

from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    EulerHeun,
    ImplicitEM,
    LambaEM,
    LambaEulerHeun,
    ReturnCode,
    SDEProblem,
    SolveError,
    VirtualBrownianTree,
)

ADAPTIVE = [LambaEM(), LambaEulerHeun(), SOSRI()]
LOOSE = {"rtol": 1e-2, "atol": 1e-2}


def of(alg) -> str:
    return next(iter(alg.interpretation))


# -- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (4, 1), (4, 3), (2, 3, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("alg", ADAPTIVE, ids=repr)
def test_states_of_any_shape_follow_their_paths(shape, alg) -> None:
    u0 = torch.linspace(0.5, 1.5, max(math.prod(shape), 1), dtype=DOUBLE).reshape(shape)
    prob = linear(u0=u0, interpretation=of(alg))
    sol = solve(prob, alg, rtol=1e-3, atol=1e-3, seed=4)
    W = sol.noise.at([1.0])[0].reshape(shape)
    assert sol.u.shape == (len(sol.t), *shape) and sol.success
    exact = linear_solution(prob, 1.0, W)
    # errors of steps are independent: those of n add up to the root of n
    assert rms((sol.u[-1] - exact) / (1e-3 + 1e-3 * exact)) < math.sqrt(len(sol.steps))
    assert sol.noise.rows == math.prod(shape[:-1])
    assert sol.noise.m == (shape[-1] if shape else 1)


def test_scalar_noise_is_one_motion_a_path() -> None:
    prob = linear(4, 3, noise="scalar")
    column = prob.remake(g=lambda t, u, p: (p[1] * u)[..., None])
    one, other = (solve(x, EM(), dt=0.05, seed=2) for x in (prob, column))
    assert (one.noise.rows, one.noise.m) == (4, 1)
    torch.testing.assert_close(one.u, other.u)
    torch.testing.assert_close(one.u[..., :1].expand_as(one.u), one.u)  # components stay together
    assert not torch.allclose(one.u[-1, 0], one.u[-1, 1])


def test_general_noise_with_as_many_motions_as_g_has_columns() -> None:
    prob = linear(2000, 1, g=two_noises, noise="general")
    sol = solve(prob, EM(), dt=1 / 256, seed=2, save_everystep=False)
    W = sol.noise.at([1.0])[0]
    assert W.shape == (2000, 2)
    exact = torch.exp(0.4 - (0.49 + 0.09) / 2 + 0.7 * W[:, :1] + 0.3 * W[:, 1:])
    assert rms(sol.u[-1] - exact) < 0.08


def test_a_diagonal_matrix_is_diagonal_noise() -> None:
    prob = linear(3, 2)
    matrix = prob.remake(g=lambda t, u, p: torch.diag_embed(p[1] * u), noise="general")
    for alg in (EM(), LambaEM()):
        options = {"dt": 0.05, "adaptive": False, "seed": 1}
        a, b = (solve(x, alg, **options) for x in (prob, matrix))
        torch.testing.assert_close(a.u, b.u)


def test_additive_noise_takes_either_shape() -> None:
    prob = linear(3, 2, g=lambda t, u, p: p[1] * torch.ones_like(u), noise="additive")
    matrix = prob.remake(g=lambda t, u, p: torch.diag_embed(p[1] * torch.ones_like(u)))
    a, b = (solve(x, EM(), dt=0.05, seed=1) for x in (prob, matrix))
    torch.testing.assert_close(a.u, b.u)


@pytest.mark.parametrize("noise", ["diagonal", "scalar", "general", "additive"])
def test_a_pytree_is_one_path(noise) -> None:
    def split(u: Tensor) -> dict:
        return {"b": u[:2], "a": u[2:].reshape(2, 2)}

    def join(u: dict) -> Tensor:
        return torch.cat([u["b"].reshape(-1), u["a"].reshape(-1)])

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.sin(u).flip(0)

    def g(t: Tensor, u: Tensor) -> Tensor:
        if noise == "general":
            return torch.stack([0.3 * u, 0.1 * u.flip(0), torch.ones_like(u)], -1)
        return torch.full_like(u, 0.4) if noise == "additive" else 0.3 * u

    def g_tree(t: Tensor, u: dict) -> dict:
        G = g(t, join(u))
        rest = G[2:].reshape(2, 2, 3) if noise == "general" else G[2:].reshape(2, 2)
        return {"a": rest, "b": G[:2]}

    u0 = torch.linspace(0.5, 1.5, 6, dtype=DOUBLE)
    flat = SDEProblem(f, g, u0, (0.0, 1.0), noise=noise)
    tree = SDEProblem(lambda t, u: split(f(t, join(u))), g_tree, split(u0), (0.0, 1.0), noise=noise)
    a, b = (solve(prob, EM(), dt=0.1, seed=3) for prob in (tree, flat))
    assert a.u["a"].shape == (11, 2, 2) and a.u["b"].shape == (11, 2)
    torch.testing.assert_close(torch.cat([a.u["b"], a.u["a"].reshape(11, 4)], 1), b.u)
    assert (a.noise.rows, a.noise.m) == (b.noise.rows, b.noise.m)
    torch.testing.assert_close(join(a(0.55)), b(0.55))


def test_modules_take_time_and_state() -> None:
    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return self.layer(u)

    prob = SDEProblem(Drift(), lambda t, u: 0.1 * u, torch.ones(5, 2), (0.0, 1.0))
    sol = solve(prob, seed=1)
    assert sol.success and sol.u.dtype == torch.float32 and sol.u.requires_grad


def test_float32_follows_the_same_path() -> None:
    prob = linear(20, 2)
    small = prob.remake(u0=prob.u0.float(), p=prob.p.float())
    for alg in (EM(), LambaEM(), SOSRI()):
        options = {"dt": 0.01, "adaptive": False, "seed": 6}
        a, b = solve(prob, alg, **options), solve(small, alg, **options)
        assert b.u.dtype == torch.float32
        torch.testing.assert_close(b.u.double(), a.u, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(a.t, b.t)


@pytest.mark.parametrize("alg", ADAPTIVE, ids=repr)
def test_float32_adaptively(alg) -> None:
    prob = linear(20, 2, interpretation=of(alg))
    prob = prob.remake(u0=prob.u0.float(), p=prob.p.float())
    sol = solve(prob, alg, rtol=1e-3, atol=1e-3, seed=6)
    W = sol.noise.at([1.0])[0]
    assert W.dtype == torch.float32
    assert rms(sol.u[-1] - linear_solution(prob, 1.0, W)) < 0.03


def test_functions_that_fill_one_buffer() -> None:
    drift, noise = torch.empty(4, 2, dtype=DOUBLE), torch.empty(4, 2, dtype=DOUBLE)
    prob = linear(4, 2)
    filling = prob.remake(
        f=lambda t, u, p: torch.mul(u, p[0], out=drift),
        g=lambda t, u, p: torch.mul(u, p[1], out=noise),
    )
    for alg in (EM(), LambaEM(), SOSRI()):
        a, b = (solve(x, alg, dt=0.1, adaptive=False, seed=1) for x in (prob, filling))
        assert torch.equal(a.u, b.u)
        assert torch.equal(a(0.33), b(0.33))


# -- seeds ---------------------------------------------------------------------------------------


def test_a_seed_decides_everything() -> None:
    prob = linear(3, 2)
    a, b, c = (solve(prob, LambaEM(), seed=s, **LOOSE) for s in (1, 1, 2))
    assert torch.equal(a.u, b.u) and torch.equal(a.t, b.t)
    assert len(a.t) != len(c.t) or not torch.equal(a.u, c.u)


def test_no_seed_is_drawn_by_torch_and_told() -> None:
    prob = linear(3, 2)
    torch.manual_seed(5)
    a, other = solve(prob, **LOOSE), solve(prob, **LOOSE)
    torch.manual_seed(5)
    b = solve(prob, **LOOSE)
    again = solve(prob, seed=a.noise.seed, **LOOSE)
    assert torch.equal(a.u, b.u) and torch.equal(a.u, again.u)
    assert other.noise.seed != a.noise.seed


def test_a_generator_gives_the_seed() -> None:
    prob = linear(3, 2)
    a, b = (solve(prob, seed=torch.Generator().manual_seed(8), **LOOSE) for _ in range(2))
    generator = torch.Generator().manual_seed(8)
    c, d = (solve(prob, seed=generator, **LOOSE) for _ in range(2))
    assert a.noise.seed == b.noise.seed == c.noise.seed != d.noise.seed


def test_a_path_does_not_depend_on_its_batch() -> None:
    few, many = (solve(linear(n, 2), EM(), dt=0.1, seed=3).u for n in (3, 7))
    assert torch.equal(few, many[:, :3])


def test_seeds_of_paths() -> None:
    seeds = torch.tensor([[5, 9, 5], [7, 5, -1]])
    prob = linear(u0=torch.ones(2, 3, 2, dtype=DOUBLE))
    u = solve(prob, EM(), dt=0.1, seed=seeds).u
    assert torch.equal(u[:, 0, 0], u[:, 0, 2]) and torch.equal(u[:, 0, 0], u[:, 1, 1])
    assert not torch.allclose(u[-1, 0, 0], u[-1, 0, 1])
    alone = solve(linear(2, 2), EM(), dt=0.1, seed=torch.tensor([-1, 7])).u
    assert torch.equal(alone[:, 1], u[:, 1, 0]) and torch.equal(alone[:, 0], u[:, 1, 2])


def test_the_seed_of_one_path_may_be_a_tensor() -> None:
    prob = linear(u0=torch.ones(2, dtype=DOUBLE))
    a, b = (solve(prob, EM(), dt=0.1, seed=s).u for s in (3, torch.tensor(3)))
    assert torch.equal(a, b)


# -- times ---------------------------------------------------------------------------------------


def test_fixed_steps_and_the_points_of_the_path_are_the_same_times() -> None:
    sol = solve(linear(), EM(), dt=1e-3, seed=0)
    assert len(sol.noise.times) == len(sol.t) == 1001
    torch.testing.assert_close(
        torch.tensor(sol.noise.times, dtype=DOUBLE), sol.t, rtol=1e-15, atol=0
    )
    torch.testing.assert_close(sol.t, torch.linspace(0, 1, 1001, dtype=DOUBLE))


@pytest.mark.parametrize("alg", ADAPTIVE, ids=repr)
def test_adaptive_steps_are_points_of_the_path(alg) -> None:
    sol = solve(linear(5, interpretation=of(alg)), alg, seed=0, rtol=1e-3, atol=1e-3)
    assert sol.stats.nreject > 0
    known = torch.tensor(sol.noise.times, dtype=DOUBLE)
    assert float((known[:, None] - sol.t).abs().amin(0).max()) < 1e-15


@pytest.mark.parametrize("alg", [EM(), *ADAPTIVE], ids=repr)
def test_saving_changes_nothing(alg) -> None:
    prob = linear(5, 2, interpretation=of(alg))
    options = {**LOOSE, "seed": 3, "dt": 0.07 if alg.adaptive else 0.03}
    every = solve(prob, alg, **options)
    times = sorted({0.0, 0.1, 1 / 3, 0.34, float(every.t[4]), 0.9999, 1.0})
    some = solve(prob, alg, saveat=times, **options)
    ends = solve(prob, alg, save_everystep=False, **options)
    assert torch.equal(some.t, torch.tensor(times, dtype=DOUBLE))
    assert torch.equal(every.u[-1], some.u[-1]) and torch.equal(every.u[-1], ends.u[-1])
    assert torch.equal(every.steps.h, some.steps.h)
    assert torch.equal(some.u[times.index(float(every.t[4]))], every.u[4])
    # what is read between the steps is the same, also afterwards and in another order
    order = torch.randperm(len(times))
    read = every(torch.tensor(times, dtype=DOUBLE)[order])
    torch.testing.assert_close(read[order.argsort()], some.u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alg", ADAPTIVE, ids=repr)
def test_dense_output_follows_the_path(alg) -> None:
    prob = linear(
        4, 2, f=lambda t, u, p: 0.5 * torch.ones_like(u), g=lambda t, u, p: 2 * torch.ones_like(u),
        interpretation=of(alg),
    )  # fmt: skip
    sol = solve(prob, alg, seed=3, dt=0.3, adaptive=False)
    t = torch.linspace(0, 1, 23, dtype=DOUBLE)
    exact = 1 + 0.5 * t[:, None, None] + 2 * sol.noise.at(t.tolist())
    torch.testing.assert_close(sol(t), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sol(sol.t), sol.u, rtol=1e-13, atol=1e-13)


def test_dense_output_between_steps_has_the_order_of_eulers_method() -> None:
    prob = linear(2000)
    errors = []
    for n in (8, 16, 32):
        sol = solve(prob, SOSRI(), dt=1 / n, adaptive=False, seed=n)
        t = 1 - 0.5 / n
        errors.append(rms(sol(t) - linear_solution(prob, t, sol.noise.at([t])[0])))
    assert (
        errors[1] / errors[2] > 1.8 and errors[0] / errors[2] > 3.4
    )  # a step's error is of order 1


def test_backward_in_time_is_a_path_of_its_own() -> None:
    prob = linear(2000, tspan=(1.0, 0.0))
    sol = solve(prob, EM(), dt=1 / 128, seed=5)
    assert sol.t[0] == 1.0 and sol.t[-1] == 0.0 and bool((sol.steps.h < 0).all())
    W = sol.noise.at([0.0], since=1.0)[0]
    assert abs(float(W.var()) - 1) < 0.1
    exact = torch.exp(torch.tensor(-0.4 - 0.245, dtype=DOUBLE) + 0.7 * W)
    assert rms(sol.u[-1] - exact) < 0.06


def test_back_along_the_same_path() -> None:
    prob = linear(500, interpretation="stratonovich")
    there = solve(prob, EulerHeun(), dt=1 / 256, seed=5, save_everystep=False)
    back = prob.remake(u0=there.u[-1], tspan=(1.0, 0.0))
    again = solve(back, EulerHeun(), dt=1 / 256, noise=there.noise)
    assert rms(again.u[-1] - prob.u0) < 0.01


@pytest.mark.parametrize("alg", [EM(), LambaEM(), SOSRI()], ids=repr)
def test_jumps_at_stops_are_seen_from_the_right_side(alg) -> None:
    """Constant drift, whose size jumps: every method is exact where it is seen from each side."""

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.where(t < 0.5, 1.0, -3.0) * torch.ones_like(u)

    prob = linear(2, 1, f=f, g=lambda t, u, p: torch.full_like(u, 0.3))
    sol = solve(prob, alg, dt=0.2, tstops=[0.5], adaptive=False, seed=1)
    assert 0.5 in sol.t.tolist()
    exact = 1 + 0.5 - 1.5 + 0.3 * sol.noise.at([1.0])[0]
    torch.testing.assert_close(sol.u[-1], exact)


def test_an_empty_span() -> None:
    sol = solve(linear(tspan=(0.5, 0.5)), LambaEM(), seed=0)
    assert sol.success and torch.equal(sol.u[0], linear().u0)


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
