"""The generator: its known answers, its normals, and the compiled kernel against torch."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from diffsolve.solvers.stochastic.noise import draws
from diffsolve.solvers.stochastic.noise.draws import Draws
from diffsolve.solvers.stochastic.noise.philox import (
    INV_SQRT_12,
    READS,
    TREE,
    counter_of,
    normals,
    philox,
)

CPU = torch.device("cpu")
#: Random123 1.14, tests/kat_vectors: counter, key and words of philox4x32-10.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = {"one": 2**63 + 12345, "each": torch.arange(1, 301) * 0x1234567_89ABCDE}


@pytest.fixture
def by_torch(monkeypatch):
    """Makes `Draws` without the compiled kernel, as on another device."""

    def make(*args):
        with monkeypatch.context() as patch:
            patch.setattr(draws, "compiled", lambda name: None)
            return Draws(*args)

    return make


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_torch_gives_the_known_answers(counter, key, words):
    found = philox(*(torch.tensor(x) for x in (*counter, *key)))
    assert tuple(int(x) for x in found) == words


def test_the_kernel_gives_the_known_answers():
    from numba import njit

    from diffsolve.solvers.stochastic.noise import kernel

    compiled = njit(lambda *words: kernel.philox(*words))
    for counter, key, words in KNOWN_ANSWERS:
        assert tuple(x & 0xFFFFFFFF for x in compiled(*counter, *key)) == words


def test_the_kernel_is_there():
    # everything below compares torch with itself where it is not
    assert Draws(0, 1, 1, CPU)._draw is not None


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("counter", [0, 2**32 - 2, READS + 7, TREE + (123 << 32)])
def test_kernel_and_torch_agree(seed, counter, by_torch):
    kernel = Draws(seed, 300, 7, CPU)(counter, 5, True)
    same = by_torch(seed, 300, 7, CPU)(counter, 5, True)
    assert kernel.shape == same.shape == (2, 5, 300, 7)
    assert ((kernel - same).abs() <= 1e-14 * same.abs()).all()


def test_normals_are_those_of_the_words():
    """Against the formula with other arithmetic: integers of Python, NumPy's functions."""
    counter, component, path, seed = 41 | READS, 3, 17, -5
    words = philox(
        *(torch.tensor(x) for x in (41, component, path, READS >> 32)),
        torch.tensor(seed & 0xFFFFFFFF),
        torch.tensor((seed >> 32) & 0xFFFFFFFF),
    )
    x0, x1, x2, x3 = (int(x) for x in words)
    u = ((x1 << 32 | x0) // 2**11 + 1) / 2**53
    v = ((x3 << 32 | x2) // 2**11) / 2**53
    radius = math.sqrt(-2 * math.log(u))
    expected = radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)
    found = normals(*(torch.tensor(x) for x in (counter, component, path, seed)))
    assert [float(x) for x in found] == pytest.approx(expected, rel=1e-13)
    drawn = Draws(seed, 20, 5, CPU)(counter, 1, True)[:, 0, path, component]
    assert drawn.tolist() == pytest.approx([expected[0], expected[1] * INV_SQRT_12], rel=1e-13)


def test_extreme_words():
    """The ends of the uniforms: radius zero and the largest, the ends of the half circle."""
    from numba import njit

    from diffsolve.solvers.stochastic.noise import kernel

    logarithm = njit(lambda k: kernel._minus_two_log(k))
    for k in (1, 2, 3, 2**52, 2**52 + 1, 2**53 - 1, 2**53, 6369051672525772, 6369051672525773):
        exact = (
            -2 * (math.log(k) - 53 * math.log(2)) if k < 2**52 else -2 * math.log1p(k / 2**53 - 1)
        )
        assert logarithm(k) == pytest.approx(exact, rel=1e-15, abs=0)
    sine = njit(lambda r: kernel._sine(r))
    r = np.concatenate([np.linspace(-1, 1, 4001), [2.0**-51, 1 - 2.0**-51]])
    assert np.allclose([sine(x) for x in r], np.sin(np.pi / 2 * r), rtol=4e-16, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 3), (8, 16), (5000, 1), (1, 5000), (70, 70)])
