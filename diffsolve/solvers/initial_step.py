"""Size of the first step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.structure import as_float
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.norms import Tolerance

_ONE = np.ones(1)
_AIM = 0.25  # error of the first step of an SDE, in tolerances
_AHEAD = (0.0437, 0.2861)  # where to look ahead of an SDE, in units of the longest step


def initial_step(
    field: VectorField,
    t0: Any,
    u0: Tensor,
    f0: Tensor,
    direction: float,
    order: float,
    tolerance: Tolerance,
    dtmax: Any,
) -> Any:
    """Guess a first step from the sizes of the state and its first two derivatives.

    For an SDE, ``order`` is that of the solution whose error is estimated, and the guess is by
    ``stochastic_step``.

    Returns
    -------
    float or 0-d tensor
        Positive size, a tensor where it is on the tape.

    References
    ----------
    Hairer, Norsett, Wanner, Solving ODEs I (1993), section II.4, "Starting step size".
    """
    if isinstance(field, SDEField):
        return stochastic_step(field, t0, u0, f0, direction, order, tolerance, dtmax)
    magnitude = u0.abs()
    d0 = _as_number(tolerance.scaled_norm(u0, magnitude))
    d1 = _as_number(tolerance.scaled_norm(f0, magnitude))
    if not d1 < math.inf:  # NaN too
        return math.nan
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * (d0 / d1)
    h0 = min(h0, dtmax)
    (t,) = field.times(t0, direction * h0, _ONE)
    f1 = field(t, torch.add(u0, f0 * (direction * h0)))
    d2 = _as_number(tolerance.scaled_norm(f1 - f0, magnitude)) / h0
    largest = max(d1, d2)
    if not largest < math.inf:
        return h0 * 1e-3
    h1 = max(1e-6, h0 * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** (1 / order)
    return min(100 * h0, h1, dtmax)


def stochastic_step(
    field: SDEField,
    t0: float,
    u0: Tensor,
    f0: Tensor,
    direction: float,
    order: float,
    tolerance: Tolerance,
    dtmax: float,
) -> float:
    """Guess a first step of an SDE from what a small step of Euler's method would leave out.

    In a trial step of length ``h0``, the drift and three standard deviations of the noise move the
    state by a hundredth of its size, or by a tolerance. It changes the drift by ``df`` and the
    diffusion by ``dg``. Euler's method leaves out about ``h/2 df`` of the drift, which grows as
    ``h**2``, and ``sqrt(h)/2 dg`` of the noise, which is proportional to ``h`` there and to
    ``h**(order + 1/2)`` for a method of that order. The guess is the step where the larger one is a
    quarter of the tolerance.

    A small step does not see what changes with time alone, and a long one sees only its ends. So
    before a guess that is a considerable part of the longest step, ``f`` and ``g`` are evaluated
    ahead, for the state at the start: noise that changes by ``dg`` in a time ``s`` leaves out
    ``dg h / s`` times ``sqrt(h/3)``.

    References
    ----------
    After Hairer, Norsett, Wanner, Solving ODEs I (1993), section II.4. Their rule with the drift
    replaced by ``f`` plus and minus ``3 g``, as in StochasticDiffEq.jl, takes ``g`` for a
    derivative; its first steps are so short that a controller which at most adds an eighth needs
    up to a hundred steps to reach the size that suits the problem.
    """
    magnitude = u0.abs()

    def norm(x: Tensor) -> float:
        return float(tolerance.scaled_norm(x.detach(), magnitude.detach()))

    G0 = field.diffusion(field.after(t0, direction), u0)
    deviation = field.deviation(G0)
    of_drift, of_noise = norm(f0), 3 * norm(deviation)
    if not of_drift + of_noise < math.inf:  # NaN too
        return math.nan
    if of_drift + of_noise == 0:
        h0 = 1e-3 * dtmax
    else:  # h of_drift + sqrt(h) of_noise = move
        move = max(0.01 * norm(u0), 1.0)
        root = 2 * move / (of_noise + math.sqrt(of_noise**2 + 4 * move * of_drift))
        h0 = min(root * root, dtmax)
    (t,) = field.times(t0, direction * h0, _ONE)
    u1 = torch.add(u0, f0, alpha=direction * h0).add(deviation, alpha=math.sqrt(h0))
    df = norm(field(t, u1) - f0) / 2
    dg = norm(field.deviation(field.diffusion(t, u1) - G0)) / 2
    if not df + dg < math.inf:
        return h0 * 1e-3
    h = dtmax
    if df > 0:
        h = min(h, math.sqrt(_AIM * h0 / df))
    if dg > 0:
        h = min(h, (_AIM * math.sqrt(h0) / dg) ** (1 / (order + 0.5)))
    for ahead in [x * dtmax for x in _AHEAD]:
        if h <= ahead:
            break
        (t,) = field.times(t0, direction * ahead, _ONE)
        df = norm(field(t, u0) - f0) / 2
        dg = norm(field.deviation(field.diffusion(t, u0) - G0)) / math.sqrt(3)
        if 0 < df < math.inf:
            h = min(h, math.sqrt(_AIM * ahead / df))
        if 0 < dg < math.inf:
            h = min(h, (_AIM * ahead / dg) ** (2 / 3))
    return h


def _as_number(x: Any) -> Any:
    """A float off the tape, a float64 tensor on it."""
    if isinstance(x, Tensor) and x.requires_grad:
        return x.to("cpu", torch.float64)
    return as_float(x)
