"""Tableaus of Rosenbrock methods.

Their conditions are checked by the tests rather than at each import. Vectors and rows are written
dense; a row of a matrix ends at its last nonzero coefficient. The methods of the Rodas family are
stiffly accurate, with the embedded solution in their last but one stage: the error estimate is the
last ``V``.

The published estimates of Rodas5 and ROS3P are zero for whole classes of problems. Both have one
more stage here, of weight zero, that uses the derivative at the new point and costs no evaluation
of ``f``. Its numbers are ours; they follow from the conditions that stand beside them.
"""

from __future__ import annotations

from math import sqrt

from diffsolve.solvers.continuous_extension import Interpolant, cubic_hermite
from diffsolve.solvers.rosenbrock.tableau import RosenbrockTableau, rodas_interpolant

__all__ = [
    "RODAS3",
    "RODAS4",
    "RODAS4P",
    "RODAS5",
    "RODAS5P",
    "ROS3P",
    "ROSENBROCK23",
    "ROSENBROCK32",
]

# Shampine and Reichelt's stages: d is the diagonal, e32 couples the second stage to the third
_SR_D, _SR_E32 = 1 / (2 + sqrt(2)), 6 + sqrt(2)
_SR_ALPHA = ((), (1 / 2,), (0, 1))
_SR_GAMMA = ((_SR_D,), (-_SR_D, _SR_D), (_SR_D * (_SR_E32 - 2), -_SR_D * _SR_E32, _SR_D))
_SR_SOURCE = (
    "L. F. Shampine, M. W. Reichelt, The MATLAB ODE suite, SIAM J. Sci. Comput. 18 (1997) 1"
)

# theta (1-theta) / (1-2d) K_1 + theta (theta-2d) / (1-2d) K_2, with K_1 = V_1/d, K_2 = (V_1+V_2)/d
_SR_POLYNOMIAL = (
    (0, 0),
    (1 / _SR_D, 0),
    (-2 / (1 - 2 * _SR_D), 1 / (_SR_D * (1 - 2 * _SR_D))),
    (0, 0),
    (0, 0),
)

ROSENBROCK23 = RosenbrockTableau(
    "Rosenbrock23",
    f"{_SR_SOURCE}: ode23s, with a solution of order 3 for the error estimate",
    order=2,
    alpha=_SR_ALPHA,
    gamma=_SR_GAMMA,
    b=(0, 1, 0),
    b_error=(-1 / 6, 1 / 3, -1 / 6),
    error_order=3,
    interpolant=Interpolant(2, _SR_POLYNOMIAL),
    checked=False,
)

# not A-stable: |R(z)| > 1 on the real axis beyond -27.1, and 1.61 at infinity
ROSENBROCK32 = RosenbrockTableau(
    "Rosenbrock32",
    f"{_SR_SOURCE}: the pair of ode23s, going on from the solution of order 3",
    order=3,
    alpha=_SR_ALPHA,
    gamma=_SR_GAMMA,
    b=(1 / 6, 2 / 3, 1 / 6),
    b_error=(1 / 6, -1 / 3, 1 / 6),
    checked=False,
)

_ROS3P_GAMMA = 1 / 2 + sqrt(3) / 6

# The published weights (1/3, -1/3, 0) of the estimate give zero for linear systems. With the fourth
# stage it is 1/6 h**3 d3u/dt3 to leading order, as large for f''(f, f) as theirs; it fulfils Lang
# and Verwer's conditions for parabolic problems, and no weight falls on V_2 and V_3.
ROS3P = RosenbrockTableau(
    "ROS3P",
    "J. Lang, J. Verwer, ROS3P - an accurate third-order Rosenbrock solver designed for parabolic "
    "problems, BIT 41 (2001) 731",
    order=3,
    alpha=((), (1,), (1, 0), (2 / 3, 0, 1 / 3)),
    gamma=(
        (_ROS3P_GAMMA,),
        (-1, _ROS3P_GAMMA),
        (-_ROS3P_GAMMA, 1 / 2 - 2 * _ROS3P_GAMMA, _ROS3P_GAMMA),
        (2 / 3 - 4 * sqrt(3) / 9, -(1 + sqrt(3)) / 3, (sqrt(3) / 3 - 1) / 3, _ROS3P_GAMMA),
    ),
    b=(2 / 3, 0, 1 / 3, 0),
    b_error=(-1 / 3, 2 * sqrt(3) / 3, (4 - 2 * sqrt(3)) / 3, -1),
    checked=False,
)

