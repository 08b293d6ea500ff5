"""Layers and problems of the tests of NeuralSDE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffsolve import (
    EM,
)
from diffsolve.nn import NeuralSDE

DOUBLE = torch.float64
FIXED: dict[str, Any] = {"dt": 0.05, "adaptive": False}
U0 = torch.tensor([[1.0, 0.5], [-0.3, 0.2], [0.1, 0.9]], dtype=DOUBLE)


class Noise(nn.Module):
    """A positive diffusion, a component a component."""

    def __init__(self, d: int = 2):
        super().__init__()
        self.level = nn.Parameter(torch.linspace(0.3, 0.5, d, dtype=DOUBLE))

    def forward(self, u: Tensor) -> Tensor:
        return self.level * (1 + u**2).sqrt()


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def layer(sensealg: Any = None, alg: Any = None, **options: Any) -> NeuralSDE:
    return NeuralSDE(net(), Noise(), (0.0, 1.0), alg or EM(), sensealg, **{**FIXED, **options})


def prior(u: Tensor) -> Tensor:
    return -0.5 * u
