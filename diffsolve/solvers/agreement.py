"""Whether gradients that were computed in two ways are the same.

``torch.vmap`` has a rule of its own for every operation, and the derivatives of some are wrong.
What was computed in a batch is therefore compared, once, with what comes out without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uneven(x: Tensor) -> Tensor:
    """Weights of the shape of ``x``, no two of them alike."""
    weights = torch.linspace(1.0, 2.0, max(x.numel(), 1), dtype=x.dtype, device=x.device)
    return weights[: x.numel()].reshape(x.shape)


def same_gradients(computed: Sequence[Tensor | None], known: Sequence[Tensor | None]) -> bool:
    """Whether gradients are the same up to rounding; None is zero."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for a, b in zip(computed, known, strict=True):
        like = a if b is None else b
        if like is not None:
            zero = torch.zeros_like(like)
            pairs.append((zero if a is None else a, zero if b is None else b))
    sizes = [float(b.abs().nan_to_num(0.0).sum()) / max(b.numel(), 1) ** 0.5 for _, b in pairs]
    largest = max(sizes, default=0.0)
    for (a, b), size in zip(pairs, sizes, strict=True):
        eps = torch.finfo(b.dtype).eps
        allowed = (1e5 if eps < 1e-12 else 1e3) * eps * size + 100 * eps * largest
        if not torch.allclose(a, b, rtol=0.0, atol=allowed, equal_nan=True):
            return False
    return True
