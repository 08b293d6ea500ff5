"""What an SDE's solve needs before its first step: a method, and a Brownian path."""

from __future__ import annotations

from typing import Any

import torch

from diffsolve.problems.sde import SDEProblem
from diffsolve.problems.sde_field import Increment, SDEField
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.stochastic.low_order import EM
from diffsolve.solvers.stochastic.method import StochasticMethod, check_method


def stochastic_method(alg: Algorithm | None, prob: SDEProblem) -> StochasticMethod:
    """The method of a solve; None: what suits the noise and the integral."""
    return check_method(EM() if alg is None else alg, prob.noise, prob.interpretation)


def brownian_path(
    field: SDEField, alg: Algorithm, seed: Any, noise: Any, t0: float, t1: float
) -> Any:
    """The Brownian path of a solve from ``t0`` to ``t1``."""
    return noise if noise is not None else _Plain(field, seed)


class _Plain:
    def __init__(self, field, seed):
        self.field = field
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.generator = torch.Generator().manual_seed(self.seed)
        self.known = {}

    def increment(self, s, t):
        key = (round(s, 12), round(t, 12))
        if key not in self.known:
            f = self.field
            dz = torch.randn(2, f.rows, f.m, generator=self.generator, dtype=torch.float64)
            h = abs(t - s)
            self.known[key] = Increment(
                (dz[0] * h**0.5).to(f.dtype), (dz[1] * (h / 12) ** 0.5).to(f.dtype)
            )
        return self.known[key]
