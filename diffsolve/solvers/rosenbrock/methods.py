"""The Rosenbrock methods: each one a tableau."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Step, pi_controller
from diffsolve.solvers.controllers import Controller
from diffsolve.solvers.rosenbrock import tableaus
from diffsolve.solvers.rosenbrock.native import FAMILY
from diffsolve.solvers.rosenbrock.step import take_step
from diffsolve.solvers.rosenbrock.tableau import RosenbrockTableau
from diffsolve.solvers.stage_rows import RKState
from diffsolve.solvers.tableau_method import Named, TableauMethod


class Rosenbrock(TableauMethod):
    """Rosenbrock method of any tableau: linearly implicit, for stiff problems.

    Each step evaluates the Jacobian of ``f`` and its derivative by time, factors one matrix, and
    solves a linear system a stage. No iteration can fail, and the error estimates are sharp, which
    makes these methods the first choice for small stiff systems at moderate tolerances. They rely
    on the exact Jacobian: a ``jac`` that is only roughly right lowers the order.

    Parameters
    ----------
    tableau
        Its coefficients, checked when the tableau was built.

    Raises
    ------
    TypeError
        If ``tableau`` is not a ``RosenbrockTableau``.

    References
    ----------
    Hairer, Wanner (HW), Solving Ordinary Differential Equations II (1996), section IV.7.
    """

    is_implicit = True
    has_jacobian_inside = True
    family = FAMILY
    tableau_type = RosenbrockTableau

    def step(self, field: VectorField, t: Any, h: Any, state: tuple[Tensor, ...]) -> Step:
        return take_step(field, self.tableau.stages, t, h, RKState(*state))

    def default_controller(self) -> Controller:
        return pi_controller(self.tableau.estimate_order)


class _Named(Named, Rosenbrock):
    """A method that is its class's tableau."""


class Rosenbrock23(_Named):
    """The L-stable method of order 2 behind MATLAB's ode23s, for rough tolerances.

    Its estimate has order 3, its continuous extension order 2.

    References
    ----------
    Shampine, Reichelt, SIAM J. Sci. Comput. 18 (1997) 1.
    """

    coefficients = tableaus.ROSENBROCK23


class Rosenbrock32(_Named):
    """The companion of order 3 to ``Rosenbrock23``, which is not A-stable.

    References
    ----------
    Shampine, Reichelt, SIAM J. Sci. Comput. 18 (1997) 1.
    """

    coefficients = tableaus.ROSENBROCK32


class ROS3P(_Named):
    """Lang and Verwer's A-stable method of order 3, without order reduction for parabolic problems.

    The published error estimate is zero for linear systems with constant coefficients; this one
    sees them, by a stage more that costs no evaluation of ``f``.

    References
    ----------
    Lang, Verwer, BIT 41 (2001) 731.
    """

    coefficients = tableaus.ROS3P


class Rodas3(_Named):
    """Stiffly accurate L-stable method of order 3(2) with four stages.

    References
    ----------
    Sandu et al., Atmos. Environ. 31 (1997) 3459.
    """

    coefficients = tableaus.RODAS3


class Rodas4(_Named):
    """Hairer and Wanner's stiffly accurate L-stable method of order 4(3), their code RODAS.

    References
    ----------
    HW, section VI.4.
    """

    coefficients = tableaus.RODAS4


class Rodas4P(_Named):
    """Variant of ``Rodas4`` that keeps its order for parabolic and very stiff problems.

    References
    ----------
    Steinebach, Preprint 1741, TH Darmstadt (1995).
    """

    coefficients = tableaus.RODAS4P


class Rodas5(_Named):
    """Stiffly accurate method of order 5(4) with eight stages.

    The published error estimate is zero for ``y' = g(t)``; this one sees such parts of a problem,
    by a stage more that costs no evaluation of ``f``.

    References
    ----------
    Di Marzo, RODAS5(4), Universite de Geneve (1993).
    """

    coefficients = tableaus.RODAS5


class Rodas5P(_Named):
    """Steinebach's method of order 5(4), with little order reduction: for tight tolerances.

    References
    ----------
    Steinebach, BIT 63 (2023) 27.
    """

    coefficients = tableaus.RODAS5P
