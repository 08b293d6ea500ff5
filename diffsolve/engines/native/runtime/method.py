"""A method's and a controller's numbers as the kernels read them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from diffsolve.engines.native.declined import Declined
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.controllers import Controller, IController, PIController, PIDController
from diffsolve.solvers.explicit_rk.step import stiffness_stage
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.sdirk.tableau import INSIDE


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


class Method:
    """Coefficients of a one-step method, and the memory that they lie in.

    Attributes
    ----------
    family
        Name of the folder that its kernels come from.
    integers
        The kernels' integers, with those of the method filled in: to be copied.
    n, rows
        Stages without and with the extra ones of the interpolant.
    degree
        Of the interpolant.
    is_implicit, needs_jvp
        Whether steps need the Jacobian, and products with one that is not at hand.
    """

    def __init__(self, family: str, stages: Any, order: int):
        dense = stages.interpolant
        extra = len(dense.c_extra)
        self.family, self.stages = family, stages
        self.n, self.rows = stages.n, stages.n + extra
        self.degree = dense.polynomial.shape[1]
        self.is_implicit, self.needs_jvp = family != "explicit_rk", family == "sdirk"
        a_extra = np.zeros((max(extra, 1), self.rows))
        for i, row in enumerate(dense.a_extra):
            a_extra[i, : len(row)] = row
        self.integers = np.zeros(L.N_INTEGERS, np.int64)
        self._arrays: list[np.ndarray] = []
        for slot, values in (
            (L.A, stages.a),
            (L.C, stages.c),
            (L.B_ERROR, stages.b_error),
            (L.B_LOW, stages.b_error_low),
            (L.B_DENSE, stages.b_dense),
            (L.POLY, dense.bernstein),
            (L.A_EXTRA, a_extra),
            (L.C_EXTRA, [*dense.c_extra, 0.0]),
        ):
            self._write(slot, values)
        if self.is_implicit:
            self._write(L.GAMMA, [stages.gamma])
        if family == "rosenbrock":
            self._write(L.COUPLING, stages.coupling)
            self._write(L.TIME_WEIGHTS, stages.d)
        if family == "sdirk":
            self._write(L.PREDICTOR, stages.predictor)
            self._write(L.IMPLICIT, stages.implicit, np.int64)
            self._write(L.INSIDE, np.vstack([INSIDE, stages.inside]))
        for slot, value in (
            (L.STAGES, stages.n),
            (L.EXTRA, extra),
            (L.DEGREE, self.degree),
            (L.STIFF_STAGE, 0 if self.is_implicit else stiffness_stage(stages)),
            (L.AT_END, stages.at_end if family == "rosenbrock" else 0),
            (L.SMOOTHED, family == "sdirk" and stages.smoothed),
            (L.ORDER, order),
            (L.DENSE_ROWS, 1 + self.rows),
        ):
            self.integers[slot] = value

    def _write(self, slot: int, values: Any, dtype: Any = np.float64) -> None:
        if values is not None:
            array = np.ascontiguousarray(values, dtype=dtype)
            self._arrays.append(array)
            self.integers[slot] = address(array)


@functools.lru_cache(maxsize=100)
def _method(family: str, stages: Any, order: int) -> Method:
    return Method(family, stages, order)


def method_of(alg: Algorithm) -> Method:
    """The numbers of an algorithm.

    Raises
    ------
    Declined
        If there is no kernel for its steps.
    """
    kind = type(alg)
    if alg.kernels is None:
        raise Declined(f"{alg.name} has no program step")
    base = next(c for c in kind.__mro__ if "kernels" in vars(c))
    if kind.step is not base.step:
        raise Declined(f"{alg.name} has no program step")
    if kind.init is not base.init:
        raise Declined(f"{alg.name} starts in its own way")
    found: Any = alg
    return _method(alg.kernels, found.tableau.stages, alg.order)


def set_controller(controller: Controller, integers: Any, reals: Any) -> None:
    """Write a controller's kind and constants.

    Raises
    ------
    Declined
        If it is the user's own.
    """
    kind = type(controller)
    reals[L.SAFETY] = controller.safety
    reals[L.FACTOR_MIN], reals[L.FACTOR_MAX] = controller.factor_min, controller.factor_max
    reals[L.STEADY] = controller.steady
    if kind is PIController:
        integers[L.CONTROLLER] = L.PI
        reals[L.BETA1], reals[L.BETA2] = controller.beta1, controller.beta2  # type: ignore[attr-defined]
    elif kind is IController:
        integers[L.CONTROLLER] = L.INTEGRAL
        reals[L.BETA1] = controller.exponent  # type: ignore[attr-defined]
    elif kind is PIDController:
        integers[L.CONTROLLER] = L.PID
        beta, k = controller.beta, controller.k  # type: ignore[attr-defined]
        reals[L.BETA1], reals[L.BETA2], reals[L.BETA3] = [x / k for x in beta]
        reals[L.BETA_PLAIN] = 1 / k
    else:
        raise Declined(f"the controller {kind.__name__} has no program form")
