"""Which products with a Jacobian make the matrix: all rows, independent blocks, or colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.structure import outside_transforms
from diffsolve.problems.vector_field import VectorField

_SMALL = 16  # unknowns up to which every entry of the matrix is computed
_DIRECTIONS = 2  # random ones: along a single one, coupled rows might look independent


class MatrixTooLarge(ValueError):
    """An implicit step would need a dense matrix that is too large."""


class Layout:
    """Cotangents ``(C, N)``, and how the products with them make the matrix.

    Attributes
    ----------
    shape
        ``(B, d)``: number and size of the diagonal blocks.
    cotangents
        What the Jacobian is multiplied with from the left.
    directions
        Random vectors ``(n, N)`` whose products tell whether the structure is as assumed.
    """

    shape: tuple[int, int]
    cotangents: Tensor
    directions: Tensor

    def blocks(self, products: Tensor) -> Tensor | None:
        """The matrix ``(B, d, d)`` from the products; None where its structure is another."""
        raise NotImplementedError

    def agree(
        self, known: Tensor, terms: Tensor, rtol: float, atol: float = 0.0, by_block: bool = False
    ) -> bool:
        """Whether ``known`` is the sum of ``terms`` over the last axis, up to rounding.

        That is relative to the largest of all, or of the own block.
        """
        off = (known - terms.sum(-1)).abs()
        sizes = terms.abs().sum(-1) + known.abs()
        largest = sizes.amax(-1, keepdim=True) if by_block else sizes.amax()
        # other checks refuse NaN and Inf, which tell nothing about the structure
        return not bool((off > rtol * largest + atol).any())


class Dense(Layout):
    """Every row of one block."""

    def __init__(self, field: VectorField):
        n = field.structure.size
        if n > field.largest_matrix:
            raise MatrixTooLarge(
                f"an implicit method needs the Jacobian of this f, whose {n} x {n} entries are too "
                "many for a dense matrix: use an explicit method such as Tsit5(), or write a batch "
                "as u of shape (..., d) whose rows f treats independently"
            )
        self.shape = (1, n)
        self.cotangents = torch.eye(n, dtype=field.dtype, device=field.device)

    def blocks(self, products: Tensor) -> Tensor:
        return products[None]


class IndependentRows(Layout):
    """Blocks of a state ``(..., d)`` whose rows ``f`` treats independently.

    A product with the same vector in every row gives each row's block if rows are independent.
    Products with vectors that differ from row to row agree with these blocks only in that case.
    """

    def __init__(self, field: VectorField):
        shape = field.structure.shapes[0]
        count, size = self.shape = (math.prod(shape[:-1]), shape[-1])
        self.rounding = rounding(field)
        self.directions = random_directions(field)
        chosen = torch.zeros(size, count, size, dtype=field.dtype, device=field.device)
        for j in range(size):
            chosen[j, :, j] = 1
        self.cotangents = torch.cat([chosen.reshape(size, count * size), self.directions])

    def blocks(self, products: Tensor) -> Tensor | None:
        count, size = self.shape
        rows = products.reshape(-1, count, size)
        blocks = rows[:size].transpose(0, 1)
        for known, direction in zip(rows[size:], self.directions, strict=True):
            terms = (blocks * direction.reshape(count, size, 1)).mT
            if not self.agree(known, terms, self.rounding, by_block=True):
                return None
        return blocks


class Coloured(Layout):
    """Rows of a sparse matrix, added up where they share no column.

    References
    ----------
    Curtis, Powell, Reid, IMA J. Appl. Math. 13 (1974) 117.
    """

    def __init__(self, field: VectorField, pattern: Tensor):
        n = field.structure.size
        self.shape = (1, n)
        self.directions, self.rounding = random_directions(field), rounding(field)
        self.colours = _colours(pattern).to(field.device)
        self.mask = pattern.to(field.dtype).to(field.device)
        chosen = torch.nn.functional.one_hot(self.colours).to(self.mask).T
        self.cotangents = torch.cat([chosen, self.directions])

    def blocks(self, products: Tensor) -> Tensor:
        matrix = products[self.colours] * self.mask
        for known, direction in zip(products[-_DIRECTIONS:], self.directions, strict=True):
            if not self.agree(known, (matrix * direction[:, None]).T, self.rounding):
                raise ValueError(
                    "jac_sparsity is wrong: the Jacobian of f has entries outside of it; compare "
                    "it with jacobian_sparsity(prob)"
                )
        return matrix[None]


def first_layout(field: VectorField, rows: bool = True) -> Layout:
    """The layout that a field suggests.

    Parameters
    ----------
    field
        The right-hand side.
    rows
        Whether the rows of its state may be independent.
    """
    structure = field.structure
    if field.jac_sparsity is not None:
        pattern = checked_pattern(field.jac_sparsity, structure.size)
        if int(_colours(pattern).max()) + 1 + _DIRECTIONS < structure.size:
            return Coloured(field, pattern)
        return Dense(field)
    shape = structure.shapes[0]
    # the whole matrix of a small state costs no more than a check that its rows are independent,
    # and lower precision is too coarse for that check
    is_batch = structure.is_tensor and math.prod(shape[:-1]) > 1 and structure.size > _SMALL
    return IndependentRows(field) if rows and is_batch and not field.low_eps else Dense(field)


def checked_pattern(pattern: Any, n: int) -> Tensor:
    """A pattern as a dense tensor of booleans on the CPU.

    Every entry that a sparse matrix stores belongs to it, whatever its value.

    Raises
    ------
    ValueError
        If it is no matrix of ``n`` rows and columns.
    """
    if isinstance(pattern, Tensor) and pattern.layout is not torch.strided:
        stored = pattern.detach().to_sparse_coo().coalesce()
        mask = _of_entries(stored.indices(), stored.shape)
    elif isinstance(pattern, Tensor):
        mask = pattern.detach() != 0
    elif hasattr(pattern, "tocoo"):  # one of SciPy's
        stored = pattern.tocoo()
        entries = torch.from_numpy(np.stack([stored.row, stored.col]).astype(np.int64))
        mask = _of_entries(entries, stored.shape)
    else:
        mask = torch.as_tensor(np.asarray(pattern) != 0, device="cpu")
    if mask.shape != (n, n):
        raise ValueError(
            f"jac_sparsity has shape {tuple(mask.shape)}, expected {(n, n)}: a tensor, an array, "
            "or a sparse matrix of torch or SciPy"
        )
    return mask.cpu()


def _of_entries(entries: Tensor, shape: Sequence[int]) -> Tensor:
    """A matrix of booleans that is true at entries ``(2, k)``."""
    mask = torch.zeros(*shape, dtype=torch.bool, device="cpu")
    mask[tuple(entries.cpu())] = True
    return mask


def random_directions(field: VectorField) -> Tensor:
    """Vectors ``(n, N)``, the same each time and from no generator that anyone else uses.

    No two entries are equal, nor two sums of them. Random signs would be: for two rows in every
    second case, and often for all rows of a small state.
    """
    generator = torch.Generator("cpu").manual_seed(4)
    shape = (_DIRECTIONS, field.structure.size)
    with outside_transforms():  # which treat random numbers as the user's
        values = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (2 * values - 1).to(dtype=field.dtype, device=field.device)


def rounding(field: VectorField) -> float:
    """By how much sums of products may differ, relative to the largest."""
    single = field.structure.time_dtype != torch.float64
    return (1e3 if single else 1e4) * torch.finfo(field.dtype).eps + 8 * field.low_eps


def _colours(pattern: Tensor) -> Tensor:
    """Colour of each row, greedily: rows of a colour share no column."""
    taken: list[Tensor] = []  # columns of each colour
    colours = []
    for row in pattern:
        free = (i for i, columns in enumerate(taken) if not bool((columns & row).any()))
        colour = next(free, len(taken))
        if colour == len(taken):
            taken.append(torch.zeros_like(row))
        taken[colour] |= row
        colours.append(colour)
    return torch.tensor(colours, device="cpu")
