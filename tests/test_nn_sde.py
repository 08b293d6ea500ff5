"""``NeuralSDE``: the solve of an SDE as a layer, and the divergence from a prior."""

from __future__ import annotations

import math

import pytest
import torch
from gradients import assert_near, leaf
from nn_sdes import DOUBLE, FIXED, U0, layer, net, prior
from torch import nn

from diffsolve import (
    EM,
    BacksolveAdjoint,
    DiscreteAdjoint,
    EulerHeun,
    InterpolatingAdjoint,
    LambaEM,
    ReversibleAdjoint,
    ReversibleHeun,
    SDEProblem,
    SolveError,
    solve,
)
from diffsolve.nn import NeuralSDE

STRATONOVICH = "stratonovich"
SENSEALGS = [
    None,
    DiscreteAdjoint(),
    DiscreteAdjoint(checkpoints=2),
    DiscreteAdjoint(tape=True),
    BacksolveAdjoint(),
    InterpolatingAdjoint(),
]
each = pytest.mark.parametrize("sensealg", SENSEALGS, ids=repr)


# -- the layer ------------------------------------------------------------------------------------


@each
def test_gradients_are_those_of_solve(sensealg):
    module = layer(sensealg)
    u0 = U0.clone().requires_grad_()
    out = module(u0, seed=3)
    assert out.shape == u0.shape
    tensors = [u0, *module.parameters()]
    got = torch.autograd.grad((out**2).sum(), tensors)
    prob = SDEProblem(
        lambda t, u: module.drift(u), lambda t, u: module.diffusion(u), u0, (0.0, 1.0)
    )
    sol = solve(prob, EM(), sensealg=sensealg, save_everystep=False, seed=3, **FIXED)
    expected = torch.autograd.grad((sol.u[-1] ** 2).sum(), tensors)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gradients_of_the_reversible_adjoint():
    found = []
    for x in (ReversibleAdjoint(), DiscreteAdjoint()):
        module = layer(x, ReversibleHeun(), interpretation=STRATONOVICH)
        found.append(torch.autograd.grad(module(U0, seed=1).sum(), list(module.parameters())))
    for got, expected in zip(*found, strict=True):
        assert_near(got, expected, 1e-10)


@each
def test_layer_in_sequential_trains(sensealg):
    torch.manual_seed(0)
    module = NeuralSDE(
        nn.Sequential(nn.Linear(2, 2), nn.Tanh()),
        lambda u: 0.1 * torch.ones_like(u),
        alg=EM(),
        sensealg=sensealg,
        noise="additive",
        dt=0.1,
    )
    model = nn.Sequential(nn.Linear(3, 2), module, nn.Linear(2, 1))
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


def test_a_new_path_in_each_call_from_torch_s_generator():
    module = layer()
    torch.manual_seed(5)
    first, second = module(U0), module(U0)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(module(U0), first)


def test_seeds_that_are_given():
    fixed = layer(seed=4)
    assert torch.equal(fixed(U0), fixed(U0))
    assert torch.equal(fixed(U0), layer()(U0, seed=4))
    assert not torch.equal(fixed(U0), fixed(U0, seed=5))
    drawn = layer(seed=torch.Generator().manual_seed(9))
    first, second = drawn(U0), drawn(U0)
    assert not torch.equal(first, second)
    drawn.seed.manual_seed(9)
    assert torch.equal(drawn(U0), first)
    rows = layer(seed=torch.tensor([7, 8, 7]))
    same = U0[:1].expand(3, 2)
    out = rows(same)
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out[0], out[1])


def test_a_path_to_follow_goes_before_the_seed_of_the_layer():
    module = layer(seed=4)
    sol = module.solve(U0, seed=6)
    again = module.solve(U0, noise=sol.noise)
    torch.testing.assert_close(again.u[-1], sol.u[-1], rtol=1e-13, atol=1e-14)


SHAPES: dict[str, tuple[int, ...]] = {
    "diagonal": (2,),
    "scalar": (2, 1),
    "additive": (2, 3),
    "general": (2, 3),
}


@pytest.mark.parametrize("interpretation", ["ito", STRATONOVICH])
@pytest.mark.parametrize("noise", SHAPES)
def test_kinds_of_noise(noise, interpretation):
    scale = nn.Parameter(torch.rand(SHAPES[noise], dtype=DOUBLE))

    def diffusion(u):
        if noise == "additive":
            return scale.expand(*u.shape[:-1], *scale.shape)
        return scale * torch.sin(u if noise == "diagonal" else u[..., None])

    module = NeuralSDE(net(), diffusion, noise=noise, interpretation=interpretation)
    out = module(U0)
    assert out.shape == U0.shape
    out.sum().backward()
    assert scale.grad.any()


def test_functions_that_take_time():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.5, dtype=DOUBLE))

        def forward(self, t, u):
            return self.rate * torch.cos(t) * u

    module = NeuralSDE(
        Timed(), lambda t, u: 0.0 * t * u, alg=EulerHeun(), takes_time=True,
        interpretation=STRATONOVICH, dt=1e-2,
    )  # fmt: skip
    torch.testing.assert_close(module(U0), U0 * math.exp(0.5 * math.sin(1)), rtol=1e-4, atol=0)


