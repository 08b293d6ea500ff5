"""Methods of strong order 1/2 for any noise: Euler-Maruyama and Euler-Heun, also adaptive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.structure import Number
from diffsolve.solvers.algorithm import Step
from diffsolve.solvers.stochastic.method import (
    ANY_NOISE,
    PathInterpolant,
    StartOfStep,
    StochasticMethod,
    add_scaled,
    register,
    scaled,
    sqrt_abs,
    time_change_of_noise,
)
from diffsolve.solvers.stochastic.milstein import ito_correction


class EM(StochasticMethod):
    """The Euler-Maruyama method, for any noise of an Ito equation, with fixed steps.

    ``u_new = u + h f(t, u) + g(t, u) W``. Strong order 1/2 (1 where the noise is additive), weak
    order 1.

    References
    ----------
    Maruyama, Rend. Circ. Mat. Palermo 4 (1955) 48; Kloeden, Platen, Numerical Solution of
    Stochastic Differential Equations (1992), section 10.2.
    """

    noise_types = ANY_NOISE
    interpretation = frozenset({"ito"})
    strong_order = 0.5
    weak_order = 1.0
    adaptive = False
    estimates_stiffness = False

    def step(self, field: Any, t: Number, h: Number, state: tuple[Tensor, ...]) -> Step:
        (u,) = state
        now = field.after(t, h)
        G = field.diffusion(now, u)
        new = field.add_noise(add_scaled(u, field(now, u), h), G, field.increment(t, h).W)
        return Step((new,), None, None, PathInterpolant(field, t, h, u, new, G))


class EulerHeun(StochasticMethod):
    """The Euler-Heun method, for any noise of a Stratonovich equation, with fixed steps.

    ``K = u + h f(t, u) + g(t, u) W``, then the trapezoidal rule for the drift and the diffusion:
    ``u_new = u + h/2 (f(t, u) + f(t + h, K)) + 1/2 (g(t, u) + g(t + h, K)) W``. Strong order 1/2,
    and 1 where the noise is commutative (diagonal, scalar, additive); weak order 1.

    References
    ----------
    Rümelin, SIAM J. Numer. Anal. 19 (1982) 604; Kloeden, Platen (1992), section 15.1; Burrage,
    Burrage, Tian, Proc. R. Soc. Lond. A 460 (2004) 373, section 3.
    """

    noise_types = ANY_NOISE
    interpretation = frozenset({"stratonovich"})
    strong_order = 0.5
    weak_order = 1.0
    adaptive = False

    def step(self, field: Any, t: Number, h: Number, state: tuple[Tensor, ...]) -> Step:
        return _heun(field, t, h, state[0], estimate=False)


class LambaEM(EM):
    """Euler-Maruyama with Lamba's error estimate, for any noise of an Ito equation.

    The step is that of ``EM``. What it leaves out is, to leading order, ``h^2/2 f'f`` of the drift
    and ``sum g_j' g_k I_(k,j)`` of the noise, with the double Ito integrals ``I``. Both are
    estimated by one more evaluation:

    - drift: ``h/2 (f(t + h, K) - f(t, u))`` with ``K = u + h f(t, u)``, the difference from Heun's
      method; where the noise is additive, ``K`` is the new state, since how the noise moves the
      drift is then as large as anything that is left out;
    - diagonal and scalar noise: ``(g(t + h, u + sqrt(h) G) - G) / sqrt(h) * (W^2 - h) / 2``, the
      Milstein term of this path, ``G = g(t, u)``;
    - general noise, where the ``I_(k,j)`` are not known from ``W``:
      ``sqrt(h/2) |g(t + h, u + G W) - G|``, row by row. Its mean square is that of the sum,
      ``h^2/2 sum |g_j' g_k|^2``, also where the symmetric part of it vanishes;
    - additive noise: none of these is left out, but the change of ``g`` with time is
      (``time_change_of_noise``).

    The noise beside the step is evaluated at ``t + h``, so that its change with time is seen there,
    too. The estimate is the sum of both magnitudes, as in Rößler's methods. Strong order 1/2, weak
    order 1.

    References
    ----------
    Lamba, J. Comput. Appl. Math. 161 (2003) 417, sections 2 and 3: both estimates, for scalar
    equations that do not depend on time. The estimate for general noise follows from
    ``E I_(k,j)^2 = h^2/2`` and the independence of these integrals (Kloeden, Platen (1992),
    section 5.7).

    Notes
    -----
    Published codes differ in whether the noise of the step and of its estimate uses ``g(t, u)`` or
    ``g(t + h, K)``, and scale the perturbation of ``u`` in several ways. Here ``g(t, u)`` stands in
    both, as the Ito-Taylor expansion at ``(t, u)`` has it, and the perturbation has the size of the
    noise, ``sqrt(h)``.
    """

    adaptive = True
    estimates_stiffness = True

    def step(self, field: Any, t: Number, h: Number, state: tuple[Tensor, ...]) -> Step:
        (u,) = state
        now, then = field.both_ends(t, h)
        W = field.increment(t, h).W
        f, G = field(now, u), field.diffusion(now, u)
        K = add_scaled(u, f, h)
        new = field.add_noise(K, G, W)
        end = new if field.noise == "additive" else K
        df = field(then, end) - f
        error = _half(df, h).abs()
        error = error + neglected_noise(StartOfStep(field, t, h, now, then, u, G, W)).abs()
        return Step((new,), error, (df, end - u), PathInterpolant(field, t, h, u, new, G))


class LambaEulerHeun(EulerHeun):
    """Euler-Heun with an error estimate, for any noise of a Stratonovich equation.

    The step is that of ``EulerHeun``. The estimate is its distance from the Euler predictor ``K``,
    the magnitudes of both parts added: ``h/2 |f(t + h, K) - f(t, u)|`` of the drift, and of the
    noise ``1/2 |(g(t + h, K) - G) W|``, ``G = g(t, u)``; it costs no evaluation. Where the noise is
    general, the step leaves out Levy areas that may be there when this product vanishes:
    ``sqrt(h/2) |g(t + h, K) - G|``, row by row, has the mean square of what they contribute where
    they are alone. Strong order 1/2, 1 where the noise is commutative; weak order 1.

    References
    ----------
    The counterpart of Lamba, J. Comput. Appl. Math. 161 (2003) 417, for Stratonovich integrals,
    by the argument in ``LambaEM`` (variance of a Levy area: Kloeden, Platen (1992), section 5.7).
    """

    adaptive = True

    def step(self, field: Any, t: Number, h: Number, state: tuple[Tensor, ...]) -> Step:
        return _heun(field, t, h, state[0], estimate=True)


def _heun(field: SDEField, t: Number, h: Number, u: Tensor, estimate: bool) -> Step:
    now, then = field.both_ends(t, h)
    W = field.increment(t, h).W
    f, G = field(now, u), field.diffusion(now, u)
    K = field.add_noise(add_scaled(u, f, h), G, W)
    df = field(then, K) - f
    dG = field.diffusion(then, K) - G
    of_drift, of_noise = _half(df, h), 0.5 * field.product(dG, W)
    new = K + of_drift + of_noise
    error = None
    if estimate:
        if not field.is_diagonal and field.m > 1:
            of_noise = _row_norms(dG, h)
        error = of_drift.abs() + of_noise.abs()
    return Step((new,), error, (df, K - u), PathInterpolant(field, t, h, u, new, G))


def neglected_noise(start: StartOfStep) -> Tensor:
    """What noise contributes that an Euler step leaves out: ``(N,)``.

    That is the double Ito integrals (of general noise, where the increment does not tell them, the
    root mean square), and the change with time.
    """
    field = start.field
    if field.noise == "additive":
        return time_change_of_noise(start)
    if field.is_diagonal or field.m == 1:
        return ito_correction(start, start.then, start.u)
    beside = field.add_noise(start.u, start.G, start.W)
    return _row_norms(field.diffusion(start.then, beside) - start.G, start.h)


def _row_norms(dG: Tensor, h: Number) -> Tensor:
    return scaled(torch.linalg.vector_norm(dG, dim=-1).reshape(-1), 0.5**0.5 * sqrt_abs(h))


def _half(df: Tensor, h: Number) -> Tensor:
    return scaled(df, 0.5 * h)


register(LambaEM())
register(LambaEulerHeun())
register(EM())
register(EulerHeun())
