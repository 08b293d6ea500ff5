"""Numbers that change from solve to solve: what they cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from native_changes import ENGINES, F64
from native_runs import find_program
from torch import Tensor, nn

from diffsolve import ODEProblem, Rodas5P, Tsit5, solve

# -- numbers that change ---------------------------------------------------------------------------


class Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.beta = 1.0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        if self.beta < 0.82:  # it decides, too
            return -u
        return self.beta * self.net(u) - 0.3 * u


@ENGINES
def test_number_that_changes_at_each_step_becomes_an_input(engine: str) -> None:
    module, seconds = Annealed(), []
    codes = set()
    for i in range(24):
        module.beta = 1.0 - 0.01 * i
        prob = ODEProblem(module, torch.ones(2, dtype=F64), (0.0, 1.0))
        sol = solve(prob, Tsit5(), engine=engine)
        expected = solve(prob, Tsit5(), engine="torch")
        torch.testing.assert_close(sol.u[-1], expected.u[-1], rtol=1e-9, atol=1e-12)
        assert sol.stats.engine == "native"
        seconds.append(sol.stats.compile_s)
        codes.add(id(find_program(prob)))
    assert len(codes) <= 4


P_KINDS = {
    "array": np.array,
    "tuple": tuple,
    "dict": lambda x: {str(i): v for i, v in enumerate(x)},
    "nested": lambda x: {"a": {"0": np.float64(x[0]), "1": x[1]}, "b": [x[2]]},
    "single": lambda x: [np.float32(v) for v in x],
}


def _rates(p: Any) -> Any:
    if isinstance(p, dict):
        return [p["a"]["0"], p["a"]["1"], p["b"][0]] if "a" in p else [p[str(i)] for i in range(3)]
    return p


def _kinetics(t: Tensor, u: Tensor, p: Any) -> Tensor:
    a, b, c = _rates(p)
    rate = -2 * float(a) if c > 2.5 else -float(a)  # c decides
    return torch.stack([rate * u[0] + b * u[1], float(a) * u[0] - b * u[1] * math.exp(-c)])


@pytest.mark.parametrize("kind", P_KINDS)
@pytest.mark.parametrize("engine", ["auto"])
def test_numbers_in_p_are_inputs(kind: str, engine: str) -> None:
    alg, codes = Rodas5P() if kind == "array" else Tsit5(), set()
    for i in range(12):
        p = P_KINDS[kind]([1.1 + 0.1 * i, 0.3 + 0.07 * i, 1.9 + 0.11 * i])
        prob = ODEProblem(_kinetics, torch.tensor([1.0, 0.2], dtype=F64), (0.0, 1.0), p)
        sol = solve(prob, alg, engine=engine)
        assert sol.stats.engine == "native"
        codes.add(id(find_program(prob)))
        reference = solve(prob, alg, engine="torch")
        torch.testing.assert_close(sol.u[-1], reference.u[-1], rtol=1e-9, atol=1e-12)
    assert len(codes) <= 4


def test_number_that_decides_what_is_computed_goes_to_torch_after_a_while() -> None:
    def f(t: Tensor, u: Tensor, p: Any) -> Tensor:
        for _ in range(p[0]):
            u = torch.tanh(u)
        return -u

    engines = []
    for n in range(30):
        prob = ODEProblem(f, torch.ones(1, dtype=F64), (0.0, 0.1), [n])
        sol = solve(prob, Tsit5())
        engines.append(sol.stats.engine)
        if n % 8 == 0:
            expected = solve(prob, Tsit5(), engine="torch").u[-1]
            torch.testing.assert_close(sol.u[-1], expected, rtol=1e-9, atol=1e-12)
    assert engines[0] == "native" and "at every solve" in engines[-1]
    first = ODEProblem(f, torch.ones(1, dtype=F64), (0.0, 0.1), [20])
    assert solve(first, Tsit5()).stats.engine == "native"  # what is known stays known
