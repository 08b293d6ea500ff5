"""The named test problems: equations, references, invariants, published values."""

from __future__ import annotations

import inspect

import mpmath
import numpy as np
import pytest
import torch
from library_problems import FORMULAS, PROBLEMS, STIFF, slopes_by_complex_steps
from scipy.integrate import solve_ivp

from diffsolve.problems import library
from diffsolve.problems.ode import ODEProblem

each_problem = pytest.mark.parametrize("name", PROBLEMS)
NONSTIFF = [name for name in PROBLEMS if name not in STIFF]

# DOP853 makes errors of at most 1e-13 per step, in some hundred steps, and the problem multiplies
# those made early on: by less than 5 for most, by 20 for Henon-Heiles, by 1e2 for the Pleiades, by
# 1e4 for Arenstorf (2e6 for the first steps, which are short). These are 20 times what is seen.
TOLERANCES = {"henon_heiles": 5e-11, "pleiades": 4e-11, "arenstorf": 1e-9}


@pytest.mark.parametrize("name", NONSTIFF)
def test_reference_against_dop853(name: str) -> None:
    problem, reference = PROBLEMS[name](), PROBLEMS[name].reference()
    p = problem.p.numpy()
    solution = solve_ivp(
        lambda t, u: FORMULAS[name](t, u, p),
        problem.tspan,
        problem.u0.numpy(),
        method="DOP853",
        t_eval=reference.t,
        rtol=1e-13,
        atol=1e-14,
    )
    error = np.abs(solution.y.T - reference.u).max() / np.abs(reference.u).max()
    assert error < TOLERANCES.get(name, 2e-12)


@each_problem
def test_formula(name: str) -> None:
    problem = PROBLEMS[name]()
    for _ in range(3):
        u, t = torch.randn_like(problem.u0), torch.rand((), dtype=torch.float64)
        p = problem.p * (1 + 0.1 * torch.randn_like(problem.p))
        expected = FORMULAS[name](float(t), u.numpy(), p.numpy())
        np.testing.assert_allclose(problem.f(t, u, p).numpy(), expected, rtol=1e-11, atol=1e-13)


@each_problem
def test_batched_states(name: str) -> None:
    problem = PROBLEMS[name]()
    t = torch.tensor(0.7, dtype=torch.float64)
    u = torch.randn(4, 3, *problem.u0.shape, dtype=torch.float64)
    together = problem.f(t, u, problem.p)
    assert together.shape == u.shape
    for i, j in np.ndindex(4, 3):
        torch.testing.assert_close(
            together[i, j], problem.f(t, u[i, j], problem.p), rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - {"linear", "spiral"}))
def test_batched_parameters(name: str) -> None:
    problem = PROBLEMS[name]()
    t = torch.tensor(0.7, dtype=torch.float64)
    u = torch.randn(5, *problem.u0.shape, dtype=torch.float64)
    p = problem.p * (1 + 0.1 * torch.randn(5, *problem.p.shape, dtype=torch.float64))
    together = problem.f(t, u, p)
    for i in range(5):
        torch.testing.assert_close(together[i], problem.f(t, u[i], p[i]), rtol=1e-12, atol=1e-13)


# one interval of the reference, from its state at the start; SciPy's Radau at rtol=1e-8
@pytest.mark.parametrize("name", STIFF)
def test_reference_against_radau(name: str) -> None:
    problem, (t, u) = PROBLEMS[name](), PROBLEMS[name].reference()
    p, k = problem.p.numpy(), 2 if name == "brusselator_1d" else 7
    u0 = u[k].copy()
    if name == "e5":
        k, u0 = 2, u[2].copy()  # later, rounding hides y2 - y3, which is y4
    solution = solve_ivp(
        lambda t, u: FORMULAS[name](t, u, p),
        (t[k], t[k + 1]),
        u0,
        method="Radau",
        rtol=1e-8,
        atol=1e-30,
        jac=lambda t, u: slopes_by_complex_steps(lambda v: FORMULAS[name](t, v, p), u),
    )
    np.testing.assert_allclose(solution.y[:, -1], u[k + 1], rtol=1e-6)


