"""Stiff test problems of oscillation and diffusion, and two with closed forms.

The right-hand sides take states and parameters with any leading axes: the components are on the
last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsolve.problems.library.catalog import Values, library_problem, tensor
from diffsolve.problems.ode import ODEProblem


@library_problem(
    "Hairer and Wanner (1996), IV.10; IVP Test Set, VDPOL, in unscaled time", stiff=True
)
def van_der_pol(
    *,
    mu: float = 1000.0,
    u0: Values = (2.0, 0.0),
    tspan: tuple[float, float] | None = None,
    p: Values | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Relaxation oscillations: slow drifts, and jumps that take ``1 / mu`` or so.

    ::

        u1' = u2
        u2' = mu (1 - u1^2) u2 - u1

    With ``s = t / mu`` and ``v = mu u2`` these are ``du1/ds = v`` and ``dv/ds = ((1 - u1^2) v -
    u1) / eps``, ``eps = 1 / mu^2``, as Hairer and Wanner write them: their ``eps = 1e-6`` is
    ``mu = 1000``. There are references for ``mu`` of 1e3 and 1e6.

    Parameters
    ----------
    mu
        The parameter; it sets ``p`` and ``tspan`` where these are not given.
    u0
        ``(u1, u2)`` at the start.
    tspan
        Interval of integration, by default ``(0, 2 mu)``, which has two jumps.
    p
        ``(mu,)``, ``(..., 1)``.
    dtype, device
        Of the tensors.

    References
    ----------
    Van der Pol, B. (1926). On relaxation oscillations. Phil. Mag. 2, 978-992.
    Hairer, E. and Wanner, G. (1996). Solving Ordinary Differential Equations II, 2nd ed.,
    section IV.10. Springer.
    Mazzia, F. and Magherini, C. (2008). Test Set for Initial Value Problem Solvers, release 2.4.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        u1, u2 = u.unbind(-1)
        return torch.stack((u2, p[..., 0] * (1 - u1 * u1) * u2 - u1), -1)

    span = (0.0, 2.0 * mu) if tspan is None else tspan
    damping = tensor((mu,) if p is None else p, dtype, device)
    return ODEProblem(f, tensor(u0, dtype, device), span, damping)


@library_problem("Hairer and Wanner (1996), Solving ODEs II, IV.10, problem BRUSS", stiff=True)
def brusselator_1d(
    *,
    n: int = 40,
    a: float | Tensor = 1.0,
    b: float | Tensor = 3.0,
    alpha: float | Tensor = 0.02,
    u0: Values | None = None,
    tspan: tuple[float, float] = (0.0, 10.0),
    p: Values | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Reaction of two substances that diffuse in a line, on ``n`` points inside it.

    ::

        u_t = a + u^2 v - (b + 1) u + alpha u_xx
        v_t = b u - u^2 v + alpha v_xx

    for ``0 < x < 1`` with ``u = 1`` and ``v = 3`` at the ends; at the start ``u = 1 + sin(2 pi x)``
    and ``v = 3``. Second derivatives are central differences at ``x_i = i / (n + 1)``,
    ``i = 1, ..., n``.

    Parameters
    ----------
    n
        Number of points. The reference is that of 40 of them; Hairer and Wanner have 500.
    a, b, alpha
        Parameters that are used where ``p`` is not given: numbers, or ``n`` values, one a point.
    u0
        ``(u_1, ..., u_n, v_1, ..., v_n)`` at the start.
    tspan
        Interval of integration.
    p
        Rows ``a``, ``b``, ``alpha``: ``(..., 3, 1)``, or ``(..., 3, n)`` for values that vary in
        space. By default those of the three parameters of these names.
    dtype, device
        Of the tensors.

    References
    ----------
    Lefever, R. and Nicolis, G. (1971). Chemical instabilities and sustained oscillations. J.
    Theor. Biol. 30, 267-284.
    Hairer, E. and Wanner, G. (1996). Solving Ordinary Differential Equations II, 2nd ed.,
    section IV.10. Springer.
    """
    u0 = _wave(n) if u0 is None else u0
    if p is None:
        rows = [torch.as_tensor(x, dtype=dtype, device=device) for x in (a, b, alpha)]
        p = torch.stack(torch.broadcast_tensors(*(row.reshape(-1) for row in rows)))
    f = _reaction_and_diffusion(n, torch.tensor([[1.0], [3.0]], dtype=dtype, device=device))
    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


