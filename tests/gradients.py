"""What the tests of gradients share: sensealgs, a linear problem, comparisons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffsolve import (
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    Vern7,
    solve,
)

DOUBLE = torch.float64
CONTINUOUS = [BacksolveAdjoint(), InterpolatingAdjoint(), InterpolatingAdjoint(checkpoints=5)]
STEPWISE = [DiscreteAdjoint(), DiscreteAdjoint(checkpoints=5)]
TAPE = DiscreteAdjoint(tape=True)
THROUGH = DiscreteAdjoint(through_step_size=True)
SENSEALGS = [*STEPWISE, TAPE, *CONTINUOUS]


def label(x):
    if isinstance(x, DiscreteAdjoint):
        if x.through_step_size:
            return "discrete-through-step-size"
        kind = "tape" if x.tape else f"checkpoints{x.checkpoints}" if x.checkpoints else "steps"
        return f"discrete-{kind}"
    if isinstance(x, InterpolatingAdjoint):
        return f"interpolating-checkpoints{x.checkpoints}" if x.checkpoints else "interpolating"
    return type(x).__name__


def each(values=SENSEALGS):
    return pytest.mark.parametrize("sensealg", values, ids=label)


def leaf(values, dtype=DOUBLE):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def assert_near(got, expected, rtol=1e-7):
    """Equal up to ``rtol`` of the largest entry."""
    expected = torch.as_tensor(expected, dtype=got.dtype)
    assert got.shape == expected.shape
    assert float((got - expected).detach().abs().max()) <= rtol * float(expected.abs().max())


# -- the linear problem, whose gradients are those of a matrix exponential -----------------------

MATRIX = [[-0.3, 1.1], [-0.9, 0.2]]
START = [1.0, -0.5]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def linear(t, u, p):
    return p @ u


def linear_reference(u0, p, times, weigh):
    """Gradients by ``u0`` and ``p`` of ``weigh(u)`` at ``times`` after the start."""
    u0, p = (x.detach().clone().requires_grad_() for x in (u0, p))
    u = torch.stack([torch.linalg.matrix_exp(p * t) @ u0 for t in times.detach()])
    return torch.autograd.grad(weigh(u), (u0, p))


def check_linear(sensealg, tspan=(0.0, 1.5), weigh=lambda u: (u**2).sum(), rtol=1e-7, **options):
    u0, p = leaf(START), leaf(MATRIX)
    options = {"alg": Vern7(), **TIGHT, **options}
    sol = solve(ODEProblem(linear, u0, tspan, p), sensealg=sensealg, **options)
    weigh(sol.u).backward()
    expected = linear_reference(u0, p, sol.t - tspan[0], weigh)
    for x, reference in zip((u0, p), expected, strict=True):
        # plain autograd knows nothing of what a value does not depend on
        got = torch.zeros_like(x) if x.grad is None and sensealg is TAPE else x.grad
        assert_near(got, reference, rtol)
    return sol


class Decay(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, t, u):
        return -self.a * u

    def rate(self, t, u):
        return self.forward(t, u)
