"""The virtual Brownian tree: its law, and that a value depends on the seed and the time alone."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random

import numpy as np
import pytest
import torch
from noise_basis import Basis, covariance
from scipy import stats

from diffsolve import EM, SDEProblem, solve
from diffsolve.solvers.stochastic.noise import VirtualBrownianTree, draws

LEVEL = 1e-3  # of each Kolmogorov-Smirnov test
INTERVALS = [
    (0.0, 1.0),
    (0.0, 0.5),
    (0.25, 0.75),
    (0.1, 0.9),
    (0.3, 0.301),
    (0.7, 0.1),
    (0.0, 1e-3),
    (0.4999, 0.5001),
    (1 - 1e-3, 1.0),
    (1 / 3, 1 / 3 + 2e-6),
]


def is_normal(x, variance):
    x = x.flatten().numpy() / math.sqrt(variance)
    return stats.kstest(x, "norm").pvalue > LEVEL


def equal(a, b):
    return torch.equal(a.W, b.W) and (a.H is None or torch.equal(a.H, b.H))


def steps(noise, points):
    return [noise.increment(a, b) for a, b in itertools.pairwise(points)]


def tree(seed=5, rows=4, m=2, t0=0.0, t1=1.0, **options):
    return VirtualBrownianTree(seed, t0, t1, rows, m, levy_area=True, **options)


def inside(noise, points):
    return [noise.inside(a, b) for a, b in itertools.pairwise(points)]


def by_torch(monkeypatch, *args, **options):
    with monkeypatch.context() as patch:
        patch.setattr(draws, "compiled", lambda name: None)
        return tree(*args, **options)


def with_basis(depth):
    """A tree whose normals are unit vectors."""
    found = VirtualBrownianTree(0, 0.0, 1.0, 200, levy_area=True, tol=2.0**-depth)
    found._draws = Basis()
    found._prepare()
    return found


# -- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "points",
    [
        [0.0, 1.0],
        [0.0, 0.25, 0.5, 0.625, 1.0],
        [0.0, 0.31, 0.8, 1.0],
        [0.03, 0.5, 0.77],
        [0.1, 0.2, 0.27, 0.4, 0.55, 0.83, 0.9],
        [0.9, 0.6, 0.33, 0.1],
    ],
)
def test_increments_are_independent_and_of_their_variances(points):
    """Exactly, from the coefficients of the normals; no two points are in one leaf of 1/32."""
    found = covariance(with_basis(5), points)
    torch.testing.assert_close(found, torch.eye(len(found)).double(), rtol=0, atol=1e-13)


def test_in_one_leaf_there_is_one_bridge():
    """The law that is promised ends there: the covariance of what follows is another."""
    anywhere = with_basis(5)
    anywhere.increment = anywhere.inside
    found = covariance(anywhere, [0.1, 0.105, 0.11, 0.2])
    assert (found - torch.eye(6).double()).abs().max() > 0.1
    # but from any point before to any in the leaf it holds
    for t in (0.1, 0.105, 0.11):
        torch.testing.assert_close(
            covariance(with_basis(5), [0.02, t]), torch.eye(2).double(), rtol=0, atol=1e-13
        )


def test_distribution():
    noise = tree(seed=8, rows=5000, m=1)
    points = [0.05, 0.1, 1 / 3, 0.5, 0.75, 0.9]
    found = steps(noise, points)
    for x, h in zip(found, np.diff(points), strict=True):
        assert is_normal(x.W, h)
        assert is_normal(x.H, h / 12)
    forms = torch.stack([y.flatten() / y.std() for x in found for y in x])
    correlations = (forms @ forms.T / 5000).fill_diagonal_(0)
    assert correlations.abs().max() < 4 / math.sqrt(5000)


def test_quadratic_variation():
    n = 1 << 12
    noise = VirtualBrownianTree(6, 0.0, 1.0, rows=4)
    total = sum(noise.increment(i / n, (i + 1) / n).W ** 2 for i in range(n))
    assert (total - 1).abs().max() < 4 * math.sqrt(2 / n)


# -- a function of the seed and the times --------------------------------------------------------


@pytest.mark.parametrize("seed", [5, torch.arange(7) * 10**17])
@pytest.mark.parametrize(("m", "tol"), [(1, None), (3, 1e-3), (300, 0.1), (2, 1.0)])
def test_kernel_and_torch_agree(monkeypatch, seed, m, tol):
    options = {"seed": seed, "rows": 7, "m": m, "tol": tol}
    kernel, plain = tree(**options), by_torch(monkeypatch, **options)
    assert kernel._kernel is not None
    assert plain._kernel is None
    for a, b in [*INTERVALS, (0.33, 0.33 + 1e-7), (0.6, 0.6 + 1e-12)]:
        x, y = kernel.inside(a, b), plain.inside(a, b)
        h = abs(b - a)
        atol = 1e-14 * math.sqrt(max(h, kernel.tol if h < kernel.tol else 0))
        torch.testing.assert_close(x.W, y.W, rtol=1e-13, atol=atol)
        # H within one leaf is a difference of integrals, divided by the length
        atol = 1e-13 * math.sqrt(h) + (1e-15 * kernel.tol**1.5 / h if h < kernel.tol else 0)
        torch.testing.assert_close(x.H, y.H, rtol=1e-13, atol=atol)


def test_order_and_steps_do_not_matter():
    noise = tree()
    known = {(a, b): noise.increment(a, b) for a, b in INTERVALS}
    shuffled = random.Random(0).sample(INTERVALS, len(INTERVALS))
    other = tree()
    assert all(equal(other.increment(a, b), known[a, b]) for a, b in shuffled)


@pytest.mark.parametrize("points", [[0.2, 0.7], [0.0, 0.1, 0.35, 0.5, 0.9, 1.0], [1.0, 0.6, 0.2]])
def test_steps_add_up(points):
    noise = tree()
    whole = noise.increment(points[0], points[-1])
    W, area, h = 0.0, 0.0, points[-1] - points[0]
    for (a, b), x in zip(itertools.pairwise(points), steps(noise, points), strict=True):
        area = area + (b - a) * (x.W / 2 + x.H + W)
        W = W + x.W
    torch.testing.assert_close(W, whole.W, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(area / h - W / 2, whole.H, rtol=1e-12, atol=1e-14)


def test_short_steps_add_up():
    """Within leaves too, where the path is resolved no further."""
    noise = tree(tol=0.1)
    points = np.linspace(0.2, 0.5, 200).tolist()
    found = inside(noise, points)
    torch.testing.assert_close(
        sum(x.W for x in found), noise.increment(0.2, points[-1]).W, rtol=1e-12, atol=1e-13
    )


def test_backward():
    noise = tree()
    for a, b in INTERVALS:
        x, y = noise.increment(a, b), noise.increment(b, a)
        assert torch.equal(x.W, -y.W)
        assert torch.equal(x.H, y.H)


def test_batch_and_neighbours_do_not_matter():
    large, small = tree(rows=700, m=3), tree(rows=5, m=2)
    for a, b in INTERVALS:
        x, y = large.increment(a, b), small.increment(a, b)
        assert torch.equal(x.W[:5, :2], y.W)
        assert torch.equal(x.H[:5, :2], y.H)
    seeds = torch.arange(700)
    own = tree(seed=seeds, rows=700)
    alone = tree(seed=613, rows=1)
    for a, b in INTERVALS:
        assert torch.equal(own.increment(a, b).W[613:614], alone.increment(a, b).W)


def test_a_smaller_tolerance_refines_the_same_path():
    coarse, fine = tree(tol=1 / 16), tree(tol=1e-9)
    for a, b in [(0.0, 1.0), (0.25, 0.875), (0.5, 0.5625), (1.0, 0.1875)]:
        assert equal(coarse.increment(a, b), fine.increment(a, b))
    assert not equal(coarse.increment(0.0, 0.3), fine.increment(0.0, 0.3))


def test_other_spans():
    noise = tree(t0=-3.0, t1=5.0, rows=5000, m=1)
    assert is_normal(noise.increment(-3.0, 5.0).W, 8.0)
    assert is_normal(noise.increment(-1.7, 2.0).H, 3.7 / 12)
    far = tree(t0=1e6, t1=1e6 + 1.0, rows=5000, m=1)
    assert is_normal(far.increment(1e6 + 0.3, 1e6 + 0.7).W, 0.4)


def test_times_beside_the_ends_by_rounding():
    noise = tree()
    below, above = -1e-17, math.nextafter(1.0, 2.0)
    assert equal(noise.increment(below, above), noise.increment(0.0, 1.0))
    zero = noise.increment(0.4, 0.4)
    assert torch.equal(zero.W, torch.zeros(4, 2))
    assert torch.equal(zero.H, torch.zeros(4, 2))
    # a sum that is an end of a leaf but for rounding is that end
    third = 0.1 + 0.2 + 0.3 + 0.4 - 0.5
    x = noise.increment(0.0, third)
    torch.testing.assert_close(x.W, noise.increment(0.0, 0.5).W, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 8])
def test_between_times_that_are_one_end_of_a_leaf_there_is_nothing(kernel, k, monkeypatch):
    if not kernel:
        monkeypatch.setattr(draws, "compiled", lambda name: None)
    noise = tree(tol=1 / 8)
    t = k / 8
    ends = [math.nextafter(t, 0), t, min(math.nextafter(t, 2), 1.0)]
    for a, b in itertools.permutations(ends, 2):
        for found in (noise.increment(a, b), noise.inside(a, b)):
            assert torch.equal(found.W, torch.zeros(4, 2))
            assert torch.equal(found.H, torch.zeros(4, 2))
    assert torch.equal(noise.at([ends[2]], since=ends[0])[0], torch.zeros(4, 2))


def test_a_save_at_a_step_s_end_but_for_rounding():
    """Its value is that of the step's end, though both are the end of a leaf."""
    noise = VirtualBrownianTree(3, 0.0, 1.2)
    prob = SDEProblem(lambda t, u: -u, lambda t, u: u, torch.ones(1).double(), (0.0, 1.2))
    fixed = {"dt": 0.3, "adaptive": False, "noise": noise}
    saved = solve(prob, EM(), saveat=[0.1 + 0.2, 0.6, 1.2], **fixed)
    steps_ = solve(prob, EM(), **fixed)
    torch.testing.assert_close(saved.u[0], steps_.u[1], rtol=1e-7, atol=0)


