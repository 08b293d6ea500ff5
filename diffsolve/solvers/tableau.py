"""What the tableaus of all families share: their fields, their rows in a step, and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffsolve.solvers.continuous_extension import Interpolant
from diffsolve.solvers.interpolation_error import interpolation_error
from diffsolve.solvers.order_conditions import (
    Array,
    TableauError,
    check_order,
    elementary_weights,
    warn_if_blind,
)


def as_array(values: ArrayLike | None) -> Array | None:
    """``values`` in float64; None stays None."""
    return None if values is None else np.asarray(values, dtype=np.float64)


class Frozen:
    """Base of frozen dataclasses with an ``__init__`` of their own, which sets the fields once.

    They are hashed by identity: code and tables that belong to one are found by it.
    """

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False, kw_only=True)
class StepRows:
    """A tableau in the form of the step, over ``n`` rows.

    Row 0 is the derivative at the start of the step, the last row the one at the new point.

    Attributes
    ----------
    a
        ``(n, n)``, lower triangular; its last row holds the weights of the solution.
    c
        ``n`` nodes.
    b_error, b_error_low
        ``n`` weights of the error estimate and of the second one, or None.
    interpolant
        Continuous extension over the ``n`` rows.
    """

    a: Array
    c: Array
    b_error: Array | None
    b_error_low: Array | None = None
    interpolant: Interpolant

    @property
    def n(self) -> int:
        return len(self.c)

    @cached_property
    def b_dense(self) -> Array | None:
        """``n`` weights of an estimate of the interpolant's error; None: the step's own will do."""
        known = self.interpolant.error
        return self.dense_error() if known is None else known

    def dense_error(self) -> Array | None:
        """``b_dense`` where the interpolant brings none."""
        raise NotImplementedError

    def elementary_weights(self, order: int) -> dict[tuple, Array]:
        """Elementary weights of the rows, for every tree up to ``order``."""
        return elementary_weights(self.a, order)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImplicitRows(StepRows):
    """Rows of an implicit method.

    Attributes
    ----------
    gamma
        Diagonal coefficient.
    smoothed
        Whether the estimate is multiplied by ``(I - h gamma J)^-1``.
    """

    gamma: float
    smoothed: bool = False

    def dense_error(self) -> Array | None:
        return interpolation_error(self, self.smoothed)

    def linear_rows(self, z: float, u: float, g: Callable[[float], float], slope: float) -> Array:
        """Rows of a step of size 1 of ``u' = z u + g(t)`` from ``u``, ``slope`` being ``g'(0)``."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class RungeKuttaTableau(Frozen):
    """Base of the tableaus of explicit, Rosenbrock and SDIRK methods; see there."""

    name: str
    source: str
    order: int
    b: Array
    b_error: Array | None
    error_order: int | None
    interpolant: Interpolant | None
    stages: Any = dataclasses.field(init=False, repr=False)

    def _set_common(
        self,
        name: str,
        source: str,
        order: int,
        b: ArrayLike,
        b_error: ArrayLike | None,
        error_order: int | None,
        interpolant: Interpolant | None,
    ) -> None:
        self._set(
            name=name,
            source=source,
            order=order,
            b=as_array(b),
            b_error=as_array(b_error),
            error_order=order - 1 if error_order is None else error_order,
            interpolant=interpolant,
        )

    @property
    def estimate_order(self) -> int:
        """Power of the step size that the error estimate falls with."""
        return min(self.order, self.error_order or 1) + 1

    def _require_weights(self, s: int) -> None:
        if self.b.shape != (s,):
            raise TableauError(f"{self.name}: b has shape {self.b.shape}, c has {s} nodes")

    def _require_first_node(self, node: float) -> None:
        if node != 0:
            raise TableauError(f"{self.name}: the first node is {node}, not 0")

    def _check_embedded(
        self, nodes: Array, a: Array, b: Array, b_error: Array | None, beta: Array | None = None
    ) -> None:
        """Check the embedded solution, and that the estimate is not zero for all problems."""
        if b_error is None:
            return
        label = f"{self.name}: embedded solution"
        check_order(label, a, b - b_error, self.error_order or 1, beta=beta)
        warn_if_blind(self.name, nodes, a if beta is None else beta, b_error)

    def _check_dense(
        self,
        a: Array,
        beta: Array | None = None,
        to_stages: Callable[[Array], Array] = lambda weights: weights,
    ) -> None:
        """Check the interpolant at four points.

        Parameters
        ----------
        a, beta
            Coefficients of its rows, as in ``check_order``.
        to_stages
            From weights of the rows to weights of the stages that ``a`` is for.
        """
        dense = self.stages.interpolant
        for theta in (0.25, 0.5, 0.75, 1.0):
            label = f"{self.name}: interpolant at theta={theta}"
            check_order(label, a, to_stages(dense.weights(theta)), dense.order, theta, beta)

    def _require_dense_rows(self) -> None:
        """Refuse an interpolant with other rows than those of the step."""
        dense, n = self.stages.interpolant, self.stages.n
        if len(dense.polynomial) != n or dense.c_extra:
            raise TableauError(
                f"{self.name}: the interpolant has {len(dense.polynomial)} rows for {n} of the step"
            )