@each
def test_saveat_gives_all_times(sensealg):
    module = layer(sensealg, saveat=[0.25, 0.5, 1.0])
    out = module(U0)
    assert out.shape == (3, *U0.shape)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_whole_solution_and_overrides():
    module = layer(alg=LambaEM(), adaptive=True, rtol=1e-2)
    sol = module.solve(U0)
    assert sol.stats.alg == "LambaEM"
    sol.steps.error.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    other = module.solve(U0, alg=EM(), tspan=(0.0, 2.0), seed=1)
    assert other.stats.alg == "EM"
    assert float(other.t[-1]) == 2.0
    assert module.tspan == (0.0, 1.0)


def test_state_dict_dtype_and_evaluation():
    module, other = layer(seed=1), layer(seed=1)
    names = [*(f"drift.{x}" for x in net().state_dict()), "diffusion.level"]
    assert list(module.state_dict()) == names
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    assert not torch.equal(module(U0), other(U0))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(U0), other(U0))
    with torch.no_grad():
        assert not module(U0).requires_grad
    assert module.float()(U0.float()).dtype == torch.float32


def test_failures_and_repr():
    with pytest.raises(SolveError):
        layer(alg=LambaEM(), adaptive=True, maxiters=1, rtol=1e-6, atol=1e-6)(U0)
    with pytest.raises(ValueError, match="EM"):
        layer(interpretation=STRATONOVICH)(U0)
    shown = repr(layer())
    assert "tspan=(0.0, 1.0)" in shown
    assert "EM()" in shown
    assert "noise='diagonal'" in shown


# -- noise that vanishes --------------------------------------------------------------------------


def test_nothing_is_added_where_drift_and_noise_both_vanish():
    # the second component is the prior's and has no noise, the first noise with a gradient
    level = leaf(0.4)

    def f(u):
        return torch.stack([-2 * u[..., 0], -0.5 * u[..., 1]], -1)

    def g(u):
        return torch.stack([level + 0 * u[..., 0], 0 * u[..., 1]], -1)

    module = NeuralSDE(f, g, alg=EM(), prior=prior, **FIXED)
    _, kl = module(U0, seed=1, logqp=True)
    (grad,) = torch.autograd.grad(kl.sum(), level)
    alone = NeuralSDE(lambda u: -2 * u, lambda u: level + 0 * u, alg=EM(), prior=prior, **FIXED)
    _, expected = alone(U0[:, :1], seed=1, logqp=True)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), level)[0])


ZERO = {
    "diagonal": ("diagonal", lambda u: torch.stack([0.3 + 0 * u[..., 0], 0 * u[..., 1]], -1)),
    "general": ("general", lambda u: 0 * u[..., None] + torch.tensor([[0.3, 0.1], [0.0, 0.0]])),
    "scalar": ("scalar", lambda u: 0.3 + 0 * u),
}


@pytest.mark.parametrize("kind", ZERO)
def test_an_infinite_divergence_is_refused_at_the_start(kind):
    noise, g = ZERO[kind]
    module = NeuralSDE(net(), g, alg=EM(), noise=noise, prior=prior, **FIXED)
    with pytest.raises(ValueError, match="divergence from the prior is infinite at t0 = 0"):
        module(U0, logqp=True)


def test_an_infinite_divergence_is_told_later():
    def g(t, u):
        return 0.3 * (t < 0.5) + 0 * u

    module = NeuralSDE(
        lambda t, u: -u, g, alg=EM(), prior=lambda t, u: 0 * u, takes_time=True, **FIXED
    )
    with pytest.raises(SolveError, match="Perhaps the divergence from the prior is infinite:"):
        module(U0, logqp=True)


def test_logqp_needs_a_prior_and_goes_forward():
    with pytest.raises(ValueError, match="prior="):
        layer()(U0, logqp=True)
    with pytest.raises(ValueError, match="forward in time"):
        layer(prior=prior).solve(U0, logqp=True, tspan=(1.0, 0.0))


@pytest.mark.parametrize("takes_time", [False, True])
def test_what_was_compiled_for_logqp_serves_the_next_solve(takes_time):
    drift = net()
    f = (lambda t, u: drift(u)) if takes_time else drift
    h = (lambda t, u: prior(u)) if takes_time else prior
    g = (lambda t, u: 0.3 + 0 * u) if takes_time else lambda u: 0.3 + 0 * u
    module = NeuralSDE(f, g, alg=EM(), prior=h, takes_time=takes_time, **FIXED)
    module.solve(U0, logqp=True, engine="native")
    again = module.solve(U0, logqp=True, engine="native")
    assert again.stats.compile_s == 0
    first = module.split(again.u)[1][-1]
    module.prior = f  # another function is seen: then nothing diverges
    assert module.split(module.solve(U0, logqp=True).u)[1][-1].abs().max() == 0 < first.min()


def test_half_precision_of_autocast_is_lifted_and_given_back() -> None:
    layer = NeuralSDE(
        lambda u: -u, lambda u: 0.1 + 0 * u, prior=lambda u: -2 * u, seed=3, rtol=1e-2, atol=1e-3
    )
    u0 = torch.ones(4, 2)
    expected, expected_kl = layer(u0, logqp=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(u0.bfloat16())
        larger, kl = layer(u0.bfloat16(), logqp=True)
    assert (found.dtype, larger.dtype, kl.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(larger.float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(kl, expected_kl, rtol=0.05, atol=0.0)


def test_misspelt_options_are_named_when_the_layer_is_made() -> None:
    with pytest.raises(TypeError, match=r"NeuralSDE: atoll .* did you mean atol\?"):
        NeuralSDE(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), atoll=1e-3)
