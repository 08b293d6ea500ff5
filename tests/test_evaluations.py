"""How often f is evaluated in fixed steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffsolve as ds
from diffsolve import ODEProblem, solve

F64 = torch.float64
ONE_TO_FOUR = [(ds.Euler(), 1), (ds.Midpoint(), 2), (ds.Heun(), 2), (ds.RK4(), 4)]


def counted() -> tuple[list[float], ODEProblem]:
    calls: list[float] = []

    def f(t: Tensor, u: Tensor) -> Tensor:
        calls.append(float(t))
        return torch.sin(t) - u * u

    return calls, ODEProblem(f, torch.tensor([1.0, 0.5], dtype=F64), (0.0, 1.0))


@pytest.mark.parametrize(("alg", "stages"), ONE_TO_FOUR, ids=str)
@pytest.mark.parametrize("n", [1, 4])
def test_fixed_steps_evaluate_nothing_that_is_not_read(alg: Any, stages: int, n: int) -> None:
    options: dict[str, Any] = {"dt": 1 / n, "adaptive": False, "engine": "torch"}
    calls, prob = counted()
    whole = solve(prob, alg, **options)  # whose dense output reads it
    assert len(calls) == n * stages + 1
    choices: list[dict[str, Any]] = [{"save_everystep": False}, {"saveat": 1 / n}]
    for saves in choices:
        calls, prob = counted()
        sol = solve(prob, alg, **options, **saves)
        assert len(calls) == sol.stats.nf == n * stages
        assert torch.equal(sol.u[-1], whole.u[-1])
        # the estimate of the last step is made when it is asked for
        torch.testing.assert_close(sol.steps.stiffness, whole.steps.stiffness)
        torch.testing.assert_close(sol.steps.error, whole.steps.error)
        assert len(calls) == n * stages + 1


def test_what_reads_the_end_keeps_it() -> None:
    calls, prob = counted()
    options: dict[str, Any] = {"dt": 0.25, "adaptive": False, "engine": "torch"}
    dense = solve(prob, ds.Midpoint(), **options)
    sol = solve(prob, ds.Midpoint(), saveat=[0.9, 1.0], **options)  # a value inside
    torch.testing.assert_close(sol.u[0], dense(0.9))
    assert len(calls) == 2 * 9
    calls.clear()
    sol = solve(prob, ds.Tsit5(), save_everystep=False, **options)  # an error estimate
    assert len(calls) == 4 * 6 + 1
    torch.testing.assert_close(sol.steps.error, solve(prob, ds.Tsit5(), **options).steps.error)
