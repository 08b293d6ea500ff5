"""Gradients where ``f`` has a corner, a tie, or no second derivative."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from diffsolve import (
    TRBDF2,
    DiscreteAdjoint,
    Euler,
    KenCarp4,
    ODEProblem,
    Rodas5P,
    Rosenbrock23,
    Trapezoid,
    solve,
)

F64 = torch.float64


def hill(t, u, p):
    x, y = u
    a, k, n, d = p
    return torch.stack([a / (1 + (y / k) ** n) - d * x, a * x**n / (k**n + x**n) - d * y])


def braked(t, u, p):
    """A body that starts at rest: the norm of its velocity has no derivative there."""
    v = u[2:]
    return torch.cat([v, p[:2] - p[2] * v * torch.linalg.vector_norm(v)])


CASES = {
    "hill": (hill, [0.0, 0.0], [1.0, 0.5, 1.5, 0.7]),
    "norm": (braked, [0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.4]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize(
    ("alg", "tol"),
    [(Rodas5P(), 1e-6), (Rosenbrock23(), 1e-6), (TRBDF2(), 1e-4), (Trapezoid(), 1e-4)],
)
def test_where_f_has_no_second_derivative(name, engine, alg, tol):
    f, start, values = CASES[name]

    def exact(p):
        def g(t, u):
            return f(t, torch.tensor(u), torch.tensor(p)).numpy()

        return (
            solve_ivp(g, (0, 3), start, "DOP853", [1.5, 3.0], rtol=1e-11, atol=1e-12).y ** 2
        ).sum()

    p0 = np.array(values)
    want = [(exact(p0 + d) - exact(p0 - d)) / 2e-5 for d in 1e-5 * np.eye(len(p0))]
    p = torch.tensor(p0, requires_grad=True)
    prob = ODEProblem(f, torch.tensor(start, dtype=F64), (0.0, 3.0), p)
    options = {"rtol": tol, "atol": tol / 100, "saveat": [1.5, 3.0], "engine": engine}
    sol = solve(prob, alg, **options)
    (found,) = torch.autograd.grad(sol.u.square().sum(), p)
    near = 1e3 * tol if tol < 1e-5 else 100 * tol
    torch.testing.assert_close(found, torch.tensor(want), rtol=near, atol=near / 10)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_estimates_that_have_no_gradient_are_refused(engine):
    u0 = torch.zeros(1, dtype=F64, requires_grad=True)
    prob = ODEProblem(lambda t, u: 1 - u - u**1.5, u0, (0.0, 5.0))
    sol = solve(prob, TRBDF2(), saveat=[5.0], engine=engine)
    with pytest.raises(RuntimeError, match=r"no second derivative.*leave the estimates"):
        (sol.u[-1].sum() + sol.steps.error.sum()).backward()


def test_the_tape_says_that_there_is_no_second_derivative():
    p = torch.tensor([1.0, 0.5, 1.5, 0.7], dtype=F64, requires_grad=True)
    prob = ODEProblem(hill, torch.zeros(2, dtype=F64), (0.0, 1.0), p)
    sol = solve(prob, Rodas5P(), saveat=[1.0], sensealg=DiscreteAdjoint(tape=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        sol.u.sum().backward()


ZERO = torch.zeros(2, dtype=F64)
MASKED = {
    "maximum": lambda u: torch.sqrt(torch.maximum(u, ZERO)),
    "minimum": lambda u: torch.sqrt(-torch.minimum(-u, ZERO)),
    "clamp": lambda u: torch.sqrt(u.clamp(min=0)),
    "relu": lambda u: torch.sqrt(torch.relu(u)),
    "where": lambda u: torch.sqrt(torch.where(u > 0, u, 0.0)),
    "max": lambda u: torch.sqrt(torch.stack([u[0], u.min() - u.min()]).max()) + u,
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_masked_slope_hides_an_infinite_one(name, engine):
    def f(t, u, k):
        return -k * MASKED[name](u)

    u0 = torch.tensor([4.0, -1.0], dtype=F64, requires_grad=True)
    k = torch.tensor(0.3, dtype=F64, requires_grad=True)
    sol = solve(ODEProblem(f, u0, (0.0, 0.5), k), Euler(), dt=0.5, engine=engine, saveat=[0.5])
    found = torch.autograd.grad(sol.u.sum(), (u0, k))
    expected = torch.autograd.grad((u0 + 0.5 * f(0.0, u0, k)).sum(), (u0, k))
    torch.testing.assert_close(found, expected)
    for alg in (Rodas5P(), KenCarp4()):
        prob = ODEProblem(f, u0.detach(), (0.0, 1.0), k.detach())
        assert solve(prob, alg, engine=engine, saveat=[1.0]).u.isfinite().all()


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("alg", [Rodas5P(), KenCarp4()])
def test_an_operation_without_a_derivative_does_not_stop_implicit_methods(engine, alg):
    def f(t, u):
        return torch.heaviside(u, ZERO) - u

    prob = ODEProblem(f, torch.tensor([0.5, -0.5], dtype=F64), (0.0, 1.0))
    u = solve(prob, alg, engine=engine, saveat=[1.0], rtol=1e-6, atol=1e-8).u[-1]
    decay = np.exp(-1.0)
    torch.testing.assert_close(
        u, torch.tensor([1 - 0.5 * decay, -0.5 * decay], dtype=F64), rtol=1e-5, atol=0.0
    )
