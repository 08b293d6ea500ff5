"""Gradients that would be lost in TorchScript, in place, and in solves inside of other code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lossy_functions import F64, SENSEALGS, U0, each_sensealg, network
from torch import Tensor, nn

from diffsolve import (
    KenCarp4,
    ODEProblem,
    Rodas5P,
    SDEProblem,
    Tsit5,
    Vern9,
    solve,
)
from diffsolve.nn import NeuralODE

# -- TorchScript, and work in place ------------------------------------------------------------


class Oscillator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.5, 0.8], dtype=F64))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.rate * u * torch.cos(t)


def forced(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return -p * u * torch.cos(t)


ARGUMENTS = (torch.tensor(0.3, dtype=F64), U0, torch.ones(2, dtype=F64))
SCRIPTS: dict[str, Callable[[], Any]] = {
    "scripted function": lambda: torch.jit.script(forced),
    "traced function": lambda: torch.jit.trace(forced, ARGUMENTS),
    "scripted module": lambda: torch.jit.script(Oscillator()),
    "traced module": lambda: torch.jit.trace(Oscillator(), ARGUMENTS[:2]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "in a function"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_gradients_of_torchscript(name: str, wrapped: bool) -> None:
    f = SCRIPTS[name]()
    by: Any = torch.tensor([0.5, 0.8], dtype=F64, requires_grad=True)
    p = by
    if "module" in name:
        (by,), p = f.parameters(), None
    called = (lambda *args: f(*args)) if wrapped else f
    prob = ODEProblem(called, U0, (0.0, 1.0), p)
    expected = -math.sin(1.0) * U0 * torch.exp(-by.detach() * math.sin(1.0))
    for engine in ("auto", "torch"):
        for sensealg in SENSEALGS:
            options: dict[str, Any] = {"sensealg": sensealg, "engine": engine, "saveat": [1.0]}
            sol = solve(prob, Tsit5(), rtol=1e-8, atol=1e-10, **options)
            (got,) = torch.autograd.grad(sol.u.sum(), by)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    if name != "traced function":
        assert "TorchScript" in solve(prob, Rodas5P()).stats.engine
    with pytest.raises(ValueError, match="TorchScript"):
        solve(prob, Tsit5(), engine="native")


@pytest.mark.parametrize("engine", ["auto", "native", "torch"])
@pytest.mark.parametrize("wanted", [False, True], ids=["forward", "gradient"])
def test_a_refused_f_leaves_the_state_as_it_was(engine: str, wanted: bool) -> None:
    def in_place(t: Tensor, u: Tensor) -> Tensor:
        return -u.clamp_(min=0.75)

    def pure(t: Tensor, u: Tensor) -> Tensor:
        return -u

    u0 = U0.clone().requires_grad_(wanted)
    problems = (
        ODEProblem(in_place, u0, (0.0, 1.0)),
        SDEProblem(in_place, pure, u0, (0.0, 1.0)),
        SDEProblem(pure, in_place, u0, (0.0, 1.0)),
    )
    for prob in problems:
        options: dict[str, Any] = {} if isinstance(prob, ODEProblem) else {"seed": 0}
        with pytest.raises(ValueError, match="in place"):
            solve(prob, engine=engine, **options)
        assert torch.equal(u0, U0)


# -- solves inside of other code ---------------------------------------------------------------


@each_sensealg
@pytest.mark.parametrize("alg", [KenCarp4(), Rodas5P(), Tsit5()], ids=repr)
def test_f_that_reads_another_solution(alg: Any, sensealg: Any) -> None:
    """Its dense output can be differentiated by the time as often as implicit methods ask."""
    start = torch.tensor([0.0, 1.0], dtype=F64)
    prob = ODEProblem(lambda t, u: torch.stack([u[1], -u[0]]), start, (0.0, 2.0))
    forcing = solve(prob, Vern9(), rtol=1e-12, atol=1e-13)  # sin and cos

    def run(sine: Callable[[Tensor], Tensor]) -> tuple[Tensor, int, int]:
        p = torch.tensor([3.0, 5.0], dtype=F64, requires_grad=True)
        prob = ODEProblem(lambda t, u, p: -p * (u - sine(t)), U0, (0.0, 1.9), p)
        sol = solve(prob, alg, sensealg=sensealg, saveat=[1.9], rtol=1e-5, atol=1e-7)
        (got,) = torch.autograd.grad(sol.u.sum(), p)
        return got, sol.stats.naccept, (sol.stats.adjoint or sol.stats).naccept

    want, steps, back = run(torch.sin)
    got, found_steps, found_back = run(lambda t: forcing(t)[0])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    assert (found_steps, found_back) == pytest.approx((steps, back), abs=1)


def test_dense_output_has_derivatives_of_every_order_by_the_time() -> None:
    start = torch.tensor([0.0, 1.0], dtype=F64)
    prob = ODEProblem(lambda t, u: torch.stack([u[1], -u[0]]), start, (0.0, 2.0))
    for engine in ("auto", "torch"):
        sol = solve(prob, Vern9(), rtol=1e-12, atol=1e-13, engine=engine)
        t = torch.tensor([0.3, 0.7], dtype=F64, requires_grad=True)
        value = sol(t)[:, 0]
        for expected in (torch.sin, torch.cos, lambda t: -torch.sin(t), lambda t: -torch.cos(t)):
            torch.testing.assert_close(value, expected(t), rtol=1e-5, atol=1e-5)
            (value,) = torch.autograd.grad(value.sum(), t, create_graph=True)


def test_training_under_torch_compile() -> None:
    """The solve is a break in the graph; what is around it is compiled, and trains as before."""
    torch.manual_seed(2)
    layer = NeuralODE(network(), (0.0, 1.0), Tsit5(), rtol=1e-6)
    model = nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 1)).double()
    x = torch.randn(3, 2, dtype=F64)

    def step(f: Callable) -> list[Tensor]:
        return list(torch.autograd.grad(f(x).square().sum(), list(model.parameters())))

    expected = step(model)
    compiled = torch.compile(model, backend="eager")
    for engine in ("auto", "torch"):
        layer.options["engine"] = engine
        for got, want in zip(step(compiled), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
