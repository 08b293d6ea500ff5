"""Gradients by the times of a solve, for every sensealg alike.

They follow from the flow: ``du(t_i)/dt_i = f(t_i, u_i)``, and moving the start by ``dt0`` is
moving the initial state by ``-f(t0, u0) dt0``. One evaluation of ``f`` a saved time, in the
reverse pass, and only where a time requires a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffsolve.problems.vector_field import VectorField


def _inner(g: Tensor, du: Tensor) -> Tensor:
    return (g.conj() * du).sum().real


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u0: Tensor, t0: Tensor, field: VectorField) -> Tensor:
        ctx.save_for_backward(u0, t0)
        ctx.field = field
        return u0.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        u0, t0 = ctx.saved_tensors
        du = ctx.field(ctx.field.time(t0), u0)
        return g, -_inner(g, du).to(t0), None


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, times: Tensor, field: VectorField) -> Tensor:
        ctx.save_for_backward(u, times)
        ctx.field = field
        return u.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        u, times = ctx.saved_tensors
        slopes = [
            _inner(g_i, ctx.field(ctx.field.time(t), u_i)).to(times)
            for t, u_i, g_i in zip(times, u, g, strict=True)
        ]
        return g, torch.stack(slopes), None


def attach_start(u0: Tensor, t0: Any, field: VectorField) -> Tensor:
    """``u0`` that passes its cotangent on to ``t0``."""
    if isinstance(t0, Tensor) and t0.requires_grad:
        return _Start.apply(u0, t0, field)  # type: ignore[return-value]
    return u0


def attach_saved(u: Tensor, times: Tensor, field: VectorField) -> Tensor:
    """Saved states ``(T, N)`` that pass their cotangents on to their times ``(T,)``."""
    if times.requires_grad:
        return _Saved.apply(u, times, field)  # type: ignore[return-value]
    return u
