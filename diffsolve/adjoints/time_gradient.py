"""Gradients by the times of a solve, for every sensealg alike.

They follow from the flow: ``du(t_i)/dt_i = f(t_i, u_i)``, and moving the start by ``dt0`` is
moving the initial state by ``-f(t0, u0) dt0``. One evaluation of ``f`` a saved time, in the
reverse pass, and only where a time requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffsolve.adjoints.sensealg import release
from diffsolve.problems.vector_field import VectorField


def _inner(g: Tensor, du: Tensor) -> Tensor:
    return (g.conj() * du).sum().real


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u0: Tensor, t0: Tensor, field: VectorField, direction: float) -> Tensor:
        ctx.save_for_backward(u0, t0)
        ctx.field, ctx.direction = field, direction
        return u0.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        u0, t0 = ctx.saved_tensors
        du = ctx.field(ctx.field.after(float(t0), ctx.direction), u0)
        release(ctx)
        return g, -_inner(g, du).to(t0), None, None


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, times: Tensor, field: VectorField, t0: float, t1: float
    ) -> Tensor:
        ctx.save_for_backward(u, times)
        ctx.field, ctx.t0, ctx.t1 = field, t0, t1
        return u.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        u, times = ctx.saved_tensors
        field, forward = ctx.field, ctx.t1 - ctx.t0
        slopes = []
        for t, u_i, g_i in zip(times.tolist(), u, g, strict=True):
            # where f jumps at t, on the side of the solution up to t
            side = field.after(t, forward if t == ctx.t0 else -forward)
            slopes.append(_inner(g_i, field(side, u_i)).to(times))
        release(ctx)
        return g, torch.stack(slopes), None, None, None


class _Slopes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, times: Tensor, slopes_at: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(times)
        ctx.slopes_at = slopes_at
        return u.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        # made of tensors, since implicit methods differentiate it again
        (times,) = ctx.saved_tensors
        slopes = ctx.slopes_at(times)
        return g, (g.conj() * slopes).sum(1).real.to(times), None


def attach_start(u0: Tensor, t0: Any, field: VectorField, direction: float) -> Tensor:
    """``u0`` that passes its cotangent on to ``t0``."""
    if isinstance(t0, Tensor) and t0.requires_grad:
        return _Start.apply(u0, t0, field, direction)  # type: ignore[return-value]
    return u0


def attach_saved(u: Tensor, times: Tensor, field: VectorField, t0: float, t1: float) -> Tensor:
    """Saved states ``(T, N)`` that pass their cotangents on to their times ``(T,)``."""
    if times.requires_grad and len(times):
        return _Saved.apply(u, times, field, t0, t1)  # type: ignore[return-value]
    return u


def attach_slopes(u: Tensor, times: Tensor, slopes_at: Callable[[Tensor], Tensor]) -> Tensor:
    """States ``(T, N)`` that pass their cotangents on to their times.

    ``slopes_at`` gives ``du/dt`` at them, which may depend on them again.
    """
    return _Slopes.apply(u, times, slopes_at)  # type: ignore[return-value]
