"""Nonstiff test problems of mechanics: bodies that attract each other, and a tumbling one.

The right-hand sides take states and parameters with any leading axes: the components are on the
last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffsolve.problems.library.catalog import Values, library_problem, tensor
from diffsolve.problems.ode import ODEProblem

_PLEIADES = (
    *(3.0, 3.0, -1.0, -3.0, 2.0, -2.0, 2.0),
    *(3.0, -3.0, 2.0, 0.0, 0.0, -4.0, 4.0),
    *(0.0, 0.0, 0.0, 0.0, 0.0, 1.75, -1.5),
    *(0.0, 0.0, 0.0, -1.25, 1.0, 0.0, 0.0),
)


@library_problem("Hairer, Norsett and Wanner (1993), Solving ODEs I, 2nd ed., II.10, p. 245")
def pleiades(
    *,
    u0: Values = _PLEIADES,
    tspan: tuple[float, float] = (0.0, 3.0),
    p: Values = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Seven stars in the plane, with close encounters.

    ::

        x_i'' = sum_j m_j (x_j - x_i) / r_ij^3
        y_i'' = sum_j m_j (y_j - y_i) / r_ij^3,    r_ij^2 = (x_i - x_j)^2 + (y_i - y_j)^2

    At the start ``x = (3, 3, -1, -3, 2, -2, 2)``, ``y = (3, -3, 2, 0, 0, -4, 4)``,
    ``x' = (0, 0, 0, 0, 0, 1.75, -1.5)`` and ``y' = (0, 0, 0, -1.25, 1, 0, 0)``.

    Parameters
    ----------
    u0
        ``(x, y, x', y')`` at the start, 28 numbers.
    tspan
        Interval of integration.
    p
        The masses ``m``, by default ``(1, ..., 7)``.
    dtype, device
        Of the tensors.

    References
    ----------
    Hairer, E., Norsett, S. P. and Wanner, G. (1993). Solving Ordinary Differential Equations I,
    2nd ed., section II.10. Springer.
    Mazzia, F. and Magherini, C. (2008). Test Set for Initial Value Problem Solvers, release 2.4.
    """
    diagonal = torch.eye(7, dtype=torch.bool, device=device)

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        position = u[..., :14].unflatten(-1, (2, 7))
        offset = position.unsqueeze(-2) - position.unsqueeze(-1)  # [c, i, j]: from i to j
        # a distance of one to itself keeps a star, and the gradient, from dividing by zero
        square = (offset * offset).sum(-3).masked_fill(diagonal, 1.0)
        pull = square.pow(-1.5) * p.unsqueeze(-2)
        acceleration = (offset * pull.unsqueeze(-3)).sum(-1)
        return torch.cat((u[..., 14:], acceleration.flatten(-2)), -1)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


