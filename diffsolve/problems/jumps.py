"""Jumps at the times in ``tstops``, whose gradient by those times nothing here can give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.problems.probe import Probe

_MOVING = (
    "{name} jumps at t = {t:.8g}, one of tstops, where it compares the time with a tensor whose "
    "gradient is wanted{line}: the gradient by the time of a jump would be zero. Solve piece by "
    "piece: one solve to the jump, with its time in tspan, which has a gradient, and one from "
    "sol.u[-1] on. Or detach that tensor in the comparison, where no such gradient is wanted."
)


def refuse_moving_jumps(
    field: Any, functions: Sequence[tuple[str, Callable[..., Any]]], u0: Tensor, end: float
) -> None:
    """Refuse a gradient by the time of a jump, which would be zero without a word.

    Parameters
    ----------
    field
        The right-hand side, whose ``breaks`` are the times in question.
    functions
        ``f``, and ``g`` of an SDE, with their names.
    u0, end
        Flat state at the start, and the end of the span.

    Raises
    ------
    ValueError
        If one of the functions jumps at such a time because of a comparison with a tensor that
        requires a gradient.
    """
    # a jump may be of size zero at one state, but hardly at both
    states = [u0.detach(), 1.3 * u0.detach() + 0.7]
    for name, f in functions:
        for t in field.breaks:
            for u in states if t != end else ():
                line = _moving_jump(field, f, t, u)
                if line is not None:
                    raise ValueError(_MOVING.format(name=name, t=t, line=line))


def _moving_jump(field: Any, f: Callable[..., Any], t: float, u: Tensor) -> str | None:
    """The line whose comparison makes ``f(., u)`` jump at ``t``, or None."""
    try:
        (before, left), (after, right) = (_run(field, f, field.after(t, d), u) for d in (-1, 1))
    except Exception:  # outside of where f is defined
        return None
    flipped = [line for (a, line), (b, _) in zip(left, right, strict=False) if not _are_close(a, b)]
    if len(left) != len(right):
        flipped += [line for _, line in max(left, right, key=len)[:1]]
    return flipped[0] if flipped and not _are_close(before, after) else None


def _run(
    field: Any, f: Callable[..., Any], t: Tensor, u: Tensor
) -> tuple[Tensor, list[tuple[Tensor, str]]]:
    """What ``f`` returns, flat, and the comparisons that a gradient would be wanted of."""
    state = field.structure.unravel(u.clone())
    with torch.enable_grad(), Probe(t, pytree.tree_leaves(state)) as probe:
        value = f(t, state, *field._args)
    flat = torch.cat([x.detach().reshape(-1) for x in pytree.tree_leaves(value)])
    return flat, probe.switches


def _are_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    rounding = torch.finfo(a.dtype).eps ** 0.5
    a, b = a.detach(), b.detach()
    return torch.allclose(a, b, rtol=rounding, atol=rounding, equal_nan=True)