def test_shape_does_not_matter(shape):
    """Whichever loops the kernel takes: element by element the numbers of a batch of one."""
    rows, m = shape
    whole = Draws(11, rows, m, CPU)(3, 4, True)
    for count, i, c in [(0, 0, 0), (3, rows - 1, m - 1), (2, rows // 2, m // 3)]:
        alone = Draws(11, i + 1, c + 1, CPU)(3 + count, 1, True)[:, 0, i, c]
        assert torch.equal(whole[:, count, i, c], alone)
    assert len(whole.unique()) == whole.numel()


def test_without_the_second_normal_the_first_is_the_same():
    one = Draws(11, 50, 3, CPU)(3, 9, False)
    assert one.shape == (1, 9, 50, 3)
    assert torch.equal(one[0], Draws(11, 50, 3, CPU)(3, 9, True)[0])


def test_distribution():
    """Level 0.1 % for each; 2**18 numbers of each kind."""
    n = Draws(2024, 512, 4, CPU)(0, 128, True)
    w, h = n[0].flatten().numpy(), (n[1] / INV_SQRT_12).flatten().numpy()
    for x in (w, h):
        assert stats.kstest(x, "norm").pvalue > 1e-3
        assert abs(stats.kurtosis(x)) < 3.3 * math.sqrt(24 / len(x))
        assert stats.kstest(x[np.abs(x) > 3], _tail).pvalue > 1e-3
    bound = 3.3 / math.sqrt(len(w))
    assert abs(np.mean(w * h)) < bound
    assert abs(np.mean((w**2 - 1) * (h**2 - 1))) < 2 * bound
    for axis in range(3):  # neighbouring serials, paths and components
        x = n[0].transpose(0, axis).numpy()
        assert abs(np.mean(x[1:] * x[:-1])) < 3.3 / math.sqrt(x[1:].size)


def _tail(x):
    """Distribution of a normal that is beyond three."""
    low = stats.norm.cdf(np.minimum(x, -3))
    high = stats.norm.cdf(np.maximum(x, 3)) - stats.norm.cdf(3)
    return (low + high) / (2 * stats.norm.sf(3))


def test_seeds_of_neighbours_are_independent():
    n = torch.stack([Draws(seed, 200, 5, CPU)(0, 20, False)[0] for seed in range(10)])
    products = (n[1:] * n[:-1]).mean(dim=(1, 2, 3))
    assert products.abs().max() < 4 / math.sqrt(n[0].numel())


def test_counters_of_times():
    times = [0.0, 1.0, math.nextafter(1.0, 2.0), 2.0, -1.0, 0.1, 0.2, 1e300, 5e-324]
    found = {counter_of(READS, t) for t in times}
    assert len(found) == len(times)
    assert all(x >> 56 == READS >> 56 for x in found)
    assert counter_of(READS, -0.0) == counter_of(READS, 0.0)
    assert counter_of(READS, 0.0, 1.0) != counter_of(READS, 1.0, 0.0)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="64 bits"):
        Draws(seed, 1, 1, CPU)


def test_where_the_kernel_cannot_be_made_torch_draws(monkeypatch):
    from diffsolve.engines.declined import Declined
    from diffsolve.engines.native.runtime import kernels

    expected = Draws(5, 4, 2, CPU)(1, 3, True)

    def broken(*args):
        raise Declined("no compiler")

    monkeypatch.setattr(kernels, "kernel", broken)
    draws.compiled.cache_clear()
    try:
        plain = Draws(5, 4, 2, CPU)
        assert plain._draw is None
        torch.testing.assert_close(plain(1, 3, True), expected, rtol=1e-14, atol=0)
        whole = torch.ones(2, 4, 2, dtype=torch.float64)
        assert plain.divide(whole, 0, 1.0, 7, 0.25, 0.75).shape == (4, 4, 2)
    finally:
        draws.compiled.cache_clear()


@pytest.mark.slow
def test_the_loops_are_made_of_vectors():
    """One that is not takes ten times as long; nothing else would tell."""
    from diffsolve.engines.native.runtime.build import kernel_ir

    for name, loops in (("draw", 4), ("bridge", 5), ("tree", 20)):
        text = kernel_ir(name, "stochastic/noise", False)
        assert len(re.findall(r"^vector\.body\d*:", text, re.MULTILINE)) >= loops
