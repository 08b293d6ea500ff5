"""Implicit tableaus: interpolants, predictors, and shapes that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from implicit_tableaus import ROSENBROCK, SDIRK, TABLEAUS, Real, rebuilt

from diffsolve.solvers.continuous_extension import Interpolant
from diffsolve.solvers.order_conditions import TableauError
from diffsolve.solvers.rosenbrock import tableaus as rosenbrock
from diffsolve.solvers.sdirk import tableaus as sdirk
from diffsolve.solvers.sdirk.tableau import extrapolations

# -- inside a step, and what users give ------------------------------------------------------------


def test_known_derivative_at_the_new_point():
    """Rosenbrock23's last stage evaluates f at the new point, as do the stages for estimates."""
    known = {name: form.at_end for name, t in ROSENBROCK.items() if (form := t.stages).at_end}
    assert known == {"RODAS5": 9, "ROS3P": 4, "ROSENBROCK23": 3}


@pytest.mark.parametrize("name", TABLEAUS)
def test_interpolant_meets_both_ends(name):
    form = TABLEAUS[name].stages
    dense = form.interpolant
    assert dense.polynomial.shape[0] == form.n and not dense.c_extra
    scale = max(1.0, np.abs(dense.polynomial).max())
    np.testing.assert_allclose(dense.weights(0.0), 0 * form.c, rtol=0, atol=0)
    np.testing.assert_allclose(dense.weights(1.0), form.a[-1], rtol=0, atol=1e-14 * scale)


DERIVED = ["KVAERNO4", "KVAERNO5", "KENCARP4", "KENCARP5"]


@pytest.mark.parametrize("name", sorted({*SDIRK, "ROSENBROCK32", "ROS3P", "RODAS3"} - {*DERIVED}))
def test_hermite_interpolants_have_the_slopes_of_both_ends(name):
    form = TABLEAUS[name].stages
    for theta, row in ((0.0, 0), (1.0, form.n - 1)):
        slope = form.interpolant.weights(theta, derivative=1)
        np.testing.assert_allclose(slope, np.eye(form.n)[row], rtol=0, atol=1e-13)


def stiff_rows(form, z, g, u):
    """Rows of a step of size 1 of ``u' = z u + g(t)`` from ``u`` at 0."""
    k = np.zeros(form.n, Real)
    k[0] = z * u + g(0.0)
    for i in range(1, form.n):
        right = z * (u + form.a[i, :i] @ k[:i]) + g(form.c[i])
        k[i] = right / (1 - z * form.a[i, i])
    return k


@pytest.mark.parametrize("name", DERIVED)
def test_derived_interpolants_are_bounded_at_infinity(name):
    """What a cubic Hermite polynomial is not: a fast transient stays between its ends."""
    form = SDIRK[name].stages
    theta = np.linspace(0, 1, 21)
    rows = stiff_rows(form, Real(-1e6), lambda t: 0.0, Real(1))
    assert np.abs(1 + form.interpolant.weights(theta) @ rows).max() <= 1 + 1e-5


@pytest.mark.parametrize(("name", "degree"), [(name, 3) for name in ("KENCARP4", "KENCARP5")])
def test_derived_interpolants_of_stiff_problems(name, degree):
    """Prothero and Robinson's problem with the solution ``t**degree``."""
    form, z = SDIRK[name].stages, Real(-1e8)
    theta = np.linspace(0, 1, 21)
    rows = stiff_rows(form, z, lambda t: degree * t ** (degree - 1) - z * t**degree, Real(0))
    off = form.interpolant.weights(theta) @ rows - theta**degree
    assert np.abs(off).max() <= 1e-6


@pytest.mark.parametrize("name", SDIRK)
def test_predictors_extrapolate(name):
    """Exactly for a derivative that is a polynomial through the rows that they use."""
    form = SDIRK[name].stages
    for i in np.flatnonzero(form.implicit):
        row = form.predictor[i]
        used = np.flatnonzero(row)
        assert len(used) and used.max() < i
        if np.any(np.isclose(form.c[:i], form.c[i])):
            assert list(row[used]) == [1.0] and np.isclose(form.c[used[0]], form.c[i])
            continue
        for power in range(len(used)):
            assert row @ form.c**power == pytest.approx(form.c[i] ** power, abs=1e-12)
        assert np.abs(row).sum() < 15


def test_default_predictors():
    """The latest row at the same node, else the latest three distinct nodes."""
    c = np.array([0.0, 0.5, 0.5, 0.25, 1.0, 0.5])
    rows = extrapolations(c, np.arange(6) > 0)
    np.testing.assert_allclose(rows[1], (1, 0, 0, 0, 0, 0))
    np.testing.assert_allclose(rows[2], (0, 1, 0, 0, 0, 0))
    np.testing.assert_allclose(rows[3], (0.5, 0, 0.5, 0, 0, 0))
    np.testing.assert_allclose(rows[4], (3, 0, 6, -8, 0, 0))
    np.testing.assert_allclose(rows[5], (0, 0, 1, 0, 0, 0))


def test_predictors_of_the_user():
    parts = {"predictor": {2: (1 / 4, 3 / 4)}}
    found = rebuilt(sdirk.TRBDF2, **parts).stages.predictor
    np.testing.assert_array_equal(found[2], (1 / 4, 3 / 4, 0))
    np.testing.assert_array_equal(found[1], sdirk.TRBDF2.stages.predictor[1])
    for bad, words in (
        ({2: (1 / 4, 1 / 4)}, "predictors"),
        ({0: ()}, "row 0"),
        ({1: (1 / 2, 1 / 2)}, "row 1"),
        ({3: (1,)}, "row 3"),
    ):
        with pytest.raises(TableauError, match=words):
            rebuilt(sdirk.TRBDF2, predictor=bad)


SHAPES = SimpleNamespace(
    rosenbrock=[
        ({"b": (0, 1, 0, 0)}, "gamma is not"),
        ({"alpha": ((1,), (1 / 2,), (0, 1))}, "row 0"),
        ({"gamma": ((0,), (0, 0), (0, 0, 0))}, "gamma is not"),
        ({"b_error": (1, -1)}, "b_error has shape"),
        ({"interpolant": Interpolant(2, np.ones((4, 2)))}, "rows for 5"),
    ],
    sdirk=[
        ({"b": (1,)}, "b has shape"),
        ({"a": ((), (1 / 4, 1 / 4, 1), (0, 0, 1 / 4))}, "row 1"),
        ({"a": ((), (1 / 4, 0), (0, 0, 1 / 4))}, "diagonal"),
        ({"c": (0.1, 0.5, 1)}, "first node"),
        ({"b_error": (1, -1)}, "b_error has shape"),
        ({"interpolant": Interpolant(2, np.ones((4, 2)))}, "rows for 3"),
    ],
)


@pytest.mark.parametrize(("changes", "words"), SHAPES.rosenbrock)
def test_shapes_of_rosenbrock_tableaus(changes, words):
    with pytest.raises(TableauError, match=words):
        rebuilt(rosenbrock.ROSENBROCK23, **changes)


@pytest.mark.parametrize(("changes", "words"), SHAPES.sdirk)
def test_shapes_of_sdirk_tableaus(changes, words):
    with pytest.raises(TableauError, match=words):
        rebuilt(sdirk.TRBDF2, **changes)
