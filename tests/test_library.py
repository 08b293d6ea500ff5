"""The named test problems: equations, references, invariants, published values."""

from __future__ import annotations

import inspect
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import diffsolve
from diffsolve import Tsit5, jacobian_sparsity, solve
from diffsolve.problems import library
from diffsolve.problems.library import LibraryProblem
from diffsolve.problems.ode import ODEProblem

PROBLEMS = {
    name: getattr(library, name)
    for name in library.__all__
    if isinstance(getattr(library, name), LibraryProblem)
}
each_problem = pytest.mark.parametrize("name", PROBLEMS)
STIFF = [name for name, problem in PROBLEMS.items() if problem.stiff]
NONSTIFF = [name for name in PROBLEMS if name not in STIFF]


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


def np_hires(t, u, p):
    k1, k2, k3, k4, k5, k6, kp, km, ks, oks = p
    y1, y2, y3, y4, y5, y6, y7, y8 = u
    return np.array(
        [
            -k1 * y1 + k2 * y2 + k6 * y3 + oks,
            k1 * y1 - (k2 + k3) * y2,
            -(k6 + k1) * y3 + k2 * y4 + k5 * y5,
            k3 * y2 + k1 * y3 - (k4 + k2) * y4,
            -(k5 + k1) * y5 + k2 * (y6 + y7),
            -kp * y6 * y8 + k4 * y4 + k1 * y5 - k2 * y6 + km * y7,
            kp * y6 * y8 - (k2 + km + ks) * y7,
            -kp * y6 * y8 + (k2 + km + ks) * y7,
        ]
    )


# the substances, and how many of which are made (above zero) or used by each reaction
SUBSTANCES = "NO2 NO O3P O3 HO2 OH HCHO CO ALD MEO2 C2O3 CO2 PAN CH3O HNO3 O1D SO2 SO4 NO3 N2O5"
REACTIONS = """
NO2 = NO O3P; NO O3 = NO2; HO2 NO = NO2 OH; HCHO = HO2 HO2 CO; HCHO = CO; HCHO OH = HO2 CO;
ALD = MEO2 HO2 CO; ALD OH = C2O3; C2O3 NO = NO2 MEO2 CO2; C2O3 NO2 = PAN; PAN = C2O3 NO2;
MEO2 NO = CH3O NO2; CH3O = HCHO HO2; NO2 OH = HNO3; O3P = O3; O3 = O1D; O3 = O3P; O1D = OH OH;
O1D = O3P; SO2 OH = SO4 HO2; NO3 = NO; NO3 = NO2 O3P; NO2 O3 = NO3; NO3 NO2 = N2O5; N2O5 = NO3 NO2
"""


def np_pollu(t, u, p):
    place = {name: i for i, name in enumerate(SUBSTANCES.split())}
    slope = np.zeros_like(u * p[0])
    for k, reaction in zip(p, REACTIONS.split(";"), strict=True):
        before, after = ([place[name] for name in side.split()] for side in reaction.split("="))
        rate = k * np.prod(u[before])
        np.subtract.at(slope, before, rate)
        np.add.at(slope, after, rate)
    return slope


def np_brusselator(t, u, p):
    n = len(u) // 2
    a, b, alpha = np.broadcast_to(p, (3, n))
    slope = np.empty_like(u * p[0, 0])
    for i in range(n):
        x, y = u[i], u[n + i]
        x_left, y_left = (u[i - 1], u[n + i - 1]) if i > 0 else (1, 3)
        x_right, y_right = (u[i + 1], u[n + i + 1]) if i < n - 1 else (1, 3)
        grid = alpha[i] * (n + 1) ** 2
        slope[i] = a[i] + x**2 * y - (b[i] + 1) * x + grid * (x_left - 2 * x + x_right)
        slope[n + i] = b[i] * x - x**2 * y + grid * (y_left - 2 * y + y_right)
    return slope


def np_stiff_linear(t, u, p):
    reflection = np.eye(len(u)) - 2 / len(u)
    return -reflection @ np.diag(p) @ reflection @ u


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
    "rober": lambda t, u, p: np.array(
        [
            -p[0] * u[0] + p[2] * u[1] * u[2],
            p[0] * u[0] - p[2] * u[1] * u[2] - p[1] * u[1] ** 2,
            p[1] * u[1] ** 2,
        ]
    ),
    "orego": lambda t, u, p: np.array(
        [
            p[0] * (u[1] + u[0] * (1 - p[2] * u[0] - u[1])),
            (u[2] - (1 + u[0]) * u[1]) / p[0],
            p[1] * (u[0] - u[2]),
        ]
    ),
    "hires": np_hires,
    "e5": lambda t, u, p: np.array(
        [
            -p[0] * u[0] - p[1] * u[0] * u[2],
            p[0] * u[0] - p[3] * p[2] * u[1] * u[2],
            p[0] * u[0] - p[1] * u[0] * u[2] - p[3] * p[2] * u[1] * u[2] + p[2] * u[3],
            p[1] * u[0] * u[2] - p[2] * u[3],
        ]
    ),
    "pollu": np_pollu,
    "van_der_pol": lambda t, u, p: np.array([u[1], p[0] * (1 - u[0] ** 2) * u[1] - u[0]]),
    "brusselator_1d": np_brusselator,
    "stiff_linear": np_stiff_linear,
    "prothero_robinson": lambda t, u, p: p[0] * (u - np.cos(t)) - np.sin(t),
}

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