def test_steps_below_the_resolution_are_refused():
    """Their law is another: a bridge of a single pair of normals has no quadratic variation."""
    noise = tree(tol=1 / 16)
    noise.increment(0.1, 0.1 + 1 / 16)
    noise.increment(0.3, 0.3)
    with pytest.raises(ValueError, match=r"0.0624 .* 0.0625, .* tol"):
        noise.increment(0.1, 0.1624)
    with pytest.raises(ValueError, match="tol"):
        noise.increment(0.1624, 0.1)
    at = noise.at([0.1, 0.11], since=0.1)  # to look is allowed
    assert torch.equal(at[1], noise.inside(0.1, 0.11).W)
    prob = SDEProblem(
        lambda t, u: 0 * u, lambda t, u: u, torch.ones(1).double(), (0.0, 1.0), noise="scalar"
    )
    noise = VirtualBrownianTree(1, 0.0, 1.0, tol=1e-2)
    with pytest.raises(ValueError, match="a smaller tol"):
        solve(prob, EM(), dt=1e-3, adaptive=False, noise=noise)
    # values inside of steps, however close
    solve(prob, EM(), dt=0.1, adaptive=False, noise=noise, saveat=[0.5, 0.501, 0.502])


def test_at():
    noise = tree()
    W = noise.at([0.3, 0.0, 1.0])
    assert torch.equal(W[0], noise.increment(0.0, 0.3).W)
    assert torch.equal(W[1], torch.zeros(4, 2))
    assert torch.equal(noise.at([0.1], since=0.6)[0], noise.increment(0.6, 0.1).W)
    assert noise.at([]).shape == (0, 4, 2)


