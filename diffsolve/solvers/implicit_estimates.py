"""Stiffness estimates of implicit steps, and steps that failed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffsolve.problems.structure import Number
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Step, Trouble
from diffsolve.solvers.continuous_extension import Interpolant
from diffsolve.solvers.jacobian import Push, differentiator, push_forward
from diffsolve.solvers.spectral_radius import spectral_radius
from diffsolve.solvers.stage_rows import RKInterpolant, RKState

_NOTHING = Interpolant(1, [[1.0]])


def failed(field: VectorField, state: RKState, trouble: Trouble) -> Step:
    """A step whose equations were not solved."""
    zero = torch.zeros((), dtype=field.dtype, device=field.device)
    dense = RKInterpolant(field, 0.0, 0.0, state.u, state.du[None], _NOTHING)
    return Step(state, None, zero, dense, converged=False, trouble=trouble)


def radius_off_tape(
    field: VectorField, t: float, h: float, u: Tensor, here: Any, older: Any
) -> Tensor:
    """Spectral radius of the Jacobian at the start of a step.

    Parameters
    ----------
    field, t, h, u
        The step.
    here
        The Jacobian there, or None.
    older
        One of an earlier step, for an ``f`` that allows no products.
    """
    if here is not None:
        return spectral_radius(here.product, u)
    usual = field.linearise is None
    if not usual or differentiator(field).by_differences:
        return spectral_radius(older.product, u)
    count = field.nf
    push = push_forward(field, t, h, u)
    field.nf = count  # part of the estimate
    try:
        return spectral_radius(lambda v: push(v, 0.0).detach(), u)
    except RuntimeError:  # f holds a function that can be differentiated once only
        return spectral_radius(older.product, u)


def radius_on_tape(
    field: VectorField, t: Number, h: Number, state: RKState, push: Push | None
) -> Tensor:
    """The same, differentiable; ``push`` from ``push_forward`` where there is one."""
    pushed = push_forward(field, t, h, state.u, state.du) if push is None else push
    return spectral_radius(lambda v: pushed(v, 0.0), state.u)
