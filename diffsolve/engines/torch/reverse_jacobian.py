"""The Jacobian of a reverse equation, made of that of the forward one, for implicit methods.

With ``L = bar . f(t, u, p)`` the reverse state ``[bar, (u,) mu]`` has the derivative
``[-L_u, (f,) -L_p]``. Nothing depends on ``mu``, and the state does not depend on the adjoint, so
the matrix is block-triangular: only ``J`` and ``-J^T`` are factored, each as large as the forward
system, and the rest follows by substitution with products. The cost does not grow with the number
of parameters beyond that of a product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.probe import may_be_read
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.jacobian import differentiator
from diffsolve.solvers.linear import BlockLU, Linearisation, factored_step_matrix
from diffsolve.solvers.time_difference import Stencil

_START = np.zeros(1)

Gradients = tuple[Tensor, Tensor]


class Lagrangian:
    """``L = bar . f(t, u, p)`` at a point, and its first and second derivatives.

    Parameters
    ----------
    field, params
        Forward right-hand side, and the parameters ``p``.
    time, u, bar
        The point.
    flat
        Makes the parameters' part of the reverse state from their gradients.
    """

    def __init__(
        self,
        field: VectorField,
        params: Sequence[Tensor],
        time: Tensor,
        u: Tensor,
        bar: Tensor,
        flat: Callable[[Sequence[Tensor | None]], Tensor],
    ):
        self.params, self.bar, self.flat = params, bar, flat
        with torch.enable_grad():
            self.time = may_be_read(time.clone().requires_grad_())  # its slope is then a difference
            self.u = u.detach().requires_grad_()
            self.value = field(self.time, self.u)

    def by_parameters(self, bar: Tensor) -> Tensor:
        """``f_p^T bar``, for any ``bar``."""
        if not self.value.requires_grad or not self.params:
            return self.flat([None] * len(self.params))
        return self.flat(
            torch.autograd.grad(self.value, self.params, bar, retain_graph=True, allow_unused=True)
        )

    @cached_property
    def _slopes(self) -> tuple[Tensor | None, ...]:
        """``L_u`` and ``L_t``, on the tape."""
        if not self.value.requires_grad:
            return None, None
        return torch.autograd.grad(
            self.value, (self.u, self.time), self.bar, create_graph=True, allow_unused=True
        )

    def second(self, along: Tensor | None, d: float) -> Gradients:
        """Gradients by ``u`` and ``p`` of the change ``L_u . along + d L_t``."""
        slope_u, slope_t = self._slopes
        directions = ((slope_u, along), (slope_t, torch.full_like(self.time, d) if d else None))
        pairs = [
            (slope, x)
            for slope, x in directions
            if slope is not None and x is not None and slope.requires_grad
        ]
        inputs = [self.u, *self.params]
        if not pairs:
            return torch.zeros_like(self.bar), self.flat([None] * len(self.params))
        slopes, tangents = zip(*pairs, strict=True)
        by_u, *by_p = torch.autograd.grad(
            slopes, inputs, tangents, retain_graph=True, allow_unused=True
        )
        return (torch.zeros_like(self.bar) if by_u is None else by_u), self.flat(by_p)


class ReverseJacobian(Linearisation):
    """Jacobian of the reverse right-hand side at a point.

    Parameters
    ----------
    field
        The reverse equation, which counts the work.
    blocks
        Those of the forward Jacobian ``J``, ``(B, d, d)``.
    at
        The Lagrangian there.
    sizes
        Lengths of ``bar``, the state that is solved again (or 0) and ``mu``.
    slope
        Derivative of the reverse right-hand side by time, or None.
    """

    def __init__(
        self,
        field: VectorField,
        blocks: Tensor,
        at: Lagrangian,
        sizes: Sequence[int],
        slope: Tensor | None,
    ):
        super().__init__(field, blocks, slope)
        self.at, self.sizes = at, list(sizes)

    def product(self, v: Tensor) -> Tensor:
        """Product with the diagonal blocks alone, which have all of the eigenvalues."""
        bar, u, mu = v.split(self.sizes)
        shape = (*self.blocks.shape[:2], 1)
        back = -torch.bmm(self.blocks.mT, bar.reshape(shape)).reshape(-1)
        forth = torch.bmm(self.blocks, u.reshape(shape)).reshape(-1) if len(u) else u
        return torch.cat([back, forth, 0 * mu])

    def factor(self, h: float, gamma: float) -> ReverseLU | None:
        """Factors of ``I / gamma - h J``; None where that is singular or not finite."""
        back = factored_step_matrix(self.field, self.blocks.mT, -h, gamma)
        forth = None
        if self.sizes[1]:
            forth = factored_step_matrix(self.field, self.blocks, h, gamma)
        if back is None or (self.sizes[1] and forth is None):
            return None
        return ReverseLU(self, back, forth, h, gamma)


class ReverseLU:
    """Factors of the diagonal blocks, and substitution for the others."""

    def __init__(
        self, of: ReverseJacobian, back: BlockLU, forth: BlockLU | None, h: float, gamma: float
    ):
        self.of, self.back, self.forth, self.h, self.gamma = of, back, forth, h, gamma

    def solve(self, b: Tensor) -> Tensor:
        """``M^{-1} b``, flat."""
        bar, u, mu = b.split(self.of.sizes)
        at, h = self.of.at, self.h
        if self.forth is not None:
            u = self.forth.solve(u)
            by_u, by_p = at.second(u, 0.0)
            bar, mu = bar - h * by_u, mu - h * by_p
        bar = self.back.solve(bar)
        return torch.cat([bar, u, self.gamma * (mu - h * at.by_parameters(bar))])


def reverse_jacobian(reverse: Any, t: float, h: float, z: Tensor, slope: bool) -> ReverseJacobian:
    """The Jacobian of a reverse equation at the start of a step.

    Parameters
    ----------
    reverse
        The equation, a ``ReverseODE``.
    t, h, z
        The step.
    slope
        Whether the derivative by time is wanted.

    Raises
    ------
    ValueError
        If the state is complex.
    """
    if reverse.dtype.is_complex:
        raise ValueError("an implicit method cannot solve the adjoint of a complex state")
    (time,) = reverse.times(t, h, _START)
    u, (bar, _, _) = reverse.state_at(time, z), reverse.blocks(z)
    forward = differentiator(reverse.forward)
    linear = forward.at(t, h, u, slope, exact=True)
    flat = functools.partial(_flat, reverse.params, reverse.dtype, reverse.device)
    at = Lagrangian(reverse.forward, reverse.params, time, u, bar, flat)
    moving = None
    if slope and forward.moves_unseen:  # autograd misses part of the time dependence
        stencil = Stencil(reverse, t, h)
        moving = stencil.slope(*(reverse.derivative(x, z) for x in stencil.times))
    elif slope:
        moving = reverse.slope_at(time, at, linear.slope)
    sizes = (reverse.n, reverse.sizes[1], sum(reverse.sizes[2:]))
    return ReverseJacobian(reverse, linear.blocks, at, sizes, moving)


def _flat(
    params: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    grads: Sequence[Tensor | None],
) -> Tensor:
    """Gradients by the parameters as their part of the reverse state."""
    parts = [
        as_reals(torch.zeros_like(p) if g is None else g, dtype)
        for g, p in zip(grads, params, strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)


def as_reals(g: Tensor, dtype: torch.dtype) -> Tensor:
    """``g``, flat, in the dtype of the reverse state; a complex one as pairs if that is real."""
    if g.is_complex() and not dtype.is_complex:
        g = torch.view_as_real(g.resolve_conj())
    return g.reshape(-1).to(dtype)
