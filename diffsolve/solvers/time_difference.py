"""``df/dt`` by a difference, for an ``f`` that reads its time as a number.

A difference divides what rounding leaves by a small interval, and a stiff ``f`` has large terms.
So the interval is a part of the step, within which the solution is smooth, and the formula is of
second order: two thirds of the digits are left. Where the difference is differentiated, the
products at its three times are computed alike and subtracted from one another: they cancel to zero,
not to rounding, where the time only selects a branch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.capture import reached_leaves, refuse_unknown_leaves
from diffsolve.problems.vector_field import VectorField

_NODES = np.array([0.0, 0.5, 1.0])


class Stencil:
    """Times from the start of a step on, and what to divide differences by.

    Attributes
    ----------
    times
        The start and two later times, as ``f`` sees them.
    near, far
        Factors of the changes of ``f`` up to the two later times; zero where rounding leaves no
        room between the times.
    """

    def __init__(self, field: Any, t: float, h: float):
        eps = torch.finfo(field.structure.time_dtype).eps
        size = min(max(2 * eps ** (1 / 3) * abs(h), 32 * eps * abs(t)), abs(h))
        self.times = field.times(t, math.copysign(size, h), _NODES)
        start, middle, end = (float(x) for x in self.times)
        a, b = middle - start, end - start
        room = a != 0 and a != b
        self.near = b / (a * (b - a)) if room else 0.0
        self.far = -a / (b * (b - a)) if room else 0.0

    def slope(self, start: Any, middle: Any, end: Any) -> Any:
        """The derivative of something from what it is at the three times."""
        return self.near * (middle - start) + self.far * (end - start)


def time_difference(field: Any, t: float, h: float, u: Tensor, y: Tensor) -> Tensor:
    """``df/dt`` at the start of a step; ``y`` is ``f(t, u)``."""
    stencil = Stencil(field, t, h)
    _, middle, end = stencil.times
    return stencil.slope(y, field(middle, u), field(end, u))


def time_difference_on_tape(field: VectorField, t: float, h: float, u: Tensor) -> Tensor:
    """The same, on the tape where ``u`` or the parameters of ``field`` are."""
    return _TimeDifference.apply(field, Stencil(field, t, h), u, *field.params)  # type: ignore


class _TimeDifference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, field: VectorField, stencil: Stencil, u: Tensor, *params: Tensor
    ) -> Tensor:
        ctx.field, ctx.stencil = field, stencil
        ctx.save_for_backward(u, *params)
        return stencil.slope(*(field(time, u) for time in stencil.times))

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Any:
        u, *params = ctx.saved_tensors
        again = torch.is_grad_enabled()  # for a second derivative
        field: VectorField = ctx.field
        pulled = []
        for time in ctx.stencil.times:
            with torch.enable_grad():
                at = u if again and u.requires_grad else u.detach().requires_grad_()
                y = field(time, at)
            inputs = [x for x in (at, *params) if x.requires_grad]
            grads: Any = [None] * len(inputs)
            if y.requires_grad:
                if field.differentiated_once:
                    refuse_unknown_leaves(reached_leaves([y]), inputs)
                grads = torch.autograd.grad(y, inputs, bar, create_graph=again, allow_unused=True)
            pulled.append(
                [
                    torch.zeros_like(x) if g is None else g
                    for x, g in zip(inputs, grads, strict=True)
                ]
            )
        found = iter([ctx.stencil.slope(*three) for three in zip(*pulled, strict=True)])
        return None, None, next(found), *(next(found) if p.requires_grad else None for p in params)