def slopes_by_complex_steps(f, x: np.ndarray) -> np.ndarray:
    """``[i, ..., j]``: of ``f_i`` along each entry of ``x``; exact to rounding, at any scale."""
    columns = []
    for j in range(x.size):
        moved = x.astype(complex)
        moved.flat[j] += 1e-150j
        columns.append(f(moved).imag / 1e-150)
    return np.stack(columns, -1)


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


# The stiff problems


def test_which_problems_are_stiff() -> None:
    assert set(STIFF) == {
        *("rober", "orego", "hires", "e5", "pollu", "van_der_pol"),
        *("brusselator_1d", "stiff_linear", "prothero_robinson"),
    }


@pytest.mark.parametrize("name", STIFF)
def test_native_engine_follows(name: str) -> None:
    problem = PROBLEMS[name](tspan=(0.0, 1e-11))
    options: dict[str, Any] = {"adaptive": False, "dt": 1e-12, "save_everystep": False}
    torch_end, native_end = (
        solve(problem, Tsit5(), engine=engine, **options).u[-1] for engine in ("torch", "native")
    )
    torch.testing.assert_close(native_end, torch_end, rtol=1e-9, atol=1e-40)
    random = slopes_by_complex_steps(
        lambda v: FORMULAS[name](0.7, v, problem.p.numpy()), torch.rand_like(problem.u0).numpy()
    )
    assert np.array_equal(jacobian_sparsity(problem).to_dense().numpy(), random != 0)


def test_rober_keeps_mass() -> None:
    for reference in (library.rober.reference(), library.rober.reference(tspan=(0.0, 1e11))):
        np.testing.assert_allclose(reference.u.sum(1), 1.0, rtol=1e-15)
    # the two have the times 100, ..., 1e5 in common
    short, long = library.rober.reference(), library.rober.reference(tspan=(0, 1e11))
    np.testing.assert_allclose(short.u[7:], long.u[1:5], rtol=1e-15)


def test_hires_keeps_the_enzyme() -> None:
    u = library.hires.reference().u
    np.testing.assert_allclose(u[:, 6] + u[:, 7], 0.0057, rtol=1e-15)


def test_pollu_keeps_nitrogen_and_sulphur() -> None:
    u = library.pollu.reference().u
    assert drift(u[:, [0, 1, 12, 14, 18]].sum(1) + 2 * u[:, 19]) < 1e-14
    assert drift(u[:, 16] + u[:, 17]) < 1e-14


def test_e5_keeps_a_difference() -> None:
    u = library.e5.reference().u
    assert (np.abs(u[:, 1] - u[:, 2] - u[:, 3]) <= 1e-15 * u[:, 1]).all()


# Methods, and how far they may let ``y2 - y3 - y4`` drift: by rounding alone, some ulp of 1e-10 in
# an SDIRK method, which corrects what its systems lose; a Rosenbrock method does not
DRIFTS = {
    **dict.fromkeys(("KenCarp4", "KenCarp5", "Kvaerno4", "Kvaerno5"), 1e-24),
    **dict.fromkeys(("Rodas4", "Rodas4P"), 4e-22),
    **dict.fromkeys(("Rodas5", "Rodas5P"), 4e-21),
}


