"""``NeuralSDE``: the solve of an SDE as a layer, and the divergence from a prior."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradients import assert_near, leaf
from torch import Tensor, nn

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

DOUBLE = torch.float64
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
FIXED: dict[str, Any] = {"dt": 0.05, "adaptive": False}
U0 = torch.tensor([[1.0, 0.5], [-0.3, 0.2], [0.1, 0.9]], dtype=DOUBLE)


class Noise(nn.Module):
    """A positive diffusion, a component a component."""

    def __init__(self, d: int = 2):
        super().__init__()
        self.level = nn.Parameter(torch.linspace(0.3, 0.5, d, dtype=DOUBLE))

    def forward(self, u: Tensor) -> Tensor:
        return self.level * (1 + u**2).sqrt()


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def layer(sensealg: Any = None, alg: Any = None, **options: Any) -> NeuralSDE:
    return NeuralSDE(net(), Noise(), (0.0, 1.0), alg or EM(), sensealg, **{**FIXED, **options})


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


# -- the divergence from a prior: two Ornstein-Uhlenbeck processes --------------------------------

# du = -a (u - m) dt + s dW from 0.3, against the prior drift -b u
OU = [1.2, 0.8, 0.5, 0.6]
START = 0.3


def ou_divergence(p: Tensor) -> Tensor:
    """The integral of the mean of ``1/2 ((f - h)/s)^2``, from the moments of a Gaussian."""
    a, m, b, s = p
    t = torch.linspace(0, 1, 4001, dtype=DOUBLE)
    mean = m + (START - m) * torch.exp(-a * t)
    variance = s**2 / (2 * a) * (1 - torch.exp(-2 * a * t))
    # f - h = (b - a) u + a m
    square = (b - a) ** 2 * (mean**2 + variance) + 2 * (b - a) * a * m * mean + (a * m) ** 2
    return torch.trapezoid(square / (2 * s**2), t)


def ou_layer(p: Tensor, **options: Any) -> NeuralSDE:
    return NeuralSDE(
        lambda u: -p[0] * (u - p[1]),
        lambda u: p[3] * torch.ones_like(u),
        prior=lambda u: -p[2] * u,
        **options,
    )


def test_divergence_of_two_ornstein_uhlenbeck_processes():
    p = leaf(OU)
    paths = 2000
    module = ou_layer(p, alg=EM(), dt=0.01)
    _, kl = module(torch.full((paths, 1), START, dtype=DOUBLE), seed=2, logqp=True)
    assert kl.shape == (paths,)
    expected = ou_divergence(p)
    error = float(kl.detach().std() / math.sqrt(paths))
    assert abs(float((kl.mean() - expected).detach())) < 3 * error
    assert error < 0.02 * float(expected.detach())
    (got,) = torch.autograd.grad(kl.mean(), p)
    (exact,) = torch.autograd.grad(expected, p)
    # the scatter of a gradient, from parts of the paths
    _, again = module(torch.full((paths, 1), START, dtype=DOUBLE), seed=2, logqp=True)
    parts = torch.stack(
        [torch.autograd.grad(x.mean(), p, retain_graph=True)[0] for x in again.chunk(10)]
    )
    scatter = parts.std(0) / math.sqrt(10)
    assert ((got - exact).abs() < 4 * scatter + 2e-2 * exact.abs()).all()
    assert (scatter < 0.1 * exact.abs()).all()


AGREEING = [DiscreteAdjoint(tape=True), BacksolveAdjoint(), InterpolatingAdjoint()]


@pytest.mark.parametrize("sensealg", AGREEING, ids=repr)
def test_sensealgs_agree_on_its_gradient(sensealg):
    found = []
    for x in (sensealg, DiscreteAdjoint()):
        p = leaf(OU)
        module = ou_layer(p, alg=EM(), sensealg=x, dt=1 / 128, noise="additive")
        u, kl = module(torch.full((20, 1), START, dtype=DOUBLE), seed=2, logqp=True)
        found += torch.autograd.grad(kl.sum() + (u**2).sum(), p)
    assert_near(*found, 1e-12 if sensealg == DiscreteAdjoint(tape=True) else 2e-2)


# -- the divergence, against a state that was put together by hand --------------------------------


def prior(u: Tensor) -> Tensor:
    return -0.5 * u


def by_hand(module: NeuralSDE, rate: Any, wider: Any, u0: Tensor, **options: Any) -> Tensor:
    """States of the problem with ``rate(u)`` as the drift of one more component."""

    def f(t: Tensor, z: Tensor) -> Tensor:
        u = z[..., :-1]
        return torch.cat([module.drift(u), rate(u)[..., None]], -1)

    def g(t: Tensor, z: Tensor) -> Tensor:
        return wider(module.diffusion(z[..., :-1]))

    start = torch.cat([u0, torch.zeros(*u0.shape[:-1], 1, dtype=DOUBLE)], -1)
    prob = SDEProblem(f, g, start, (0.0, 1.0), noise=module.noise)
    return solve(prob, EM(), seed=1, save_everystep=False, **FIXED, **options).u[-1]


def apart(module: NeuralSDE, u: Tensor) -> Tensor:
    return module.drift(u) - prior(u)


def column(g: Tensor) -> Tensor:
    return torch.cat([g, torch.zeros(*g.shape[:-2], 1, g.shape[-1], dtype=DOUBLE)], -2)


def row(g: Tensor) -> Tensor:
    return torch.cat([g, torch.zeros(*g.shape[:-1], 1, dtype=DOUBLE)], -1)


MATRIX = torch.tensor([[0.5, 0.1, 0.2], [-0.2, 0.4, 0.3]], dtype=DOUBLE)


def diffusion_of(kind: str) -> tuple[str, Any, Any, Any]:
    """Noise, diffusion, the rate of the divergence, and how a row is added to the diffusion."""

    def of_matrix(matrix: Tensor) -> Any:
        inverse = torch.linalg.pinv(matrix)

        def rate(module: NeuralSDE, u: Tensor) -> Tensor:
            scale = 1 + u[..., :1] ** 2
            return ((apart(module, u) / scale) @ inverse.T).square().sum(-1) / 2

        return lambda u: matrix * (1 + u[..., :1, None] ** 2), rate, column

    if kind == "diagonal":
        level = torch.tensor([0.3, 0.5], dtype=DOUBLE)
        return (
            "diagonal",
            lambda u: level * (1 + u**2),
            lambda module, u: (apart(module, u) / (level * (1 + u**2))).square().sum(-1) / 2,
            row,
        )
    if kind == "additive":
        level = torch.tensor([0.3, 0.5], dtype=DOUBLE)
        return (
            "additive",
            lambda u: level.expand(u.shape),
            lambda module, u: (apart(module, u) / level).square().sum(-1) / 2,
            row,
        )
    if kind == "square":
        return "general", *of_matrix(MATRIX[:, :2])
    return "general", *of_matrix(MATRIX)


@pytest.mark.parametrize("kind", ["diagonal", "additive", "square", "wide"])
def test_divergence_is_that_of_a_larger_state(kind):
    noise, diffusion, rate, wider = diffusion_of(kind)
    module = NeuralSDE(net(), diffusion, alg=EM(), noise=noise, prior=prior, **FIXED)
    u0 = U0.clone().requires_grad_()
    u, kl = module(u0, seed=1, logqp=True)
    z = by_hand(module, lambda u: rate(module, u), wider, u0)
    assert u.shape == U0.shape
    assert kl.shape == (3,)
    torch.testing.assert_close(u, z[..., :-1], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(kl, z[..., -1], rtol=1e-10, atol=1e-12)
    tensors = [u0, *module.parameters()]
    got, expected = (torch.autograd.grad(x.sum(), tensors) for x in (kl, z[..., -1]))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("as_column", [False, True])
def test_divergence_of_scalar_noise(as_column):
    # a drift that is the prior's and a multiple of the noise: the only one that noise can turn into
    level = torch.tensor([0.3, 0.5], dtype=DOUBLE)
    gain = leaf(0.7)

    def diffusion(u):
        return (level * u)[..., None] if as_column else level * u

    module = NeuralSDE(
        lambda u: prior(u) + gain * u[..., :1] * (level * u),
        diffusion,
        alg=EM(),
        noise="scalar",
        prior=prior,
        saveat=[0.05, 0.1],
        **FIXED,
    )
    u, kl = module(U0, seed=1, logqp=True)
    assert u.shape == (2, 3, 2)
    assert kl.shape == (2, 3)
    steps = torch.stack([U0[:, 0], u[0, :, 0]])
    expected = 0.05 * (0.5 * (gain * steps) ** 2).cumsum(0)
    torch.testing.assert_close(kl, expected)


def test_the_paths_are_those_without_it():
    module = layer(prior=prior)
    u, _ = module(U0, seed=3, logqp=True)
    torch.testing.assert_close(u, module(U0, seed=3), rtol=1e-13, atol=1e-13)


def test_divergence_at_saved_times_and_of_whole_solutions():
    module = layer(prior=prior, saveat=[0.0, 0.5, 1.0], seed=1)
    u, kl = module(U0, logqp=True)
    assert u.shape == (3, 3, 2)
    assert kl.shape == (3, 3)
    assert (kl[0] == 0).all()
    assert (kl.diff(dim=0) > 0).all()
    sol = module.solve(U0, logqp=True)
    assert sol.u.shape == (3, 3, 3)
    for x, y in zip(module.split(sol.u), (u, kl), strict=True):
        assert torch.equal(x, y)


def test_divergence_of_a_pytree():
    module = NeuralSDE(
        lambda u: {"x": u["y"].sum() - u["x"], "y": -u["y"]},
        lambda u: {"x": 0.5 + 0 * u["x"], "y": 0.2 + 0 * u["y"]},
        prior=lambda u: {"x": -u["x"], "y": 0 * u["y"]},
        alg=EM(),
        **FIXED,
    )
    u0 = {"x": torch.ones(2, dtype=DOUBLE), "y": leaf([[0.5], [0.2], [0.1]])}
    u, kl = module(u0, seed=1, logqp=True)
    assert u["y"].shape == (3, 1)
    assert kl.shape == ()
    one = module.solve(u0, seed=1, logqp=True, tspan=(0.0, 0.05))
    expected = 0.05 * (2 * (0.8 / 0.5) ** 2 + (u0["y"] / 0.2).square().sum()) / 2
    torch.testing.assert_close(module.split(one.u)[1][-1], expected)
    assert torch.autograd.grad(kl, u0["y"])[0].any()


def test_divergence_of_a_number():
    module = ou_layer(leaf(OU), alg=EM(), dt=0.1)
    u, kl = module(torch.tensor(START, dtype=DOUBLE), seed=1, logqp=True)
    assert u.shape == kl.shape == ()


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
