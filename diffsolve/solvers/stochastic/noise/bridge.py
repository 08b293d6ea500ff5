"""The law of an interval of Brownian motion that is divided in two.

Over an interval of length ``h``, ``W`` is the increment and ``H`` the space-time Levy area
``1/h * integral of (W(u) - W(s) - (u - s)/h W) du``: independent, normal, of variances ``h`` and
``h/12``. It is divided into lengths ``a h`` and ``b h``, ``a + b = 1``, with ``W1, H1`` and
``W2, H2``, which are independent as long as ``W`` and ``H`` are not known. Let
``Z = b W1 - a W2``, which is independent of ``W = W1 + W2``; then ``W1 = a W + Z`` and
``W2 = b W - Z``. The integrals of both parts add up to that of the whole if

    ``H = Z/2 + a H1 + b H2``,

where ``Z, H1, H2`` are independent of variances ``h a b``, ``h a/12``, ``h b/12``. Conditioning
on this one equation, with ``q = 1 - 3 a b``, leaves two independent standard normals ``n1, n2``:

    ``Z = 6 a b H + c n1``,  ``c = sqrt(h a b q)``,
    ``H1 = a**2 K + b (c/q) n2/sqrt(12)``,  ``H2 = b**2 K - a (c/q) n2/sqrt(12)``,
    ``K = H - (c/q) n1/2``.

Nothing in it cancels or divides by a length, however short one part is. For the middle it is the
formula of Foster, Lyons and Oberhauser (2020), An optimal polynomial approximation of Brownian
motion; for any point, of Jelinčič, Foster and Kidger (2024), Single-seed generation of Brownian
paths and integrals for adaptive and high order SDE solvers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weights(left: float, right: float) -> tuple[float, float, float, float]:
    """``a, b, c, c/q`` for parts of these lengths."""
    h = left + right
    a, b = left / h, right / h
    q = 1.0 - 3.0 * a * b
    c = math.sqrt(h * a * b * q)
    return a, b, c, c / q


def divide(W: Tensor, H: Tensor, n: Tensor, left: float, right: float) -> Tensor:
    """``W1, H1, W2, H2``, stacked, of the two parts of an interval with ``W`` and ``H``.

    Parameters
    ----------
    n
        Two independent normals: of variance 1 and of variance 1/12.
    left, right
        Lengths of the parts.
    """
    a, b, c, e = weights(left, right)
    z = torch.add(6 * a * b * H, n[0], alpha=c)
    k = torch.add(H, n[0], alpha=-0.5 * e)
    return torch.stack(
        [
            torch.add(z, W, alpha=a),
            torch.add(a * a * k, n[1], alpha=b * e),
            torch.sub(b * W, z),
            torch.sub(b * b * k, n[1], alpha=a * e),
        ]
    )