@pytest.mark.parametrize("name", STIFF)
def test_gradients_of_stiff_problems(name: str) -> None:
    # differences would drown the small ones beside rate constants of 1e11
    problem = PROBLEMS[name]()
    t = torch.tensor(0.7, dtype=torch.float64)
    u, p = torch.rand_like(problem.u0), problem.p
    by_u, by_p = torch.func.jacrev(lambda u, p: problem.f(t, u, p), (0, 1))(u, p)
    formula = FORMULAS[name]
    for got, expected in (
        (by_u, slopes_by_complex_steps(lambda v: formula(0.7, v, p.numpy()), u.numpy())),
        (by_p, slopes_by_complex_steps(lambda v: formula(0.7, u.numpy(), v), p.numpy())),
    ):
        np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NONSTIFF)
def test_gradients(name: str) -> None:
    problem = PROBLEMS[name]()
    t = torch.tensor(0.7, dtype=torch.float64)
    u = torch.randn_like(problem.u0).requires_grad_()
    p = problem.p.clone().requires_grad_()
    # relative: a close encounter in the random state makes large derivatives
    assert torch.autograd.gradcheck(lambda u, p: problem.f(t, u, p), (u, p), rtol=1e-4)


@each_problem
def test_problem(name: str) -> None:
    problem = PROBLEMS[name]()
    assert isinstance(problem, ODEProblem)
    assert problem.u0.dtype == problem.p.dtype == torch.float64
    single = PROBLEMS[name](dtype=torch.float32, tspan=(0.0, 0.5))
    assert single.tspan == (0.0, 0.5)
    t = torch.tensor(0.0)
    assert single.f(t, single.u0, single.p).dtype == torch.float32
    # a caller's tensor stays in the graph
    p = problem.p.clone().requires_grad_()
    made = PROBLEMS[name](p=p)
    made.f(t, made.u0 + 0.1, made.p).sum().backward()
    assert p.grad is not None and bool(p.grad.isfinite().all())


@each_problem
def test_reference_shape(name: str) -> None:
    problem, reference = PROBLEMS[name](), PROBLEMS[name].reference()
    assert reference.t.dtype == reference.u.dtype == np.float64
    assert reference.t.shape == (11,)
    assert reference.u.shape == (11, *problem.u0.shape)
    assert (reference.t[0], reference.t[-1]) == problem.tspan
    np.testing.assert_array_equal(reference.u[0], problem.u0.numpy())
    reference.u[:] = 0  # the caller's own copy
    assert PROBLEMS[name].reference().u.any()


@each_problem
def test_catalog_entry(name: str) -> None:
    problem = PROBLEMS[name]
    assert problem.name == name
    assert problem.source
    assert problem.__doc__ is not None and "References" in problem.__doc__
    assert {"u0", "tspan", "p", "dtype"} <= inspect.signature(problem).parameters.keys()


def test_stored_reference_takes_no_parameters() -> None:
    with pytest.raises(ValueError, match="default parameters"):
        library.lorenz.reference(tspan=(0.0, 1.0))
    with pytest.raises(ValueError, match="default parameters"):
        library.van_der_pol.reference(mu=10.0)


# Closed forms


def test_linear_default() -> None:
    t, u = library.linear.reference()
    slow, fast = np.exp(-t)[:, None], np.exp(-3 * t)[:, None]
    exact = 1 + slow * [0.5, 0, -0.5] + fast * [0.5, -1, 0.5]
    np.testing.assert_allclose(u, exact, rtol=1e-12)


def test_linear_any_matrix() -> None:
    matrix = [[0.5, 2.0], [-3.0, -0.2]]  # not normal
    u0 = [[1.0, 0.0], [-0.3, 2.0]]
    t, u = library.linear.reference(p=matrix, u0=u0, tspan=(1.0, 4.0))
    assert u.shape == (11, 2, 2)
    for time, states in zip(t, u, strict=True):
        flow = mpmath.expm(mpmath.matrix(matrix) * (time - 1.0))
        expected = np.array(u0) @ np.array(flow.tolist(), dtype=float).T
        np.testing.assert_allclose(states, expected, rtol=1e-12, atol=1e-12)
