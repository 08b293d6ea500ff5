"""The tableaus of the Rosenbrock and SDIRK methods do what they claim.

Conditions, measured orders, rejected corruptions, stability at infinity and on the imaginary axis.
Orders are measured on a scalar problem, in extended precision where the platform has it.
"""

from __future__ import annotations

import numpy as np
import pytest
from implicit_tableaus import ROSENBROCK, SDIRK, TABLEAUS, Real, rebuilt

from diffsolve.solvers import order_conditions
from diffsolve.solvers.continuous_extension import Interpolant
from diffsolve.solvers.order_conditions import TableauError
from diffsolve.solvers.rosenbrock import tableaus as rosenbrock
from diffsolve.solvers.rosenbrock.tableau import RosenbrockTableau
from diffsolve.solvers.sdirk import tableaus as sdirk
from diffsolve.solvers.sdirk.tableau import SDIRKTableau

RODAS = [name for name in ROSENBROCK if name.startswith("RODAS")]
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.b_error is not None]
KVAERNO = [name for name in SDIRK if name.startswith("KVAERNO")]
EMBEDDED_IN_STAGE = [name for name in (*RODAS, *KVAERNO) if name != "RODAS5"]

# R at infinity, and whether the method is A-stable
AT_INFINITY = dict.fromkeys(TABLEAUS, 0.0) | {
    "ROS3P": 1 - 3**0.5,
    "ROSENBROCK32": 1.6094757082487305,
    "IMPLICIT_MIDPOINT": -1.0,
    "TRAPEZOID": -1.0,
}
A_STABLE = [name for name in TABLEAUS if name != "ROSENBROCK32"]
STIFFLY_ACCURATE = {*RODAS, *SDIRK} - {"IMPLICIT_MIDPOINT"}

# order of the solution, power of the step size of the error estimate, order of the interpolant
ORDERS = {
    "ROSENBROCK23": (2, 3, 2),
    "ROSENBROCK32": (3, 3, 3),
    "ROS3P": (3, 3, 3),
    "RODAS3": (3, 3, 3),
    "RODAS4": (4, 4, 3),
    "RODAS4P": (4, 4, 3),
    "RODAS5": (5, 5, 4),
    "RODAS5P": (5, 5, 4),
    "IMPLICIT_EULER": (1, 2, 1),
    "IMPLICIT_MIDPOINT": (2, None, 2),
    "TRAPEZOID": (2, 2, 2),
    "SDIRK2": (2, 3, 2),
    "TRBDF2": (2, 3, 2),
    "KVAERNO3": (3, 3, 3),
    "KVAERNO4": (4, 4, 3),
    "KVAERNO5": (5, 5, 4),
    "KENCARP3": (3, 3, 3),
    "KENCARP4": (4, 4, 3),
    "KENCARP5": (5, 5, 4),
}


# A logistic equation that depends on time, with its derivatives and its solution.


def f(t, u):
    return (1 + np.cos(2 * t) / 4) * u * (1 - u)


def f_u(t, u):
    return (1 + np.cos(2 * t) / 4) * (1 - 2 * u)


def f_t(t, u):
    return -np.sin(2 * t) / 2 * u * (1 - u)


def solution(t):
    return 1 / (1 + 3 * np.exp(-t - np.sin(2 * t) / 8))


def rosenbrock_step(form, t, u, h):
    """New state and rows of a step with the transformed stages."""
    k = np.zeros(form.n, Real)
    k[0] = f(t, u)
    matrix = 1 / Real(form.gamma) - h * f_u(t, u)
    for i in range(1, form.n - 1):
        right = f(t + form.c[i] * h, u + h * (form.a[i] @ k))
        k[i] = (right + form.coupling[i] @ k + h * form.d[i] * f_t(t, u)) / matrix
    new = u + h * (form.a[-1] @ k)
    k[-1] = f(t + h, new)
    return new, k


def sdirk_step(form, t, u, h):
    """New state and rows of a step whose stages Newton's method solves to the last digit."""
    k = np.zeros(form.n, Real)
    g = u
    for i in range(form.n):
        time = t + form.c[i] * h
        base = u + h * (form.a[i, :i] @ k[:i])
        k[i] = form.predictor[i] @ k
        for _ in range(60):
            g = base + h * form.a[i, i] * k[i]
            k[i] -= (k[i] - f(time, g)) / (1 - h * form.a[i, i] * f_u(time, g))
        g = base + h * form.a[i, i] * k[i]
    return g, k


