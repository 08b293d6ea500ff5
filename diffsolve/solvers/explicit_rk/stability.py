"""How long a step may be for a mode of the solution, by the direction of its eigenvalue."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from diffsolve.solvers.explicit_rk.tableau import Stages
from diffsolve.solvers.order_conditions import Array
from diffsolve.solvers.stable_steps import DIRECTIONS

#: What is left of a mode after a step whose error is not known: it vanishes soon.
_LEFT = 0.5
#: What a step may add to a mode, as a part of it.
_SLACK = 0.002
_SPACING = 0.02


def stability_polynomial(stages: Stages) -> Array:
    """Coefficients of ``R(z)``, that of 1 first: a step of ``u' = lambda u`` is ``R(h lambda) u``.

    References
    ----------
    Hairer, Wanner, Solving ODEs II (1996), section IV.2: ``R(z) = 1 + sum_k z^k b^T A^(k-1) 1``.
    """
    v, found = np.ones(stages.n), [1.0]
    for _ in range(stages.n):
        found.append(float(stages.a[-1] @ v))
        v = stages.a @ v
    largest = max(i for i, x in enumerate(found) if abs(x) > 1e-14)
    return np.array(found[: largest + 1])


@lru_cache(maxsize=100)
def damped_sizes(stages: Stages) -> Array:
    """Largest ``|h lambda|`` up to which steps damp a mode, or follow it.

    That is ``|R(z)| <= max(1/2, 1.002 |exp(z)|)`` for all shorter ``z`` of the same direction. On
    the edge of the region of stability, where ``|R| = 1``, what a gradient holds of a mode would
    stay for ever, and errors of the eigenvalue would let it grow.

    Returns
    -------
    Array
        Entry ``i`` for ``cos = -i / 32`` of the angle of ``lambda``: imaginary at the first, real
        and negative at the last.
    """
    coefficients = stability_polynomial(stages)[::-1]
    cosines = np.linspace(0.0, 1.0, DIRECTIONS)
    directions = (-cosines + 1j * np.sqrt(1 - cosines**2))[:, None]
    found = np.full(DIRECTIONS, np.nan)
    start, most = 0.0, 2.0 * stages.n**2  # no polynomial of that degree reaches so far
    while np.isnan(found).any() and start < most:
        radii = start + _SPACING * np.arange(1, 401)
        z = directions * radii
        allowed = np.maximum(_LEFT, (1 + _SLACK) * np.exp(z.real))
        excess = np.abs(np.polyval(coefficients, z)) - allowed
        for i, row in enumerate(excess):
            beyond = np.flatnonzero(row > 0)
            if len(beyond) and np.isnan(found[i]):
                found[i] = radii[beyond[0]] - _SPACING
        start = radii[-1]
    return np.where(np.isnan(found), most, found)
