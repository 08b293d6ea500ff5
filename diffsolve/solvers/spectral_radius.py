"""How fast a system can move: an estimate of its Jacobian's spectral radius."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def spectral_radius(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """``sqrt(|J^3 v| / |J v|)`` for a fixed vector ``v`` of signs.

    Three steps of the power iteration; the square root of two of them, so that a pair of complex
    eigenvalues does not make it swing. It can be differentiated, and is 0 where a product is.

    Parameters
    ----------
    product
        From ``v`` to ``J v``, both ``(N,)``.
    like
        A tensor of such a shape and dtype.

    Returns
    -------
    Tensor
        0-d.

    References
    ----------
    The power iteration as in Hairer, Wanner, Solving ODEs II (1996), section IV.2, and Sommeijer,
    Shampine, Verwer, J. Comput. Appl. Math. 88 (1998) 315.
    """
    first, peak = _normalised(product(signs(like)))
    if not peak > 0:
        return torch.zeros((), dtype=like.dtype, device=like.device) * peak
    second, peak = _normalised(product(first))
    if not peak > 0:
        return torch.zeros((), dtype=like.dtype, device=like.device) * peak
    third = torch.linalg.vector_norm(product(second))
    if not third > 0:
        return torch.zeros((), dtype=like.dtype, device=like.device) * third.detach()
    return torch.sqrt(peak * third / torch.linalg.vector_norm(first))


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divided by its largest magnitude, a constant, so that squares cannot overflow."""
    peak = x.detach().abs().amax()
    return (x / peak if peak > 0 else x), peak


def signs(like: Tensor) -> Tensor:
    """The Thue-Morse sequence, which no smooth vector is orthogonal to for long."""
    n = like.numel()
    sequence = torch.ones(1, dtype=like.dtype, device=like.device)
    while len(sequence) < n:
        sequence = torch.cat([sequence, -sequence])
    return sequence[:n]
