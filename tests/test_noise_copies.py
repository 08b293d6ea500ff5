"""Brownian paths: reads, copies, paths for another solve, and refusals."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from noise_paths import equal, same, steps

from diffsolve import EM, LambaEM, SDEProblem, solve
from diffsolve.solvers.stochastic.noise import (
    BrownianPath,
    VirtualBrownianTree,
    draw_seed,
)
from diffsolve.solvers.stochastic.noise import path as path_module

# -- reads ---------------------------------------------------------------------------------------


def test_at_is_the_sum_of_increments():
    path = BrownianPath(4, rows=5, m=2, t0=1.0)
    steps(path, [1.0, 1.5, 2.0])
    times = [1.25, 2.0, 0.5, 1.0, 1.25, 3.0]
    W = path.at(times)
    assert W.shape == (6, 5, 2)
    for x, t in zip(W, times, strict=True):
        same(x, path.increment(1.0, t).W)
    since = path.at(times, since=1.7)
    for x, t in zip(since, times, strict=True):
        same(x, path.increment(1.7, t).W)
    assert torch.equal(W[3], torch.zeros(5, 2))
    assert path.at([]).shape == (0, 5, 2)


def test_reads_take_no_serials():
    """What is saved does not change the steps."""

    def run(read):
        path = BrownianPath(4, rows=5, levy_area=True)
        found = []
        for i in range(5):
            found.append(path.increment(0.2 * i, 0.2 * (i + 1)))
            path.increment(0.2 * (i + 1), 0.2 * (i + 3))  # tried
            if read:
                path.at([0.2 * i + 0.05, 0.2 * i + 0.13], since=0.2 * i)
        return found, path

    (plain, _), (saved, path) = run(False), run(True)
    assert all(equal(x, y) for x, y in zip(plain, saved, strict=True))
    # a read is a function of what is known and of its time
    assert torch.equal(run(True)[1].at([0.05]), path.at([0.05]))
    early, late = BrownianPath(4), BrownianPath(4)
    early.increment(0.0, 1.0)
    late.increment(0.0, 1.0)
    late.increment(1.0, 2.0)
    assert torch.equal(early.at([0.3]), late.at([0.3]))


# -- copies --------------------------------------------------------------------------------------


def recorded(seed=4, **options):
    path = BrownianPath(seed, rows=5, levy_area=True, **options)
    steps(path, [0.0, 0.5, 1.0, 2.0])
    path.increment(0.0, 0.2)
    path.increment(1.0, 1.7)
    path.at([0.1, 1.1])
    return path


@pytest.mark.parametrize(
    "copied", [BrownianPath.fork, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize("seed", [4, torch.arange(5)])
def test_copies_are_the_same_path_and_go_on_alone(copied, seed):
    path = recorded(seed)
    other = copied(path)
    known = list(path.times)
    assert all(equal(x, y) for x, y in zip(steps(other, known), steps(path, known), strict=True))
    far = other.increment(2.0, 3.0)
    other.increment(0.0, 0.05)
    assert path.times == known
    assert equal(far, path.increment(2.0, 3.0))  # the same serial


def test_replay_at_other_steps():
    path = recorded()
    whole = path.increment(0.0, 2.0)
    for count in (1, 3, 16):
        replay = path.fork()
        points = np.linspace(0, 2, count + 1).tolist()
        same(sum(x.W for x in steps(replay, points)), whole.W)
        back = steps(path.fork(), points[::-1])
        same(sum(x.W for x in back), -whole.W)


def test_forks_of_other_kinds():
    path = recorded()
    plain = path.fork(levy_area=False, dtype=torch.float32)
    for a, b in [(0.0, 0.5), (0.0, 0.2), (0.5, 2.0), (2.0, 2.5)]:
        x, y = path.increment(a, b), plain.increment(a, b)
        assert y.W.dtype == torch.float32
        assert y.H is None
        assert torch.equal(x.W.float(), y.W)
    assert plain.fork().dtype == torch.float32


def test_float32_is_the_float64_path_rounded():
    path, single = recorded(), recorded(dtype=torch.float32)
    for a, b in [(0.0, 0.5), (0.5, 0.0), (0.0, 0.1), (0.0, 2.0), (2.0, 4.0)]:
        x, y = path.increment(a, b), single.increment(a, b)
        assert y.W.dtype == y.H.dtype == torch.float32
        assert torch.equal(x.W.float(), y.W)
        assert torch.equal(x.H.float(), y.H)
    assert torch.equal(single.at([0.7]), path.at([0.7]).float())
    assert single.extra(0.0, 1.0, 2).dtype == torch.float32


def test_what_is_handed_out_may_be_changed():
    path = recorded()
    points = list(path.times)
    before = [type(x)(x.W.clone(), x.H.clone()) for x in steps(path, points)]
    for x in steps(path, points):
        x.W.zero_()
        x.H.zero_()
    assert all(equal(x, y) for x, y in zip(steps(path, points), before, strict=True))


def test_inference_mode():
    with torch.inference_mode():
        path = recorded()
    W = path.increment(0.0, 0.2).W + path.increment(1.0, 2.0).W + path.increment(0.0, 2.0).W
    x = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
    (x * W).sum().backward()
    assert torch.equal(x.grad, W)


def test_memory_is_that_of_the_points():
    """Ten thousand steps of a thousand paths would be 80 MB of numbers."""
    path = BrownianPath(1, rows=1000)
    for i in range(300):
        path.increment(float(i), i + 1.0)
    kept = sum(x.untyped_storage().nbytes() for x in path._ahead[:1])
    assert kept <= 8 * path_module._AHEAD["cpu"]
    assert not path._halves
    assert len(pickle.dumps(path)) < 300 * 32 + 1000


def test_empty_batches():
    path = BrownianPath(1, rows=0, m=2, levy_area=True)
    assert path.increment(0.0, 1.0).W.shape == (0, 2)
    assert path.increment(0.0, 0.5).H.shape == (0, 2)
    assert path.at([0.3]).shape == (1, 0, 2)


def test_manual_seed_decides_the_seed():
    torch.manual_seed(1)
    first = draw_seed()
    torch.manual_seed(1)
    assert draw_seed() == first
    assert draw_seed() != first


# -- to be followed by another solve -------------------------------------------------------------


def test_a_path_is_followed_where_it_is_known():
    """Beyond, two solves would draw two paths that share some of their numbers."""
    path = BrownianPath(0)
    with pytest.raises(ValueError, match=r"knows nothing yet.*seed=.*VirtualBrownianTree"):
        path.check(1, 1, 0.0, 1.0)
    path.increment(0.0, 0.4)
    path.increment(0.4, 1.0)
    for a, b in [(0.0, 1.0), (1.0, 0.0), (0.2, 0.7), (0.0, 0.0), (0.0, math.nextafter(1.0, 2.0))]:
        path.check(1, 1, a, b)
    for a, b in [(0.0, 1.1), (1.1, 0.0), (-0.1, 0.5), (2.0, 3.0), (0.0, 1.0 + 1e-12)]:
        with pytest.raises(ValueError, match=r"known from t = 0 to t = 1.* longest .*finest"):
            path.check(1, 1, a, b)


def test_solves_follow_a_path_where_it_is_known():
    prob = SDEProblem(lambda t, u: -u, lambda t, u: u, torch.ones(1).double(), (0.0, 1.0))
    with pytest.raises(ValueError, match="knows nothing yet"):
        solve(prob, EM(), dt=0.5, noise=BrownianPath(0))
    sol = solve(prob, EM(), dt=1 / 8, seed=0)
    with pytest.raises(ValueError, match="known from t = 0 to t = 1"):
        solve(prob.remake(tspan=(0.0, 2.0)), EM(), dt=1 / 8, noise=sol.noise)
    ends = [
        solve(prob, EM(), dt=dt, noise=sol.noise).noise.increment(0.0, 1.0).W for dt in (0.5, 0.03)
    ]
    for end in ends:
        same(end, sol.noise.increment(0.0, 1.0).W)


def test_fixed_steps_see_one_path_whatever_the_batch():
    def run(rows, **options):
        u0 = torch.ones(rows, 1).double()
        prob = SDEProblem(lambda t, u: -u, lambda t, u: u, u0, (0.0, 1.0))
        return solve(prob, EM(), dt=0.1, adaptive=False, **options)

    few, many = run(2, seed=3), run(50, seed=3)
    assert torch.equal(few.u, many.u[:, :2])
    assert torch.equal(few.noise.at([0.5, 1.0]), many.noise.at([0.5, 1.0])[:, :2])


def test_adaptive_steps_see_one_path_where_that_is_a_tree():
    """The numbers of a ``BrownianPath`` go with the steps, and those with the batch."""

    def run(starts, noise=None, **options):
        u0 = torch.tensor(starts, dtype=torch.float64)[:, None]
        prob = SDEProblem(lambda t, u: -u, lambda t, u: 1 + u, u0, (0.0, 1.0))
        seed = 3 if noise is None else None
        return solve(prob, LambaEM(), seed=seed, noise=noise, **options)

    rough, fine = {"rtol": 0.1, "atol": 0.1}, {"rtol": 0.03, "atol": 0.03}

    def end(*starts, tree=True, options=rough):
        noise = VirtualBrownianTree(3, 0.0, 1.0, rows=len(starts)) if tree else None
        sol = run(starts, noise, **options)
        return sol.noise.at([1.0])[0, 0], sol.stats.naccept

    alone, count = end(1.0)
    for other, steps_ in (end(1.0, 60.0), end(1.0, options=fine)):
        assert steps_ != count
        same(other, alone)
    alone, count = end(1.0, tree=False)
    for other, steps_ in (end(1.0, 60.0, tree=False), end(1.0, tree=False, options=fine)):
        assert steps_ != count
        assert (other - alone).abs() > 1e-3


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BrownianPath(1.5), TypeError, "integer"),
        (lambda: BrownianPath(True), TypeError, "integer"),
        (lambda: BrownianPath(torch.ones(2)), TypeError, "integers"),
        (lambda: BrownianPath(2**64), ValueError, "64 bits"),
        (lambda: BrownianPath(torch.arange(3), rows=2), ValueError, "3 entries for 2 paths"),
        (lambda: BrownianPath(1, dtype=torch.complex128), TypeError, "real"),
        (lambda: BrownianPath(1, rows=-1), ValueError, "negative"),
        (lambda: BrownianPath(1).increment(0.0, math.nan), ValueError, "nan"),
        (lambda: BrownianPath(1).increment(0.0, math.inf), ValueError, "inf"),
        (lambda: BrownianPath(1, 5, 2).check(5, 1, 0.0, 1.0), ValueError, "5 paths of 2"),
    ],
)
def test_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
