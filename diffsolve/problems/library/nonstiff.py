"""Nonstiff test problems of populations, chemistry and machine learning.

The right-hand sides take states with any leading axes, and parameters too unless a docstring says
otherwise: the components are on the last axis.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsolve.problems.library.catalog import Values, library_problem, tensor
from diffsolve.problems.ode import ODEProblem


@library_problem("Lotka (1925), Elements of Physical Biology; Volterra (1926), Nature 118, 558-560")
def lotka_volterra(
    *,
    u0: Values = (1.0, 1.0),
    tspan: tuple[float, float] = (0.0, 10.0),
    p: Values = (1.5, 1.0, 3.0, 1.0),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Predators ``y`` and their prey ``x``; the orbits are closed.

    ::

        x' =  a x - b x y
        y' = -c y + d x y

    Parameters
    ----------
    u0
        ``(x, y)`` at the start.
    tspan
        Interval of integration.
    p
        ``(a, b, c, d)``. These defaults, with ``u0`` and ``tspan``, are those of the
        DifferentialEquations.jl documentation and benchmarks.
    dtype, device
        Of the tensors.

    References
    ----------
    Lotka, A. J. (1925). Elements of Physical Biology. Williams & Wilkins.
    Volterra, V. (1926). Fluctuations in the abundance of a species considered mathematically.
    Nature 118, 558-560.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        x, y = u.unbind(-1)
        a, b, c, d = p.unbind(-1)
        return torch.stack((x * (a - b * y), y * (d * x - c)), -1)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


@library_problem("SciMLSensitivity.jl, test/adjoint.jl; Ma et al. (2021), arXiv:1812.01892")
def lotka_volterra_time(
    *,
    u0: Values = (1.0, 1.0),
    tspan: tuple[float, float] = (0.0, 10.0),
    p: Values = (1.5, 1.0, 3.0, 1.0),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Lotka-Volterra equations whose interaction grows with time, to test adjoints.

    ::

        u1' =  p1 u1 - p2 u1 u2 t
        u2' = -p3 u2 + p4 u1 u2 t

    Parameters
    ----------
    u0
        ``(u1, u2)`` at the start.
    tspan
        Interval of integration.
    p
        ``(p1, p2, p3, p4)``.
    dtype, device
        Of the tensors.

    References
    ----------
    Ma, Y., Dixit, V., Innes, M., Guo, X. and Rackauckas, C. (2021). A comparison of automatic
    differentiation and continuous sensitivity analysis for derivatives of differential equation
    solutions. IEEE HPEC; arXiv:1812.01892. The equations are in the adjoint tests of
    SciMLSensitivity.jl.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        x, y = u.unbind(-1)
        a, b, c, d = p.unbind(-1)
        return torch.stack((x * (a - b * t * y), y * (d * t * x - c)), -1)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


@library_problem("Lorenz (1963), J. Atmos. Sci. 20, 130-141")
def lorenz(
    *,
    u0: Values = (1.0, 0.0, 0.0),
    tspan: tuple[float, float] = (0.0, 10.0),
    p: Values = (10.0, 28.0, 8 / 3),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Convection in three modes: the first strange attractor.

    ::

        x' = sigma (y - x)
        y' = x (rho - z) - y
        z' = x y - beta z

    Parameters
    ----------
    u0
        ``(x, y, z)`` at the start.
    tspan
        Interval of integration. By ``t = 10`` errors have hardly grown, as the orbit still winds
        around one of the fixed points; later they grow like ``exp(0.9 t)``, and a solution in
        float64 soon says nothing.
    p
        ``(sigma, rho, beta)``, by default those of Lorenz.
    dtype, device
        Of the tensors.

    References
    ----------
    Lorenz, E. N. (1963). Deterministic nonperiodic flow. J. Atmos. Sci. 20, 130-141.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        x, y, z = u.unbind(-1)
        sigma, rho, beta = p.unbind(-1)
        return torch.stack((sigma * (y - x), x * (rho - z) - y, x * y - beta * z), -1)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


@library_problem("FitzHugh (1961), Biophys. J. 1, 445-466; parameters: Scholarpedia 1(9):1349")
def fitzhugh_nagumo(
    *,
    u0: Values = (1.0, 1.0),
    tspan: tuple[float, float] = (0.0, 10.0),
    p: Values = (0.7, 0.8, 0.08, 0.5),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Spiking of a neuron with membrane potential ``v`` and recovery ``w``.

    ::

        v' = v - v^3 / 3 - w + I
        w' = (v + a - b w) / tau

    Parameters
    ----------
    u0
        ``(v, w)`` at the start.
    tspan
        Interval of integration; one spike of the limit cycle takes about 40 units of time.
    p
        ``(a, b, 1 / tau, I)``. The first three are those of Izhikevich and FitzHugh; all, with
        ``u0`` and ``tspan``, are those of the FitzHugh-Nagumo work-precision diagrams of
        SciMLBenchmarks.jl.
    dtype, device
        Of the tensors.

    References
    ----------
    FitzHugh, R. (1961). Impulses and physiological states in theoretical models of nerve
    membrane. Biophys. J. 1, 445-466.
    Izhikevich, E. M. and FitzHugh, R. (2006). FitzHugh-Nagumo model. Scholarpedia 1(9), 1349.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        v, w = u.unbind(-1)
        a, b, rate, current = p.unbind(-1)
        return torch.stack((v - v * v * v / 3 - w + current, rate * (v + a - b * w)), -1)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


def _matrix_exponential(t: NDArray[np.float64], problem: ODEProblem) -> NDArray[np.float64]:
    matrix = problem.p.detach().double().cpu()
    u0 = problem.u0.detach().double().cpu()
    times = torch.from_numpy(t - t[0]).reshape(-1, 1, 1)
    flow = torch.linalg.matrix_exp(times * matrix)  # (T, n, n)
    return torch.einsum("tij,...j->t...i", flow, u0).numpy()


# A linear reaction between three substances; its eigenvalues are 0, -1 and -3.
_REACTION = ((-1.0, 1.0, 0.0), (1.0, -2.0, 1.0), (0.0, 1.0, -1.0))


@library_problem(
    "Hull, Enright, Fellen and Sedgwick (1972), SIAM J. Numer. Anal. 9, 603-637, problem B2",
    solution=_matrix_exponential,
)
def linear(
    *,
    u0: Values = (2.0, 0.0, 1.0),
    tspan: tuple[float, float] = (0.0, 20.0),
    p: Values = _REACTION,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Linear equations ``u' = A u``; by default problem B2 of DETEST, a chemical reaction.

    ::

                 | -1   1   0 |
        A  =  p  |  1  -2   1 |
                 |  0   1  -1 |

    The reference is ``expm(A t) u0``, for any parameters.

    Parameters
    ----------
    u0
        State at the start, ``(..., n)``.
    tspan
        Interval of integration.
    p
        The matrix ``A``, ``(n, n)``; without leading axes.
    dtype, device
        Of the tensors.

    References
    ----------
    Hull, T. E., Enright, W. H., Fellen, B. M. and Sedgwick, A. E. (1972). Comparing numerical
    methods for ordinary differential equations. SIAM J. Numer. Anal. 9, 603-637.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.nn.functional.linear(u, p)  # u @ p.mT in one operation

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


@library_problem("Chen, Rubanova, Bettencourt and Duvenaud (2018), arXiv:1806.07366")
def spiral(
    *,
    u0: Values = (2.0, 0.0),
    tspan: tuple[float, float] = (0.0, 1.5),
    p: Values = ((-0.1, 2.0), (-2.0, -0.1)),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """The cubic spiral that neural differential equations are taught on.

    ::

        u' = u^3 A,    A = | -0.1   2.0 |
                           | -2.0  -0.1 |

    with ``u`` a row vector and the cube taken component by component.

    Parameters
    ----------
    u0
        State at the start.
    tspan
        Interval of integration. The default, with 30 points of data, is that of the SciML
        tutorials and of the work on regularised neural differential equations; Chen et al. use
        ``(0, 25)``.
    p
        The matrix ``A``, ``(2, 2)``; without leading axes.
    dtype, device
        Of the tensors.

    References
    ----------
    Chen, R. T. Q., Rubanova, Y., Bettencourt, J. and Duvenaud, D. (2018). Neural ordinary
    differential equations. NeurIPS 31; arXiv:1806.07366.
    Pal, A., Ma, Y., Shah, V. and Rackauckas, C. (2021). Opening the blackbox: accelerating neural
    differential equations by regularizing internal solver heuristics. ICML; arXiv:2105.03918.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return (u * u * u) @ p

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))
