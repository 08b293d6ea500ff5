"""Milstein methods without derivatives, of strong order 1, with fixed and adaptive steps.

They add to Euler-Maruyama's step what the double integrals ``I_(j,k)`` contribute, ``sum over j, k
of g_k' g_j I_(j,k)``: known from the increment where the noise is diagonal or commutative, and with
Levy areas otherwise.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from diffsolve.problems.structure import Number
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Step
from diffsolve.solvers.stage_rows import RKState
from diffsolve.solvers.stochastic.levy_area import levy_area
from diffsolve.solvers.stochastic.method import (
    ANY_NOISE,
    PathInterpolant,
    StartOfStep,
    StochasticMethod,
    add_scaled,
    magnitude_of,
    register,
    scaled,
    sqrt_abs,
    time_change_of_noise,
)

_INTEGRALS = ("ito", "stratonovich")


class InterpretationMethod(StochasticMethod):
    """Base of methods that are made for either of the integrals.

    Parameters
    ----------
    interpretation
        ``"ito"`` (default) or ``"stratonovich"``.

    Raises
    ------
    ValueError
        If ``interpretation`` is neither.
    """

    def __init__(self, interpretation: str = "ito"):
        if interpretation not in _INTEGRALS:
            raise ValueError(
                f'{self.name}: interpretation must be "ito" or "stratonovich", '
                f"got {interpretation!r}"
            )
        self.integral = interpretation
        self.interpretation = frozenset({interpretation})

    def __repr__(self) -> str:
        return f"{self.name}({'' if self.integral == 'ito' else repr(self.integral)})"


class Milstein(InterpretationMethod):
    """Base of the explicit ones, whose state is ``(u, f(t, u))``.

    With the correction ``C`` of the method the step is ``u_new = u + h f + G W + C``, ``f`` and
    ``G`` at ``(t, u)``. The error estimate is that of Euler-Maruyama's step, which is embedded:
    ``h/2 |f(t + h, u_new) - f| + |C|``. The first part costs nothing: the next step begins with
    that derivative. Where ``C`` does not see that ``g`` changes with time, in Ito's sense and for
    additive noise, ``time_change_of_noise`` is added, which costs an evaluation of ``g``.

    Parameters
    ----------
    interpretation
        ``"ito"`` (default) or ``"stratonovich"``.

    Raises
    ------
    ValueError
        If ``interpretation`` is neither.
    """

    strong_order = 1.0
    weak_order = 1.0
    estimate_order = 0.5
    adaptive = True
    carries_derivative = True

    def init(self, field: VectorField, t: Number, u: Tensor, du: Tensor | None = None) -> RKState:
        return RKState(u, field(field.time(t), u) if du is None else du)

    def step(self, field: Any, t: Number, h: Number, state: tuple[Tensor, ...]) -> Step:
        u, du = state
        now, then = field.both_ends(t, h)
        G = field.diffusion(now, u)
        W = field.increment(t, h).W
        start = StartOfStep(field, t, h, now, then, u, G, W)
        K = add_scaled(u, du, h)
        new = field.add_noise(K, G, W)
        correction = None
        if field.noise != "additive":
            correction = self.correction(start, K)
            new = new + correction
        du_new = field(then, new)
        change = du_new - du
        error = scaled(change, 0.5 * h).abs()
        if correction is not None:
            error = error + correction.abs()
        if correction is None or self.integral == "ito":
            error = error + time_change_of_noise(start).abs()
        dense = PathInterpolant(field, t, h, u, new, G)
        return Step(RKState(new, du_new), error, (change, new - u), dense)

    @abstractmethod
    def correction(self, start: StartOfStep, K: Tensor) -> Tensor:
        """What the double integrals contribute, ``(N,)``; ``K`` is ``u + h f``."""


class RKMil(Milstein):
    """The Milstein method without derivatives, for diagonal or scalar noise.

    Diagonal noise is that of a ``g`` whose component ``i`` depends on component ``i`` of ``u``;
    with another ``g`` the strong order is 1/2. Evaluations a step: one of ``f``, three of ``g``,
    two for Stratonovich equations.

    Parameters
    ----------
    interpretation
        ``"ito"`` (default) or ``"stratonovich"``.

    Raises
    ------
    ValueError
        If ``interpretation`` is neither.

    References
    ----------
    Kloeden, Platen, Numerical Solution of Stochastic Differential Equations (1992), section 11.1.

    Notes
    -----
    For Stratonovich equations the correction is ``1/2 (g(t + h, u + h f + G W) - G) W``, as in
    Heun's method. The usual one, ``(g(t, u + sqrt(h) G) - G) / sqrt(h) * W^2 / 2`` (Kloeden,
    Platen, section 11.1; StochasticDiffEq.jl; torchsde with ``grad_free``), has the mean error
    ``h^1.5/4 g'' G^2`` a step, so that its strong order is 1/2 where ``g`` is not linear. Here the
    term of that kind has ``W^3``, whose mean is zero.
    """

    noise_types = frozenset({"diagonal", "scalar"})

    def correction(self, start: StartOfStep, K: Tensor) -> Tensor:
        if self.integral == "ito":
            return ito_correction(start, start.now, K)
        return stratonovich_correction(start, K)


class RKMilCommute(Milstein):
    """The Milstein method without derivatives, for noise of any shape that is commutative.

    That is ``g_k' g_j = g_j' g_k`` for every two columns of ``g``; with noise that is not, the
    strong order is 1/2. Evaluations of ``g`` a step: ``m + 2``; three for diagonal and scalar
    noise; two for Stratonovich equations and for additive noise.

    Parameters
    ----------
    interpretation
        ``"ito"`` (default) or ``"stratonovich"``.

    Raises
    ------
    ValueError
        If ``interpretation`` is neither.

    References
    ----------
    Kloeden, Platen, Numerical Solution of Stochastic Differential Equations (1992), sections 10.3
    and 11.1. For Stratonovich equations the correction is the one in ``RKMil``.
    """

    noise_types = ANY_NOISE

    def correction(self, start: StartOfStep, K: Tensor) -> Tensor:
        if self.integral == "stratonovich":
            return stratonovich_correction(start, K)
        if start.field.is_diagonal or start.field.m == 1:
            return ito_correction(start, start.now, K)
        return _double_integrals(start, _symmetric_part(start.W, start.h))


class RKMilGeneral(Milstein):
    """The Milstein method without derivatives, for general noise, with Levy areas.

    The double integrals of noise that is not commutative are not known from the increments: their
    antisymmetric parts, the Levy areas, are computed from the path between the ends of the step
    (``levy_area``), at as many points as strong order 1 asks for, about ``time_scale / (12 h)``.
    They belong to the path: a solve with other steps, after a rejected step too, sees the same
    path. The path remembers these points; reading them takes time, and no evaluation of ``g``. Of
    these there are ``m + 2`` a step.

    For diagonal and scalar noise it is ``RKMil``, for additive noise no area is needed.

    Parameters
    ----------
    interpretation
        ``"ito"`` (default) or ``"stratonovich"``.
    time_scale
        Time in which the noise changes the solution by as much as it is; default None: the length
        of the problem's time span. The error of an area, root mean square, is at most
        ``h^1.5 / sqrt(time_scale)``, in steps shorter than ``time_scale / 49,152`` at most
        ``h / 221``: there the pieces of a step are ``MOST_PIECES``. Along a
        ``VirtualBrownianTree`` it is at least ``sqrt(h tol / 12)``.

    Raises
    ------
    ValueError
        If ``interpretation`` is neither, or ``time_scale`` is given and not positive and finite.

    References
    ----------
    Kloeden, Platen, Numerical Solution of Stochastic Differential Equations (1992), sections 10.3
    and 11.1; the areas: see ``levy_area``. For Stratonovich equations the symmetric part is the
    correction in ``RKMil``.
    """

    noise_types = ANY_NOISE
    needs_levy_area = True
    is_one_step = False  # a batch of steps brings no noise between the ends of its steps

    def __init__(self, interpretation: str = "ito", time_scale: float | None = None):
        super().__init__(interpretation)
        if time_scale is not None:
            if not 0 < time_scale < float("inf"):
                raise ValueError(f"time_scale must be positive and finite, got {time_scale!r}")
            time_scale = float(time_scale)
        self.time_scale = time_scale

    def __repr__(self) -> str:
        given = [] if self.integral == "ito" else [repr(self.integral)]
        if self.time_scale is not None:
            given.append(f"time_scale={self.time_scale!r}")
        return f"{self.name}({', '.join(given)})"

    def correction(self, start: StartOfStep, K: Tensor) -> Tensor:
        field, ito = start.field, self.integral == "ito"
        if field.is_diagonal or field.m == 1:
            if ito:
                return ito_correction(start, start.now, K)
            return stratonovich_correction(start, K)
        scale = field.span if self.time_scale is None else self.time_scale
        area = levy_area(field, start.t, start.h, scale)
        if ito:
            return _double_integrals(start, _symmetric_part(start.W, start.h) + area)
        return stratonovich_correction(start, K) + _double_integrals(start, area)


def ito_correction(start: StartOfStep, at: Tensor, base: Tensor) -> Tensor:
    """``g' g (W^2 - |h|) / 2`` of diagonal or scalar noise, by a difference: ``(N,)``.

    ``base`` is what the state is moved from, ``u`` or ``u + h f``; ``at`` is the time there.
    """
    field, G, W = start.field, start.G, start.W
    beside = add_scaled(base, G.reshape(-1), sqrt_abs(start.h))
    change = field.diffusion(at, beside) - G
    size = sqrt_abs(start.h, W.dtype)
    return field.product(change, 0.5 * (W * W / size - size))


def stratonovich_correction(start: StartOfStep, base: Tensor) -> Tensor:
    """``sum of g_k' g_j W_j W_k / 2``, by a difference along the step's noise: ``(N,)``."""
    field, G, W = start.field, start.G, start.W
    change = field.diffusion(start.then, field.add_noise(base, G, W)) - G
    return field.product(change, 0.5 * W)


def _symmetric_part(W: Tensor, h: Number) -> Tensor:
    """``(I_(j,k) + I_(k,j)) / 2`` of Ito integrals: ``(R, m, m)``."""
    unit = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    return 0.5 * (W[..., :, None] * W[..., None, :] - unit * magnitude_of(h, W.dtype))


def _double_integrals(start: StartOfStep, integrals: Tensor) -> Tensor:
    """``sum of g_k' g_j I_(j,k)`` by differences along each column of ``g``: ``(N,)``.

    The mean of the integrals is zero, so that of the error of the differences is, too.
    """
    field, G, side = start.field, start.G, sqrt_abs(start.h)
    weights = integrals / sqrt_abs(start.h, start.u.dtype)
    total: Any = None
    for j in range(field.m):
        beside = add_scaled(start.u, G[:, :, j].reshape(-1), side)
        term = field.product(field.diffusion(start.now, beside) - G, weights[:, j])
        total = term if total is None else total + term
    return total


for _method in (RKMil, RKMilCommute, RKMilGeneral):
    for _integral in _INTEGRALS:
        register(_method(_integral))
