"""Solving SDEs: shapes of states and noise, seeds, saving, dense output, replay, failures."""

from __future__ import annotations

import math

import pytest
import torch
from sde_solves import ADAPTIVE, LOOSE, of
from sdes import DOUBLE, linear, linear_solution, rms, solve, two_noises
from torch import Tensor, nn

from diffsolve import (
    EM,
    SOSRI,
    EulerHeun,
    LambaEM,
    SDEProblem,
)

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