def step(tableau, t, u, h):
    take = rosenbrock_step if isinstance(tableau, RosenbrockTableau) else sdirk_step
    return take(tableau.stages, Real(t), Real(u), Real(h))


def local_errors(tableau, h):
    """Largest estimate, and error of the interpolant, of single steps from the exact solution."""
    form, estimate, dense = tableau.stages, 0.0, 0.0
    for t in np.linspace(Real(0), Real(2), 7):
        u = solution(t)
        _, k = step(tableau, t, u, h)
        if form.b_error is not None:
            estimate = max(estimate, abs(h * (form.b_error @ k)))
        for theta in np.linspace(0.1, 0.9, 9):
            value = u + h * (form.interpolant.weights(theta) @ k)
            dense = max(dense, abs(value - solution(t + Real(theta) * h)))
    return np.array([estimate, dense], dtype=float)


def global_error(tableau, n):
    u, h, worst = solution(Real(0)), Real(2) / n, 0.0
    for i in range(n):
        u, _ = step(tableau, i * h, u, h)
        worst = max(worst, float(abs(u - solution((i + 1) * h))))
    return worst


def stability(tableau, z, b=None):
    """Stability function R(z) = 1 + z b (I - z A)^-1 e, from the coefficients of the literature."""
    if isinstance(tableau, RosenbrockTableau):
        a, b = tableau.alpha + tableau.gamma, tableau.b if b is None else b
    else:
        a, b = tableau.stages.a, tableau.stages.a[-1] if b is None else b
    return 1 + z * (b @ np.linalg.solve(np.eye(len(b)) - z * a, np.ones(len(b))))


def changed(values, index, by=1e-7):
    """A copy with one entry changed: too little to see in a plot, too much for a rounding error."""
    copy = np.array(values, dtype=np.float64)
    copy[index] += by
    return copy


def test_the_lists_are_complete():
    for module, kind in ((rosenbrock, RosenbrockTableau), (sdirk, SDIRKTableau)):
        found = {name for name, value in vars(module).items() if isinstance(value, kind)}
        assert found == set(module.__all__)
    assert set(ORDERS) == set(TABLEAUS)


@pytest.mark.parametrize("name", TABLEAUS)
def test_conditions(name, monkeypatch):
    """All of them hold to rounding errors: tighter than what a user's tableau has to meet."""
    monkeypatch.setattr(order_conditions, "TOLERANCE", 1e-13)
    TABLEAUS[name].check()


def test_conditions_see_a_slip_of_one_digit(monkeypatch):
    """KenCarp5 is also in circulation with 7827059040719, which is wrong by 2e-12."""
    monkeypatch.setattr(order_conditions, "TOLERANCE", 1e-13)
    a = np.array(sdirk.KENCARP5.a)
    a[6, 5] = -4269925059573 / 7827059040719
    with pytest.raises(TableauError, match="sum to c"):
        rebuilt(sdirk.KENCARP5, a=a)


@pytest.mark.parametrize("name", TABLEAUS)
def test_order_of_the_solution(name):
    tableau = TABLEAUS[name]
    observed = np.log2(global_error(tableau, 32) / global_error(tableau, 64))
    assert observed == pytest.approx(ORDERS[name][0], abs=0.3)
    assert tableau.order == ORDERS[name][0]


@pytest.mark.parametrize("name", TABLEAUS)
def test_orders_inside_a_step(name):
    tableau, (_, estimate, dense) = TABLEAUS[name], ORDERS[name]
    coarse, fine = local_errors(tableau, 0.05), local_errors(tableau, 0.025)
    observed = np.log2(coarse[1] / fine[1])
    assert observed == pytest.approx(dense + 1, abs=0.3)
    assert tableau.stages.interpolant.order == dense
    if estimate is not None:
        # the leading term of Rodas5's estimate is so small that the next one still shows
        tolerance = 0.6 if name == "RODAS5" else 0.3
        assert np.log2(coarse[0] / fine[0]) == pytest.approx(estimate, abs=tolerance)
        assert tableau.estimate_order == estimate


