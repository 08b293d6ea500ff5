"""What PyTorch gets wrong, or cannot do, in products that the torch engine takes of ``f``."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from diffsolve import (
    DiscreteAdjoint,
    KenCarp4,
    ODEProblem,
    Rodas5P,
    Rosenbrock23,
    Tsit5,
    solve,
)

F64 = torch.float64


def central(loss, x, h=1e-4):
    """Gradient of ``loss`` by central differences of fourth order."""
    found = []
    with torch.no_grad():
        for e in torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape) * h:
            near, far = loss(x + e) - loss(x - e), loss(x + 2 * e) - loss(x - 2 * e)
            found.append((8 * near - far) / (12 * h))
    return torch.stack(found).reshape(x.shape)


# -- normalisations, whose third derivatives are wrong ----------------------------------------


def scripted_layer_norm():
    return torch.jit.script(nn.LayerNorm(4))


NORMS = {
    "layer": (lambda: nn.LayerNorm(4), (4,)),
    "plain layer": (lambda: nn.LayerNorm(4, elementwise_affine=False), (4,)),
    "group": (lambda: nn.GroupNorm(2, 4), (1, 4)),
    "batch": (lambda: nn.BatchNorm1d(2, track_running_stats=False), (3, 2)),
    "batch, running": (lambda: nn.BatchNorm1d(2).eval(), (3, 2)),
    "instance": (lambda: nn.InstanceNorm1d(2, affine=True), (1, 2, 3)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("tape", [False, True])
def test_rosenbrock_through_a_normalisation(name, tape):
    torch.manual_seed(0)
    make, shape = NORMS[name]
    norm = make().double()
    for x in norm.parameters():
        nn.init.uniform_(x, 0.5, 1.5)
    u0 = torch.randn(shape, dtype=F64)

    def loss(x):
        prob = ODEProblem(lambda t, u: 2 * torch.tanh(norm(u)) - u, x, (0.0, 0.5))
        options = {"adaptive": False, "dt": 0.25, "saveat": [0.5], "engine": "torch"}
        sol = solve(prob, Rosenbrock23(), sensealg=DiscreteAdjoint(tape=tape), **options)
        return sol.u.square().sum()

    x = u0.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(found, central(loss, u0), rtol=1e-7, atol=1e-8)


def test_a_normalisation_out_of_reach_is_refused():
    norm = scripted_layer_norm().double()
    u0 = torch.randn(4, dtype=F64, requires_grad=True)
    prob = ODEProblem(lambda t, u: norm(u) - u, u0, (0.0, 0.5))
    sol = solve(prob, Rodas5P(), saveat=[0.5], engine="torch")
    with pytest.raises(RuntimeError, match="KenCarp4"):
        sol.u.sum().backward()


def test_running_statistics_are_those_of_torch():
    from diffsolve.problems.plain_norms import PlainNorms

    torch.manual_seed(0)
    for make, shape in (
        (lambda: nn.BatchNorm1d(3), (5, 3)),
        (lambda: nn.InstanceNorm1d(3, track_running_stats=True, affine=True), (2, 3, 4)),
    ):
        plain, usual = make().double(), make().double()
        x = torch.randn(shape, dtype=F64)
        with PlainNorms():
            found = plain(x)
        torch.testing.assert_close(found, usual(x))
        for a, b in zip(plain.buffers(), usual.buffers(), strict=True):
            torch.testing.assert_close(a, b)


# -- rules of torch.vmap ----------------------------------------------------------------------

BATCHED = {
    "select_scatter": lambda u, p: torch.select_scatter(u, p[0], 0, 1),
    "index_fill": lambda u, p: u.index_fill(0, torch.tensor([1]), p[0]),
    "as_strided": lambda u, p: p[0] * u.as_strided((3,), (1,)),
    "as_strided_scatter": lambda u, p: u.as_strided_scatter(p[0] * u[:1], (1,), (1,), 1),
    "layer_norm": lambda u, p: nn.functional.layer_norm(p[1:], (3,), u) * p[0],
    "checkpoint": lambda u, p: torch.utils.checkpoint.checkpoint(
        lambda x: torch.sin(x) * p[0], u, use_reentrant=False
    ),
}


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("alg", [Tsit5(), KenCarp4()])
def test_gradients_do_not_depend_on_a_batch(name, alg):
    f = BATCHED[name]
    found = []
    for sensealg in (DiscreteAdjoint(), DiscreteAdjoint(tape=True)):
        p = torch.tensor([0.9, 0.3, -0.7, 1.1], dtype=F64, requires_grad=True)
        u0 = torch.tensor([0.3, -0.7, 1.1], dtype=F64, requires_grad=True)
        prob = ODEProblem(lambda t, u, p: -f(u, p), u0, (0.0, 1.0), p)
        options = {"adaptive": False, "dt": 0.1, "rtol": 1e-12, "atol": 1e-12}
        options |= {"saveat": [0.45, 1.0], "engine": "torch", "sensealg": sensealg}
        sol = solve(prob, alg, **options)
        loss = (sol.u * torch.tensor([1.0, 2.0, 3.0], dtype=F64)).sum()
        found.append(torch.autograd.grad(loss, (u0, p)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# -- times read as numbers --------------------------------------------------------------------


def stiff(t, u, p):
    a, b = u
    fast = 1e4 * b * (1 - a - b)
    slow = 0.04 * p[0] * a
    return torch.stack([fast - slow, slow - fast - 3e7 * p[1] * b**2])


def reads(t, u, p):
    float(t)
    return stiff(t, u, p)


def branches(t, u, p):
    return stiff(t, u, p) if t < 1e9 else -u


def selects(t, u, p):
    return torch.where(t < 1e9, stiff(t, u, p), -u)


@pytest.mark.parametrize(
    ("f", "dtype", "tol", "allowed"),
    [
        (reads, torch.float32, 1e-3, 2e-3),
        (reads, F64, 1e-5, 1e-9),
        (branches, F64, 1e-5, 1e-9),
        (selects, F64, 1e-5, 1e-9),
    ],
)
def test_a_time_that_only_selects_a_branch(f, dtype, tol, allowed):
    def gradient(f):
        u0 = torch.tensor([1.0, 0.0], dtype=dtype)
        p = torch.ones(2, dtype=dtype, requires_grad=True)
        options = {"rtol": tol, "atol": tol * 1e-4, "saveat": [1e4], "engine": "torch"}
        sol = solve(ODEProblem(f, u0, (0.0, 1e4), p), Rodas5P(), **options)
        return torch.autograd.grad(sol.u[-1, 0], p)[0]

    torch.testing.assert_close(gradient(f), gradient(stiff), rtol=allowed, atol=0.0)


@pytest.mark.parametrize("tape", [False, True])
def test_a_time_read_as_a_number_that_moves_f(tape):
    """``u' = p (cos t - u)``, with the cosine by Python."""

    def solved(f, p):
        u0 = torch.zeros(1, dtype=F64)
        prob = ODEProblem(f, u0, (0.0, 2.0), p)
        options = {"rtol": 1e-6, "atol": 1e-6, "saveat": [2.0], "engine": "torch"}
        return solve(prob, Rodas5P(), sensealg=DiscreteAdjoint(tape=tape), **options)

    found = []
    for f in (lambda t, u, p: p * (math.cos(t) - u), lambda t, u, p: p * (torch.cos(t) - u)):
        p = torch.tensor(20.0, dtype=F64, requires_grad=True)
        sol = solved(f, p)
        found.append((sol.stats.naccept, torch.autograd.grad(sol.u.sum(), p)[0]))
    (steps, number), (expected, tensor) = found
    assert steps <= expected + 2
    torch.testing.assert_close(number, tensor, rtol=1e-5, atol=0.0)