RODAS3 = RosenbrockTableau.from_transformed(
    "Rodas3",
    "A. Sandu et al., Benchmarking stiff ODE solvers for atmospheric chemistry problems II: "
    "Rosenbrock solvers, Atmos. Environ. 31 (1997) 3459",
    order=3,
    gamma=1 / 2,
    a=((), (), (2,), (2, 0, 1)),
    c=((), (4,), (1, -1), (1, -1, -8 / 3)),
    m=(2, 0, 1, 1),
    e=(0, 0, 0, 1),
    # its stages solve u' = u**2 exactly, so that no combination of order 3 sees a long step there
    interpolant=cubic_hermite((0, 2, 0, 1, 1, 0), order=3, error=0.15),
    checked=False,
)

# fmt: off
_RODAS4_A = (
    (),
    (1.544,),
    (0.9466785280815826, 0.2557011698983284),
    (3.314825187068521, 2.896124015972201, 0.9986419139977817),
    (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.687886036105895),
    (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.687886036105895, 1),
)

_RODAS4_C = (
    (),
    (-5.6688,),
    (-2.430093356833875, -0.2063599157091915),
    (-0.1073529058151375, -9.594562251023355, -20.47028614809616),
    (7.496443313967647, -10.24680431464352, -33.99990352819905, 11.7089089320616),
    (
        8.083246795921522, -7.981132988064893, -31.52159432874371, 16.31930543123136,
        -6.058818238834054,
    ),
)

_RODAS4_H = (
    (
        10.12623508344586, -7.487995877610167, -34.80091861555747, -7.992771707568823,
        1.025137723295662, 0,
    ),
    (
        -0.6762803392801253, 6.087714651680015, 16.43084320892478, 24.76722511418386,
        -6.594389125716872, 0,
    ),
)
# fmt: on

RODAS4 = RosenbrockTableau.from_transformed(
    "Rodas4",
    "E. Hairer, G. Wanner, Solving Ordinary Differential Equations II (1996), section VI.4, with "
    "the numbers of their code RODAS (METH=1)",
    order=4,
    gamma=1 / 4,
    a=_RODAS4_A,
    c=_RODAS4_C,
    m=(*_RODAS4_A[-1], 1),
    e=(0, 0, 0, 0, 0, 1),
    interpolant=rodas_interpolant(3, (*_RODAS4_A[-1], 1), _RODAS4_H),
    nodes=(0, 0.386, 0.21, 0.63, 1, 1),
    d=(0.25, -0.1043, 0.1035, -0.0362, 0, 0),
    checked=False,
)

# fmt: off
_RODAS4P_A = (
    (),
    (3,),
    (1.831036793486759, 0.4955183967433795),
    (2.304376582692669, -0.05249275245743001, -1.176798761832782),
    (-7.170454962423024, -4.741636671481785, -16.31002631330971, -1.062004044111401),
    (-7.170454962423024, -4.741636671481785, -16.31002631330971, -1.062004044111401, 1),
)

_RODAS4P_C = (
    (),
    (-12,),
    (-8.791795173947035, -2.207865586973518),
    (10.81793056857153, 6.780270611428266, 19.5348594464241),
    (34.19095006749676, 15.49671153725963, 54.7476087596413, 14.16005392148534),
    (
        34.62605830930532, 15.30084976114473, 56.99955578662667, 18.40807009793095,
        -5.714285714285717,
    ),
)

