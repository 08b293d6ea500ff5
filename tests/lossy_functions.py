"""Problems of the tests of lost gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffsolve import (
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
)

F64 = torch.float64
U0 = torch.tensor([1.0, 0.5], dtype=F64)
SENSEALGS = [
    DiscreteAdjoint(),
    DiscreteAdjoint(checkpoints=3),
    DiscreteAdjoint(tape=True),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
]
each_sensealg = pytest.mark.parametrize("sensealg", SENSEALGS, ids=repr)


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
