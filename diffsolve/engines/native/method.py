"""A method's and a controller's numbers as the kernels read them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from diffsolve.engines.native.declined import Declined
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.controllers import Controller, IController, PIController, PIDController
from diffsolve.solvers.explicit_rk.methods import ExplicitRK
from diffsolve.solvers.explicit_rk.step import stiffness_stage
from diffsolve.solvers.explicit_rk.tableau import Stages
from diffsolve.solvers.kernels import layout as L


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


class Method:
    """Coefficients of an explicit Runge-Kutta method, and the memory that they lie in.

    Attributes
    ----------
    integers
        The kernels' integers, with those of the method filled in: to be copied.
    rows
        Stages, the extra ones of the interpolant included.
    """

    def __init__(self, stages: Stages, order: int):
        dense = stages.interpolant
        extra = len(dense.c_extra)
        self.stages = stages
        self.n, self.rows = stages.n, stages.n + extra
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
            (L.POLY, dense.polynomial),
            (L.A_EXTRA, a_extra),
            (L.C_EXTRA, np.asarray([*dense.c_extra, 0.0])),
        ):
            if values is not None:
                array = np.ascontiguousarray(values, dtype=np.float64)
                self._arrays.append(array)
                self.integers[slot] = address(array)
        for slot, value in (
            (L.STAGES, stages.n),
            (L.EXTRA, extra),
            (L.DEGREE, dense.polynomial.shape[1]),
            (L.STIFF_STAGE, stiffness_stage(stages)),
            (L.ORDER, order),
        ):
            self.integers[slot] = value


@functools.lru_cache(maxsize=100)
def _method(stages: Stages, order: int) -> Method:
    return Method(stages, order)


def method_of(alg: Algorithm) -> Method:
    """The numbers of an algorithm.

    Raises
    ------
    Declined
        If there is no kernel for its steps.
    """
    kind = type(alg)
    if not isinstance(alg, ExplicitRK) or kind.step is not ExplicitRK.step:
        raise Declined(f"{alg.name} has no compiled step")
    if kind.init is not ExplicitRK.init:
        raise Declined(f"{alg.name} starts in its own way")
    return _method(alg.tableau.stages, alg.order)


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
        raise Declined(f"the controller {kind.__name__} has no compiled form")
