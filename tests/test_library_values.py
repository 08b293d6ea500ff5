"""Problems of the library: invariants, and values published elsewhere."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from library_problems import (
    FORMULAS,
    PROBLEMS,
    STIFF,
    np_brusselator,
    np_stiff_linear,
    slopes_by_complex_steps,
)

import diffsolve
from diffsolve import Tsit5, jacobian_sparsity, solve
from diffsolve.problems import library

# Invariants of the stored references: they hold to rounding, whatever the solver was


# -- invariants and published values --------------------------------------------------------------


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
