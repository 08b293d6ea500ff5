"""What the tests of changes share: a solve, and the engines that must notice a change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsolve import ODEProblem, Tsit5, solve

F64 = torch.float64
ENGINES = pytest.mark.parametrize("engine", ["native", "auto"])


def ones(n: int = 2) -> Tensor:
    return torch.ones(n, dtype=F64)


def end(prob: ODEProblem, engine: str = "native") -> list[float]:
    return solve(prob, Tsit5(), engine=engine, rtol=1e-8, atol=1e-8).u[-1].tolist()
