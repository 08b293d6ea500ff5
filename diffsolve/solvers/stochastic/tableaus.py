"""Tableaus of stochastic Runge-Kutta methods.

Their conditions are checked by the tests rather than at each import; they hold to the last digit.
"""

from __future__ import annotations

from diffsolve.solvers.stochastic.tableau import SRATableau, SRITableau

__all__ = ["SOSRA", "SOSRI", "SRA1", "SRIW1"]

_ROESSLER = (
    "A. Rößler, Runge-Kutta methods for the strong approximation of solutions of stochastic "
    "differential equations, SIAM J. Numer. Anal. 48 (2010) 922"
)
_RACKAUCKAS = (
    "C. Rackauckas, Q. Nie, Stability-optimized high order methods and stiffness detection for "
    "pathwise stiff stochastic differential equations, IEEE HPEC (2020), arXiv:1804.04344; the "
    "digits are those of StochasticDiffEq.jl"
)

SRA1 = SRATableau(
    "SRA1",
    _ROESSLER,
    alpha=(1 / 3, 2 / 3),
    beta1=(1, 0),
    beta2=(-1, 1),
    a0=((), (3 / 4,)),
    b0=((), (3 / 2,)),
    c1=(1, 0),
    checked=False,
)

SOSRA = SRATableau(
    "SOSRA",
    _RACKAUCKAS,
    alpha=(0.2889874966892885, 0.6859880440839937, 0.025024459226717772),
    beta1=(-16.792534242221663, 17.514995785380226, 0.27753845684143835),
    beta2=(0.4237535769069274, 0.6010381474428539, -1.0247917243497813),
    a0=((), (0.6923962376159507,), (-3.1609142252828395, 4.1609142252828395)),
    b0=((), (1.3371632704399763,), (1.442371048468624, 1.8632741501139225)),
    c1=(0, 0.041248171110700504, 1),
    checked=False,
)

# beta2 as Rößler has it: beta2 and B1 of SRIW2, where the first is negative, have the other sign
SRIW1 = SRITableau(
    "SRIW1",
    _ROESSLER,
    alpha=(1 / 3, 2 / 3, 0, 0),
    beta1=(-1, 4 / 3, 2 / 3, 0),
    beta2=(-1, 4 / 3, -1 / 3, 0),
    beta3=(2, -4 / 3, -2 / 3, 0),
    beta4=(-2, 5 / 3, -2 / 3, 1),
    a0=((), (3 / 4,)),
    a1=((), (1 / 4,), (1, 0), (0, 0, 1 / 4)),
    b0=((), (3 / 2,)),
    b1=((), (1 / 2,), (-1, 0), (-5, 3, 1 / 2)),
    checked=False,
)

# the drift of the last stage belongs to t + 3.75 h, the row sum that the conditions ask for
SOSRI = SRITableau(
    "SOSRI",
    _RACKAUCKAS,
    alpha=(1.140099274172029, -0.6401334255743456, 0.4736296532772559, 0.026404498125060714),
    beta1=(-1.8453464565104432, 2.688764531100726, -0.2523866501071323, 0.40896857551684956),
    beta2=(0.4969658141589478, -0.5771202869753592, -0.12919702470322217, 0.2093514975196336),
    beta3=(2.8453464565104425, -2.688764531100725, 0.2523866501071322, -0.40896857551684945),
    beta4=(0.11522663875443433, -0.57877086147738, 0.2857851028163886, 0.17775911990655704),
    a0=(
        (),
        (-0.04199224421316468,),
        (2.842612915017106, -2.0527723684000727),
        (4.338237071435815, -2.8895936137439793, 2.3017575594644466),
    ),
    a1=(
        (),
        (0.26204282091330466,),
        (0.20903646383505375, -0.1502377115150361),
        (0.05836595312746999, 0.6149440396332373, 0.08535117634046772),
    ),
    b0=(
        (),
        (-0.21641093549612528,),
        (1.5336352863679572, 0.26066223492647056),
        (-1.0536037558179159, 1.7015284721089472, -0.20725685784180017),
    ),
    b1=(
        (),
        (-0.5119011827621657,),
        (2.67767339866713, -4.9395031322250995),
        (0.15580956238299215, 3.2361551006624674, -1.4223118283355949),
    ),
    checked=False,
)
