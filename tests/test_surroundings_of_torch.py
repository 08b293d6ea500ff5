"""Solves do not depend on torch's defaults, and leave nothing of a transform behind."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffsolve import (
    EM,
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    KenCarp4,
    ODEProblem,
    Rodas5P,
    SDEProblem,
    Tsit5,
    solve,
)
from diffsolve.nn import NeuralODE, NeuralSDE
from diffsolve.regularization import local_error_estimate

F64 = torch.float64


@contextmanager
def defaults(dtype, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if device is None:
            yield
        else:
            with torch.device(device):
                yield
    finally:
        torch.set_default_dtype(before)


def f(t, u, p):
    return torch.stack([-p[0] * u[0] + u[1] * t, -p[1] * u[1] * u[0]])


def numbers(kind, dtype):
    """All numbers of a solve and of its gradients."""
    p = torch.tensor([0.5, 0.8], dtype=dtype, device="cpu", requires_grad=True)
    u0 = torch.tensor([1.0, 0.4], dtype=dtype, device="cpu", requires_grad=True)
    options = {"saveat": [0.3, 1.0], "rtol": 1e-5, "atol": 1e-7}
    name, engine, sensealg = kind
    if name == "sde":
        prob = SDEProblem(f, lambda t, u, p: 0.1 * p * u, u0, (0.0, 1.0), p)
        sol = solve(prob, EM(), dt=0.1, seed=3, engine=engine, saveat=[0.35, 1.0])
        loss = sol.u.square().sum()
    else:
        alg = {"tsit5": Tsit5(), "rodas": Rodas5P(), "kencarp": KenCarp4(), "default": None}[name]
        prob = ODEProblem(f, u0, (0.0, 1.0), p)
        sol = solve(prob, alg, engine=engine, sensealg=sensealg, dense=True, **options)
        loss = sol.u.square().sum()
        if isinstance(sensealg, DiscreteAdjoint) and name == "tsit5":
            loss = loss + sol.steps.error.sum()
    grads = torch.autograd.grad(loss, (u0, p))
    found = [sol.u.detach(), sol.t, *grads]
    if name != "sde":
        found.append(sol([0.21, 0.77]).detach())
        if engine == "torch":
            generator = torch.Generator("cpu").manual_seed(1)
            found.append(local_error_estimate(sol, generator=generator).detach())
    return found


KINDS = [
    ("tsit5", "native", DiscreteAdjoint()),
    ("rodas", "native", DiscreteAdjoint()),
    ("tsit5", "native", InterpolatingAdjoint()),
    ("sde", "native", None),
    ("sde", "torch", None),
    ("tsit5", "torch", DiscreteAdjoint()),
    ("tsit5", "torch", DiscreteAdjoint(tape=True)),
    ("tsit5", "torch", DiscreteAdjoint(through_step_size=True)),
    ("rodas", "torch", DiscreteAdjoint()),
    ("kencarp", "torch", DiscreteAdjoint()),
    ("kencarp", "torch", DiscreteAdjoint(tape=True)),
    ("tsit5", "torch", InterpolatingAdjoint()),
    ("rodas", "torch", BacksolveAdjoint()),
    ("default", "torch", DiscreteAdjoint(checkpoints=3)),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_defaults_of_torch_change_no_bit(kind):
    for dtype in (F64, torch.float32) if kind[0] == "tsit5" else (F64,):
        with defaults(torch.float32, None):
            expected = numbers(kind, dtype)
        for default, device in (
            (F64, None),
            (torch.bfloat16, None),
            (torch.float16, None),
            (torch.float32, "meta"),
        ):
            with defaults(default, device):
                found = numbers(kind, dtype)
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == b.dtype
                assert a.device == b.device
                assert torch.equal(a, b), (default, device, a, b)


# -- transforms -------------------------------------------------------------------------------


def lotka(t, u, p):
    return torch.stack([p[0] * u[0] - u[0] * u[1], -p[1] * u[1] + u[0] * u[1]])


def transformed(alg, rtol):
    def loss(p):
        u0 = torch.tensor([1.0, 1.0], dtype=F64)
        prob = ODEProblem(lotka, u0, (0.0, 0.5), p)
        return solve(prob, alg, saveat=[0.5], rtol=rtol, atol=1e-6).u[-1].sum()

    return loss


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacfwd": torch.func.jacfwd,
    "jacrev": torch.func.jacrev,
    "hessian": torch.func.hessian,
    "grad of grad": lambda f: torch.func.grad(lambda p: torch.func.grad(f)(p).sum()),
    "jvp": lambda f: lambda p: torch.func.jvp(f, (p,), (torch.ones_like(p),))[1],
    "vjp": lambda f: lambda p: torch.func.vjp(f, p)[1](torch.ones((), dtype=F64))[0],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_a_solve_works_again(name):
    rtol = 1e-4 + 1e-6 * list(TRANSFORMS).index(name)  # what is kept for it is made here
    p = torch.tensor([1.5, 3.0], dtype=F64)
    loss = transformed(Tsit5(), rtol)
    first = TRANSFORMS[name](loss)(p)
    second = TRANSFORMS[name](loss)(p)
    assert torch.equal(first, second)
    # what is kept is that of a usual solve: with its tolerances a plain one, and one on the tape
    q = p.clone().requires_grad_()
    (usual,) = torch.autograd.grad(loss(q), q)
    if name in ("grad", "jacrev", "jacfwd", "vjp"):
        torch.testing.assert_close(usual, first, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alg", [KenCarp4(), Rodas5P()])
def test_a_transform_of_an_implicit_solve_works_again(alg):
    p = torch.tensor([1.5, 3.0], dtype=F64)
    loss = transformed(alg, 1.37e-4)
    first = torch.func.grad(loss)(p)
    assert torch.equal(first, torch.func.grad(loss)(p))
    q = p.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(q), q)[0], first, rtol=1e-5, atol=1e-9)


def test_a_transform_of_other_solves_works_again():
    torch.manual_seed(0)
    layer = NeuralODE(torch.nn.Linear(2, 2).double(), (0.0, 0.5), rtol=1.41e-4, atol=1e-6)
    weights = {k: v.detach() for k, v in layer.named_parameters()}
    u0 = torch.tensor([1.0, 0.5], dtype=F64)

    def of_layer(weights):
        return torch.func.functional_call(layer, weights, (u0,)).sum()

    def of_paths(p):
        prob = SDEProblem(lotka, lambda t, u, p: 0.1 * p * u, u0, (0.0, 0.5), p)
        sol = solve(prob, EM(), dt=0.1, seed=1, sensealg=DiscreteAdjoint(tape=True))
        return sol.u[-1].sum()

    for loss, at in ((of_layer, weights), (of_paths, torch.tensor([1.5, 3.0], dtype=F64))):
        first, second = torch.func.grad(loss)(at), torch.func.grad(loss)(at)
        for a, b in zip(*map(torch.utils._pytree.tree_leaves, (first, second)), strict=True):
            assert torch.equal(a, b)
        float(loss(at))


class Potential(torch.nn.Module):
    """A right-hand side that differentiates inside."""

    def __init__(self):
        super().__init__()
        self.stiffness = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, u):
        with torch.enable_grad():
            x = u if u.requires_grad else u.detach().requires_grad_()
            energy = (self.stiffness * x**2).sum()
            return -torch.autograd.grad(energy, x, create_graph=True)[0]


def _ode():
    return NeuralODE(torch.nn.Linear(2, 2), (0.0, 1.0), Tsit5())


def _hamiltonian():
    return NeuralODE(Potential(), (0.0, 1.0), Tsit5())


def _sde():
    drift, diffusion = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    return NeuralSDE(drift, diffusion, (0.0, 1.0), EM(), dt=0.1, seed=0)


@pytest.mark.parametrize("make", [_ode, _hamiltonian, _sde], ids=lambda x: x.__name__)
def test_first_solve_under_a_checkpoint(make):
    """The runs that only look save nothing that a checkpoint would count."""
    torch.manual_seed(0)
    layer, x = make(), torch.ones(3, 2)
    for _ in range(2):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    for _ in range(2):
        layer(x).sum().backward()
    for a, p in zip(got, layer.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)
