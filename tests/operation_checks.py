"""Checks of compiled operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from native_graphs import F64
from torch import Tensor

Op = Callable[..., Tensor]


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)