_RODAS4P_H = (
    (25.09876703708589, 11.62013104361867, 28.49148307714626, -5.664021568594133, 0, 0),
    (
        1.638054557396973, -0.7373619806678748, 8.47791821923899, 15.9925314877952,
        -1.882352941176471, 0,
    ),
)
# fmt: on

RODAS4P = RosenbrockTableau.from_transformed(
    "Rodas4P",
    "G. Steinebach, Order reduction of ROW methods for DAEs and method of lines applications, "
    "Preprint 1741, TH Darmstadt (1995), with the numbers of the code RODAS (METH=3)",
    order=4,
    gamma=1 / 4,
    a=_RODAS4P_A,
    c=_RODAS4P_C,
    m=(*_RODAS4P_A[-1], 1),
    e=(0, 0, 0, 0, 0, 1),
    interpolant=rodas_interpolant(3, (*_RODAS4P_A[-1], 1), _RODAS4P_H),
    nodes=(0, 0.75, 0.21, 0.63, 1, 1),
    d=(0.25, -0.5, -0.023504, -0.0362, 0, 0),
    checked=False,
)

# fmt: off
_RODAS5_A = (
    (),
    (2,),
    (3.040894194418781, 1.041747909077569),
    (2.576417536461461, 1.62208306077664, -0.9089668560264532),
    (2.760842080225597, 1.446624659844071, -0.3036980084553738, 0.2877498600325443),
    (
        -14.09640773051259, 6.925207756232704, -41.47510893210728, 2.343771018586405,
        24.13215229196062,
    ),
    (
        -14.09640773051259, 6.925207756232704, -41.47510893210728, 2.343771018586405,
        24.13215229196062, 1,
    ),
    (
        -14.09640773051259, 6.925207756232704, -41.47510893210728, 2.343771018586405,
        24.13215229196062, 1, 1,
    ),
)

_RODAS5_M = (*_RODAS5_A[-1], 1)

_RODAS5_C = (
    (),
    (-10.31323885133993,),
    (-21.04823117650003, -7.234992135176716),
    (32.22751541853323, -4.943732386540191, 19.44922031041879),
    (-20.69865579590063, -8.816374604402768, 1.260436877740897, -0.7495647613787146),
    (
        -46.22004352711257, -17.49534862857472, -289.6389582892057, 93.60855400400906,
        318.3822534212147,
    ),
    (
        34.20013733472935, -14.1553540271769, 57.823356409884, 25.83362985412365,
        1.408950972071624, -6.551835421242162,
    ),
    (
        42.57076742291101, -13.80770672017997, 93.98938432427124, 18.77919633714503,
        -31.5835918722337, -6.685968952921985, -5.810979938412932,
    ),
    (
        61.90775595898114, -11.844904553894972, 88.91449533191359, 20.871232555265586,
        -21.055025949295654, -6.6145479014762705, -5.639782946570707, -2.811447528747097,
    ),
)

_RODAS5_E = (
    1.1105896481316342, 0, 1.4463133562789527, -2.0356517395135083, 1.9377696188650222,
    0.08317563650267468, 0.12049760438967844, 0.19305148609538497, 1 / 0.19,
)

_RODAS5_H = (
    (
        27.354592673333357, -6.925207756232704, 26.40037733258859, 0.5635230501052979,
        -4.699151156849391, -1.6008677469422725, -1.5306074446748028, -1.3929872940716344,
    ),
    (
        44.19024239501722, 0, 202.93261852171622, -35.5669339789154,
        -181.91095152160645, 3.4116351403665033, 2.5793540257308067, 2.2435122582734066,
    ),
    (
        -44.0988150021747, 0, -181.26175034586677, 56.99302194811676,
        183.21182741427398, -7.480257918273637, -5.792426076169686, -5.32503859794143,
    ),
)
# fmt: on