def _wave(n: int) -> Values:
    wave = [1 + math.sin(2 * math.pi * i / (n + 1)) for i in range(1, n + 1)]
    return (*wave, *([3.0] * n))


def _reaction_and_diffusion(n: int, walls: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    per_square = (n + 1) ** 2

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        both = u.unflatten(-1, (2, n))
        x, y = both.unbind(-2)
        a, b, alpha = p.unbind(-2)
        edge = walls.expand(*both.shape[:-1], 1)
        padded = torch.cat((edge, both, edge), -1)
        curvature = (padded[..., :-2] - 2 * both + padded[..., 2:]) * per_square
        made = x * x * y
        reaction = torch.stack((a + made - (b + 1) * x, b * x - made), -2)
        return (reaction + alpha.unsqueeze(-2) * curvature).flatten(-2)

    return f


def _modes(t: NDArray[np.float64], problem: ODEProblem) -> NDArray[np.float64]:
    rates, u0 = (x.detach().double().cpu().numpy() for x in (problem.p, problem.u0))

    def reflect(u: NDArray[np.float64]) -> NDArray[np.float64]:
        return u - 2 * u.mean(-1, keepdims=True)

    decay = np.exp(-np.multiply.outer(t - t[0], rates))  # (T, n)
    decay = decay.reshape(len(t), *([1] * (u0.ndim - 1)), -1)
    return reflect(decay * reflect(u0))


@library_problem(
    "Linear equations with given eigenvalues, as in Enright, Hull and Lindberg (1975), class A",
    solution=_modes,
    stiff=True,
)
def stiff_linear(
    *,
    u0: Values = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    tspan: tuple[float, float] = (0.0, 10.0),
    p: Values = (0.1, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Linear equations whose modes decay at given rates.

    ::

        u' = -Q diag(p) Q u,    Q = I - (2 / n) 1 1^T

    with the reflection ``Q = Q^T = Q^-1``, which couples all components. The reference is
    ``Q exp(-t diag(p)) Q u0``, for any parameters. At the default start all modes are as large.

    Parameters
    ----------
    u0
        State at the start, ``(..., n)``.
    tspan
        Interval of integration.
    p
        The ``n`` rates, the eigenvalues with a minus.
    dtype, device
        Of the tensors.

    References
    ----------
    Enright, W. H., Hull, T. E. and Lindberg, B. (1975). Comparing numerical methods for stiff
    systems of O.D.E.s. BIT 15, 10-48.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        slope = p * (2 * u.mean(-1, keepdim=True) - u)
        return slope - 2 * slope.mean(-1, keepdim=True)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))


def _cosine(t: NDArray[np.float64], problem: ODEProblem) -> NDArray[np.float64]:
    rate, u0 = (x.detach().double().cpu().numpy() for x in (problem.p, problem.u0))
    time = t.reshape(-1, *([1] * u0.ndim))
    return np.cos(time) + np.exp(rate * (time - t[0])) * (u0 - np.cos(t[0]))


@library_problem("Prothero and Robinson (1974), Math. Comp. 28, 145-162", _cosine, stiff=True)
def prothero_robinson(
    *,
    u0: Values = (1.0,),
    tspan: tuple[float, float] = (0.0, 10.0),
    p: Values = (-1e6,),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> ODEProblem:
    """Fast attraction to a slow curve: where methods for stiff equations lose order.

    ::

        u' = lambda (u - phi(t)) + phi'(t),    phi(t) = cos(t)

    The reference is ``phi(t) + exp(lambda (t - t0)) (u0 - phi(t0))``, for any parameters; at the
    default start it is the curve.

    Parameters
    ----------
    u0
        State at the start, ``(..., n)``.
    tspan
        Interval of integration.
    p
        ``(lambda,)``, ``(..., 1)``, or one number for each component of the state.
    dtype, device
        Of the tensors.

    References
    ----------
    Prothero, A. and Robinson, A. (1974). On the stability and accuracy of one-step methods for
    solving stiff systems of ordinary differential equations. Math. Comp. 28, 145-162.
    """

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return p * (u - torch.cos(t)) - torch.sin(t)

    return ODEProblem(f, tensor(u0, dtype, device), tspan, tensor(p, dtype, device))
