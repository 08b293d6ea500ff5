"""Methods with a node beyond the step: f is not evaluated outside of the span, nor past a stop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsolve as ds
from diffsolve import ODEProblem, solve

F64 = torch.float64
BEYOND = pytest.mark.parametrize("alg", [ds.Kvaerno4(), ds.Kvaerno5()], ids=repr)
ENGINES = pytest.mark.parametrize("engine", ["native", "torch"])


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@BEYOND
@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("options", [{}, {"adaptive": False, "dt": 0.3}], ids=["free", "fixed"])
def test_times_that_f_sees(alg: Any, span: tuple[float, float], options: Any) -> None:
    seen: list[float] = []

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        seen.append(float(t))
        return -p * u * u

    for sensealg in (ds.DiscreteAdjoint(), ds.InterpolatingAdjoint(), ds.BacksolveAdjoint()):
        p = torch.tensor(0.5, dtype=F64, requires_grad=True)
        prob = ODEProblem(f, torch.ones(1, dtype=F64), span, p)
        sol = solve(prob, alg, saveat=[span[1]], sensealg=sensealg, engine="torch", **options)
        sol.u.sum().backward()
    assert min(seen) == 0.0 and max(seen) == 1.0


def wavy(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p * torch.cos(2 * t) * u - u + torch.sin(3 * t)


def wavy_end(alg: Any, dt: float, engine: str, p: Any = 1.0, **options: Any) -> Tensor:
    prob = ODEProblem(wavy, torch.ones(2, dtype=F64), (0.0, 1.0), torch.as_tensor(p, dtype=F64))
    options |= {"save_everystep": False, "engine": engine}
    return solve(prob, alg, adaptive=False, dt=dt, **options).u[-1, 0]


@ENGINES
@BEYOND
def test_the_order_stays(alg: Any, engine: str) -> None:
    exact = wavy_end(ds.Vern9(), 1 / 400, "native")
    errors = [abs(float(wavy_end(alg, dt, engine) - exact)) for dt in (1 / 8, 1 / 16, 1 / 32)]
    # also where each step ends at a time that f must not be looked at beyond
    stops = [i / 8 for i in range(1, 8)]
    errors += [abs(float(wavy_end(alg, 1 / 8, engine, tstops=stops) - exact))]
    assert math.log2(errors[0] / errors[2]) / 2 > alg.order - 0.3
    assert errors[3] < 10 * errors[0]  # 2,000 where a stage is evaluated at the stop


@ENGINES
@BEYOND
def test_gradient_through_such_a_step(alg: Any, engine: str) -> None:
    p = torch.tensor(1.0, dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(wavy_end(alg, 0.5, engine, p), p)
    high, low = (wavy_end(alg, 0.5, engine, 1 + d) for d in (1e-5, -1e-5))
    assert abs(float(found * 2e-5 / (high - low)) - 1) < 1e-7


@BEYOND
def test_both_engines_extrapolate_alike(alg: Any) -> None:
    ours, theirs = (wavy_end(alg, 0.25, engine) for engine in ("native", "torch"))
    assert abs(float(ours - theirs)) < 1e-13
