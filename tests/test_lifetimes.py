"""Models that keep what they solved: freed when nobody refers to them any more."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from diffsolve import (
    EM,
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    KenCarp4,
    ODEProblem,
    SDEProblem,
    Tsit5,
    solve,
)
from diffsolve.nn import NeuralODE

F64 = torch.float64
SENSEALGS = [
    DiscreteAdjoint(),
    DiscreteAdjoint(checkpoints=3),
    DiscreteAdjoint(tape=True),
    InterpolatingAdjoint(),
    InterpolatingAdjoint(checkpoints=3),
    BacksolveAdjoint(),
]


class Model(nn.Module):
    """Its right-hand side refers to it, and so does the solution that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2).double()

    def rhs(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.net(u))

    def spread(self, t: Tensor, u: Tensor) -> Tensor:
        return 0.1 * u


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("sensealg", SENSEALGS, ids=repr)
def test_model_that_keeps_its_solution_is_freed(engine: str, sensealg: DiscreteAdjoint) -> None:
    if engine == "native" and getattr(sensealg, "tape", False):
        pytest.skip("the tape runs on torch")

    def used(alg: Tsit5 | KenCarp4, backward: bool) -> weakref.ref:
        model, u0 = Model(), torch.ones(4, 2, dtype=F64)
        prob = ODEProblem(model.rhs, u0, (0.0, 1.0))
        model.sol = solve(prob, alg, saveat=[0.5, 1.0], sensealg=sensealg, engine=engine)
        if backward:
            model.sol.u.sum().backward()
            assert model.net.weight.grad is not None
        return weakref.ref(model)

    references = [used(Tsit5(), True), used(KenCarp4(), True)]
    if engine == "native":  # no backward has need of f
        references.append(used(Tsit5(), False))
    gc.collect()
    assert [r() for r in references] == [None] * len(references)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_models_of_other_kinds_are_freed(engine: str) -> None:
    def moving_times() -> nn.Module:
        model = Model()
        ends = [torch.tensor(t, dtype=F64, requires_grad=True) for t in (0.0, 1.0)]
        prob = ODEProblem(model.rhs, torch.ones(2, dtype=F64), tuple(ends))
        model.sol = solve(prob, Tsit5(), saveat=[0.5, 1.0], engine=engine)
        model.sol.u.sum().backward()
        assert ends[0].grad is not None
        return model

    def layer() -> nn.Module:
        model = NeuralODE(nn.Linear(2, 2).double(), engine=engine)
        model.sol = model.solve(torch.ones(3, 2, dtype=F64))
        model.sol.u.sum().backward()
        return model

    def stochastic() -> nn.Module:
        model = Model()
        prob = SDEProblem(model.rhs, model.spread, torch.ones(3, 2, dtype=F64), (0.0, 1.0))
        model.sol = solve(prob, EM(), dt=0.1, engine=engine)
        model.sol.u.sum().backward()
        return model

    references = [weakref.ref(make()) for make in (moving_times, layer, stochastic)]
    gc.collect()
    assert [r() for r in references] == [None] * 3


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("sensealg", SENSEALGS[::3], ids=repr)
def test_a_graph_that_is_kept_can_be_used_again(engine: str, sensealg: DiscreteAdjoint) -> None:
    p = torch.tensor([2.0], dtype=F64, requires_grad=True)
    prob = ODEProblem(lambda t, u, p: -p * u, torch.ones(1, dtype=F64), (0.0, 1.0), p)
    loss = solve(prob, Tsit5(), sensealg=sensealg, engine=engine).u[-1].sum()
    first, second, third = (
        torch.autograd.grad(loss, p, retain_graph=keep)[0] for keep in (True, True, False)
    )
    assert torch.equal(first, second) and torch.equal(first, third)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, p)