@library_problem("Arenstorf (1963), Amer. J. Math. 85, 27-35; Hairer et al. (1993), II.0, p. 129")
def arenstorf(
    *,
    u0: Values = (0.994, 0.0, 0.0, -2.00158510637908252240537862224),
    tspan: tuple[float, float] = (0.0, 17.0652165601579625588917206249),
    p: Values = (0.012277471,),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Periodic orbit of a satellite around the earth and the moon, which turn around each other.

    ::

        x'' = x + 2 y' - (1 - mu) (x + mu) / D1 - mu (x - 1 + mu) / D2
        y'' = y - 2 x' - (1 - mu) y / D1 - mu y / D2
        D1 = ((x + mu)^2 + y^2)^(3/2),    D2 = ((x - 1 + mu)^2 + y^2)^(3/2)

    Errors at the start, next to the moon, are multiplied by 2e6 over one period, ``tspan``. The
    orbit of the published decimal data closes to 5e-27; that of the same data in float64, to which
    the reference belongs, closes to 1.5e-11.

    Parameters
    ----------
    u0
        ``(x, y, x', y')`` at the start.
    tspan
        Interval of integration, by default one period.
    p
        ``(mu,)``, the mass of the moon relative to both, ``(..., 1)``.
    dtype, device
        Of the tensors.

    References
    ----------
    Arenstorf, R. F. (1963). Periodic solutions of the restricted three body problem representing
    analytic continuations of Keplerian elliptic motions. Amer. J. Math. 85, 27-35.
    Hairer, E., Norsett, S. P. and Wanner, G. (1993). Solving Ordinary Differential Equations I,
    2nd ed., section II.0, equations (0.1) and (0.2). Springer.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        x, y, vx, vy = u.unbind(-1)
        moon = p[..., 0]
        earth = 1 - moon
        from_earth, from_moon, yy = x + moon, x - earth, y * y
        a = earth * torch.addcmul(yy, from_earth, from_earth).pow(-1.5)
        b = moon * torch.addcmul(yy, from_moon, from_moon).pow(-1.5)
        # fused operations: eager mode pays for each, and the state is small
        ax = torch.add(x - a * from_earth, vy, alpha=2).addcmul(b, from_moon, value=-1)
        ay = torch.sub(y, vx, alpha=2).addcmul(a + b, y, value=-1)
        return torch.stack((vx, vy, ax, ay), -1)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


@library_problem("Krogh (1973), JACM 20, 545-562; Hairer et al. (1993), Solving ODEs I, II.10")
def rigid_body(
    *,
    u0: Values = (1.0, 0.0, 0.9),
    tspan: tuple[float, float] = (0.0, 20.0),
    p: Values = (-2.0, 1.25, -0.5),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Euler's equations of a rigid body without external forces.

    ::

        y1' = I1 y2 y3
        y2' = I2 y1 y3
        y3' = I3 y1 y2

    ``y_i^2 / I_i - y_j^2 / I_j`` is constant for any ``i`` and ``j``.

    Parameters
    ----------
    u0
        ``(y1, y2, y3)`` at the start.
    tspan
        Interval of integration.
    p
        ``(I1, I2, I3)``.
    dtype, device
        Of the tensors.

    References
    ----------
    Krogh, F. T. (1973). On testing a subroutine for the numerical integration of ordinary
    differential equations. J. ACM 20, 545-562.
    Hairer, E., Norsett, S. P. and Wanner, G. (1993). Solving Ordinary Differential Equations I,
    2nd ed., section II.10, problem EULR (there with an external force). Springer.
    Soetaert, K., Cash, J. and Mazzia, F. (2012). Solving Differential Equations in R. Springer.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        x, y, z = u.unbind(-1)
        return p * torch.stack((y * z, x * z, x * y), -1)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


@library_problem("Henon and Heiles (1964), Astron. J. 69, 73-79")
def henon_heiles(
    *,
    u0: Values = (0.0, 0.1, 0.5, 0.0),
    tspan: tuple[float, float] = (0.0, 100.0),
    p: Values = (1.0,),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """A star in the field of a galaxy, by its Hamiltonian.

    ::

        H = (x'^2 + y'^2 + x^2 + y^2) / 2 + lambda (x^2 y - y^3 / 3)
        x'' = -x - 2 lambda x y
        y'' = -y - lambda (x^2 - y^2)

    Parameters
    ----------
    u0
        ``(x, y, x', y')`` at the start. The default, of energy 0.1297 (orbits escape above 1/6),
        is that of the DifferentialEquations.jl documentation.
    tspan
        Interval of integration.
    p
        ``(lambda,)``, ``(..., 1)``.
    dtype, device
        Of the tensors.

    References
    ----------
    Henon, M. and Heiles, C. (1964). The applicability of the third integral of motion: some
    numerical experiments. Astron. J. 69, 73-79.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        x, y, vx, vy = u.unbind(-1)
        strength = p[..., 0]
        ax = -x - 2 * strength * x * y
        ay = strength * (y * y - x * x) - y
        return torch.stack((vx, vy, ax, ay), -1)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))
