"""The explicit Runge-Kutta methods: each one a tableau."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Step
from diffsolve.solvers.controllers import Controller, IController
from diffsolve.solvers.explicit_rk import tableaus
from diffsolve.solvers.explicit_rk.native import FAMILY
from diffsolve.solvers.explicit_rk.stability import stable_sizes
from diffsolve.solvers.explicit_rk.step import take_step
from diffsolve.solvers.explicit_rk.tableau import Tableau
from diffsolve.solvers.stage_rows import RKState
from diffsolve.solvers.tableau_method import Named, TableauMethod


class ExplicitRK(TableauMethod):
    """Explicit Runge-Kutta method of any tableau.

    Parameters
    ----------
    tableau
        Its coefficients, checked when the tableau was built.

    Raises
    ------
    TypeError
        If ``tableau`` is not a ``Tableau``.

    Examples
    --------
    >>> midpoint = Tableau("midpoint", "Runge 1895", 2, [[], [0.5]], [0, 1], [0, 0.5])
    >>> method = ExplicitRK(midpoint)
    """

    is_one_step = True
    family = FAMILY
    tableau_type = Tableau

    @property
    def stable_sizes(self) -> Any:  # type: ignore[override]
        stages = self.tableau.stages
        return stable_sizes(stages), stages.n - 1

    @property
    def may_end_open(self) -> bool:
        stages = self.tableau.stages
        unread = all(b is None or b[-1] == 0 for b in (stages.b_error, stages.b_error_low))
        return unread and type(self).step is ExplicitRK.step

    def step(
        self,
        field: VectorField,
        t: Any,
        h: Any,
        state: tuple[Tensor, ...],
        open_end: bool = False,
    ) -> Step:
        return take_step(field, self.tableau.stages, t, h, RKState(*state), open_end)


class _Named(Named, ExplicitRK):
    """An explicit method that is its class's tableau."""


class Euler(_Named):
    """Euler's method, order 1; fixed steps, so ``solve`` needs ``dt``.

    References
    ----------
    Hairer, Norsett, Wanner (HNW), Solving Ordinary Differential Equations I (1993), section I.7.
    """

    coefficients = tableaus.EULER


class Midpoint(_Named):
    """The explicit midpoint method, order 2; fixed steps, so ``solve`` needs ``dt``.

    References
    ----------
    Runge, Math. Ann. 46 (1895) 167; HNW, section II.1.
    """

    coefficients = tableaus.MIDPOINT


class Heun(_Named):
    """Heun's method of order 2 with an embedded Euler step, 2(1).

    References
    ----------
    Heun, Z. Math. Phys. 45 (1900) 23; HNW, section II.1.
    """

    coefficients = tableaus.HEUN


class Ralston(_Named):
    """Ralston's method of order 2 with an embedded Euler step, 2(1).

    References
    ----------
    Ralston, Math. Comp. 16 (1962) 431.
    """

    coefficients = tableaus.RALSTON


class RK4(_Named):
    """The classical method of order 4; fixed steps, so ``solve`` needs ``dt``.

    References
    ----------
    Kutta, Z. Math. Phys. 46 (1901) 435; HNW, table II.1.2.
    """

    coefficients = tableaus.RK4


class BS3(_Named):
    """Bogacki and Shampine's 3(2) pair, for rough tolerances.

    References
    ----------
    Bogacki, Shampine, Appl. Math. Lett. 2 (1989) 321.
    """

    coefficients = tableaus.BS3


class DP5(_Named):
    """Dormand and Prince's 5(4) pair, with Shampine's interpolant of order 4.

    References
    ----------
    Dormand, Prince, J. Comput. Appl. Math. 6 (1980) 19; controller and interpolant: HNW, sections
    II.4 and II.6.
    """

    coefficients = tableaus.DP5

    def default_controller(self) -> Controller:
        # as in HNW, eq. II.4.13, and in SciPy's and MATLAB's codes of this pair; Hairer's own PI
        # values, PIController(0.17, 0.04), spend up to 5 % more evaluations on smaller errors
        return IController.for_order(5)


class Tsit5(_Named):
    """Tsitouras' 5(4) pair with a free interpolant of order 4; the default for most work.

    References
    ----------
    Tsitouras, Comput. Math. Appl. 62 (2011) 770.
    """

    coefficients = tableaus.TSIT5


class DP8(_Named):
    """Hairer's 8(5,3) method after Dormand and Prince, with an interpolant of order 7.

    References
    ----------
    HNW, sections II.5 and II.10, and the code DOP853.
    """

    coefficients = tableaus.DP8

    def default_controller(self) -> Controller:
        return IController.for_order(8)  # beta = 0, Hairer's default for this method


class Vern6(_Named):
    """Verner's most efficient 6(5) pair, interpolant of order 6.

    References
    ----------
    Verner, Numerically optimal Runge-Kutta pairs with interpolants, Numer. Algorithms 53 (2010)
    383.
    """

    coefficients = tableaus.VERN6


class Vern7(_Named):
    """Verner's most efficient 7(6) pair, interpolant of order 7; for tight tolerances.

    References
    ----------
    Verner, Numerically optimal Runge-Kutta pairs with interpolants, Numer. Algorithms 53 (2010)
    383.
    """

    coefficients = tableaus.VERN7


class Vern9(_Named):
    """Verner's most efficient 9(8) pair, interpolant of order 9; for the tightest tolerances.

    References
    ----------
    Verner, Numerically optimal Runge-Kutta pairs with interpolants, Numer. Algorithms 53 (2010)
    383.
    """

    coefficients = tableaus.VERN9
