"""Problems and differences of the tests of SDE gradients."""

from __future__ import annotations

import pytest
import torch
from gradients import label
from sdes import DOUBLE, solve
from torch import Tensor

from diffsolve import (
    DiscreteAdjoint,
    SDEProblem,
)

SENSEALGS = [DiscreteAdjoint(), DiscreteAdjoint(checkpoints=4), DiscreteAdjoint(tape=True)]
SAVES = [0.0, 0.13, 0.5, 0.51, 0.77, 1.0]

each_sensealg = pytest.mark.parametrize("sensealg", SENSEALGS, ids=label)


def noise_of(kind: str):
    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        if kind == "general":
            return torch.stack([p[1] * u.sin(), 0.2 * u.flip(-1), 0.1 * torch.ones_like(u)], -1)
        if kind == "additive":
            return p[1] * torch.exp(-t) * torch.ones_like(u)
        return p[1] * u.sin() if kind == "diagonal" else (p[1] * u.cos())[..., None]

    return g


def nonlinear(kind: str = "diagonal", interpretation: str = "ito", d: int = 2) -> SDEProblem:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return p[0] * u - 0.3 * u**3 + torch.sin(3 * t)

    u0 = torch.linspace(0.8, 1.4, 3 * d, dtype=DOUBLE).reshape(3, d)
    p = torch.tensor([0.4, 0.6], dtype=DOUBLE)
    return SDEProblem(
        f, noise_of(kind), u0, (0.0, 1.0), p, noise=kind, interpretation=interpretation
    )


def weighted(u: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 2.0, u.numel(), dtype=u.dtype).reshape(u.shape)
    return (weights * u**2).sum()


def gradients(prob: SDEProblem, alg, sensealg, loss=weighted, **options):
    u0, p = (x.detach().clone().requires_grad_() for x in (prob.u0, prob.p))
    sol = solve(prob.remake(u0=u0, p=p), alg, sensealg=sensealg, **options)
    value = loss(sol if loss is not weighted else sol.u)
    value.backward()
    return u0.grad, p.grad, sol


def differences(prob: SDEProblem, alg, loss=weighted, eps=1e-6, **options) -> Tensor:
    """Central differences by the parameters, along one path and in the same steps."""
    found = []
    for i in range(len(prob.p)):
        values = []
        for sign in (1, -1):
            p = prob.p.clone()
            p[i] += sign * eps
            sol = solve(prob.remake(p=p), alg, **options)
            values.append(float(loss(sol if loss is not weighted else sol.u)))
        found.append((values[0] - values[1]) / (2 * eps))
    return torch.tensor(found, dtype=DOUBLE)
