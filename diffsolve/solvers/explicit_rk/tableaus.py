"""Tableaus of explicit Runge-Kutta methods.

Every constant is a ``Tableau``, so its order conditions are checked on import. Methods of order
six and above are in ``high_order`` and are available from here as well.
``stability_interval`` is the largest ``x`` such that the stability function satisfies
``|R(-s)| <= 1`` for all ``s`` in ``[0, x]``.
"""

from __future__ import annotations

from diffsolve.solvers.continuous_extension import Interpolant, nested_polynomial
from diffsolve.solvers.explicit_rk.high_order import DP8, VERN6, VERN7, VERN9
from diffsolve.solvers.explicit_rk.tableau import Tableau

__all__ = [
    "BS3",
    "DP5",
    "DP8",
    "EULER",
    "HEUN",
    "MIDPOINT",
    "RALSTON",
    "RK4",
    "TSIT5",
    "VERN6",
    "VERN7",
    "VERN9",
]

EULER = Tableau(
    "Euler",
    "L. Euler, Institutionum calculi integralis (1768)",
    order=1,
    a=((),),
    b=(1,),
    c=(0,),
    stability_interval=2.0,
)

MIDPOINT = Tableau(
    "Midpoint",
    "C. Runge, Ueber die numerische Aufloesung von Differentialgleichungen, Math. Ann. 46 (1895)",
    order=2,
    a=((), (1 / 2,)),
    b=(0, 1),
    c=(0, 1 / 2),
    stability_interval=2.0,
)

HEUN = Tableau(
    "Heun",
    "K. Heun, Neue Methode zur approximativen Integration, Z. Math. Phys. 45 (1900); with Euler's "
    "method embedded",
    order=2,
    a=((), (1,)),
    b=(1 / 2, 1 / 2),
    c=(0, 1),
    b_error=(-1 / 2, 1 / 2),
    stability_interval=2.0,
)

RALSTON = Tableau(
    "Ralston",
    "A. Ralston, Runge-Kutta methods with minimum error bounds, Math. Comp. 16 (1962), the method "
    "of order 2; with Euler's method embedded",
    order=2,
    a=((), (2 / 3,)),
    b=(1 / 4, 3 / 4),
    c=(0, 2 / 3),
    b_error=(-3 / 4, 3 / 4),
    stability_interval=2.0,
)

RK4 = Tableau(
    "RK4",
    "W. Kutta, Beitrag zur naeherungsweisen Integration totaler Differentialgleichungen, Z. Math. "
    "Phys. 46 (1901)",
    order=4,
    a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0, 1 / 2, 1 / 2, 1),
    stability_interval=2.7853,
)

BS3 = Tableau(
    "BS3",
    "P. Bogacki, L. F. Shampine, A 3(2) pair of Runge-Kutta formulas, Appl. Math. Lett. 2 (1989)",
    order=3,
    a=((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0),
    c=(0, 1 / 2, 3 / 4, 1),
    b_error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    stability_interval=2.5127,
)

_DP5_B = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0)

# Hairer's d_i: coefficients of theta**2 (1-theta)**2 in the continuous extension
_DP5_D = (
    -12715105075 / 11282082432,
    0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)

DP5 = Tableau(
    "DP5",
    "J. R. Dormand, P. J. Prince, A family of embedded Runge-Kutta formulae, J. Comput. Appl. "
    "Math. 6 (1980), table 2; continuous extension of L. F. Shampine (1986) as in E. Hairer, "
    "S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I (1993), section II.6",
    order=5,
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DP5_B[:6],
    ),
    b=_DP5_B,
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    b_error=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    stability_interval=3.3066,
    interpolant=Interpolant(4, nested_polynomial(_DP5_B, (_DP5_D,), new=6)),
)

# fmt: off
_TSIT5_A = (
    (),
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (
        5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401,
        -0.028269050394068383,
    ),
    (
        0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081,
        2.324710524099774,
    ),
)

_TSIT5_ERROR = (
    0.0017800110522257714, 0.0008164344596567469, -0.007880878010261995, 0.1447110071732629,
    -0.5823571654525552, 0.45808210592918697, -1 / 66,
)
# fmt: on

TSIT5 = Tableau(
    "Tsit5",
    "C. Tsitouras, Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying "
    "assumption, Comput. Math. Appl. 62 (2011); rounded from the 80 digits in OrdinaryDiffEq.jl",
    order=5,
    a=_TSIT5_A,
    b=(*_TSIT5_A[-1], 0),
    c=(0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1),
    b_error=_TSIT5_ERROR,
    stability_interval=3.5068,
    interpolant=Interpolant(
        4,
        (
            (1, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
            (0, 0.1317, -0.2234, 0.1017),
            (0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
            (0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
            (0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
            (0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
            (0, 1.5, -4, 2.5),
        ),
    ),
)