def late_e5(name: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The solution and the reference at the reference's times, and at 1e13 behind them."""
    t, u = library.e5.reference()
    # y1 and y4 are gone by 1e11; what is left is y2' = -M C y2^2
    rest = 1 / (1 / u[-1, 1] + 1.13e9 * (1e13 - t[-1]))
    options = {"rtol": 1e-8, "atol": 1e-24, "saveat": [*t.tolist(), 1e13], **options}
    sol = solve(library.e5(tspan=(0.0, 1e13)), getattr(diffsolve, name)(), **options)
    return sol.u.numpy(), np.concatenate([u, [[0.0, rest, rest, 0.0]]])


def check_late_e5(name: str, **options: Any) -> None:
    u, exact = late_e5(name, **options)
    limit = DRIFTS[name]
    assert np.abs(u[:, 1] - u[:, 2] - u[:, 3]).max() < limit
    # until 1e8 each component is right to 50 tolerances, but for what the drift adds
    lost = limit / exact[1:9, 1:2]
    assert (np.abs(u[1:9] / exact[1:9] - 1) < 50 * 1e-8 + lost).all()
    # and y2, y3 to the end, where a drift is all that counts
    late = np.abs(u[9:, 1:3] - exact[9:, 1:3])
    assert (late < 1e-4 * exact[9:, 1:3] + limit).all()


@pytest.mark.parametrize("name", DRIFTS)
@pytest.mark.parametrize("atol", [1e-24, 1e-30])
def test_e5_late(name: str, atol: float) -> None:
    check_late_e5(name, engine="native", atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Rodas5P", "KenCarp4"])
def test_e5_late_on_torch(name: str) -> None:
    check_late_e5(name, engine="torch")


# Parameters, time and values: of the Test Set for IVP Solvers, release 2.4, at its end times, and
# of E5 in Hairer and Wanner's collection, where they are right to all digits up to 1e9
PUBLISHED = {
    "rober": (
        {"tspan": (0.0, 1e11)},
        1e11,
        "0.2083340149701255e-7 0.8333360770334713e-13 0.9999999791665050",
    ),
    "orego": ({}, 360.0, "0.1000814870318523e1 0.1228178521549917e4 0.1320554942846706e3"),
    "hires": (
        {},
        321.8122,
        """0.7371312573325668e-3 0.1442485726316185e-3 0.5888729740967575e-4 0.1175651343283149e-2
        0.2386356198831331e-2 0.6238968252742796e-2 0.2849998395185769e-2 0.2850001604814231e-2""",
    ),
    "pollu": (
        {},
        60.0,
        """0.5646255480022769e-1 0.1342484130422339e+0 0.4139734331099427e-8 0.5523140207484359e-2
        0.2018977262302196e-6 0.1464541863493966e-6 0.7784249118997964e-1 0.3245075353396018e+0
        0.7494013383880406e-2 0.1622293157301561e-7 0.1135863833257075e-7 0.2230505975721359e-2
        0.2087162882798630e-3 0.1396921016840158e-4 0.8964884856898295e-2 0.4352846369330103e-17
        0.6899219696263405e-2 0.1007803037365946e-3 0.1772146513969984e-5 0.5682943292316392e-4""",
    ),
    "van_der_pol": ({}, 2000.0, "0.1706167732170469e1 -0.8928097010248125e-3"),
    "e5": (
        {},
        1e9,
        """3.1317148329356996037e-14 1.4840957952870064294e-16 1.4840957948345691466e-16
        4.5243728279782625194e-26""",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    given, time, values = PUBLISHED[name]
    t, u = PROBLEMS[name].reference(**given)
    np.testing.assert_allclose(
        u[t.tolist().index(time)], np.array(values.split(), dtype=float), rtol=5e-13
    )


def test_van_der_pol_in_both_scales() -> None:
    assert library.van_der_pol(mu=1e6).tspan == (0.0, 2e6)
    assert library.van_der_pol(mu=1e6).p.tolist() == [1e6]
    t, u = library.van_der_pol.reference(mu=1e6)
    assert t[-1] == 2e6
    # on the slow branches u1' is u1 / (mu (1 - u1^2)), up to 1 / mu^2 of itself
    slow = u[1:, 0] / (1e6 * (1 - u[1:, 0] ** 2))
    np.testing.assert_allclose(u[1:, 1], slow, rtol=1e-9)


def test_brusselator_in_space() -> None:
    alpha = torch.linspace(0.01, 0.03, 12, dtype=torch.float64)
    problem = library.brusselator_1d(n=12, alpha=alpha, b=2.0)
    assert problem.u0.shape == (24,) and problem.p.shape == (3, 12)
    expected = np_brusselator(0.0, problem.u0.numpy(), problem.p.numpy())
    np.testing.assert_allclose(problem.f(0.0, problem.u0, problem.p), expected, rtol=1e-12)
    x = np.arange(1, 13) / 13
    np.testing.assert_allclose(problem.u0[:12], 1 + np.sin(2 * np.pi * x), rtol=1e-14)


def test_stiff_linear_any_rates() -> None:
    rates, u0 = [0.5, 3.0, 20.0], [[1.0, 0.0, 2.0], [-0.3, 2.0, 1.0]]
    t, u = library.stiff_linear.reference(p=rates, u0=u0, tspan=(1.0, 2.0))
    matrix = slopes_by_complex_steps(lambda v: np_stiff_linear(0, v, rates), np.zeros(3))
    for time, states in zip(t, u, strict=True):
        flow = mpmath.expm(mpmath.matrix(matrix.tolist()) * (time - 1.0))
        expected = np.array(u0) @ np.array(flow.tolist(), dtype=float).T
        np.testing.assert_allclose(states, expected, rtol=1e-12, atol=1e-13)


def test_prothero_robinson_off_the_curve() -> None:
    t, u = library.prothero_robinson.reference(p=(-2.0,), u0=(1.5,), tspan=(0.0, 3.0))
    np.testing.assert_allclose(u[:, 0], np.cos(t) + 0.5 * np.exp(-2 * t), rtol=1e-14)
