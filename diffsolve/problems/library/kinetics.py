"""Stiff test problems of chemical kinetics: fast reactions beside slow ones.

The right-hand sides take states and parameters with any leading axes: the components are on the
last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffsolve.problems.library.catalog import Values, library_problem, tensor
from diffsolve.problems.ode import ODEProblem


@library_problem(
    "Robertson (1966); Hairer and Wanner (1996), IV.10; IVP Test Set, ROBER", stiff=True
)
def rober(
    *,
    u0: Values = (1.0, 0.0, 0.0),
    tspan: tuple[float, float] = (0.0, 1e5),
    p: Values = (0.04, 3e7, 1e4),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Robertson's autocatalytic reaction, whose rate constants span nine orders of magnitude.

    ::

        y1' = -k1 y1 + k3 y2 y3
        y2' =  k1 y1 - k3 y2 y3 - k2 y2^2
        y3' =  k2 y2^2

    ``y1 + y2 + y3`` is constant. ``y2`` stays below 4e-5, so an absolute tolerance for it has to
    be smaller by as much; where errors make it negative, the solution grows without bound.

    Parameters
    ----------
    u0
        ``(y1, y2, y3)`` at the start.
    tspan
        Interval of integration, by default that of the DifferentialEquations.jl documentation and
        benchmarks. The IVP test set has ``(0, 1e11)``, for which there is a reference too.
    p
        ``(k1, k2, k3)``.
    dtype, device
        Of the tensors.

    References
    ----------
    Robertson, H. H. (1966). The solution of a set of reaction rate equations. In: Walsh, J. (ed.),
    Numerical Analysis: An Introduction, 178-182. Academic Press.
    Hairer, E. and Wanner, G. (1996). Solving Ordinary Differential Equations II, 2nd ed.,
    section IV.10. Springer.
    Mazzia, F. and Magherini, C. (2008). Test Set for Initial Value Problem Solvers, release 2.4.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        y1, y2, y3 = u.unbind(-1)
        k1, k2, k3 = p.unbind(-1)
        slow, fast, back = k1 * y1, k2 * y2 * y2, k3 * y2 * y3
        return torch.stack((back - slow, slow - back - fast, fast), -1)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


@library_problem(
    "Field and Noyes (1974), J. Chem. Phys. 60, 1877-1884; IVP Test Set, OREGO", stiff=True
)
def orego(
    *,
    u0: Values = (1.0, 2.0, 3.0),
    tspan: tuple[float, float] = (0.0, 360.0),
    p: Values = (77.27, 0.161, 8.375e-6),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Oregonator: the Belousov-Zhabotinsky reaction, a stiff limit cycle.

    ::

        y1' = s (y2 + y1 (1 - q y1 - y2))
        y2' = (y3 - (1 + y1) y2) / s
        y3' = w (y1 - y3)

    Parameters
    ----------
    u0
        ``(y1, y2, y3)`` at the start: bromous acid, bromide and cerium, scaled.
    tspan
        Interval of integration, a little more than one period of about 303.
    p
        ``(s, w, q)``.
    dtype, device
        Of the tensors.

    References
    ----------
    Field, R. J. and Noyes, R. M. (1974). Oscillations in chemical systems. IV. Limit cycle
    behavior in a model of a real chemical reaction. J. Chem. Phys. 60, 1877-1884.
    Hairer, E. and Wanner, G. (1996). Solving Ordinary Differential Equations II, 2nd ed.,
    section IV.10. Springer.
    Mazzia, F. and Magherini, C. (2008). Test Set for Initial Value Problem Solvers, release 2.4.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        y1, y2, y3 = u.unbind(-1)
        s, w, q = p.unbind(-1)
        return torch.stack(
            (s * (y2 + y1 * (1 - q * y1 - y2)), (y3 - (1 + y1) * y2) / s, w * (y1 - y3)), -1
        )

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


@library_problem("Schäfer (1975), J. Math. Biol. 2, 41-56; IVP Test Set, HIRES", stiff=True)
def hires(
    *,
    u0: Values = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057),
    tspan: tuple[float, float] = (0.0, 321.8122),
    p: Values = (1.71, 0.43, 8.32, 0.69, 0.035, 8.32, 280.0, 0.69, 0.69, 0.0007),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """High irradiance response: how light controls the growth of plants, by phytochrome.

    ::

        y1' = -k1 y1 + k2 y2 + k6 y3 + s
        y2' =  k1 y1 - (k2 + k3) y2
        y3' = -(k6 + k1) y3 + k2 y4 + k5 y5
        y4' =  k3 y2 + k1 y3 - (k4 + k2) y4
        y5' = -(k5 + k1) y5 + k2 (y6 + y7)
        y6' = -k+ y6 y8 + k4 y4 + k1 y5 - k2 y6 + k- y7
        y7' =  k+ y6 y8 - (k2 + k- + k*) y7
        y8' = -k+ y6 y8 + (k2 + k- + k*) y7

    ``y7 + y8`` is constant.

    Parameters
    ----------
    u0
        The eight concentrations at the start: red and far-red phytochrome (``y1``, ``y2``), both
        bound to the receptor ``X`` (``y3``, ``y4``), both bound to ``X'`` (``y5``, ``y6``),
        far-red phytochrome bound to ``X'`` and the enzyme (``y7``), the enzyme (``y8``).
    tspan
        Interval of integration.
    p
        ``(k1, k2, k3, k4, k5, k6, k+, k-, k*, s)``: conversion of red to far-red phytochrome by
        light, and back; attachment of ``y2`` to the receptor; transport of ``y4`` to ``y6``, and of
        ``y5`` to ``y3``; release of ``y3``; binding of the enzyme, and its release with the
        phytochrome whole, and with it lost; supply of phytochrome.
    dtype, device
        Of the tensors.

    References
    ----------
    Schäfer, E. (1975). A new approach to explain the "high irradiance responses" of
    photomorphogenesis on the basis of phytochrome. J. Math. Biol. 2, 41-56.
    Hairer, E. and Wanner, G. (1996). Solving Ordinary Differential Equations II, 2nd ed.,
    section IV.10. Springer.
    Mazzia, F. and Magherini, C. (2008). Test Set for Initial Value Problem Solvers, release 2.4.
    """
    return ODEProblem(_phytochrome, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


def _phytochrome(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    y1, y2, y3, y4, y5, y6, y7, y8 = u.unbind(-1)
    k1, k2, k3, k4, k5, k6, binding, release, loss, supply = p.unbind(-1)
    meet = binding * y6 * y8
    bound = meet - (k2 + release + loss) * y7
    return torch.stack(
        (
            k2 * y2 + k6 * y3 + supply - k1 * y1,
            k1 * y1 - (k2 + k3) * y2,
            k2 * y4 + k5 * y5 - (k6 + k1) * y3,
            k3 * y2 + k1 * y3 - (k4 + k2) * y4,
            k2 * (y6 + y7) - (k5 + k1) * y5,
            k4 * y4 + k1 * y5 + release * y7 - k2 * y6 - meet,
            bound,
            -bound,
        ),
        -1,
    )


@library_problem("Enright, Hull and Lindberg (1975), BIT 15, 10-48, problem E5", stiff=True)
def e5(
    *,
    u0: Values = (1.76e-3, 0.0, 0.0, 0.0),
    tspan: tuple[float, float] = (0.0, 1e11),
    p: Values = (7.89e-10, 1.1e7, 1.13e3, 1e6),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Pyrolysis, badly scaled: concentrations from 1e-3 down to 1e-65.

    ::

        y1' = -A y1 - B y1 y3
        y2' =  A y1 - M C y2 y3
        y3' =  y2' - y4'
        y4' =  B y1 y3 - C y4

    ``y2 - y3 - y4`` is constant, and the solution hangs on it from 1e10 on: a drift of 1e-20 is
    more than ``y2`` and ``y3`` at 1e11. The test set therefore forms ``y3'`` as a difference of the
    other two: as the sum ``A y1 - B y1 y3 - M C y2 y3 + C y4`` it is off by the rounding of terms
    of 1e-7 that all but cancel, and in steps of some hundred the constant drifts by 1e-20 with
    every method. All components but the first stay below 2e-10: an absolute
    tolerance that means something is ``1e-24`` or less (Hairer and Wanner take ``1.7e-24``, and
    count the error relative to each component). The reference is relative to each component
    throughout; no usual absolute tolerance resolves ``y1`` and ``y4`` at the end.

    Parameters
    ----------
    u0
        ``(y1, y2, y3, y4)`` at the start.
    tspan
        Interval of integration, by default that of Hairer and Wanner's test driver but for its
        last decades; the original one is ``(0, 1000)``. Up to 1e9 the reference is the published
        solution to 16 digits; the published one at 1e11 is off by 1e-2 in ``y1`` and ``y4``.
    p
        ``(A, B, C, M)``.
    dtype, device
        Of the tensors.

    References
    ----------
    Enright, W. H., Hull, T. E. and Lindberg, B. (1975). Comparing numerical methods for stiff
    systems of O.D.E.s. BIT 15, 10-48.
    Hairer, E. and Wanner, G. (1996). Solving Ordinary Differential Equations II, 2nd ed.,
    section IV.10. Springer.
    Mazzia, F. and Magherini, C. (2008). Test Set for Initial Value Problem Solvers, release 2.4.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        y1, y2, y3, y4 = u.unbind(-1)
        a, b, c, m = p.unbind(-1)
        split, bind, meet, back = a * y1, b * y1 * y3, m * c * y2 * y3, c * y4
        dy2, dy4 = split - meet, bind - back
        return torch.stack((-split - bind, dy2, dy2 - dy4, dy4), -1)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))