@pytest.mark.parametrize(
    "copied", [VirtualBrownianTree.fork, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize("kernel", [True, False])
def test_copies(copied, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(draws, "compiled", lambda name: None)
    noise = tree(seed=torch.arange(4), tol=1e-6)
    other = copied(noise)
    assert other.tol == noise.tol
    assert all(equal(other.increment(a, b), noise.increment(a, b)) for a, b in INTERVALS)


def test_forks_of_other_kinds():
    noise = tree()
    single = noise.fork(levy_area=False, dtype=torch.float32)
    for a, b in INTERVALS:
        x = single.increment(a, b)
        assert x.H is None
        assert torch.equal(x.W, noise.increment(a, b).W.float())


def test_empty_batches():
    assert tree(rows=0).increment(0.1, 0.7).H.shape == (0, 2)
    assert tree(m=0).increment(0.1, 0.7).W.shape == (4, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tree(t0=1.0, t1=1.0), "t0 < t1"),
        (lambda: tree(t0=0.0, t1=math.inf), "finite"),
        (lambda: tree(tol=0.0), "tol must be"),
        (lambda: tree(tol=math.nan), "tol must be"),
        (lambda: tree(t0=1e9, t1=1e9 + 1, tol=1e-6), "tol must be"),
        (lambda: tree().increment(0.0, 1.1), "covers 0 to 1, but is asked for t = 1.1"),
        (lambda: tree().increment(-0.1, 0.5), "covers"),
        (lambda: tree().increment(0.0, math.nan), "covers"),
        (lambda: tree().check(4, 2, 0.0, 2.0), "covers"),
        (lambda: tree().check(4, 3, 0.0, 1.0), "4 paths of 2"),
    ],
)
def test_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
