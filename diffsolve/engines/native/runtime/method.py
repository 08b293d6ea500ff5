"""A method's and a controller's numbers as the kernels read them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from diffsolve.engines.declined import Declined
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.controllers import Controller, IController, PIController, PIDController
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.family import Family


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


class MethodNumbers:
    """The numbers of a method as kernels read them, and the memory that they lie in.

    Attributes
    ----------
    family, stages
        The family of the method, and what it makes the numbers of (``Family.write``).
    integers
        The kernels' integers, with those of the method filled in: to be copied.
    n, rows
        Stages without and with the extra ones of the interpolant.
    degree
        Of the interpolant.
    """

    def __init__(self, family: Family, stages: Any, order: float):
        self.family, self.stages = family, stages
        self.integers = np.zeros(L.N_INTEGERS, np.int64)
        self._arrays: list[np.ndarray] = []
        self.number(L.ORDER, int(order))
        family.write(self, stages)
        self.n, extra, self.degree = self.integers[[L.STAGES, L.EXTRA, L.DEGREE]].tolist()
        self.rows = self.n + extra

    @property
    def is_implicit(self) -> bool:
        """Whether steps need the Jacobian."""
        return self.family.is_implicit

    def array(self, slot: int, values: Any, dtype: Any = np.float64) -> None:
        """Keep an array, and note its address; None: leave the slot zero."""
        if values is not None:
            array = np.ascontiguousarray(values, dtype=dtype)
            self._arrays.append(array)
            self.integers[slot] = address(array)

    def number(self, slot: int, value: int) -> None:
        self.integers[slot] = value


@functools.lru_cache(maxsize=100)
def _method(family: Family, stages: Any, order: float) -> MethodNumbers:
    return MethodNumbers(family, stages, order)


def method_of(alg: Algorithm) -> MethodNumbers:
    """The numbers of an algorithm.

    Raises
    ------
    Declined
        If there is no kernel for its steps.
    """
    kind = type(alg)
    if alg.family is None:
        raise Declined(f"{alg.name} has no compiled step")
    base = next(c for c in kind.__mro__ if "family" in vars(c))
    if kind.step is not base.step:
        raise Declined(f"{alg.name} has no compiled step")
    if kind.init is not base.init:
        raise Declined(f"{alg.name} starts in its own way")
    method: Any = alg
    return _method(alg.family, method.tableau.stages, alg.order)


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
        raise Declined(f"the controller {kind.__name__} has no compiled form")
