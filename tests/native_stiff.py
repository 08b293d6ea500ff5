"""Stiff problems on the native engine."""

from __future__ import annotations

import torch
from gradients import DOUBLE

from diffsolve import (
    ROS3P,
    ODEProblem,
    Rodas3,
    Rodas4,
    Rodas4P,
    Rodas5,
    Rodas5P,
    Rosenbrock23,
    Rosenbrock32,
)

ROSENBROCK = [
    *(Rosenbrock23(), Rosenbrock32(), ROS3P(), Rodas3()),
    *(Rodas4(), Rodas4P(), Rodas5(), Rodas5P()),
]


def forced(t, u, p):
    """Stiff, not linear, and driven: every term of a Rosenbrock method takes part."""
    x, y, z = u.unbind(-1)
    fast = p[0] * (torch.cos(p[1] * t) - x)
    return torch.stack([fast + y * z, x - p[2] * y * y, torch.sin(t) * x - p[3] * z], -1)


def forced_problem(span=(0.0, 1.0), requires_grad=False, dtype=DOUBLE):
    u0 = torch.tensor([1.0, 0.5, -0.3], dtype=dtype, requires_grad=requires_grad)
    p = torch.tensor([60.0, 2.0, 1.5, 0.7], dtype=dtype, requires_grad=requires_grad)
    return ODEProblem(forced, u0, span, p)


def weigh(sol, name):
    if name == "u":
        weights = torch.linspace(-1, 2, sol.u.numel(), dtype=sol.u.dtype).reshape(sol.u.shape)
        return (weights * sol.u.square()).sum()
    return getattr(sol.steps, name).square().sum()