@pytest.mark.parametrize("name", TABLEAUS)
def test_claimed_orders_are_the_lowest(name):
    tableau = TABLEAUS[name]
    with pytest.raises(TableauError):
        rebuilt(tableau, order=tableau.order + 1)
    if tableau.b_error is not None:
        with pytest.raises(TableauError, match="embedded"):
            rebuilt(tableau, error_order=tableau.error_order + 1)
    if tableau.interpolant is not None:
        finer = Interpolant(tableau.interpolant.order + 1, tableau.interpolant.polynomial)
        with pytest.raises(TableauError, match="interpolant"):
            rebuilt(tableau, interpolant=finer)


@pytest.mark.parametrize("name", TABLEAUS)
def test_corrupted_coefficients_are_rejected(name):
    tableau = TABLEAUS[name]
    dense = tableau.stages.interpolant
    polynomial = changed(dense.polynomial, (1, 0))
    corruptions = [{"b": changed(tableau.b, 0)}, {"interpolant": Interpolant(2, polynomial)}]
    if tableau.order == 1:
        corruptions[1]["interpolant"] = Interpolant(1, polynomial)
    last = len(tableau.b) - 1
    if isinstance(tableau, RosenbrockTableau):
        corruptions.append({"alpha": changed(tableau.alpha, (last, 0))})
        corruptions.append({"gamma": changed(tableau.gamma, (last, 0))})
        corruptions.append({"gamma": tableau.gamma + 1e-7 * np.eye(last + 1)})
        corruptions.append({"gamma": changed(tableau.gamma, (1, 1))})
    else:
        corruptions.append({"c": changed(tableau.c, last)})
        corruptions.append({"a": changed(tableau.a, (last, 0))})
        corruptions.append({"a": changed(tableau.a, (last, last))})
        # keeps the row sum, so that only the order conditions can see it
        row = last - 1
        if tableau.order > 2:
            a = changed(changed(tableau.a, (row, 0)), (row, row - 1), -1e-7)
            corruptions.append({"a": a})
    if tableau.b_error is not None:
        corruptions.append({"b_error": changed(tableau.b_error, 0)})
    rebuilt(tableau)  # unchanged, it passes
    for changes in corruptions:
        with pytest.raises(TableauError):
            rebuilt(tableau, **changes)


@pytest.mark.parametrize("name", TABLEAUS)
def test_rows(name):
    """Row 0 is the start, the last row the new point, and nothing looks ahead."""
    form = TABLEAUS[name].stages
    n = form.n
    assert form.c[0] == 0 and form.c[-1] == 1
    assert form.a.shape == (n, n) and not np.any(np.triu(form.a, 1)) and not np.any(form.a[0])
    assert form.b_error is None or form.b_error.shape == (n,)
    assert form.b_error_low is None
    if name in ROSENBROCK:
        assert not np.any(form.a[:, 0]) and not np.any(form.a[:, -1])
        assert not np.any(np.triu(form.coupling)) and not np.any(form.coupling[[0, -1]])
        assert form.d[0] == form.d[-1] == 0
    else:
        np.testing.assert_array_equal(form.implicit, form.a.diagonal() != 0)
        assert set(form.a.diagonal()) <= {0.0, form.gamma}
        assert not form.implicit[0] and not np.any(np.triu(form.predictor))


@pytest.mark.parametrize("name", ROSENBROCK)
def test_transformed_stages_are_the_stages_of_the_literature(name):
    """V = Gamma K, on a nonlinear system that depends on time."""
    tableau = ROSENBROCK[name]
    form, gamma, s = tableau.stages, tableau.gamma, len(tableau.b)
    rng = np.random.default_rng(0)
    linear, force, u = rng.standard_normal((3, 3)), rng.standard_normal(3), rng.standard_normal(3)
    t, h = 0.3, 0.1

    def field(t, u):
        return linear @ u - u**3 + force * np.sin(3 * t)

    jac, time = linear - np.diag(3 * u**2), 3 * force * np.cos(3 * t)

    K = np.zeros((s, 3))
    for i in range(s):
        right = field(t + tableau.alpha[i].sum() * h, u + h * (tableau.alpha[i] @ K))
        right += h * jac @ (gamma[i, :i] @ K[:i]) + h * gamma[i].sum() * time
        K[i] = np.linalg.solve(np.eye(3) - h * form.gamma * jac, right)

    V = np.zeros((form.n, 3))
    matrix = np.eye(3) / form.gamma - h * jac
    for i in range(1, s + 1):
        right = field(t + form.c[i] * h, u + h * (form.a[i] @ V)) + h * form.d[i] * time
        V[i] = np.linalg.solve(matrix, right + form.coupling[i] @ V)

    np.testing.assert_allclose(V[1:-1], gamma @ K, rtol=0, atol=1e-11 * np.abs(K).max())
    np.testing.assert_allclose(form.a[-1] @ V, tableau.b @ K, rtol=0, atol=1e-11)
    np.testing.assert_allclose(form.b_error @ V, tableau.b_error @ K, rtol=0, atol=1e-11)


