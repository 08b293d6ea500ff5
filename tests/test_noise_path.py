"""Brownian paths with memory: their law, and that they are the same however they are asked for."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from noise_basis import Basis, covariance
from noise_paths import equal, same, steps
from scipy import stats

from diffsolve import EM, SDEProblem, SolveError, solve
from diffsolve.solvers.stochastic.noise import (
    BrownianPath,
    draws,
)
from diffsolve.solvers.stochastic.noise import path as path_module
from diffsolve.solvers.stochastic.noise.bridge import divide, weights

LEVEL = 1e-3  # of each Kolmogorov-Smirnov test
Z_LEVEL = 4.0  # of each mean, in standard deviations


def is_normal(x, variance):
    x = x.flatten().numpy() / math.sqrt(variance)
    return stats.kstest(x, "norm").pvalue > LEVEL


def uncorrelated(*columns):
    """Whether the samples, scaled to variance one, have correlations that chance explains."""
    x = torch.stack([c.flatten() / c.std() for c in columns])
    matrix = (x @ x.T / x.shape[1]).fill_diagonal_(0)
    return matrix.abs().max() < Z_LEVEL / math.sqrt(x.shape[1])


def joined(first, second, h1, h2):
    """``W, H`` of two neighbouring intervals, from the definition of ``H`` as an integral."""
    area = h1 * (first.W / 2 + first.H) + h2 * (second.W / 2 + second.H + first.W)
    W = first.W + second.W
    return W, area / (h1 + h2) - W / 2


# -- the law of a divided interval ---------------------------------------------------------------


@pytest.mark.parametrize("left", [0.5, 0.3, 0.9, 1e-3, 1 - 1e-3, 1e-9])
@pytest.mark.parametrize("h", [1.0, 7.0])
def test_the_bridge_is_the_conditional_law(left, h):
    """Mean and covariance against conditioning of the four numbers of both parts on their sums."""
    a, b = left * h, h - left * h
    prior = np.diag([a, a / 12, b, b / 12])  # W1, H1, W2, H2
    whole = np.array([[1, 0, 1, 0], [b / 2 / h, a / h, -a / 2 / h, b / h]])  # W, H
    gain = prior @ whole.T @ np.linalg.inv(whole @ prior @ whole.T)
    covariance = prior - gain @ whole @ prior
    # `divide` is linear: its columns are what it makes of unit vectors
    unit_scales = torch.tensor([1, 12**-0.5], dtype=torch.float64)
    columns = []
    for i in range(4):
        unit = torch.eye(4, dtype=torch.float64)[i]
        columns.append(divide(unit[0], unit[1], unit[2:] * unit_scales, a, b))
    given = torch.stack(columns).numpy().T
    np.testing.assert_allclose(given[:, :2], gain, rtol=1e-13, atol=1e-16)
    noise = given[:, 2:]
    scale = np.sqrt(np.diag(prior))
    np.testing.assert_allclose(
        noise @ noise.T / np.outer(scale, scale),
        covariance / np.outer(scale, scale),
        rtol=1e-12,
        atol=3e-16 / left if left < 1e-6 else 1e-13,
    )


def test_a_very_short_part_has_its_law():
    """Without cancellation: the numbers of a part that is 1e-12 of the whole are its own."""
    a, b, c, e = weights(1e-12, 1.0)
    assert c == pytest.approx(1e-6, rel=1e-11)
    n = torch.tensor([[0.7], [0.2]], dtype=torch.float64)
    W, H = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    W1, H1, _, H2 = divide(W, H, n, 1e-12, 1.0)
    assert float(W1) == pytest.approx(0.7e-6, rel=1e-5)
    assert float(H1) == pytest.approx(0.2e-6, rel=1e-5)
    assert float(H2) == pytest.approx(0.1, rel=1e-5)
    assert a + b == pytest.approx(1, rel=1e-15)
    assert e == pytest.approx(c, rel=1e-11)


def test_halves_join_to_the_whole():
    path = BrownianPath(3, rows=50, m=2, levy_area=True)
    whole = path.increment(0.0, 2.0)
    first, second = path.increment(0.0, 0.7), path.increment(0.7, 2.0)
    W, H = joined(first, second, 0.7, 1.3)
    same(W, whole.W)
    same(H, whole.H)


@pytest.mark.parametrize("seed", range(5))
def test_the_law_is_exact_whatever_was_asked_for(seed):
    """Covariances from the coefficients of the normals, after steps, rejections and reads."""
    rng = np.random.default_rng(seed)
    path = BrownianPath(0, rows=400, levy_area=True)
    path._draws = Basis(400)
    t = 0.0
    for _ in range(12):
        h = rng.uniform(0.05, 1.0)
        for _ in range(rng.integers(0, 4)):  # rejected
            path.increment(t, t + h)
            h *= rng.uniform(0.1, 0.9)
        path.increment(t, t + h)
        path.at(rng.uniform(t, t + h, 2), since=t)
        t += h
    path.increment(-1.0, 0.4 * t)
    path.at([-2.0, t + 3.0])
    for points in (path.times, rng.uniform(-3, t + 4, 20)):
        found = covariance(path, sorted(points))
        # the shortest of the random intervals lose digits of H in the sum over parts
        torch.testing.assert_close(found, torch.eye(len(found)).double(), rtol=0, atol=1e-10)


# -- distribution --------------------------------------------------------------------------------


def test_fresh_increments():
    path = BrownianPath(1, rows=500, m=2, levy_area=True)
    found = [path.increment(0.25 * i, 0.25 * (i + 1)) for i in range(20)]
    W, H = torch.stack([x.W for x in found]), torch.stack([x.H for x in found])
    assert is_normal(W, 0.25)
    assert is_normal(H, 0.25 / 12)
    assert uncorrelated(W, H)
    assert uncorrelated(W[1:], W[:-1], H[1:], H[:-1])
    assert uncorrelated(W[:, 1:], W[:, :-1])
    assert uncorrelated(W[..., 0], W[..., 1])


@pytest.mark.parametrize("times", [(0.5,), (0.1, 0.9), (0.9, 0.2, 0.5), (0.999, 0.001, 0.5, 0.3)])
def test_bridges(times):
    """An interval that was divided again and again: parts that are independent and normal."""
    path = BrownianPath(5, rows=20_000, levy_area=True)
    path.increment(0.0, 1.0)
    for t in times:
        path.increment(0.0, t)
    points = [0.0, *sorted(times), 1.0]
    found = [(b - a, path.increment(a, b)) for a, b in itertools.pairwise(points)]
    for h, x in found:
        assert is_normal(x.W, h)
        assert is_normal(x.H, h / 12)
    assert uncorrelated(*(y for _, x in found for y in x))


def test_rejected_steps_do_not_change_the_law():
    """Steps that are tried, shortened at random by what was seen, and taken.

    A rejection depends on the increment, as in an adaptive solve: the path would be biased if
    anything that was seen were forgotten.
    """
    rows, cells = 3000, 4
    found = torch.zeros(2, cells, rows, dtype=torch.float64)
    rejected = 0
    for seed in range(rows):
        path = BrownianPath(seed, levy_area=True)
        t, h = 0.0, 0.5
        while t < 1.0:
            h = min(h, 1.0 - t)
            x = path.increment(t, t + h)
            if abs(float(x.W)) > 0.9 * math.sqrt(h) and h > 0.05:
                h *= 0.5
                rejected += 1
                continue
            t, h = t + h, 1.7 * h
        for i in range(cells):
            x = path.increment(i / cells, (i + 1) / cells)
            found[0, i, seed], found[1, i, seed] = float(x.W), float(x.H)
    assert rejected > rows
    W, H = found
    for i in range(cells):
        assert is_normal(W[i], 1 / cells)
        assert is_normal(H[i], 1 / cells / 12)
    assert uncorrelated(*W, *H)
    squares = (W**2).sum(0)
    assert abs(squares.mean() - 1) < Z_LEVEL * math.sqrt(2 / cells / rows)


def test_quadratic_variation():
    """Of 2**14 steps, half of them by bridges: one, with a standard deviation of sqrt(2/n)."""
    path = BrownianPath(6, rows=1)
    n = 1 << 14
    for i in range(n // 2):
        path.increment(2 * i / n, (2 * i + 2) / n)
    total = sum(float(path.increment(i / n, (i + 1) / n).W) ** 2 for i in range(n))
    assert abs(total - 1) < Z_LEVEL * math.sqrt(2 / n)


def test_reads_have_the_law():
    path = BrownianPath(7, rows=20_000)
    path.increment(0.0, 1.0)
    W = path.at([0.2, 0.6, 1.0, 1.5])
    parts = torch.diff(W, dim=0, prepend=torch.zeros_like(W[:1]))
    for x, h in zip(parts, (0.2, 0.4, 0.4, 0.5), strict=True):
        assert is_normal(x, h)
    assert uncorrelated(*parts)


def test_extra_normals():
    path = BrownianPath(8, rows=1000, m=2)
    W = path.increment(0.0, 1.0).W
    n = path.extra(0.0, 1.0, 5)
    assert n.shape == (5, 1000, 2)
    assert is_normal(n, 1.0)
    assert uncorrelated(W, *n)
    assert torch.equal(n, path.extra(0.0, 1.0, 5))
    assert torch.equal(n[:3], path.extra(0.0, 1.0, 3))
    assert not torch.equal(n, path.extra(0.0, 0.5, 5))


def test_asking_twice():
    path = BrownianPath(1, rows=3, m=2, levy_area=True)
    first = steps(path, [0.0, 0.3, 0.7, 1.1])
    tried = path.increment(1.1, 1.5)
    path.increment(1.1, 1.2)
    for x, (a, b) in zip(first, [(0.0, 0.3), (0.3, 0.7), (0.7, 1.1)], strict=True):
        assert equal(x, path.increment(a, b))
    assert equal(tried, path.increment(1.1, 1.5))


def test_a_step_keeps_its_numbers_when_something_is_read_inside():
    path = BrownianPath(1, rows=3, levy_area=True)
    found = steps(path, [0.0, 0.3, 0.7])
    path.at([0.1, 0.15, 0.4, 0.65])
    assert len(path.times) == 7
    assert equal(found[0], path.increment(0.0, 0.3))
    assert equal(found[1], path.increment(0.3, 0.7))
    assert equal(found[0], path.fork().increment(0.0, 0.3))


def test_batch_and_neighbours_do_not_matter():
    def run(seed, rows, m):
        path = BrownianPath(seed, rows, m, levy_area=True)
        steps(path, [0.0, 0.5, 1.0])
        return [*steps(path, [0.0, 0.2, 0.5]), path.increment(-1.0, 0.0)]

    large = run(9, 100, 3)
    for x, y in zip(large, run(9, 7, 2), strict=True):
        assert torch.equal(x.W[:7, :2], y.W)
        assert torch.equal(x.H[:7, :2], y.H)
    seeds = torch.arange(100).view(10, 10)
    own = run(seeds, 100, 3)
    for i in (0, 42, 99):
        for x, y in zip(own, run(i, 1, 3), strict=True):
            assert torch.equal(x.W[i : i + 1], y.W)
    for x, y in zip(own, run(seeds.flip(0, 1), 100, 3), strict=True):
        assert torch.equal(x.W, y.W.flip(0))


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint64"])
def test_seeds_of_numpy(dtype):
    seeds = np.arange(3).astype(dtype)
    expected = BrownianPath(torch.arange(3), rows=3).increment(0.0, 1.0).W
    assert torch.equal(BrownianPath(seeds, rows=3).increment(0.0, 1.0).W, expected)
    assert BrownianPath(seeds[2]).seed == BrownianPath(np.array(2)).seed == 2
    prob = SDEProblem(lambda t, u: -u, lambda t, u: u, torch.ones(3, 1).double(), (0.0, 1.0))
    end = solve(prob, EM(), dt=0.5, seed=seeds).u[-1]
    assert torch.equal(end, solve(prob, EM(), dt=0.5, seed=torch.arange(3)).u[-1])
    with pytest.raises(ValueError, match=r"\(2,\)"):
        solve(prob, EM(), dt=0.5, seed=seeds[:2])
    for wrong in (np.ones(3), [0, 1, 2]):
        with pytest.raises(TypeError, match="tensor of integers"):
            solve(prob, EM(), dt=0.5, seed=wrong)


def test_seeds_differ():
    x, y, z = (BrownianPath(seed, rows=5).increment(0.0, 1.0).W for seed in (1, 2, -1))
    assert len(torch.cat([x, y, z]).unique()) == 15
    assert torch.equal(BrownianPath(2**64 - 1, rows=5).increment(0.0, 1.0).W, z)


@pytest.mark.parametrize("seed", [9, torch.arange(6) * 10**17])
@pytest.mark.parametrize("levy_area", [True, False])
def test_without_the_kernel(seed, levy_area, monkeypatch):
    """As on another device: the same path from operations of torch."""

    def run():
        path = BrownianPath(seed, 6, 2, levy_area=levy_area)
        found = steps(path, [0.0, 0.3, 1.0, 1.7, 2.0])
        found += steps(path, [2.0, 1.6, 0.8, 0.1, -1.0])
        return found, path.at([0.05, 1.3]), path.extra(0.0, 1.0, 3), path._draws

    found, at, extra, kernel = run()
    monkeypatch.setattr(draws, "compiled", lambda name: None)
    other, other_at, other_extra, plain = run()
    assert (kernel._draw is None, plain._draw is None) == (False, True)
    same(at, other_at)
    same(extra, other_extra)
    for x, y in zip(found, other, strict=True):
        assert x.W.shape == y.W.shape == (6, 2)
        same(x.W, y.W)
        if levy_area:
            same(x.H, y.H)


def test_levy_area_does_not_change_the_path():
    with_area, without = (BrownianPath(4, 10, levy_area=wanted) for wanted in (True, False))
    for a, b in [(0.0, 1.0), (0.0, 0.4), (0.4, 0.5), (0.5, 2.0), (-1.0, 3.0), (0.3, 0.1)]:
        x, y = with_area.increment(a, b), without.increment(a, b)
        assert torch.equal(x.W, y.W)
        assert y.H is None


def test_drawing_ahead_changes_nothing(monkeypatch):
    points = [0.1 * i for i in range(40)]

    def run(most, expected):
        monkeypatch.setattr(path_module, "_ROWS_AHEAD", most)
        path = BrownianPath(4, 10, levy_area=True)
        path.expect(expected)
        found = steps(path, points)
        return [*found, *steps(path, points[::-1]), path.increment(0.0, 0.05)]

    expected = run(1, 0)
    for most, count in [(2, 0), (256, 0), (256, 40), (256, 1000), (16, 3)]:
        assert all(equal(x, y) for x, y in zip(run(most, count), expected, strict=True))


def test_forgotten_numbers_are_drawn_again(monkeypatch):
    def run(remembered):
        monkeypatch.setattr(path_module, "_REMEMBERED", remembered)
        path = BrownianPath(4, 1000, levy_area=True)
        path.increment(0.0, 1.0)
        points = [i / 60 for i in range(60)]
        found = steps(path, points)
        assert len(path._halves) <= max(16, path._most_halves)
        assert (len(path._halves) == 16) == (remembered == 0)
        return found + steps(path, points[::-1]) + steps(path, points)

    assert all(equal(x, y) for x, y in zip(run(0), run(1 << 26), strict=True))


def test_long_lines_of_divisions():
    """No recursion: an interval that was divided 5,000 times, from its end on, all forgotten."""
    path = BrownianPath(4)
    path.increment(0.0, 1.0)
    n = 5000
    for i in range(n, 0, -1):
        path.increment(0.0, i / n)
    first = path.increment(0.0, 1 / n).W
    again = pickle.loads(pickle.dumps(path))
    assert torch.equal(again.increment(0.0, 1 / n).W, first)
    assert torch.equal(copy.deepcopy(path).increment(0.0, 1 / n).W, first)


def test_rounded_times_are_known_points():
    path = BrownianPath(4)
    t = 0.0
    for _ in range(10):
        path.increment(t, t + 0.1)
        t += 0.1
    assert t != 1.0
    path.increment(0.0, 1.0)
    path.increment(0.3, 0.9)  # 0.30000000000000004 is the point
    path.increment(1e-17, 0.5)
    assert len(path.times) == 11
    assert float(path.at([1.0], since=t)) == 0
    path.increment(0.0, 1e-9)
    assert len(path.times) == 12


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("start", [1e9, -1e9 - 1e-3])
def test_steps_of_a_few_units_in_the_last_place_have_noise(engine, start):
    prob = SDEProblem(
        lambda t, u: 0 * u, lambda t, u: u, torch.ones(20, 1).double(), (start, start + 1e-3)
    )
    sol = solve(prob, EM(), dt=1e-6, adaptive=False, seed=0, engine=engine)
    assert sol.noise.serial == 1000
    W = torch.diff(sol.noise.at(sol.t.tolist()), dim=0)
    found = W.flatten(1) / torch.diff(sol.t)[:, None] ** 0.5
    assert (found != 0).all()
    assert is_normal(found, 1.0)
    same(sol.u[1:] / sol.u[:-1], 1 + W, rtol=1e-12)


def test_short_steps_beside_far_points():
    """What is close is measured where it is, however far the path is known."""
    for far in (1e9, -1e9):
        path = BrownianPath(1, rows=2000)
        path.increment(0.0, far)
        points = [0.0, 1e-8, 2e-8, 2.2e-8, 1e-7]
        assert all(
            is_normal(x.W, b - a)
            for x, (a, b) in zip(
                steps(path, [*points, 1e-3]),
                itertools.pairwise([*points, 1e-3]),
                strict=True,
            )
        )
        assert len(path.times) == 7


@pytest.mark.parametrize("t", [1.0, -1.0, 2.0, 1e9, 3e-5])
def test_the_ends_of_a_step_are_two_points(t):
    path = BrownianPath(1, rows=5)
    path.increment(t - 1.0, t + 1.0)
    for count in (4, 2, 3):
        for sign in (1, -1):
            end = t + sign * count * math.ulp(t)
            assert (path.increment(t, end).W != 0).all()
            assert (path.increment(end, t).W != 0).all()
    # a step whose ends lie about a known point
    path = BrownianPath(1, rows=5)
    path.increment(t - 1.0, t)
    path.increment(t, t + 1.0)
    a, b = t - 2 * math.ulp(t), t + 2 * math.ulp(t)
    assert (path.increment(a, b).W != 0).all()
    for end in (t, math.nextafter(t, math.inf)):
        assert (path.increment(t, end).W == 0).all()
    # but no solve takes such steps
    prob = SDEProblem(
        lambda t, u: 0 * u, lambda t, u: u, torch.ones(1).double(), (1.0, 1.0 + 1e-12)
    )
    for engine in ("torch", "native"):
        with pytest.raises(SolveError, match="rounding of t"):
            solve(prob, EM(), dt=2e-16, adaptive=False, seed=0, engine=engine)


def test_a_step_that_ends_on_a_stop_but_for_rounding():
    """The next one begins at the stop; no number is drawn for what lies between."""
    for engine in ("torch", "native"):
        prob = SDEProblem(lambda t, u: 0 * u, lambda t, u: 1 + u, torch.ones(1), (-1e6, 2e-2))
        sol = solve(prob, EM(), dt=1e6 + 1.0, adaptive=False, seed=0, tstops=[1e-3], engine=engine)
        assert sol.noise.serial == 2


def test_backward():
    path = BrownianPath(4, rows=5, levy_area=True)
    x = path.increment(0.0, 0.6)
    y = path.increment(0.6, 0.0)
    assert torch.equal(y.W, -x.W)
    assert torch.equal(y.H, x.H)
    # beyond the start, and by a bridge
    back = path.increment(0.0, -1.0)
    assert is_normal(BrownianPath(1, rows=5000).increment(2.0, 1.0).W, 1.0)
    first, second = path.increment(0.0, -0.4), path.increment(-0.4, -1.0)
    # joining backward is the same formula: H of the way back is that of the way forth
    W, H = joined(first, second, 0.4, 0.6)
    same(W, back.W)
    same(H, back.H)


def test_unions_add_up():
    path = BrownianPath(4, rows=5, levy_area=True)
    points = [0.0, 0.1, 0.35, 0.4, 0.8, 1.3]
    found = steps(path, points)
    h = np.diff(points)
    W, H = found[0].W, found[0].H
    for i in range(1, 5):
        whole = path.increment(0.0, points[i + 1])
        W, H = joined(type(whole)(W, H), found[i], points[i], h[i])
        same(whole.W, W)
        same(whole.H, H)
    # ends that are not known points
    whole = path.increment(0.2, 1.0)
    same(
        whole.W,
        path.increment(0.2, 0.35).W + path.increment(0.35, 0.8).W + path.increment(0.8, 1.0).W,
    )


def test_zero_length():
    x = BrownianPath(4, rows=5, m=2, levy_area=True).increment(0.5, 0.5)
    assert torch.equal(x.W, torch.zeros(5, 2))
    assert torch.equal(x.H, torch.zeros(5, 2))
