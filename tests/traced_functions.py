"""Traces of the tests."""

from __future__ import annotations

import torch
from native_graphs import F64
from torch import Tensor

U = torch.tensor([0.7, -0.4, 1.3], dtype=F64)


def hamiltonian(t: Tensor, u: Tensor) -> Tensor:
    with torch.enable_grad():
        x = u if u.requires_grad else u.clone().requires_grad_()
        energy = torch.tanh(x @ x) + torch.nn.functional.softplus(x).prod() + x[0] ** 3
        (slope,) = torch.autograd.grad(energy, x, create_graph=True)
    return slope.roll(1)
