"""Milstein methods for noise of any shape: commutative or not, and Levy areas of paths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sdes import DOUBLE, heisenberg, rms, slope
from stochastic_runs import (
    GridPath,
    field_of,
    fixed_steps,
    integral_of,
    observed,
    same_path,
    solve,
)
from torch import Tensor

from diffsolve import (
    EM,
    LambaEM,
    ReversibleHeun,
    RKMil,
    RKMilCommute,
    RKMilGeneral,
    SDEProblem,
)
from diffsolve.problems.sde_field import GivenNoise
from diffsolve.solvers.stochastic.levy_area import area_of_pieces, levy_area, pieces_of
from diffsolve.solvers.stochastic.noise.path import BrownianPath
from diffsolve.solvers.stochastic.noise.tree import VirtualBrownianTree

COARSE = [16, 32, 64, 128]
COMMUTE = [RKMilCommute(), RKMilCommute("stratonovich")]
GENERAL = [RKMilGeneral(), RKMilGeneral("stratonovich")]


# -- problems with closed forms ------------------------------------------------------------------


def turning(rows: int, interpretation: str) -> SDEProblem:
    """Three linear noises whose matrices commute; ``u`` is a matrix exponential times its start."""
    A, *Bs = matrices()

    def g(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack([u @ B.T for B in Bs], -1)

    u0 = torch.tensor([[1.0, 0.5]], dtype=DOUBLE).repeat(rows, 1)
    return SDEProblem(
        lambda t, u: u @ A.T, g, u0, (0.0, 1.0), noise="general", interpretation=interpretation
    )


def matrices() -> list[Tensor]:
    values = ([-0.2, 0.5], [0.3, 0.4], [0.1, -0.3], [-0.4, 0.2])
    return [torch.tensor([[a, -b], [b, a]], dtype=DOUBLE) for a, b in values]


def turning_solution(interpretation: str, W: Tensor) -> Tensor:
    A, *Bs = matrices()
    if interpretation == "ito":
        A = A - 0.5 * torch.stack([B @ B for B in Bs]).sum(0)
    exponent = A + torch.einsum("kij,rk->rij", torch.stack(Bs), W)
    return torch.matrix_exp(exponent) @ torch.tensor([1.0, 0.5], dtype=DOUBLE)


def twisted(rows: int, interpretation: str) -> SDEProblem:
    """``u = (sinh W1, W2, A + W1 W2)`` with the Levy area ``A``: nonlinear, and not commutative."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        x, y, z = u.unbind(-1)
        return torch.stack([0.5 * x if interpretation == "ito" else 0 * x, 0 * y, 0 * z], -1)

    def g(t: Tensor, u: Tensor) -> Tensor:
        x, y, _ = u.unbind(-1)
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        first = torch.stack([torch.sqrt(1 + x * x), zero, 0.5 * y], -1)
        second = torch.stack([zero, one, 1.5 * torch.asinh(x)], -1)
        return torch.stack([first, second], -1)

    u0 = torch.zeros(rows, 3, dtype=DOUBLE)
    return SDEProblem(f, g, u0, (0.0, 1.0), noise="general", interpretation=interpretation)


def twisted_solution(path: GridPath) -> Tensor:
    x, y = path.values[-1].unbind(-1)
    return torch.stack([x.sinh(), y, path.area() + x * y], -1)


# -- strong order --------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [*COMMUTE, *GENERAL], ids=repr)
def test_strong_order_with_commutative_noise(alg: Any) -> None:
    integral = integral_of(alg)
    prob = turning(300, integral)
    order, errors = observed(prob, alg, lambda W: turning_solution(integral, W), COARSE)
    assert order == pytest.approx(1.0, abs=0.1)
    assert errors[-1] < 0.007


@pytest.fixture(scope="module")
def path() -> GridPath:
    return GridPath(1 << 14, 150, 2)


