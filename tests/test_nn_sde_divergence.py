"""The divergence of a NeuralSDE's paths from a prior."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradients import assert_near, leaf
from nn_sdes import DOUBLE, FIXED, U0, layer, net, prior
from torch import Tensor

from diffsolve import (
    EM,
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    SDEProblem,
    solve,
)
from diffsolve.nn import NeuralSDE

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
