"""Problems with closed forms for stochastic methods."""

from __future__ import annotations

import math
from typing import Any

import torch
from sdes import DOUBLE
from torch import Tensor

from diffsolve import (
    SOSRA,
    SRA1,
    SDEProblem,
)

SRA_METHODS = [SOSRA(), SRA1()]


def sinh(rows: int, interpretation: str = "ito", **changes: Any) -> SDEProblem:
    """``u = sinh(asinh(u0) + 0.3 t + 0.5 W)``: nonlinear noise of any sign of curvature."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        along = 0.3 * torch.sqrt(1 + u * u)
        return along + 0.125 * u if interpretation == "ito" else along

    def g(t: Tensor, u: Tensor) -> Tensor:
        return 0.5 * torch.sqrt(1 + u * u)

    u0 = torch.full((rows, 1), 0.2, dtype=DOUBLE)
    return SDEProblem(f, g, u0, (0.0, 1.0), interpretation=interpretation).remake(**changes)


def sinh_solution(t: float, W: Tensor) -> Tensor:
    return torch.sinh(math.asinh(0.2) + 0.3 * t + 0.5 * W)


def rotation(rows: int, shape: int = 2, **changes: Any) -> SDEProblem:
    """``du = (a J - b^2/2) u dt + b J u dW`` with ``J`` a quarter turn and one Brownian motion.

    ``u`` turns by the angle ``a t + b W``, so that ``|u|`` stays as it is. Noise of both shapes.
    """

    def turned(u: Tensor) -> Tensor:
        return torch.stack([-u[..., 1], u[..., 0]], -1)

    def g(t: Tensor, u: Tensor) -> Tensor:
        return 0.8 * turned(u) if shape == 2 else 0.8 * turned(u)[..., None]

    u0 = torch.tensor([[1.0, 0.5]], dtype=DOUBLE).repeat(rows, 1)
    prob = SDEProblem(lambda t, u: 0.5 * turned(u) - 0.32 * u, g, u0, (0.0, 1.0), noise="scalar")
    return prob.remake(**changes)


def pendulum(rows: int, m: int = 0, **changes: Any) -> SDEProblem:
    """Nonlinear drift with additive noise that depends on time: ``m`` motions, 0: a diagonal."""
    matrix = torch.tensor([[0.3, 0.1, 0.2], [0.0, 0.4, 0.1]], dtype=DOUBLE)

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack([u[..., 1], -torch.sin(3 * u[..., 0]) - 0.2 * u[..., 1] + t], -1)

    def g(t: Tensor, u: Tensor) -> Tensor:
        size = 1 + torch.sin(3 * t)
        return 0.5 * size * torch.ones_like(u) if m == 0 else (size * matrix).expand(*u.shape, 3)

    u0 = torch.tensor([[1.0, 0.0]], dtype=DOUBLE).repeat(rows, 1)
    return SDEProblem(f, g, u0, (0.0, 1.0), noise="additive").remake(**changes)