def test_both_forms_make_the_same_tableau():
    """A table in transformed form, through alpha and Gamma, comes back."""
    for name in ROSENBROCK:
        tableau = ROSENBROCK[name]
        form, again = tableau.stages, rebuilt(tableau).stages
        size = np.abs(form.coupling).max() + np.abs(form.a).max() + 1
        for key in ("a", "c", "coupling", "d", "b_error"):
            left, right = getattr(form, key), getattr(again, key)
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-13 * size**2, err_msg=name)


def test_transformed_table_is_checked():
    form = rosenbrock.RODAS4.stages
    inner = slice(1, -1)
    table = {
        "gamma": form.gamma,
        "a": form.a[inner, inner],
        "c": form.coupling[inner, inner],
        "m": form.a[-1, inner],
        "e": form.b_error[inner],
        "nodes": form.c[inner],
        "d": form.d[inner],
    }

    def built(**changes):
        return RosenbrockTableau.from_transformed("x", "y", 4, **table | changes)

    built()
    assert np.allclose(built(nodes=None, d=None).stages.c, form.c, rtol=0, atol=1e-13)
    for key, index in {"a": (3, 1), "c": (3, 1), "m": 2, "e": 2, "nodes": 2, "d": 2}.items():
        with pytest.raises(TableauError):
            built(**{key: changed(table[key], index)})
    with pytest.raises(TableauError):
        built(gamma=form.gamma + 1e-7)


def test_ros3p_has_the_published_transformed_coefficients():
    """Lang and Verwer print both forms. The fourth stage, and with it the estimate, is ours."""
    form = rosenbrock.ROS3P.stages
    np.testing.assert_allclose(form.a[-1, 1:-1], (2, 0.5773502691896258, 0.4226497308103742, 0))
    np.testing.assert_allclose(
        form.d[1:-2], (0.7886751345948129, -0.2113248654051871, -1.0773502691896260)
    )
    np.testing.assert_allclose(form.b_error[2:4], 0, atol=1e-15)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_no_estimate_is_blind(name, recwarn):
    TABLEAUS[name].check()
    assert not recwarn.list


def test_blind_estimates_are_told():
    """The published weights of Rodas5 and ROS3P, and a difference of two rules of one node."""
    e = np.zeros(9)
    e[7] = 1.0
    rodas = rosenbrock.RODAS5
    published = e @ rodas.gamma  # of V into those of K
    with pytest.warns(UserWarning, match=r"Rodas5: .* u' = g\(t\)"):
        rebuilt(rodas, b_error=published)
    with pytest.warns(UserWarning, match=r"ROS3P: .* linear systems"):
        rebuilt(rosenbrock.ROS3P, b_error=(1 / 3, -1 / 3, 0, 0))


def test_rosenbrock23_is_ode23s():
    """One step as Shampine and Reichelt write it."""
    t, u, h = Real(0.4), solution(Real(0.4)), Real(0.1)
    d, e32 = 1 / (2 + np.sqrt(Real(2))), 6 + np.sqrt(Real(2))
    w, time = 1 - h * d * f_u(t, u), f_t(t, u)
    f0 = f(t, u)
    k1 = (f0 + h * d * time) / w
    f1 = f(t + h / 2, u + h / 2 * k1)
    k2 = (f1 - k1) / w + k1
    new = u + h * k2
    f2 = f(t + h, new)
    k3 = (f2 - e32 * (k2 - f1) - 2 * (k1 - f0) + h * d * time) / w

    found, rows = step(rosenbrock.ROSENBROCK23, t, u, h)
    form = rosenbrock.ROSENBROCK23.stages
    assert found == pytest.approx(new, abs=1e-15)
    # up to the sign, which the paper leaves open
    assert -form.b_error @ rows == pytest.approx((k1 - 2 * k2 + k3) / 6, abs=1e-15)
    theta = 0.3
    expected = (theta * (1 - theta) * k1 + theta * (theta - 2 * d) * k2) / (1 - 2 * d)
    assert form.interpolant.weights(theta) @ rows == pytest.approx(expected, abs=1e-15)


