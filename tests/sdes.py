"""What the tests of SDEs share: problems, closed forms, one path at several step sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import diffsolve
from diffsolve import SDEProblem, Solution

DOUBLE = torch.float64
RATES = (0.4, 0.7)  # drift and volatility of the linear equation


def solve(prob: Any, alg: Any = None, **options: Any) -> Solution:
    """``diffsolve.solve`` on the torch engine, where nothing else is said."""
    return diffsolve.solve(prob, alg, **{"engine": "torch", **options})


def linear_drift(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[0] * u


def linear_noise(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[1] * u


def linear(rows: int = 1, d: int = 1, **changes: Any) -> SDEProblem:
    """``du = a u dt + b u dW``, ``(rows, d)`` from 1, over a unit of time."""
    p = torch.tensor(RATES, dtype=DOUBLE)
    u0 = torch.ones(rows, d, dtype=DOUBLE)
    prob = SDEProblem(linear_drift, linear_noise, u0, (0.0, 1.0), p)
    return prob.remake(**changes)


def linear_solution(prob: SDEProblem, t: float, W: Tensor) -> Tensor:
    """The closed form of ``linear``, where its path is ``W`` after a time ``t``."""
    a, b = prob.p[0], prob.p[1]
    drift = a - b * b / 2 if prob.interpretation == "ito" else a
    return prob.u0 * torch.exp(drift * t + b * W)


def two_noises(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Two Brownian motions that commute: ``0.7 u dW1 + 0.3 u dW2``."""
    return torch.stack([p[1] * u, 0.3 * u], -1)


def heisenberg(rows: int, **changes: Any) -> SDEProblem:
    """``dx = dW1, dy = dW2, dz = (x dW2 - y dW1)/2`` from 0: ``z`` is the Levy area of ``W``."""

    def g(t: Tensor, u: Tensor) -> Tensor:
        x, y = u[..., 0], u[..., 1]
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        columns = [torch.stack([one, zero, -y / 2], -1), torch.stack([zero, one, x / 2], -1)]
        return torch.stack(columns, -1)

    u0 = torch.zeros(rows, 3, dtype=DOUBLE)
    prob = SDEProblem(lambda t, u: torch.zeros_like(u), g, u0, (0.0, 1.0), noise="general")
    return prob.remake(**changes)


def same_path(prob: SDEProblem, alg: Any, steps: Sequence[int], seed: int = 1) -> list[Solution]:
    """Solutions with these numbers of equal steps, the largest last, along one path."""
    span = abs(prob.tspan[1] - prob.tspan[0])
    fine = solve(prob, alg, dt=span / steps[-1], adaptive=False, seed=seed)
    rest = [
        solve(prob, alg, dt=span / n, adaptive=False, noise=fine.noise, save_everystep=False)
        for n in steps[:-1]
    ]
    return [*rest, fine]


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Order of convergence: the slope of errors over step sizes, fitted in logarithms."""
    x = -torch.tensor(steps, dtype=DOUBLE).log()
    y = torch.tensor(errors, dtype=DOUBLE).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())
