"""A stiff test problem of many reactions: chemistry of polluted air.

The right-hand side takes states and parameters with any leading axes: the components are on the
last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffsolve.problems.library.catalog import Values, library_problem, tensor
from diffsolve.problems.ode import ODEProblem

_START = (
    *(0.0, 0.2, 0.0, 0.04, 0.0, 0.0, 0.1, 0.3, 0.01, 0.0),
    *(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.007, 0.0, 0.0, 0.0),
)
_RATES = (
    *(0.35, 26.6, 1.23e4, 8.6e-4, 8.2e-4),
    *(1.5e4, 1.3e-4, 2.4e4, 1.65e4, 9e3),
    *(0.022, 1.2e4, 1.88, 1.63e4, 4.8e6),
    *(3.5e-4, 0.0175, 1e8, 4.44e11, 1240.0),
    *(2.1, 5.78, 0.0474, 1780.0, 3.12),
)


@library_problem(
    "Verwer (1994), SIAM J. Sci. Comput. 15, 1243-1259; IVP Test Set, POLLU", stiff=True
)
def pollu(
    *,
    u0: Values = _START,
    tspan: tuple[float, float] = (0.0, 60.0),
    p: Values = _RATES,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Air pollution: 25 reactions of 20 substances, in parts per million and minutes.

    ::

        r1  NO2            -> NO + O3P         r14  NO2 + OH   -> HNO3
        r2  NO + O3        -> NO2              r15  O3P        -> O3
        r3  HO2 + NO       -> NO2 + OH         r16  O3         -> O1D
        r4  HCHO           -> 2 HO2 + CO       r17  O3         -> O3P
        r5  HCHO           -> CO               r18  O1D        -> 2 OH
        r6  HCHO + OH      -> HO2 + CO         r19  O1D        -> O3P
        r7  ALD            -> MEO2 + HO2 + CO  r20  SO2 + OH   -> SO4 + HO2
        r8  ALD + OH       -> C2O3             r21  NO3        -> NO
        r9  C2O3 + NO      -> NO2 + MEO2 + CO2 r22  NO3        -> NO2 + O3P
        r10 C2O3 + NO2     -> PAN              r23  NO2 + O3   -> NO3
        r11 PAN            -> C2O3 + NO2       r24  NO3 + NO2  -> N2O5
        r12 MEO2 + NO      -> CH3O + NO2       r25  N2O5       -> NO3 + NO2
        r13 CH3O           -> HCHO + HO2

    Each rate is its constant times the concentrations on the left. Nitrogen is kept,
    ``y1 + y2 + y13 + y15 + y19 + 2 y20``, and sulphur, ``y17 + y18``.

    Parameters
    ----------
    u0
        The concentrations at the start, in the order NO2, NO, O3P, O3, HO2, OH, HCHO, CO, ALD,
        MEO2, C2O3, CO2, PAN, CH3O, HNO3, O1D, SO2, SO4, NO3, N2O5.
    tspan
        Interval of integration.
    p
        The 25 rate constants, from 1.3e-4 to 4.44e11.
    dtype, device
        Of the tensors.

    References
    ----------
    Verwer, J. G. (1994). Gauss-Seidel iteration for stiff ODEs from chemical kinetics. SIAM J.
    Sci. Comput. 15, 1243-1259.
    Mazzia, F. and Magherini, C. (2008). Test Set for Initial Value Problem Solvers, release 2.4.
    """
    return ODEProblem(_pollution, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


def _pollution(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    no2, no, o3p, o3, ho2, oh, hcho, _, ald, meo2, c2o3, _, pan, ch3o, *rest = u.unbind(-1)
    _, o1d, so2, _, no3, n2o5 = rest
    k = p.unbind(-1)
    r1, r2, r3, r4, r5 = k[0] * no2, k[1] * no * o3, k[2] * ho2 * no, k[3] * hcho, k[4] * hcho
    r6, r7, r8, r9 = k[5] * hcho * oh, k[6] * ald, k[7] * ald * oh, k[8] * c2o3 * no
    r10, r11, r12, r13 = k[9] * c2o3 * no2, k[10] * pan, k[11] * meo2 * no, k[12] * ch3o
    r14, r15, r16, r17 = k[13] * no2 * oh, k[14] * o3p, k[15] * o3, k[16] * o3
    r18, r19, r20, r21 = k[17] * o1d, k[18] * o1d, k[19] * so2 * oh, k[20] * no3
    r22, r23, r24, r25 = k[21] * no3, k[22] * no2 * o3, k[23] * no3 * no2, k[24] * n2o5
    return torch.stack(
        (
            r2 + r3 + r9 + r11 + r12 + r22 + r25 - r1 - r10 - r14 - r23 - r24,
            r1 + r21 - r2 - r3 - r9 - r12,
            r1 + r17 + r19 + r22 - r15,
            r15 - r2 - r16 - r17 - r23,
            2 * r4 + r6 + r7 + r13 + r20 - r3,
            r3 + 2 * r18 - r6 - r8 - r14 - r20,
            r13 - r4 - r5 - r6,
            r4 + r5 + r6 + r7,
            -r7 - r8,
            r7 + r9 - r12,
            r8 + r11 - r9 - r10,
            r9,
            r10 - r11,
            r12 - r13,
            r14,
            r16 - r18 - r19,
            -r20,
            r20,
            r23 + r25 - r21 - r22 - r24,
            r24 - r25,
        ),
        -1,
    )
