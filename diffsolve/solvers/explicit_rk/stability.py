"""How long a step may be for a mode of the solution, by the direction of its eigenvalue."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from diffsolve.solvers.explicit_rk.tableau import Stages
from diffsolve.solvers.order_conditions import Array
from diffsolve.solvers.stable_steps import DIRECTIONS, GROWTHS

#: A step that shrinks a mode to this part is stable enough, whatever the true decay is.
_LEFT = 0.9
#: Part of the true decay that a step must reproduce of a mode that only decays; of others, more.
_DECAY = 0.5
#: Steps are shorter than those at the edge, since eigenvalues are found too small by some percent.
#: The edge of the region of stability is steepest along the imaginary axis.
_SAFETY_REAL, _SAFETY_IMAGINARY = 1.1, 1.15
_SHORT, _SPACING = np.geomspace(1e-4, 0.02, 200), 0.02  # of the sizes that are tried


def stability_polynomial(stages: Stages) -> Array:
    """Coefficients of ``R(z)``, that of 1 first: a step of ``u' = lambda u`` is ``R(h lambda) u``.

    References
    ----------
    Hairer, Wanner, Solving ODEs II (1996), section IV.2: ``R(z) = 1 + sum_k z^k b^T A^(k-1) 1``.
    """
    v, coefficients = np.ones(stages.n), [1.0]
    for _ in range(stages.n):
        coefficients.append(float(stages.a[-1] @ v))
        v = stages.a @ v
    largest = max(i for i, x in enumerate(coefficients) if abs(x) > 1e-14)
    return np.array(coefficients[: largest + 1])


@lru_cache(maxsize=100)
def stable_sizes(stages: Stages) -> Array:
    """Largest ``|h lambda|`` up to which steps damp a mode, or let it grow slowly enough.

    That is ``|R(z)| <= max(0.9, exp((1 - cos / 2) Re z + growth |z|))`` for all shorter ``z`` of
    the same direction. A method that is not stable on the imaginary axis adds a little to a mode in
    each step, which a gradient holds to the end. How much it may add depends on the length of the
    span.

    Returns
    -------
    Array
        Entry ``[j, i]`` for the growth ``GROWTHS[j]``, and for ``cos = -i / 32`` of the angle of
        ``lambda``: imaginary at the first, real and negative at the last.
    """
    coefficients = stability_polynomial(stages)[::-1]
    cosines = np.linspace(0.0, 1.0, DIRECTIONS)
    decay = 1 - (1 - _DECAY) * cosines[:, None]
    directions = (-cosines + 1j * np.sqrt(1 - cosines**2))[:, None]
    sizes = np.full((len(GROWTHS), DIRECTIONS), np.nan)
    radii, most = _SHORT, 2.0 * stages.n**2  # no polynomial of that degree reaches so far
    while np.isnan(sizes).any() and radii[0] < most:
        z = directions * radii
        logarithm = np.log(np.abs(np.polyval(coefficients, z)) + 1e-300)
        for j, growth in enumerate(GROWTHS):
            allowed = np.maximum(np.log(_LEFT), decay * z.real + growth * radii)
            beyond = logarithm > allowed + 1e-14
            edge = radii[np.maximum(beyond.argmax(1) - 1, 0)]
            new = beyond.any(1) & np.isnan(sizes[j])
            sizes[j, new] = edge[new]
        radii = radii[-1] + _SPACING * np.arange(400)
    sizes = np.where(np.isnan(sizes), most, sizes)
    return sizes / (_SAFETY_IMAGINARY + cosines * (_SAFETY_REAL - _SAFETY_IMAGINARY))