@pytest.mark.parametrize("alg", GENERAL, ids=repr)
def test_strong_order_one_without_commutativity(alg: Any, path: GridPath) -> None:
    """Against the closed form on the same path, of which the steps look at a part only."""
    prob, exact = twisted(150, integral_of(alg)), twisted_solution(path)
    errors = [rms(fixed_steps(prob, alg, path, n) - exact) for n in COARSE]
    assert slope(COARSE, errors) == pytest.approx(1.0, abs=0.1)
    assert errors[-1] < 0.012


@pytest.mark.parametrize("alg", [*COMMUTE, EM(), ReversibleHeun()], ids=repr)
def test_without_levy_areas_the_order_is_half(alg: Any, path: GridPath) -> None:
    prob, exact = twisted(150, integral_of(alg)), twisted_solution(path)
    ends = [fixed_steps(prob, alg, path, n) - exact for n in COARSE]
    assert slope(COARSE, [rms(x[:, 2]) for x in ends]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("alg", GENERAL, ids=repr)
def test_one_piece_a_step_is_not_enough(alg: Any, path: GridPath) -> None:
    """Nor is the mean of the area given ``W`` and ``H`` alone: the order is 1/2 then."""
    prob, exact = twisted(150, integral_of(alg)), twisted_solution(path)
    alone = RKMilGeneral(integral_of(alg), time_scale=1e-9)
    ends = [fixed_steps(prob, alone, path, n) - exact for n in COARSE]
    assert slope(COARSE, [rms(x[:, 2]) for x in ends]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("alg", GENERAL, ids=repr)
def test_strong_order_on_a_path_of_the_solver(alg: Any) -> None:
    """As above, on a path with memory: rough solves look at points of their own of one path."""
    prob = twisted(150, integral_of(alg))
    fine = solve(prob, alg, dt=1 / 512, adaptive=False, seed=1)
    field = field_of(prob, fine.noise)
    area = area_of_pieces(field, 0.0, 1.0, 8192)[:, 0, 1]
    W = fine.noise.at([1.0])[0]
    exact = area + W[:, 0] * W[:, 1]
    errors = []
    for n in COARSE:
        sol = solve(prob, alg, dt=1 / n, adaptive=False, noise=fine.noise, save_everystep=False)
        errors.append(rms(sol.u[-1, :, 2] - exact))
    assert slope(COARSE, errors) == pytest.approx(1.0, abs=0.1)
    assert rms(fine.u[-1, :, 2] - exact) < 0.4 * errors[-1]


def test_backward_along_the_path() -> None:
    """A Stratonovich equation goes back where it came from, with the areas of the same path."""
    prob = twisted(150, "stratonovich")
    alg = GENERAL[1]
    fine = solve(prob, alg, dt=1 / 256, adaptive=False, seed=1)
    errors = []
    for n in (16, 64):
        back = prob.remake(u0=fine.u[-1], tspan=(1.0, 0.0))
        sol = solve(back, alg, dt=1 / n, adaptive=False, noise=fine.noise, save_everystep=False)
        errors.append(rms(sol.u[-1, :, 2]))
    assert errors[1] < 0.35 * errors[0]
    assert errors[1] < 0.04


# -- special noise -------------------------------------------------------------------------------


@pytest.mark.parametrize("integral", ["ito", "stratonovich"])
def test_noise_of_any_shape_that_is_diagonal(integral: str) -> None:
    """Diagonal noise as a matrix: the same numbers as ``RKMil`` to the order of the scheme."""

    def g(t: Tensor, u: Tensor) -> Tensor:
        return 0.3 + 0.4 * torch.sin(u)

    u0 = torch.tensor([[0.5, 1.0]], dtype=DOUBLE).repeat(50, 1)
    diagonal = SDEProblem(lambda t, u: -u, g, u0, (0.0, 1.0), interpretation=integral)
    matrix = diagonal.remake(g=lambda t, u: torch.diag_embed(g(t, u)), noise="general")
    sol = solve(diagonal, RKMil(integral), dt=1 / 64, adaptive=False, seed=2)
    for kind in (RKMilCommute, RKMilGeneral):
        same = solve(diagonal, kind(integral), dt=1 / 64, adaptive=False, noise=sol.noise)
        torch.testing.assert_close(same.u, sol.u, rtol=1e-12, atol=1e-13)
        other = solve(matrix, kind(integral), dt=1 / 64, adaptive=False, noise=sol.noise)
        # the points beside u differ by the drift's part, of order 1.5 a step
        assert 0 < rms(other.u[-1] - sol.u[-1]) < 2e-3


@pytest.mark.parametrize("kind", [RKMilCommute, RKMilGeneral])
def test_one_motion_of_general_noise_is_scalar_noise(kind: Any) -> None:
    u0 = torch.tensor([[0.5, 1.0]], dtype=DOUBLE).repeat(5, 1)
    g = lambda t, u: 0.4 * torch.sin(u.flip(-1))[..., None]  # noqa: E731
    general = SDEProblem(lambda t, u: -u, g, u0, (0.0, 1.0), noise="general")
    scalar = general.remake(noise="scalar")
    sols = [solve(x, kind(), rtol=1e-2, atol=1e-2, seed=1) for x in (general, scalar)]
    assert torch.equal(sols[0].u, sols[1].u)


# -- work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alg", "ng"),
    [(COMMUTE[0], 5), (COMMUTE[1], 2), (GENERAL[0], 5), (GENERAL[1], 5)],
    ids=repr,
)
def test_evaluations_a_step(alg: Any, ng: int) -> None:
    """With three motions."""
    prob = turning(2, integral_of(alg))
    few, many = (solve(prob, alg, dt=1 / n, adaptive=False, seed=0).stats for n in (10, 30))
    assert (many.nf - few.nf, many.ng - few.ng) == (20, 20 * ng)


# -- adaptive solves -----------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [*COMMUTE, *GENERAL], ids=repr)
def test_the_error_follows_the_tolerance(alg: Any) -> None:
    integral = integral_of(alg)
    prob = turning(50, integral)
    for tol, most in ((1e-1, 12), (1e-2, 50), (1e-3, 390)):
        sol = solve(prob, alg, rtol=tol, atol=tol, seed=2, save_everystep=False)
        exact = turning_solution(integral, sol.noise.at([1.0])[0])
        error = rms((sol.u[-1] - exact) / (tol + tol * exact.abs()))
        assert 0.1 < error < 1.2
        assert sol.stats.nf < most and sol.stats.nreject <= 10


def test_rejected_steps_leave_the_areas_as_they_are() -> None:
    """Adaptive steps of ``z``, the Levy area, add up to the area of the path."""
    prob = heisenberg(100)
    sol = solve(prob, RKMilGeneral(), rtol=2e-2, atol=2e-2, seed=5, dt=0.5)
    assert sol.stats.nreject > 2
    field = field_of(prob, sol.noise)
    area = area_of_pieces(field, 0.0, 1.0, 2048)[:, 0, 1]
    expected = math.sqrt(sum(h * h / (12 * pieces_of(h, 1.0)) for h in sol.steps.h.tolist()))
    assert rms(sol.u[-1, :, 2] - area) == pytest.approx(expected, rel=0.2)
    torch.testing.assert_close(sol.u[-1, :, :2], sol.noise.at([1.0])[0])


def test_less_work_than_without_areas() -> None:
    """At equal error: noise that is not commutative, small tolerances."""
    path, prob = GridPath(1 << 12, 100, 2), twisted(100, "ito")
    exact = twisted_solution(path)
    milstein = rms(fixed_steps(prob, RKMilGeneral(), path, 64) - exact)
    euler = rms(fixed_steps(prob, EM(), path, 1024) - exact)
    assert milstein < euler


# -- Levy areas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [0.5, 0.125, -0.125])
def test_the_area_converges_as_more_of_the_path_is_seen(h: float) -> None:
    field = field_of(heisenberg(4000), BrownianPath(1, 4000, 2, levy_area=True))
    start, length = max(0.0, -h), abs(h)
    areas = [area_of_pieces(field, start, h, n)[:, 0, 1] for n in (1, 4, 16, 256)]
    # of a step: h**2 / 4, a part 1 / (3 n) of which is not seen in n pieces
    assert areas[-1].square().mean() == pytest.approx(length**2 / 4, rel=0.1)
    for n, area in zip((1, 4, 16), areas, strict=False):
        expected = length**2 / 12 * (1 / n - 1 / 256)
        assert (area - areas[-1]).square().mean() == pytest.approx(expected, rel=0.1)


def test_areas_are_antisymmetric_and_add_up() -> None:
    prob = turning(3, "ito")
    field = field_of(prob, BrownianPath(1, 3, 3, levy_area=True))
    first, second, whole = (
        area_of_pieces(field, *step, 500) for step in ((0.0, 0.001), (0.001, 0.002), (0.0, 0.003))
    )
    torch.testing.assert_close(whole, -whole.mT, rtol=0, atol=1e-15)
    a, b = (field.increment(*step).W for step in ((0.0, 0.001), (0.001, 0.002)))
    cross = 0.5 * (a[:, :, None] * b[:, None, :] - b[:, :, None] * a[:, None, :])
    assert rms(first + second + cross - whole) < 0.08 * rms(whole)


def test_areas_of_a_path_with_memory_change_nothing_else() -> None:
    """Looking between the steps takes no serials: ``W`` is what any other method sees."""
    prob = turning(3, "ito")
    sols = [solve(prob, alg, dt=1 / 64, adaptive=False, seed=4) for alg in (GENERAL[0], EM())]
    times = [i / 64 for i in range(65)]
    torch.testing.assert_close(sols[0].noise.at(times), sols[1].noise.at(times))


@pytest.mark.parametrize("span", [2.0**-20, 2.0**10])
def test_the_unit_of_time_does_not_matter(span: float) -> None:
    """By default a step is cut as in the unit of time: the work is the same, and the order 1."""
    errors, prob = [], heisenberg(400)
    for n in (16, 64):
        unit, other = (
            solve(x, RKMilGeneral(), dt=x.tspan[1] / n, adaptive=False, seed=1)
            for x in (prob, prob.remake(tspan=(0.0, span)))
        )
        assert len(other.noise.times) == len(unit.noise.times) > 1.2 * n
        area = area_of_pieces(field_of(prob, other.noise), 0.0, span, 4096)[:, 0, 1]
        errors.append(rms(other.u[-1, :, 2] - area) / span)
        # areas that are left out are as large as the variance says
        expected = math.sqrt(1 / (12 * n * pieces_of(1 / n, 1.0)))
        assert errors[-1] == pytest.approx(expected, rel=0.2)
    assert slope([16, 64], errors) == pytest.approx(1.0, abs=0.15)


def test_a_time_scale_that_is_given() -> None:
    prob = heisenberg(1).remake(tspan=(0.0, 8.0))
    points = [
        len(solve(prob, alg, dt=0.25, adaptive=False, seed=1).noise.times)
        for alg in (RKMilGeneral(), RKMilGeneral(time_scale=8), RKMilGeneral(time_scale=1.0))
    ]
    assert points[0] == points[1] > points[2] == 33
    assert repr(RKMilGeneral()) == "RKMilGeneral()"
    assert repr(RKMilGeneral(time_scale=8)) == "RKMilGeneral(time_scale=8.0)"
    alg = RKMilGeneral("stratonovich", 0.5)
    assert repr(alg) == "RKMilGeneral('stratonovich', time_scale=0.5)"


@pytest.mark.slow
def test_a_solve_that_fails_ends() -> None:
    """Steps become ever shorter then, and ask for ever more of the path."""
    prob = heisenberg(2)
    g = prob.g
    bad = prob.remake(g=lambda t, u: g(t, u) / (t < 0.25))
    sol = solve(bad, RKMilGeneral(), rtol=1e-1, atol=1e-1, seed=0, throw=False)
    assert not sol.success


def test_solves_repeat_and_replay() -> None:
    prob = twisted(5, "ito")
    first, again = (solve(prob, GENERAL[0], rtol=1e-2, atol=1e-2, seed=3) for _ in range(2))
    replayed = solve(prob, GENERAL[0], rtol=1e-2, atol=1e-2, noise=first.noise)
    assert torch.equal(first.u, again.u)
    torch.testing.assert_close(replayed.u, first.u)


def test_along_a_virtual_brownian_tree() -> None:
    """It sees one path at any steps: the solutions converge to each other with order 1."""
    prob = twisted(60, "ito")
    tree = VirtualBrownianTree(1, 0.0, 1.0, rows=60, m=2, levy_area=True)
    ends = [
        solve(prob, RKMilGeneral(), dt=1 / n, adaptive=False, noise=tree, save_everystep=False).u[
            -1
        ]
        for n in (8, 32, 128)
    ]
    first, second = rms(ends[0] - ends[2]), rms(ends[1] - ends[2])
    assert second < 0.4 * first
    lamba = solve(prob, LambaEM(), dt=1 / 128, adaptive=False, noise=tree)
    assert rms(lamba.u[-1] - ends[2]) > 2 * second / 3


@pytest.mark.slow
@pytest.mark.parametrize("tol", [1e-3, 2.0**-10])
def test_a_tree_is_cut_no_finer_than_it_resolves(tol: float) -> None:
    """Areas within its leaves are not known, and steps as short as a leaf are allowed."""
    prob = heisenberg(400)
    tree = VirtualBrownianTree(1, 0.0, 1.0, rows=400, m=2, levy_area=True, tol=tol)
    area = area_of_pieces(field_of(prob, tree), 0.0, 1.0, 1000)[:, 0, 1]
    for n in (300, 900):  # which ask for pieces of 1/7,500 and 1/67,500
        sol = solve(
            prob, RKMilGeneral(), dt=1 / n, adaptive=False, noise=tree, save_everystep=False
        )
        assert rms(sol.u[-1, :, 2] - area) < 1.3 * math.sqrt(tol / 12)


def test_pieces_are_longer_than_rounding_of_the_times() -> None:
    prob = heisenberg(2)
    h = 128 * math.ulp(1.0)
    field = field_of(prob, BrownianPath(1, 2, 2, 1.0, levy_area=True))
    assert bool(levy_area(field, 1.0, h, 1.0).isfinite().all())
    assert len(field.path.times) == 3  # two pieces


@pytest.mark.parametrize(
    ("h", "scale", "pieces"), [(1.0, 1.0, 1), (1 / 12, 1.0, 1), (1 / 24, 1.0, 2), (-0.01, 1.0, 9),
                               (0.01, 10.0, 84), (1e-3, 1e-2, 1), (1e-12, 1.0, 4096)]
)  # fmt: skip
def test_pieces_of_a_step(h: float, scale: float, pieces: int) -> None:
    assert pieces_of(h, scale) == pieces


def test_the_number_of_pieces_keeps_the_error_below_the_order() -> None:
    for h in (0.3, 0.1, 0.01, 0.003):
        for scale in (0.5, 1.0, 4.0):
            assert h * h / (12 * pieces_of(h, scale)) <= h**3 / scale * (1 + 1e-6)
    for h in (1e-6, 1e-9):  # where the number of pieces is bounded
        assert math.sqrt(h * h / (12 * pieces_of(h, 1.0))) <= h / 221


def test_steps_that_are_run_at_once_have_no_path_to_look_at() -> None:
    """So they are run one by one: what a batch of steps is given has no areas."""
    assert not RKMilGeneral.is_one_step and RKMilCommute.is_one_step
    assert "areas" not in GivenNoise._fields
    assert same_path(turning(1, "ito"), GENERAL[0], [4])[0].success
