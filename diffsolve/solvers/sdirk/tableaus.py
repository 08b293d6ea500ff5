"""Tableaus of SDIRK methods, those with an explicit first stage (ESDIRK) included.

Their conditions are checked by the tests rather than at each import. A row of ``a`` ends with its
diagonal coefficient.
"""

from __future__ import annotations

from math import sqrt

from diffsolve.solvers.continuous_extension import Interpolant
from diffsolve.solvers.sdirk.tableau import SDIRKTableau

__all__ = [
    "IMPLICIT_EULER",
    "IMPLICIT_MIDPOINT",
    "KENCARP3",
    "KENCARP4",
    "KENCARP5",
    "KVAERNO3",
    "KVAERNO4",
    "KVAERNO5",
    "SDIRK2",
    "TRAPEZOID",
    "TRBDF2",
]


def _minus(b: tuple[float, ...], embedded: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(x - y for x, y in zip(b, embedded, strict=True))


# written with the derivative at the start of the step, for the sake of the error estimate
IMPLICIT_EULER = SDIRKTableau(
    "ImplicitEuler",
    "E. Hairer, G. Wanner, Solving Ordinary Differential Equations II (1996), section IV.3; the "
    "trapezoidal rule embedded",
    order=1,
    a=((), (0, 1)),
    b=(0, 1),
    c=(0, 1),
    b_error=(-1 / 2, 1 / 2),
    error_order=2,
    smoothed=True,
    checked=False,
)

IMPLICIT_MIDPOINT = SDIRKTableau(
    "ImplicitMidpoint",
    "E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I (1993), "
    "section II.7: the Gauss method with one stage",
    order=2,
    a=((1 / 2,),),
    b=(1,),
    c=(1 / 2,),
    checked=False,
)

TRAPEZOID = SDIRKTableau(
    "Trapezoid",
    "E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I (1993), "
    "section II.7; the implicit Euler method embedded",
    order=2,
    a=((), (1 / 2, 1 / 2)),
    b=(1 / 2, 1 / 2),
    c=(0, 1),
    b_error=(1 / 2, -1 / 2),
    smoothed=True,
    checked=False,
)

_A_GAMMA = 1 - sqrt(2) / 2

# The embedded solution is the quadrature of order three at the nodes 0, gamma and 1.
SDIRK2 = SDIRKTableau(
    "SDIRK2",
    "R. Alexander, Diagonally implicit Runge-Kutta methods for stiff ODEs, SIAM J. Numer. Anal. 14 "
    "(1977), the L-stable method of order 2 with gamma = 1 - sqrt(2)/2",
    order=2,
    a=((_A_GAMMA,), (1 - _A_GAMMA, _A_GAMMA)),
    b=(1 - _A_GAMMA, _A_GAMMA),
    c=(_A_GAMMA, 1),
    b_error=(
        -(3 * _A_GAMMA - 1) / (6 * _A_GAMMA),
        1 - _A_GAMMA - 1 / (6 * _A_GAMMA * (1 - _A_GAMMA)),
        _A_GAMMA - (2 - 3 * _A_GAMMA) / (6 * (1 - _A_GAMMA)),
    ),
    error_order=2,
    smoothed=True,
    checked=False,
)

_TB_D, _TB_W = 1 - sqrt(2) / 2, sqrt(2) / 4

TRBDF2 = SDIRKTableau(
    "TRBDF2",
    "M. E. Hosea, L. F. Shampine, Analysis and implementation of TR-BDF2, Appl. Numer. Math. 20 "
    "(1996) 21; the embedded solution has order 3",
    order=2,
    a=((), (_TB_D, _TB_D), (_TB_W, _TB_W, _TB_D)),
    b=(_TB_W, _TB_W, _TB_D),
    c=(0, 2 * _TB_D, 1),
    b_error=_minus((_TB_W, _TB_W, _TB_D), ((1 - _TB_W) / 3, (3 * _TB_W + 1) / 3, _TB_D / 3)),
    error_order=3,
    smoothed=True,
    checked=False,
)

_KVAERNO = (
    "A. Kvaerno, Singly diagonally implicit Runge-Kutta methods with an explicit first stage, BIT "
    "44 (2004) 489"
)

# a root of 6 x^3 - 18 x^2 + 9 x - 1: the solution of order 3 is L-stable
_K3_GAMMA = 0.435866521508459
_K3_A2 = (
    (-4 * _K3_GAMMA**2 + 6 * _K3_GAMMA - 1) / (4 * _K3_GAMMA),
    (1 - 2 * _K3_GAMMA) / (4 * _K3_GAMMA),
    _K3_GAMMA,
)
_K3_B = (
    (6 * _K3_GAMMA - 1) / (12 * _K3_GAMMA),
    1 / (12 * _K3_GAMMA * (1 - 2 * _K3_GAMMA)),
    (6 * _K3_GAMMA**2 - 6 * _K3_GAMMA + 1) / (3 * (1 - 2 * _K3_GAMMA)),
    _K3_GAMMA,
)

# Dense output of the methods of orders 4 and 5, derived for this library: polynomials over the rows
# that have the order named, end at the solution, and stay bounded at infinity: the cubic Hermite
# polynomial does not, and its order 3 is too low beside 5. Those of KenCarp4 and KenCarp5 are exact
# for stiff problems whose solution is cubic in t. What freedom is left makes the errors of the next
# order least.

KVAERNO3 = SDIRKTableau(
    "Kvaerno3",
    f"{_KVAERNO}, the 3/2 pair; the last but one stage is the embedded solution",
    order=3,
    a=((), (_K3_GAMMA, _K3_GAMMA), _K3_A2, _K3_B),
    b=_K3_B,
    c=(0, 2 * _K3_GAMMA, 1, 1),
    b_error=_minus(_K3_B, (*_K3_A2, 0)),
    checked=False,
)

# A root of 24 x^4 - 96 x^3 + 72 x^2 - 16 x + 1: the solution of order 4 is L-stable. With the gamma
# of the 3/2 pair it is the last but one stage, of order 3, that is.
_K4_GAMMA = 0.5728160624821349
_K4_A3 = (0.26260329025269582, -0.31190432742056315, 0.47648497468573248, _K4_GAMMA)
_K4_B = (
    0.197216548312835,
    0.17684378390637219,
    0.81544218135083845,
    -0.76231857605218049,
    _K4_GAMMA,
)

# fmt: off
_K4_DENSE = (
    (0.9816820585727575, -1.3899735796614385, 0.6055080694015156),
    (0.13692162983433243, 0.39316995394036014, -0.35324779986832155),
    (0.09495806143306701, 2.3510634941999227, -1.6305793742821493),
    (1.435871999983307, -5.531533212525068, 3.3333426364895815),
    (-1.649433749823464, 4.177273344046227, -1.9550235317406273),
)
# fmt: on

KVAERNO4 = SDIRKTableau(
    "Kvaerno4",
    f"{_KVAERNO}, the 4/3 pair, evaluated with more digits of gamma; the last but one stage is the "
    "embedded solution",
    order=4,
    a=(
        (),
        (_K4_GAMMA, _K4_GAMMA),
        (0.16723546202721075, -0.14294653685703411, _K4_GAMMA),
        _K4_A3,
        _K4_B,
    ),
    b=_K4_B,
    c=(0, 2 * _K4_GAMMA, 0.5971049876523115, 1, 1),
    b_error=_minus(_K4_B, (*_K4_A3, 0)),
    interpolant=Interpolant(3, _K4_DENSE),
    checked=False,
)

# fmt: off
_K5_A6 = (
    0.13855640231268224, 0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676, 0.26,
)
_K5_B = (
    0.13659751177640291, 0, -0.05496908796538376, -0.04118626728321046, 0.62993304899016403,
    0.06962479448202728, 0.26,
)
# fmt: on

# fmt: off
_K5_DENSE = (
    (0.9903049908576627, -2.108941425114401, 1.8030680182346839, -0.5478340722015422),
    (0, 0, 0, 0),
    (-0.06194321647391704, 0.6069388455003409, -1.1858848003709552, 0.5859200833791482),
    (-0.3249313491256517, -1.9034296553961108, 4.94234519436351, -2.7551704571249584),
    (0.05198012140836431, 3.4547899885475917, -4.597849141921484, 1.7210120809556892),
    (0.3941541723088273, -3.827091750825716, 7.693897722135832, -4.191335349136916),
    (-0.04956471897528511, 3.777733997288287, -8.655576992441578, 5.187407714128576),
)
# fmt: on

KVAERNO5 = SDIRKTableau(
    "Kvaerno5",
    f"{_KVAERNO}, the 5/4 pair; the last but one stage is the embedded solution",
    order=5,
    a=(
        (),
        (0.26, 0.26),
        (0.13, 0.84033320996790809, 0.26),
        (0.22371961478320505, 0.47675532319799699, -0.06470895363112615, 0.26),
        (0.16648564323248321, 0.1045001884159172, 0.03631482272098715, -0.13090704451073998, 0.26),
        _K5_A6,
        _K5_B,
    ),
    b=_K5_B,
    c=(0, 0.52, 1.2303332099679081, 0.8957659843500761, 0.43639360985864756, 1, 1),
    b_error=_minus(_K5_B, (*_K5_A6, 0)),
    interpolant=Interpolant(4, _K5_DENSE),
    checked=False,
)

_KENNEDY_CARPENTER = (
    "C. A. Kennedy, M. H. Carpenter, Additive Runge-Kutta schemes for convection-diffusion-"
    "reaction equations, Appl. Numer. Math. 44 (2003) 139, appendix"
)

_KC3_GAMMA = 1767732205903 / 4055673282236
_KC3_B = (
    1471266399579 / 7840856788654,
    -4482444167858 / 7529755066697,
    11266239266428 / 11593286722821,
    _KC3_GAMMA,
)

KENCARP3 = SDIRKTableau(
    "KenCarp3",
    f"{_KENNEDY_CARPENTER}: the implicit part of ARK3(2)4L[2]SA",
    order=3,
    a=(
        (),
        (_KC3_GAMMA, _KC3_GAMMA),
        (2746238789719 / 10658868560708, -640167445237 / 6845629431997, _KC3_GAMMA),
        _KC3_B,
    ),
    b=_KC3_B,
    c=(0, 2 * _KC3_GAMMA, 3 / 5, 1),
    b_error=_minus(
        _KC3_B,
        (
            2756255671327 / 12835298489170,
            -10771552573575 / 22201958757719,
            9247589265047 / 10645013368117,
            2193209047091 / 5459859503100,
        ),
    ),
    checked=False,
)

_KC4_B = (82889 / 524892, 0, 15625 / 83664, 69875 / 102672, -2260 / 8211, 1 / 4)

# fmt: off
_KC4_DENSE = (
    (0.6881076758212816, -1.2572039578311598, 0.7270125771715499),
    (-0.1870766793952634, -1.384325173882468, 1.5714018532777307),
    (1.1532169152497072, -0.00038877089896482975, -0.9660692038267418),
    (-1.1578242040764752, 4.4166452362409965, -2.578255736855186),
    (0.500366413590703, -1.5246596402578347, 0.7490526956721243),
    (0.0032098788100462516, -0.250067693370569, 0.49685781456052336),
)
# fmt: on

KENCARP4 = SDIRKTableau(
    "KenCarp4",
    f"{_KENNEDY_CARPENTER}: the implicit part of ARK4(3)6L[2]SA",
    order=4,
    a=(
        (),
        (1 / 4, 1 / 4),
        (8611 / 62500, -1743 / 31250, 1 / 4),
        (5012029 / 34652500, -654441 / 2922500, 174375 / 388108, 1 / 4),
        (
            15267082809 / 155376265600,
            -71443401 / 120774400,
            730878875 / 902184768,
            2285395 / 8070912,
            1 / 4,
        ),
        _KC4_B,
    ),
    b=_KC4_B,
    c=(0, 1 / 2, 83 / 250, 31 / 50, 17 / 20, 1),
    b_error=_minus(
        _KC4_B,
        (
            4586570599 / 29645900160,
            0,
            178811875 / 945068544,
            814220225 / 1159782912,
            -3700637 / 11593932,
            61727 / 225920,
        ),
    ),
    interpolant=Interpolant(3, _KC4_DENSE),
    checked=False,
)

_KC5_B = (
    -872700587467 / 9133579230613,
    0,
    0,
    22348218063261 / 9555858737531,
    -1143369518992 / 8141816002931,
    -39379526789629 / 19018526304540,
    32727382324388 / 42900044865799,
    41 / 200,
)

# fmt: off
_KC5_DENSE = (
    (0.326573491007915, 0.23465585240971, -1.1564817636868678, 0.49970383351785186),
    (0, 0, 0, 0),
    (-5.6079141319198476, 34.36453438286155, -47.85861477421181, 19.101994523270072),
    (6.110367377017471, -33.57935685514154, 53.06306539288806, -23.255383110998753),
    (-0.7785073926918764, 5.7093511501991445, -10.094839877954374, 5.023564364364618),
    (-0.6337576558964737, 5.031692597917203, -15.659611323244949, 9.19108867326769),
    (1.1700478837125505, -8.805186520827586, 16.838813308435213, -8.440799424294974),
    (0.4131904287702663, -2.9556906074185143, 4.867669037774738, -2.120168859126486),
)
# fmt: on

KENCARP5 = SDIRKTableau(
    "KenCarp5",
    f"{_KENNEDY_CARPENTER}: the implicit part of ARK5(4)8L[2]SA",
    order=5,
    a=(
        (),
        (41 / 200, 41 / 200),
        (41 / 400, -567603406766 / 11931857230679, 41 / 200),
        (683785636431 / 9252920307686, 0, -110385047103 / 1367015193373, 41 / 200),
        (
            3016520224154 / 10081342136671,
            0,
            30586259806659 / 12414158314087,
            -22760509404356 / 11113319521817,
            41 / 200,
        ),
        (
            218866479029 / 1489978393911,
            0,
            638256894668 / 5436446318841,
            -1179710474555 / 5321154724896,
            -60928119172 / 8023461067671,
            41 / 200,
        ),
        (
            1020004230633 / 5715676835656,
            0,
            25762820946817 / 25263940353407,
            -2161375909145 / 9755907335909,
            -211217309593 / 5846859502534,
            -4269925059573 / 7827059040749,
            41 / 200,
        ),
        _KC5_B,
    ),
    b=_KC5_B,
    c=(
        0,
        41 / 100,
        2935347310677 / 11292855782101,
        1426016391358 / 7196633302097,
        23 / 25,
        6 / 25,
        3 / 5,
        1,
    ),
    b_error=_minus(
        _KC5_B,
        (
            -975461918565 / 9796059967033,
            0,
            0,
            78070527104295 / 32432590147079,
            -548382580838 / 3424219808633,
            -33438840321285 / 15594753105479,
            3629800801594 / 4656183773603,
            4035322873751 / 18575991585200,
        ),
    ),
    # through the first two rows: from 0.20, 0.26 and 0.41, the latest, it is too far to 0.92
    predictor={4: (-51 / 41, 92 / 41)},
    interpolant=Interpolant(4, _KC5_DENSE),
    checked=False,
)