# The published weights (0, ..., 0, 1) of the estimate give zero for y' = g(t). With the ninth stage
# the estimate falls on the trees of order 5 as theirs, but for that of y' = g(t) and those that
# follow from it: there the sum of the weights times c**4 is 0.005. At infinity it is zero, and no
# weight falls on V_2. Of what fulfils this these are the numbers with the least sum of squares.
RODAS5 = RosenbrockTableau.from_transformed(
    "Rodas5",
    "G. Di Marzo, RODAS5(4) - Methodes de Rosenbrock d'ordre 5(4) adaptees aux problemes "
    "differentiels-algebriques, Universite de Geneve (1993); continuous extension of G. Steinebach "
    "as in OrdinaryDiffEq.jl",
    order=5,
    gamma=0.19,
    a=(*_RODAS5_A, _RODAS5_M),
    c=_RODAS5_C,
    m=(*_RODAS5_M, 0),
    e=_RODAS5_E,
    interpolant=rodas_interpolant(4, (*_RODAS5_M, 0), tuple((*row, 0) for row in _RODAS5_H)),
    nodes=(0, 0.38, 0.3878509998321533, 0.483971893787384, 0.457047700881958, 1, 1, 1, 1),
    d=(
        0.19,
        -0.18230792253337147,
        -0.3192318321868749,
        0.3449828624725343,
        -0.37741756439208984,
        0,
        0,
        0,
        0.3200189918642127,
    ),
    checked=False,
)

# fmt: off
_RODAS5P_A = (
    (),
    (3,),
    (2.849394379747939, 0.45842242204463923),
    (-6.954028509809101, 2.489845061869568, -10.358996098473584),
    (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
    (
        -7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256,
        0.030198172008377946,
    ),
    (
        -7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256,
        0.030198172008377946, 1,
    ),
    (
        -7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256,
        0.030198172008377946, 1, 1,
    ),
)

_RODAS5P_C = (
    (),
    (-14.155112264123755,),
    (-17.97296035885952, -2.859693295451294),
    (147.12150275711716, -1.41221402718213, 71.68940251302358),
    (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
    (
        24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125,
        -0.6610691825249471,
    ),
    (
        30.91273214028599, -3.1208243349937974, 77.79954646070892, 34.28646028294783,
        -19.097331116725623, -28.087943162872662,
    ),
    (
        37.80277123390563, -3.2571969029072276, 112.26918849496327, 66.9347231244047,
        -40.06618937091002, -54.66780262877968, -9.48861652309627,
    ),
)

_RODAS5P_H = (
    (
        25.948786856663858, -2.5579724845846235, 10.433815404888879, -2.3679251022685204,
        0.524948541321073, 1.1241088310450404, 0.4272876194431874, -0.17202221070155493,
    ),
    (
        -9.91568850695171, -0.9689944594115154, 3.0438037242978453, -24.495224566215796,
        20.176138334709044, 15.98066361424651, -6.789040303419874, -6.710236069923372,
    ),
    (
        11.419903575922262, 2.8879645146136994, 72.92137995996029, 80.12511834622643,
        -52.072871366152654, -59.78993625266729, -0.15582684282751913, 4.883087185713722,
    ),
)
# fmt: on

RODAS5P = RosenbrockTableau.from_transformed(
    "Rodas5P",
    "G. Steinebach, Construction of Rosenbrock-Wanner method Rodas5P and numerical benchmarks "
    "within the Julia Differential Equations package, BIT 63 (2023) 27; rounded as in "
    "OrdinaryDiffEq.jl",
    order=5,
    gamma=0.21193756319429014,
    a=_RODAS5P_A,
    c=_RODAS5P_C,
    m=(*_RODAS5P_A[-1], 1),
    e=(0, 0, 0, 0, 0, 0, 0, 1),
    interpolant=rodas_interpolant(4, (*_RODAS5P_A[-1], 1), _RODAS5P_H),
    nodes=(
        0,
        0.6358126895828704,
        0.4095798393397535,
        0.9769306725060716,
        0.4288403609558664,
        1,
        1,
        1,
    ),
    d=(
        0.21193756319429014,
        -0.42387512638858027,
        -0.3384627126235924,
        1.8046452872882734,
        2.325825639765069,
        0,
        0,
        0,
    ),
    checked=False,
)
