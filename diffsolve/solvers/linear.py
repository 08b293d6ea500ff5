"""Dense linear algebra of implicit steps: ``M = I / gamma - h J``, factored block by block."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from diffsolve.problems.vector_field import VectorField


class Factors(Protocol):
    """Factors of the matrix ``M`` of a step."""

    def solve(self, b: Tensor, /) -> Tensor:
        """``M^{-1} b``, flat ``(N,)``."""
        ...


class Linearisation(ABC):
    """A Jacobian ``J`` at a point, as implicit steps use it.

    Attributes
    ----------
    blocks
        ``(B, d, d)``, constants.
    slope
        ``df/dt`` there, ``(N,)``, or None where ``f`` does not depend on time.
    """

    def __init__(self, field: VectorField, blocks: Tensor, slope: Tensor | None = None):
        self.field: Any = weakref.proxy(field)  # whose workspace may hold this
        self.blocks, self.slope = blocks, slope

    @cached_property
    def finite(self) -> bool:
        """Whether neither the matrix nor the slope holds NaN or Inf."""
        slope = self.slope is None or bool(torch.isfinite(self.slope).all())
        return slope and bool(torch.isfinite(self.blocks).all())

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """``J v``, flat."""

    @abstractmethod
    def factor(self, h: float, gamma: float) -> Factors | None:
        """Factors of ``I / gamma - h J``; None where that is singular or not finite."""


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


class Jacobian(Linearisation):
    """``df/du``: independent diagonal blocks with ``B d = N``, one where the state is no batch."""

    def product(self, v: Tensor) -> Tensor:
        blocks, size, _ = self.blocks.shape
        return torch.bmm(self.blocks, v.reshape(blocks, size, 1)).reshape(-1)

    def factor(self, h: float, gamma: float) -> BlockLU | None:
        return factored_step_matrix(self.field, self.blocks, h, gamma)


def factored_step_matrix(
    field: VectorField, blocks: Tensor, h: float, gamma: float
) -> BlockLU | None:
    """Factors of ``M = I / gamma - h J``; None where that is singular or not finite.

    This is the one place of the torch engine that forms the matrix of an implicit step: Rosenbrock
    methods, Newton's iterations, derivatives of stages, implicit methods for SDEs and the reverse
    problems of stiff adjoints all come here. The mass matrix of ``mass du/dt = f`` would enter
    here, in the place of ``I``, and in the residuals of ``Newton`` and ``linear_on_tape``, which
    apply ``M`` without forming it.

    Parameters
    ----------
    field
        Counts the factorisation.
    blocks
        Of ``J``, ``(B, d, d)``.
    h, gamma
        Step size and diagonal coefficient.
    """
    field.nlu += 1
    matrix = blocks * -h
    matrix.diagonal(dim1=-2, dim2=-1).add_(1 / gamma)
    lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
    # a zero pivot, or NaN and Inf, which factoring spreads to the end of the block
    sound = (info == 0).all() & torch.isfinite(lu).all()
    return BlockLU(field, lu, pivots) if bool(sound) else None
