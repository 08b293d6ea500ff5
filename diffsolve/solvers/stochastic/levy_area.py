"""Levy areas of a Brownian path over a step, computed from the path itself."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.structure import Number, outside_transforms

#: Pieces of a step at most. Steps that ask for more are shorter than ``time_scale / 49,152``, those
#: of a solve that fails in the main; the error of their areas is ``h / sqrt(12 * 4096)``.
MOST_PIECES = 4096
_ULPS = 64  # of the times: length of the shortest pieces


def levy_area(field: SDEField, t: Number, h: Number, time_scale: float) -> Tensor:
    """``(I_(j,k) - I_(k,j)) / 2`` over a step, ``(R, m, m)``, with ``j`` the inner integral.

    The step is cut into equal pieces. Of each the path tells ``W`` and ``H``, and
    ``H_j W_k - W_j H_k`` is then the mean of its area; what is unknown has the variance
    ``length^2 / 12``. With ``n`` pieces that adds up to ``h^2 / (12 n)``, and strong order 1 of a
    method asks for an error ``O(h^1.5)``: so ``n`` is ``time_scale / (12 h)``, rounded up, and at
    most ``MOST_PIECES``, where the error is of order ``h``. No piece is shorter than the ``tol`` of
    a ``VirtualBrownianTree``, or than rounding of the times allows.

    Parameters
    ----------
    field, t, h
        The step; the path of ``field`` must have ``H``. It remembers the points between the pieces.
    time_scale
        See ``RKMilGeneral``.

    References
    ----------
    Foster, Lyons, Oberhauser, SIAM J. Numer. Anal. 58 (2020) 1393, on the area given ``W`` and
    ``H``. That so many values of a path are needed for this order: Clark, Cameron, in: Grigelionis
    (ed.), Stochastic Differential Systems (1980) 162. Cutting steps: Gaines, Lyons, SIAM J. Appl.
    Math. 57 (1997) 1455.

    Notes
    -----
    Fourier series (Kloeden, Platen, Wright 1992; Wiktorsson 2001) need fewer random numbers where
    only the law of the area matters. Theirs are independent of what a path draws when it is looked
    at more closely, so that solves with different steps would follow different paths.
    """
    most = abs(float(h)) / _finest(field, float(t), float(h))
    return area_of_pieces(field, t, h, pieces_of(h, time_scale, most))


def pieces_of(h: Number, time_scale: float, most: float = math.inf) -> int:
    """Number of pieces of a step, which can be cut into so many at most."""
    wanted = time_scale / (12 * abs(float(h)))
    return max(
        1, min(math.ceil(min(wanted, MOST_PIECES) - 1e-9), math.floor(min(most, MOST_PIECES)))
    )


def _finest(field: SDEField, t: float, h: float) -> float:
    """Length of the shortest pieces of a step that the path tells apart."""
    resolved = getattr(field.path, "tol", 0.0)  # of a virtual Brownian tree
    return max(resolved, _ULPS * math.ulp(max(abs(t), abs(t + h))))


def area_of_pieces(field: SDEField, t: Number, h: Number, pieces: int) -> Tensor:
    """``levy_area`` with this number of pieces."""
    with outside_transforms():
        W, H = _cut(field, float(t), float(h), pieces)
    before = W.cumsum(0) - W
    # of the path through the ends of the pieces, and of the pieces
    half = torch.einsum("nrj,nrk->rjk", 0.5 * before + H, W)
    return half - half.mT


def _halves_first(pieces: int) -> list[int]:
    """1, ..., pieces - 1 in an order that divides long intervals before short ones."""
    return sorted(range(1, pieces), key=lambda i: -(i & -i))


def _cut(field: SDEField, t: float, h: float, pieces: int) -> tuple[Tensor, Tensor]:
    """``W`` and ``H`` of equal pieces of a step, ``(pieces, R, m)``."""
    path = field.path
    assert path is not None
    whole = path.increment(t, t + h)
    increments = [whole]
    if pieces > 1:
        ends = [t, *(t + h * (i / pieces) for i in range(1, pieces)), t + h]
        # a read: it changes nothing that later steps draw. Halves first, then quarters, ...: a path
        # that remembers how it was divided finds each piece in a few steps
        path.at([ends[i] for i in _halves_first(pieces)], since=t)
        increments = [path.increment(a, b) for a, b in pairwise(ends)]
    return torch.stack([x.W for x in increments]), torch.stack(
        [x.H for x in increments if x.H is not None]
    )
