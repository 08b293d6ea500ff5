"""Gradients of SRA, SRI and Milstein methods by differences along a path, estimates included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import assert_near, label
from sdes import DOUBLE
from stochastic_runs import integral_of, solve
from torch import Tensor

from diffsolve import DiscreteAdjoint, ReversibleHeun, RKMilGeneral, SDEProblem
from diffsolve.solvers.stochastic.method import registered
from diffsolve.solvers.stochastic.milstein import Milstein
from diffsolve.solvers.stochastic.srk import SRA, SRI

METHODS = [x for x in registered() if isinstance(x, (SRA, SRI, Milstein, ReversibleHeun))]
KINDS = ["diagonal", "scalar", "general", "additive", "additive matrix"]
CASES = [(alg, kind) for alg in METHODS for kind in KINDS if kind.split()[0] in alg.noise_types]
SENSEALGS = [DiscreteAdjoint(), DiscreteAdjoint(checkpoints=3), DiscreteAdjoint(tape=True)]


def nonlinear(kind: str, interpretation: str) -> SDEProblem:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return p[0] * u - 0.3 * u**3 + torch.sin(3 * t) + 0.1 * u.flip(-1)

    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        size = p[1] * (1 + t)
        if kind == "general":
            return torch.stack([size * u.sin(), 0.2 * u.flip(-1), 0.1 * torch.ones_like(u)], -1)
        if kind.startswith("additive"):
            full = size * torch.ones_like(u)
            return full if kind == "additive" else torch.stack([full, 0.3 * full, full], -1)
        return size * u.sin() if kind == "diagonal" else (size * u.cos())[..., None]

    u0 = torch.linspace(0.8, 1.4, 6, dtype=DOUBLE).reshape(3, 2)
    p = torch.tensor([0.4, 0.6], dtype=DOUBLE)
    return SDEProblem(f, g, u0, (0.0, 1.0), p, noise=kind.split()[0], interpretation=interpretation)


def weighed(sol: Any) -> Tensor:
    """Of values in and between the steps, and of the estimates."""
    weights = torch.linspace(0.5, 2.0, sol.u.numel(), dtype=DOUBLE).reshape(sol.u.shape)
    steps = sol.steps
    estimates = steps.error.sum() + 3 * steps.error_norm.sum() + 0.1 * steps.stiffness.sum()
    return (weights * sol.u**2).sum() + 0.1 * estimates


@pytest.mark.parametrize(("alg", "kind"), CASES, ids=[f"{a!r}-{k}" for a, k in CASES])
def test_gradients_against_differences(alg: Any, kind: str) -> None:
    prob = nonlinear(kind, integral_of(alg))
    options: dict[str, Any] = {"dt": 0.1, "adaptive": False, "seed": 3, "rtol": 0.1, "atol": 0.1}
    options |= {"alg": alg, "saveat": [0.13, 0.5, 0.51, 1.0]}
    eps, expected = 1e-6, []
    for i in range(2):
        values = []
        for sign in (1, -1):
            p = prob.p.clone()
            p[i] += sign * eps
            values.append(float(weighed(solve(prob.remake(p=p), **options))))
        expected.append((values[0] - values[1]) / (2 * eps))
    for sensealg in SENSEALGS:
        p = prob.p.clone().requires_grad_()
        sol = solve(prob.remake(p=p), sensealg=sensealg, **options)
        (found,) = torch.autograd.grad(weighed(sol), p)
        assert_near(found, torch.tensor(expected, dtype=DOUBLE), 1e-6)


@pytest.mark.parametrize("alg", METHODS, ids=repr)
@pytest.mark.parametrize("sensealg", SENSEALGS[1:], ids=label)
def test_adaptive_steps_of_many_paths(alg: Any, sensealg: Any) -> None:
    """More steps than are run at once, with rejected ones; all sensealgs along the same path."""
    kind = "general" if "general" in alg.noise_types else min(alg.noise_types)
    prob = nonlinear(kind, integral_of(alg))
    tol = 1e-2 if isinstance(alg, (ReversibleHeun, RKMilGeneral)) else 1e-3
    grads = []
    for x in (DiscreteAdjoint(), sensealg):
        p, u0 = (x.clone().requires_grad_() for x in (prob.p, prob.u0))
        sol = solve(
            prob.remake(p=p, u0=u0), alg, sensealg=x, seed=5, rtol=tol, atol=tol, dt=0.2,
            saveat=[0.3, 1.0],
        )  # fmt: skip
        assert sol.stats.nreject > 0
        grads.append(torch.autograd.grad(weighed(sol), (p, u0)))
    for found, expected in zip(*grads, strict=True):
        assert_near(found, expected, 1e-9)
