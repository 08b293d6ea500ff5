"""The SDIRK methods: each one a tableau."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Step, pi_controller
from diffsolve.solvers.controllers import Controller
from diffsolve.solvers.sdirk import tableaus
from diffsolve.solvers.sdirk.native import FAMILY
from diffsolve.solvers.sdirk.step import take_step
from diffsolve.solvers.sdirk.tableau import SDIRKTableau
from diffsolve.solvers.stage_rows import RKState
from diffsolve.solvers.tableau_method import Named, TableauMethod


class SDIRK(TableauMethod):
    """Singly diagonally implicit Runge-Kutta method of any tableau, for stiff problems.

    A simplified Newton iteration solves the stages one by one, all with one matrix that is used
    again from step to step. That costs fewer Jacobians and factorisations than a Rosenbrock method,
    and an inexact ``jac`` costs iterations, not accuracy.

    Parameters
    ----------
    tableau
        Its coefficients, checked when the tableau was built. An explicit first stage (ESDIRK) is
        the derivative that the step before left.

    Raises
    ------
    TypeError
        If ``tableau`` is not an ``SDIRKTableau``.

    References
    ----------
    Hairer, Wanner (HW), Solving Ordinary Differential Equations II (1996), sections IV.6 and IV.8;
    Kennedy, Carpenter, Diagonally implicit Runge-Kutta methods for ordinary differential equations:
    a review, NASA/TM-2016-219173.
    """

    is_implicit = True
    family = FAMILY
    tableau_type = SDIRKTableau

    def step(
        self,
        field: VectorField,
        t: Any,
        h: Any,
        state: tuple[Tensor, ...],
        solved: tuple[Tensor, ...] = (),
    ) -> Step:
        return take_step(field, self.tableau.stages, t, h, RKState(*state), solved)

    def default_controller(self) -> Controller:
        # a step that hardly changes keeps its matrix
        return pi_controller(self.tableau.estimate_order, 1.2)


class _Named(Named, SDIRK):
    """A method that is its class's tableau."""


class ImplicitEuler(_Named):
    """The implicit Euler method, order 1, L-stable; the trapezoidal rule estimates its error.

    References
    ----------
    HW, section IV.3.
    """

    coefficients = tableaus.IMPLICIT_EULER


class ImplicitMidpoint(_Named):
    """The implicit midpoint rule, order 2, symplectic; fixed steps, so ``solve`` needs ``dt``.

    References
    ----------
    Hairer, Lubich, Wanner, Geometric Numerical Integration (2006), section II.1.
    """

    coefficients = tableaus.IMPLICIT_MIDPOINT


class Trapezoid(_Named):
    """The trapezoidal rule (Crank-Nicolson), order 2, A-stable; implicit Euler is embedded.

    References
    ----------
    HW, section IV.3.
    """

    coefficients = tableaus.TRAPEZOID


class SDIRK2(_Named):
    """Alexander's L-stable method of order 2 with two stages.

    References
    ----------
    Alexander, SIAM J. Numer. Anal. 14 (1977) 1006.
    """

    coefficients = tableaus.SDIRK2


class TRBDF2(_Named):
    """A trapezoidal stage and one of BDF2: order 2, L-stable, for rough tolerances.

    References
    ----------
    Bank et al., IEEE Trans. CAD 4 (1985) 436; Hosea, Shampine, Appl. Numer. Math. 20 (1996) 21.
    """

    coefficients = tableaus.TRBDF2


class Kvaerno3(_Named):
    """Kvaerno's L-stable ESDIRK method of order 3(2).

    References
    ----------
    Kvaerno, BIT 44 (2004) 489.
    """

    coefficients = tableaus.KVAERNO3


class Kvaerno4(_Named):
    """Kvaerno's L-stable ESDIRK method of order 4(3).

    A stage lies beyond the end of the step, at 1.15 of it. ``f`` is never looked at beyond the end
    of the span or past one of ``tstops``: there it is extrapolated in time, by a cubic polynomial.

    References
    ----------
    Kvaerno, BIT 44 (2004) 489.
    """

    coefficients = tableaus.KVAERNO4


class Kvaerno5(_Named):
    """Kvaerno's L-stable ESDIRK method of order 5(4), for tight tolerances.

    A stage lies beyond the end of the step, at 1.23 of it. ``f`` is never looked at beyond the end
    of the span or past one of ``tstops``: there it is extrapolated in time, by a cubic polynomial.

    References
    ----------
    Kvaerno, BIT 44 (2004) 489.
    """

    coefficients = tableaus.KVAERNO5


class KenCarp3(_Named):
    """The implicit part of Kennedy and Carpenter's additive method of order 3(2), L-stable.

    References
    ----------
    Kennedy, Carpenter, Appl. Numer. Math. 44 (2003) 139.
    """

    coefficients = tableaus.KENCARP3


class KenCarp4(_Named):
    """The implicit part of Kennedy and Carpenter's additive method of order 4(3), L-stable.

    References
    ----------
    Kennedy, Carpenter, Appl. Numer. Math. 44 (2003) 139.
    """

    coefficients = tableaus.KENCARP4


class KenCarp5(_Named):
    """The implicit part of Kennedy and Carpenter's additive method of order 5(4), L-stable.

    References
    ----------
    Kennedy, Carpenter, Appl. Numer. Math. 44 (2003) 139.
    """

    coefficients = tableaus.KENCARP5