class Wave(torch.autograd.Function):
    """``sin(3 t)`` with one derivative."""

    @staticmethod
    def forward(ctx, t):
        ctx.save_for_backward(t)
        return torch.sin(3 * t)

    @staticmethod
    @once_differentiable
    def backward(ctx, bar):
        (t,) = ctx.saved_tensors
        return 3 * torch.cos(3 * t) * bar


PARTS_OF_TIME = {
    "once": lambda t: Wave.apply(t),
    "once, beside another": lambda t: Wave.apply(t) + t * t,
    "read, beside another": lambda t: math.sin(3 * float(t)) + t * t,
}


@pytest.mark.parametrize("part", PARTS_OF_TIME)
@pytest.mark.parametrize("tape", [False, True])
@pytest.mark.parametrize("alg", [Rodas5P(), Rosenbrock23()])
def test_a_part_of_the_time_that_autograd_does_not_see(part, tape, alg):
    found = []
    whole = (lambda t: torch.sin(3 * t)) if part == "once" else lambda t: torch.sin(3 * t) + t * t
    for by_time in (PARTS_OF_TIME[part], whole):
        x = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=F64, requires_grad=True)

        def f(t, u, p, by_time=by_time):
            return -p * u * by_time(t) - u**2

        prob = ODEProblem(f, x[:2], (0.0, 2.0), x[2:])
        options = {"rtol": 1e-4, "atol": 1e-4, "engine": "torch"}
        sol = solve(prob, alg, sensealg=DiscreteAdjoint(tape=tape), **options)
        found.append((sol.u[-1].detach(), *torch.autograd.grad(sol.u[-1].sum(), x)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
