"""The Jacobian that a user gave."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.jacobian_layout import checked_pattern


def given_jacobian(field: VectorField, time: Tensor, u: Tensor) -> Tensor:
    """The user's ``jac`` at a point, checked, as blocks ``(B, d, d)``.

    Raises
    ------
    ValueError
        If it returns no matrix of this state.
    """
    structure = field.structure
    assert field.jac is not None
    given = field.jac(time, structure.unravel(u), *field._args)
    what = f"jac({field._signature}) is wrong: it returned"
    if not isinstance(given, Tensor):
        raise ValueError(f"{what} {type(given).__name__}, expected a tensor")
    shape = structure.shapes[0] if structure.is_tensor else None
    n = structure.size
    if given.shape == (n, n) or (shape is not None and given.shape == (*shape, *shape)):
        blocks = given.reshape(1, n, n)
    elif shape is not None and len(shape) > 1 and given.shape == (*shape, shape[-1]):
        blocks = given.reshape(-1, shape[-1], shape[-1])
    else:
        rows = ""
        if shape is not None and len(shape) > 1:
            rows = f", or {(*shape, shape[-1])} where rows are independent"
        raise ValueError(f"{what} shape {tuple(given.shape)}, expected {(n, n)}{rows}")
    if given.dtype != structure.dtype or given.device != structure.device:
        raise ValueError(
            f"{what} {given.dtype} on {given.device}, the state has {structure.dtype} on "
            f"{structure.device}"
        )
    return blocks.detach()


def check_jacobian(field: VectorField, t: Tensor, u: Tensor) -> None:
    """Refuse a ``jac`` or ``jac_sparsity`` of a wrong shape before any work.

    Raises
    ------
    ValueError
        If one is wrong.
    """
    if field.jac_sparsity is not None:
        checked_pattern(field.jac_sparsity, field.structure.size)
    if field.jac is not None:
        with torch.no_grad():
            given_jacobian(field, t, u)
