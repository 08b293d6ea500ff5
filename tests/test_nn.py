"""``NeuralODE``: a solve as a layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffsolve import (
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    SolveError,
    Tsit5,
    Vern7,
    solve,
)
from diffsolve.nn import NeuralODE

SENSEALGS = [
    None,
    DiscreteAdjoint(),
    DiscreteAdjoint(checkpoints=2),
    DiscreteAdjoint(tape=True),
    BacksolveAdjoint(),
    InterpolatingAdjoint(),
]
each = pytest.mark.parametrize("sensealg", SENSEALGS, ids=repr)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, t, u):
        return self.rate * torch.cos(t) * u


U0 = torch.tensor([[1.0, 0.5], [-0.3, 0.2], [0.1, 0.9]], dtype=torch.float64)


@each
def test_gradients_are_those_of_solve(sensealg):
    module = net()
    layer = NeuralODE(module, (0.0, 1.5), Vern7(), sensealg, rtol=1e-8, atol=1e-8)
    u0 = U0.clone().requires_grad_()
    out = layer(u0)
    assert out.shape == u0.shape
    got = torch.autograd.grad((out**2).sum(), [u0, *module.parameters()])
    prob = ODEProblem(lambda t, u: module(u), u0, (0.0, 1.5))
    sol = solve(prob, Vern7(), sensealg=sensealg, rtol=1e-8, atol=1e-8, save_everystep=False)
    expected = torch.autograd.grad((sol.u[-1] ** 2).sum(), [u0, *module.parameters()])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@each
def test_layer_in_sequential_trains(sensealg):
    torch.manual_seed(0)
    layer = NeuralODE(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), sensealg=sensealg)
    model = nn.Sequential(nn.Linear(3, 2), layer, nn.Linear(2, 1))
    x = torch.randn(16, 3)
    y = torch.sin(x.sum(-1, keepdim=True))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert losses[-1] < 0.7 * losses[0]


def test_state_dict_round_trip():
    layer, other = NeuralODE(net()), NeuralODE(net())
    assert list(layer.state_dict()) == [f"module.{name}" for name in net().state_dict()]
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    assert not torch.equal(layer(U0), other(U0))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(U0), other(U0))


def test_layer_follows_its_module_to_another_dtype():
    layer = NeuralODE(net()).float()
    assert layer(U0.float()).dtype == torch.float32


@each
def test_saveat_gives_all_times(sensealg):
    layer = NeuralODE(net(), (0.0, 1.0), sensealg=sensealg, saveat=[0.25, 0.5, 1.0])
    out = layer(U0)
    assert out.shape == (3, *U0.shape)
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@each
def test_module_that_takes_time(sensealg):
    layer = NeuralODE(Timed(), (0.0, 1.0), Vern7(), sensealg, takes_time=True, rtol=1e-9, atol=1e-9)
    out = layer(U0)
    torch.testing.assert_close(out, U0 * math.exp(0.5 * math.sin(1)), rtol=1e-7, atol=0)
    out.sum().backward()
    expected = float(U0.sum()) * math.sin(1) * math.exp(0.5 * math.sin(1))
    assert float(layer.module.rate.grad) == pytest.approx(expected, rel=1e-7)


def test_pytree_state():
    class Swing(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.tensor(4.0))

        def forward(self, u):
            return {"x": u["v"], "v": -self.k * u["x"]}

    layer = NeuralODE(Swing(), (0.0, 1.0), rtol=1e-5)
    out = layer({"x": torch.ones(2), "v": torch.zeros(2)})
    torch.testing.assert_close(out["x"], math.cos(2) * torch.ones(2), rtol=1e-3, atol=1e-4)
    out["x"].sum().backward()
    assert layer.module.k.grad is not None


def test_whole_solution_and_overrides():
    layer = NeuralODE(net(), (0.0, 1.0), Tsit5(), rtol=1e-4)
    sol = layer.solve(U0)
    assert sol.stats.alg == "Tsit5"
    assert sol.u.shape[1:] == U0.shape
    sol.steps.error.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    tight = layer.solve(U0, alg=Vern7(), rtol=1e-9, atol=1e-9, tspan=(0.0, 2.0))
    assert tight.stats.alg == "Vern7"
    assert float(tight.t[-1]) == 2.0
    assert layer.options == {"rtol": 1e-4}  # overrides hold for one call
    assert layer.tspan == (0.0, 1.0)


def test_every_step_on_request():
    # save_everystep=True among the options: the layer still gives the end
    sol = NeuralODE(net(), rtol=1e-6).solve(U0, save_everystep=True)
    assert len(sol.t) == len(sol.steps) + 1


@pytest.mark.parametrize("options", [{"save_everystep": True}, {"saveat": None}], ids=repr)
def test_layer_gives_the_end_whatever_is_saved(options):
    expected = NeuralODE(net())(U0)
    assert torch.equal(NeuralODE(net(), **options)(U0), expected)


def test_end_of_span_is_learned():
    t1 = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    layer = NeuralODE(net(), (0.0, t1), rtol=1e-8, atol=1e-8)
    out = layer(U0)
    out.sum().backward()
    assert float(t1.grad) == pytest.approx(float(layer.module(out).sum().detach()), rel=1e-5)


def test_evaluation_keeps_no_graph():
    layer = NeuralODE(net())
    with torch.no_grad():
        assert not layer(U0).requires_grad
    frozen = NeuralODE(net()).requires_grad_(False)
    assert not frozen(U0).requires_grad
    assert frozen.solve(U0).stats.sensealg == "none"


def test_failure_is_an_error():
    with pytest.raises(SolveError):
        NeuralODE(net(), maxiters=1, rtol=1e-8, atol=1e-8)(U0)


def test_repr_shows_the_settings():
    shown = repr(NeuralODE(net(), (0.0, 2.0), Tsit5()))
    assert "tspan=(0.0, 2.0)" in shown
    assert "Tsit5()" in shown
    assert "Linear" in shown


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("saveat", [None, [0.5, 1.0]], ids=["end", "saveat"])
def test_half_precision_of_autocast_is_lifted_and_given_back(low, saveat):
    """Between other layers, whose outputs autocast lowers: steps stay in float32."""
    module = net().float()
    layer = NeuralODE(module, (0.0, 1.0), Tsit5(), rtol=1e-4, atol=1e-5, saveat=saveat)
    model = nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 1))
    x = U0.float()
    plain = model(x)
    grads = torch.autograd.grad(plain.sum(), list(model.parameters()))
    with torch.autocast("cpu", dtype=low):
        state = model[0](x)
        found, inside = layer(state), layer.solve(state).u
        out = model(x)
    assert (state.dtype, found.dtype, inside.dtype) == (low, low, torch.float32)
    torch.testing.assert_close(out.float(), plain, rtol=0.03, atol=0.03)
    cast = torch.autograd.grad(out.float().sum(), list(model.parameters()))
    for a, b in zip(cast, grads, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05
    with pytest.raises(ValueError, match="float32"):  # without autocast f would be half as well
        layer(state)


def test_states_of_several_precisions_come_back_as_they_were():
    def f(u):
        return {"a": -u["a"], "b": -2 * u["b"]}

    layer = NeuralODE(f, (0.0, 1.0), Tsit5(), rtol=1e-6, atol=1e-8)
    u0 = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(3)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(u0)
    assert (found["a"].dtype, found["b"].dtype) == (torch.bfloat16, torch.float32)
    assert found["b"] == pytest.approx(math.exp(-2) * torch.ones(3), rel=1e-5)


def test_misspelt_options_are_named_when_the_layer_is_made():
    with pytest.raises(TypeError, match=r"NeuralODE: rtoll .* did you mean rtol\?"):
        NeuralODE(net(), rtoll=1e-6)


def test_star_import_leaves_the_modules_of_others():
    names: dict = {}
    exec("from torch import nn\nfrom diffsolve import *", names)
    assert names["nn"] is nn
    assert "problems" not in names and "solve" in names
