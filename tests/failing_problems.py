"""Problems and checks of the tests of failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsolve import (
    ODEProblem,
    SolveError,
    Tsit5,
    solve,
)

F64 = torch.float64


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


def problem(
    f: Callable = decay, u0: Any = None, tspan: Any = (0.0, 1.0), **options: Any
) -> ODEProblem:
    return ODEProblem(f, torch.ones(2, dtype=F64) if u0 is None else u0, tspan, **options)


def said(prob: ODEProblem, engine: str, alg: Any = None, **options: Any) -> str:
    with pytest.raises(SolveError) as caught:
        solve(prob, alg or Tsit5(), engine=engine, **options)
    return str(caught.value)
