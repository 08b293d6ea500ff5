"""Weak order of every stochastic method, without random numbers.

On a circle, with drift and diffusion of period 2 pi, what a step does to expectations is a matrix:
the mean over the noise by quadrature, the state by trigonometric interpolation. Its powers give the
expectations of a whole solve to ten digits, and so does the Kolmogorov equation for the solution.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from sdes import DOUBLE
from torch import Tensor

from diffsolve import ReversibleHeun, SDEProblem
from diffsolve.problems.sde_field import GivenNoise, SDEField
from diffsolve.solvers.stochastic.method import registered

POINTS, NODES = 32, 12
CIRCLE = 2 * np.pi * np.arange(POINTS) / POINTS
WAVES = np.fft.fftfreq(POINTS, 1 / POINTS)
METHODS = [x for x in registered() if not isinstance(x, ReversibleHeun)]


def drift(t: Tensor, u: Tensor) -> Tensor:
    return 0.4 * torch.sin(u) + 0.3


def multiplicative(t: Tensor, u: Tensor) -> Tensor:
    return 0.5 + 0.3 * torch.cos(u)


def additive(t: Tensor, u: Tensor) -> Tensor:
    return torch.full_like(u, 0.6)


def wanted(x: np.ndarray) -> np.ndarray:
    """The function whose expectation is looked at."""
    return np.cos(x) + 0.5 * np.sin(2 * x)


def solution(g: Any, stratonovich: bool) -> np.ndarray:
    """Expectations at time 1 by the Kolmogorov equation, for each start."""
    waves = 1j * WAVES
    waves[POINTS // 2] = 0
    D = np.fft.ifft(waves[:, None] * np.fft.fft(np.eye(POINTS), axis=0), axis=0).real
    x, zero = torch.tensor(CIRCLE), torch.zeros(())
    a, b = drift(zero, x).numpy(), g(zero, x).numpy()
    if stratonovich:
        a = a + 0.5 * b * (D @ b)
    return expm(np.diag(a) @ D + 0.5 * np.diag(b * b) @ D @ D) @ wanted(CIRCLE)


def quadrature(h: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``W``, ``H`` and weights."""
    x, w = np.polynomial.hermite_e.hermegauss(NODES)
    w = w / w.sum()
    W, H = np.meshgrid(x * math.sqrt(h), x * math.sqrt(h / 12), indexing="ij")
    return W.reshape(-1), H.reshape(-1), np.outer(w, w).reshape(-1)


def field_with(u: np.ndarray, W: np.ndarray, H: np.ndarray, alg: Any, g: Any) -> SDEField:
    noise = "additive" if g is additive else "diagonal"
    interpretation = sorted(alg.interpretation)[0]
    start = torch.tensor(u).reshape(-1, 1)
    prob = SDEProblem(drift, g, start, (0.0, 1.0), noise=noise, interpretation=interpretation)
    field = SDEField.of(prob)
    field.discover(0.0, start.reshape(-1), 1.0, False)
    given = (torch.tensor(x).reshape(-1, 1) for x in (W, H))
    field.given = GivenNoise(torch.empty(0, len(u), 1, dtype=DOUBLE), *given)
    return field


def transition(alg: Any, g: Any, h: float) -> np.ndarray:
    """What a step does to the values of a function at the points of the circle."""
    W, H, weights = quadrature(h)
    u = np.repeat(CIRCLE, len(W))
    field = field_with(u, np.tile(W, POINTS), np.tile(H, POINTS), alg, g)
    start = torch.tensor(u)
    with torch.no_grad():
        new = alg.step(field, 0.0, h, alg.init(field, 0.0, start)).state[0].numpy()
    z = np.exp(1j * new.reshape(POINTS, -1))
    means = np.stack([z**k @ weights for k in WAVES], 1)
    return means @ np.fft.fft(np.eye(POINTS), axis=0) / POINTS


def errors(alg: Any, g: Any, counts: list[int]) -> np.ndarray:
    exact = solution(g, "stratonovich" in alg.interpretation and g is not additive)
    found = []
    for n in counts:
        whole = np.linalg.matrix_power(transition(alg, g, 1 / n), n)
        found.append(np.abs(whole @ wanted(CIRCLE) - exact).max())
    return np.array(found)


@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_weak_order(alg: Any) -> None:
    g = multiplicative if "diagonal" in alg.noise_types else additive
    coarse, fine = errors(alg, g, [32, 128])
    assert math.log2(coarse / fine) / 2 == pytest.approx(alg.weak_order, abs=0.1)
    assert coarse < 0.01


def test_weak_order_of_reversible_heun() -> None:
    """Its second state makes the circle a torus."""
    alg, points = ReversibleHeun(), 16
    circle = 2 * np.pi * np.arange(points) / points
    waves = np.fft.fftfreq(points, 1 / points)
    u, v = (x.reshape(-1) for x in np.meshgrid(circle, circle, indexing="ij"))
    exact, found = solution(multiplicative, True), []
    basis = np.kron(*[np.fft.fft(np.eye(points), axis=0) / points] * 2)
    for n in (16, 64):
        W, H, weights = quadrature(1 / n)
        W, H, weights = (x.reshape(NODES, NODES) for x in (W, H, weights))
        W, weights = W[:, 0], weights.sum(1)  # it has no use for H
        whole = [np.repeat(x, len(W)) for x in (u, v)]
        field = field_with(whole[1], np.tile(W, len(u)), np.tile(W, len(u)), alg, multiplicative)
        now, beside = field.time(0.0), torch.tensor(whole[1])
        with torch.no_grad():
            slopes = field(now, beside), field.diffusion(now, beside)
            new = alg.step(field, 0.0, 1 / n, (torch.tensor(whole[0]), beside, *slopes)).state
        a, b = (np.exp(1j * x.numpy().reshape(len(u), -1)) for x in new[:2])
        powers = [np.stack([z**k for k in waves]) for z in (a, b)]
        means = np.einsum("kiq,liq,q->ikl", *powers, weights).reshape(len(u), -1)
        expected = np.linalg.matrix_power(means @ basis, n) @ wanted(u)
        on_diagonal = expected.reshape(points, points).diagonal()  # v is u at the start
        found.append(np.abs(on_diagonal - exact[:: POINTS // points]).max())
    assert math.log2(found[0] / found[1]) / 2 == pytest.approx(1.0, abs=0.1)
    assert found[0] < 0.02