def test_rosenbrock23_and_32_embed_each_other():
    two, three = rosenbrock.ROSENBROCK23, rosenbrock.ROSENBROCK32
    np.testing.assert_allclose(two.b - two.b_error, three.b, rtol=0, atol=1e-15)
    np.testing.assert_allclose(three.b - three.b_error, two.b, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", EMBEDDED_IN_STAGE)
def test_embedded_solution_is_the_last_but_one_stage(name):
    """The order conditions do not see the sign of an estimate; this does."""
    form = TABLEAUS[name].stages
    np.testing.assert_allclose(form.a[-1] - form.b_error, form.a[-2], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "row", "weight"),
    [
        ("IMPLICIT_EULER", 0, 1 / 2),
        ("TRAPEZOID", 1, 1),
        ("TRBDF2", 2, (2 - 2**0.5) / 6),
        ("KENCARP3", 3, 2193209047091 / 5459859503100),
        ("KENCARP4", 5, 61727 / 225920),
        ("KENCARP5", 7, 4035322873751 / 18575991585200),
    ],
)
def test_error_estimate_is_solution_minus_embedded_solution(name, row, weight):
    form = SDIRK[name].stages
    assert form.a[-1, row] - form.b_error[row] == pytest.approx(weight, abs=1e-15)


def test_embedded_solution_of_sdirk2_is_a_quadrature():
    form = sdirk.SDIRK2.stages
    weights = form.a[-1] - form.b_error
    for power in range(3):
        assert weights @ form.c**power == pytest.approx(1 / (power + 1), abs=1e-15)


def test_estimates_over_the_stages_alone():
    """As the literature gives them; the derivative at the start of the step takes no part then."""
    b = sdirk.SDIRK2.b
    form = rebuilt(sdirk.SDIRK2, b_error=b - (1, 0), error_order=1).stages
    np.testing.assert_array_equal(form.b_error, (0, b[0] - 1, b[1]))


@pytest.mark.parametrize("name", TABLEAUS)
def test_stability_at_infinity(name):
    assert stability(TABLEAUS[name], -1e8) == pytest.approx(AT_INFINITY[name], abs=1e-5)


@pytest.mark.parametrize("name", A_STABLE)
def test_a_stability(name):
    """|R(iy)| <= 1; the poles, all at 1/gamma, are right of the axis."""
    y = np.concatenate([np.linspace(0, 20, 401), np.logspace(1, 5, 401)])
    # rounding errors of the solves with large coefficients
    assert max(abs(stability(TABLEAUS[name], 1j * x)) for x in y) <= 1 + 1e-10


def test_rosenbrock32_is_stable_on_a_finite_interval():
    inside = [abs(stability(rosenbrock.ROSENBROCK32, -x)) for x in np.linspace(0, 27.13, 300)]
    assert max(inside) <= 1
    assert abs(stability(rosenbrock.ROSENBROCK32, -27.14)) > 1


@pytest.mark.parametrize("name", [*KVAERNO, "KENCARP3", "KENCARP4", "KENCARP5", *RODAS, "ROS3P"])
def test_unsmoothed_estimates_are_bounded(name):
    """The embedded solution is stable at infinity too."""
    tableau = TABLEAUS[name]
    if name in ROSENBROCK:
        embedded = tableau.b - tableau.b_error
    else:
        embedded = tableau.stages.a[-1] - tableau.stages.b_error
        assert not tableau.smoothed
    assert abs(stability(tableau, -1e8, embedded)) < 1


@pytest.mark.parametrize("name", ["IMPLICIT_EULER", "TRAPEZOID", "SDIRK2", "TRBDF2"])
def test_unbounded_estimates_are_smoothed(name):
    tableau = SDIRK[name]
    assert tableau.smoothed and tableau.stages.smoothed
    z = -1e8
    estimate = stability(tableau, z) - stability(
        tableau, z, tableau.stages.a[-1] - tableau.stages.b_error
    )
    assert abs(estimate) > 1e6
    assert abs(estimate / (1 - tableau.stages.gamma * z)) < 5


@pytest.mark.parametrize("name", TABLEAUS)
def test_stiff_accuracy(name):
    tableau = TABLEAUS[name]
    assert tableau.stiffly_accurate == (name in STIFFLY_ACCURATE)
    if name in SDIRK:
        assert tableau.stages.implicit[-1] == tableau.stiffly_accurate
