"""Size of the first step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.structure import detached
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.norms import Tolerance

_ONE = np.ones(1)


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

    Returns
    -------
    float or 0-d tensor
        Positive size, a tensor where it is on the tape.

    References
    ----------
    Hairer, Norsett, Wanner, Solving ODEs I (1993), section II.4, "Starting step size".
    """
    magnitude = u0.abs()
    d0 = _plain(tolerance.scaled_norm(u0, magnitude))
    d1 = _plain(tolerance.scaled_norm(f0, magnitude))
    if not d1 < math.inf:  # NaN too
        return math.nan
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * (d0 / d1)
    h0 = min(h0, dtmax)
    (t,) = field.times(t0, direction * h0, _ONE)
    f1 = field(t, torch.add(u0, f0 * (direction * h0)))
    d2 = _plain(tolerance.scaled_norm(f1 - f0, magnitude)) / h0
    largest = max(d1, d2)
    if not largest < math.inf:
        return h0 * 1e-3
    h1 = max(1e-6, h0 * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** (1 / order)
    return min(100 * h0, h1, dtmax)


def _plain(x: Any) -> Any:
    """A float off the tape, a float64 tensor on it."""
    if isinstance(x, Tensor) and x.requires_grad:
        return x.to("cpu", torch.float64)
    return float(detached(x))
