"""The named test problems: equations, references, invariants, published values."""

from __future__ import annotations

import inspect

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from diffsolve.problems import library
from diffsolve.problems.library import LibraryProblem
from diffsolve.problems.ode import ODEProblem

PROBLEMS = {
    name: getattr(library, name)
    for name in library.__all__
    if isinstance(getattr(library, name), LibraryProblem)
}
each_problem = pytest.mark.parametrize("name", PROBLEMS)


# The equations once more, written component by component with NumPy.


def np_pleiades(t, u, p):
    x, y, vx, vy = np.split(u, 4)
    ax, ay = np.zeros(7), np.zeros(7)
    for i in range(7):
        for j in range(7):
            if i != j:
                r = np.hypot(x[j] - x[i], y[j] - y[i])
                ax[i] += p[j] * (x[j] - x[i]) / r**3
                ay[i] += p[j] * (y[j] - y[i]) / r**3
    return np.concatenate((vx, vy, ax, ay))


def np_arenstorf(t, u, p):
    d1 = ((u[0] + p[0]) ** 2 + u[1] ** 2) ** 1.5
    d2 = ((u[0] - (1 - p[0])) ** 2 + u[1] ** 2) ** 1.5
    return np.array(
        [
            u[2],
            u[3],
            u[0] + 2 * u[3] - (1 - p[0]) * (u[0] + p[0]) / d1 - p[0] * (u[0] - (1 - p[0])) / d2,
            u[1] - 2 * u[2] - (1 - p[0]) * u[1] / d1 - p[0] * u[1] / d2,
        ]
    )


FORMULAS = {
    "lotka_volterra": lambda t, u, p: np.array(
        [p[0] * u[0] - p[1] * u[0] * u[1], -p[2] * u[1] + p[3] * u[0] * u[1]]
    ),
    "lotka_volterra_time": lambda t, u, p: np.array(
        [p[0] * u[0] - p[1] * u[0] * u[1] * t, -p[2] * u[1] + t * p[3] * u[0] * u[1]]
    ),
    "lorenz": lambda t, u, p: np.array(
        [p[0] * (u[1] - u[0]), u[0] * (p[1] - u[2]) - u[1], u[0] * u[1] - p[2] * u[2]]
    ),
    "fitzhugh_nagumo": lambda t, u, p: np.array(
        [u[0] - u[0] ** 3 / 3 - u[1] + p[3], p[2] * (u[0] + p[0] - p[1] * u[1])]
    ),
    "pleiades": np_pleiades,
    "arenstorf": np_arenstorf,
    "rigid_body": lambda t, u, p: np.array(
        [p[0] * u[1] * u[2], p[1] * u[0] * u[2], p[2] * u[0] * u[1]]
    ),
    "henon_heiles": lambda t, u, p: np.array(
        [
            u[2],
            u[3],
            -u[0] - 2 * p[0] * u[0] * u[1],
            -u[1] - p[0] * (u[0] ** 2 - u[1] ** 2),
        ]
    ),
    "linear": lambda t, u, p: p @ u,
    "spiral": lambda t, u, p: u**3 @ p,
}

# DOP853 makes errors of at most 1e-13 per step, in some hundred steps, and the problem multiplies
# those made early on: by less than 5 for most, by 20 for Henon-Heiles, by 1e2 for the Pleiades, by
# 1e4 for Arenstorf (2e6 for the first steps, which are short). These are 20 times what is seen.
TOLERANCES = {"henon_heiles": 5e-11, "pleiades": 4e-11, "arenstorf": 1e-9}


@each_problem
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


@each_problem
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


# Invariants of the stored references: they hold to rounding, whatever the solver was


def drift(values: np.ndarray) -> float:
    return float(np.abs(values - values[0]).max() / np.abs(values[0]))


def test_henon_heiles_energy() -> None:
    x, y, vx, vy = library.henon_heiles.reference().u.T
    energy = (vx**2 + vy**2 + x**2 + y**2) / 2 + x**2 * y - y**3 / 3
    assert energy[0] == pytest.approx(0.125 + 0.005 - 0.001 / 3)
    assert drift(energy) < 1e-14


def test_rigid_body_invariants() -> None:
    x, y, z = library.rigid_body.reference().u.T
    assert drift(x**2 / -2 - y**2 / 1.25) < 1e-14
    assert drift(y**2 / 1.25 - z**2 / -0.5) < 1e-14


def test_lotka_volterra_invariant() -> None:
    x, y = library.lotka_volterra.reference().u.T
    assert drift(x - 3 * np.log(x) + y - 1.5 * np.log(y)) < 1e-14


def test_pleiades_invariants() -> None:
    x, y, vx, vy = np.split(library.pleiades.reference().u, 4, axis=1)
    m = np.arange(1.0, 8.0)
    r = np.hypot(x[:, :, None] - x[:, None], y[:, :, None] - y[:, None]) + np.diag(7 * [np.inf])
    energy = (m * (vx**2 + vy**2)).sum(1) / 2 - (m[:, None] * m / r).sum((1, 2)) / 2
    assert drift(energy) < 1e-13
    np.testing.assert_allclose(vx @ m, (vx @ m)[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(vy @ m, (vy @ m)[0], rtol=0, atol=1e-13)
    assert drift((x * vy - y * vx) @ m) < 1e-13


def test_arenstorf_constant_and_period() -> None:
    reference = library.arenstorf.reference()
    x, y, vx, vy = reference.u.T
    mu = 0.012277471
    potential = (1 - mu) / np.hypot(x + mu, y) + mu / np.hypot(x - 1 + mu, y)
    # rounding of the start, next to the moon, is multiplied in the potential
    assert drift(x**2 + y**2 + 2 * potential - vx**2 - vy**2) < 1e-12
    # rounding the decimal data to float64, 1e-16, is multiplied by up to 2e6
    np.testing.assert_allclose(reference.u[-1], reference.u[0], rtol=0, atol=1e-10)


# Test Set for Initial Value Problem Solvers, release 2.4 (Mazzia and Magherini, 2008), II-8:
# positions and velocities at t = 3
PLEIADES_END = """
 0.3706139143970502e0  0.3237284092057233e1 -0.3222559032418324e1  0.6597091455775310e0
 0.3425581707156584e0  0.1562172101400631e1 -0.7003092922212495e0 -0.3943437585517392e1
-0.3271380973972550e1  0.5225081843456543e1 -0.2590612434977470e1  0.1198213693392275e1
-0.2429682344935824e0  0.1091449240428980e1  0.3417003806314313e1  0.1354584501625501e1
-0.2590065597810775e1  0.2025053734714242e1 -0.1155815100160448e1 -0.8072988170223021e0
 0.5952396354208710e0 -0.3741244961234010e1  0.3773459685750630e0  0.9386858869551073e0
 0.3667922227200571e0 -0.3474046353808490e0  0.2344915448180937e1 -0.1947020434263292e1
"""


def test_pleiades_published_values() -> None:
    published = np.array(PLEIADES_END.split(), dtype=float)
    np.testing.assert_allclose(library.pleiades.reference().u[-1], published, rtol=1e-13)
