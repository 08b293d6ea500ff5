"""Solves at times far from zero, which floating point tells apart coarsely."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import diffsolve as ds
from diffsolve import ODEProblem, solve


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("alg", [ds.Tsit5(), ds.Rodas5P(), ds.KenCarp4(), None], ids=repr)
def test_times_far_from_zero(alg: Any, engine: str) -> None:
    t0 = 1.7e12  # milliseconds since 1970, which float64 tells apart by 2e-4
    u0 = torch.tensor([2.0], dtype=torch.float64)
    prob = ODEProblem(lambda t, u: torch.sin(0.01 * (t - t0)) + 0 * u, u0, (t0, t0 + 1000.0))
    sol = solve(prob, alg, rtol=1e-6, saveat=[t0 + 1000.0], engine=engine)
    assert abs(float(sol.u) - 2 - 100 * (1 - math.cos(10.0))) < 0.1  # rounding of t: 1e-6 of it
    assert sol.stats.naccept < 200
    back = ODEProblem(lambda t, u: -1e-12 * u, u0, (1e12, 0.0))
    sol = solve(back, alg, rtol=1e-6, saveat=[0.0], engine=engine)
    assert abs(float(sol.u) / (2 * math.e) - 1) < 1e-4
    assert sol.stats.naccept < 100


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_first_step_below_rounding_of_t_is_lengthened(engine: str) -> None:
    prob = ODEProblem(lambda t, u: -u, torch.ones(1, dtype=torch.float64), (1e12, 1e12 + 1))
    sol = solve(prob, ds.Tsit5(), dt=1e-9, engine=engine)
    assert abs(float(sol.u[-1]) - math.exp(-1)) < 2e-3


def test_noise_from_times_far_from_zero() -> None:
    prob = ds.SDEProblem(
        lambda t, u: -u, lambda t, u: 0.1 + 0 * u, torch.ones(1, dtype=torch.float64),
        (1e12, 1e12 + 1), noise="additive",
    )  # fmt: skip
    for engine in ("native", "torch"):
        assert solve(prob, rtol=1e-2, seed=1, engine=engine).success


def test_times_that_single_precision_cannot_tell_apart_are_named() -> None:
    prob = ODEProblem(lambda t, u: -u, torch.ones(1), (1.7e12, 1.7e12 + 1000.0))
    with pytest.warns(UserWarning, match=r"f sees times in float32.* apart by 2\.03e\+05"):
        solve(prob, ds.Tsit5(), engine="torch")
