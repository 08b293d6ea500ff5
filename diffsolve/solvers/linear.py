"""Dense linear algebra of implicit steps: ``M = I / gamma - h J``, factored block by block."""

from __future__ import annotations

import weakref
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffsolve.problems.vector_field import VectorField


class BlockLU:
    """LU factors of independent diagonal blocks.

    Parameters
    ----------
    field
        Counts the solves.
    lu, pivots
        Of each block, as ``torch.linalg.lu_factor`` gives them: ``(B, d, d)`` and ``(B, d)``.
    """

    __slots__ = ("field", "lu", "pivots")

    def __init__(self, field: VectorField, lu: Tensor, pivots: Tensor):
        self.field, self.lu, self.pivots = field, lu, pivots

    def solve(self, b: Tensor) -> Tensor:
        """``M^{-1} b``, flat ``(N,)``; ``b`` may be on the tape, the matrix is a constant."""
        self.field.nsolve += 1
        columns = b.reshape(*self.pivots.shape, 1)
        return torch.linalg.lu_solve(self.lu, self.pivots, columns).reshape(-1)


class Jacobian:
    """``df/du`` at one point: independent diagonal blocks, one where the state is no batch.

    Attributes
    ----------
    blocks
        ``(B, d, d)`` with ``B d = N``; a constant.
    slope
        ``df/dt`` there, ``(N,)``, or None where ``f`` does not depend on time.
    """

    def __init__(self, field: VectorField, blocks: Tensor, slope: Tensor | None = None):
        self.field: Any = weakref.proxy(field)  # whose scratch space may hold this
        self.blocks, self.slope = blocks, slope

    @cached_property
    def finite(self) -> bool:
        """Whether neither the matrix nor the slope holds NaN or Inf."""
        slope = self.slope is None or bool(torch.isfinite(self.slope).all())
        return slope and bool(torch.isfinite(self.blocks).all())

    def product(self, v: Tensor) -> Tensor:
        """``J v``, flat."""
        blocks, size, _ = self.blocks.shape
        return torch.bmm(self.blocks, v.reshape(blocks, size, 1)).reshape(-1)

    def factor(self, h: float, gamma: float) -> BlockLU | None:
        """Factors of ``I / gamma - h J``; None where that is singular or not finite."""
        return factor(self.field, self.blocks, -h, gamma)


def factor(field: VectorField, blocks: Tensor, scale: float, gamma: float) -> BlockLU | None:
    """Factors of ``I / gamma + scale * blocks``; None where that is singular or not finite."""
    field.nlu += 1
    matrix = blocks * scale
    matrix.diagonal(dim1=-2, dim2=-1).add_(1 / gamma)
    lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
    # a zero pivot, or NaN and Inf, which factoring spreads to the end of the block
    sound = (info == 0).all() & torch.isfinite(lu).all()
    return BlockLU(field, lu, pivots) if bool(sound) else None
