"""What the methods of all families share that are given by a tableau."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm, Step
from diffsolve.solvers.stage_rows import RKInterpolant, RKState, as_scale, constant


class OfTableau(Algorithm):
    """Base of the families' classes that are given by a tableau.

    Raises
    ------
    TypeError
        If ``tableau`` is not one of the family's.
    """

    tableau_type: ClassVar[type]

    def __init__(self, tableau: Any):
        kind = self.tableau_type
        if not isinstance(tableau, kind):
            family = next(c for c in type(self).__mro__ if "tableau_type" in vars(c)).__name__
            raise TypeError(f"{family} needs a {kind.__name__}, got {type(tableau).__name__}")
        self.tableau = tableau

    @property
    def name(self) -> str:
        return self.tableau.name

    def __repr__(self) -> str:
        kind = type(self)
        takes_any_tableau = "tableau_type" in vars(kind)
        return f"{kind.__name__}({self.tableau.name if takes_any_tableau else ''})"


class TableauMethod(OfTableau):
    """Base of the Runge-Kutta-like families, whose state is ``(u, du)``."""

    def __init__(self, tableau: Any):
        super().__init__(tableau)
        self.order = tableau.order
        self.adaptive = tableau.stages.b_error is not None

    @property
    def key(self) -> Any:
        return type(self), self.tableau

    def init(self, field: VectorField, t: Any, u: Tensor, du: Tensor | None = None) -> RKState:
        return RKState(u, field(field.time(t), u) if du is None else du)

    def interpolation_error(self, field: VectorField, h: Any, step: Step) -> Tensor | None:
        weights, dense = self.tableau.stages.b_dense, step.interpolant
        if weights is None or not isinstance(dense, RKInterpolant):
            return None
        return (constant(field, weights) * as_scale(field, h)) @ dense.k


class Named(OfTableau):
    """Mixed into a family's class: the method of one tableau, ``coefficients``."""

    coefficients: ClassVar[Any]

    def __init__(self) -> None:
        super().__init__(self.coefficients)
