"""The times of a solve: what to save, and where steps must end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.structure import detached

_internals: Any = torch._C  # has no public way to ask for active transforms
# the same times are asked for at each step of a training
_recent: dict[tuple[float, float], tuple[Tensor, SaveTimes]] = {}


@dataclass(frozen=True)
class SaveTimes:
    """Times to save.

    Attributes
    ----------
    array
        Float64, in the order of integration; None: every step. ``times``: the same as a list.
    given
        The user's tensor of times, where its gradient is wanted.
    from_start
        Whether the times move with ``t0``, except a last one that is ``t1``.
    """

    array: np.ndarray | None
    given: Tensor | None = None
    from_start: bool = False

    @cached_property
    def times(self) -> list[float] | None:
        return None if self.array is None else self.array.tolist()

    @classmethod
    def build(cls, saveat: Any, t0: float, t1: float, save_everystep: bool | None) -> SaveTimes:
        """Check ``saveat``.

        Raises
        ------
        ValueError
            If times are unsorted, repeated, NaN or outside of the span, or contradict
            ``save_everystep``.
        """
        if saveat is None:
            if save_everystep is False:
                return cls(np.array([t0] if t0 == t1 else [t0, t1]), from_start=True)
            return cls(None, from_start=True)
        if save_everystep:
            raise ValueError(
                "saveat saves exactly its times: drop save_everystep=True, or saveat and read "
                "other times from sol(t)"
            )
        if not isinstance(saveat, Tensor):
            if isinstance(saveat, Real) or getattr(saveat, "ndim", 1) == 0:
                return cls(_spaced(float(saveat), t0, t1), from_start=True)
            return cls._of_tensor(torch.from_numpy(np.array(saveat, dtype=np.float64)), t0, t1)
        if saveat.dim() == 0:
            return cls(_spaced(float(saveat), t0, t1), from_start=True)
        return cls._of_tensor(saveat, t0, t1)

    @classmethod
    def _of_tensor(cls, values: Tensor, t0: float, t1: float) -> SaveTimes:
        # a transform wraps tensors; a time that moves is never the same
        plain = values.dtype is torch.float64 and values.is_cpu and not values.requires_grad
        plain = plain and not _internals._are_functorch_transforms_active()
        known = _recent.get((t0, t1)) if plain else None
        if known is not None and torch.equal(known[0], values):
            return known[1]
        if values.dim() != 1 or not len(values) or values.is_complex():
            shape = tuple(values.shape)
            raise ValueError(f"saveat must be a spacing or a 1-d list of times, got shape {shape}")
        given = values if values.requires_grad else None
        # rounding of the user's dtype must not push an end out of the span
        eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
        times = np.array(values.detach().tolist(), dtype=np.float64)
        times[0], times[-1] = (snapped(float(t), (t0, t1), eps) for t in (times[0], times[-1]))
        _check_order(times, t0, t1)
        saves = cls(times, given)
        if plain:
            if len(_recent) > 10:
                _recent.clear()
            _recent[t0, t1] = values.detach().clone(), saves
        return saves

    def differentiable(self, span: tuple[Any, Any]) -> bool:
        """Whether a gradient by a time is wanted."""
        if self.given is not None:
            return True
        t0, t1 = span
        return (isinstance(t0, Tensor) and t0.requires_grad) or (
            isinstance(t1, Tensor) and t1.requires_grad
        )

    def as_tensor(self, span: tuple[Any, Any], reached: Sequence[float] | np.ndarray) -> Tensor:
        """The times that were reached, ``(T,)`` float64, on the tape where a time is."""
        if self.given is not None:
            return self.given[: len(reached)].to(device="cpu", dtype=torch.float64)
        values = torch.tensor(reached, dtype=torch.float64, device="cpu")
        t0, t1 = span
        if not self.from_start or not self.differentiable(span) or not len(values):
            return values
        start, end = (torch.as_tensor(t, dtype=torch.float64, device="cpu") for t in (t0, t1))
        if self.array is None:  # only the ends move: step sizes are constants
            moves = torch.zeros_like(values)
            moves[0] = 1.0
        else:
            moves = torch.ones_like(values)
        at_end = values == float(detached(end))
        moves = torch.where(at_end & (values != float(detached(start))), 0.0, moves)
        values = values + moves * (start - start.detach())
        ends = (at_end & (moves == 0)).to(values.dtype)
        return values + ends * (end - end.detach())

    def inside(self, times: Tensor, span: tuple[Any, Any]) -> Tensor:
        """``times`` without gradients that already flow through the steps on the tape.

        Those are the gradients by the ends of the span and by the ends of accepted steps.
        """
        if self.array is None or not times.requires_grad:
            return times.detach()
        t0, t1 = span
        ends = [float(detached(t)) for t in span if isinstance(t, Tensor) and t.requires_grad]
        if self.given is None:
            ends = [float(detached(t0)), float(detached(t1))]
        tied = torch.zeros(len(times), dtype=torch.bool, device="cpu")
        for end in ends:
            tied |= times.detach() == end
        return torch.where(tied, times.detach(), times)


def _spaced(spacing: float, t0: float, t1: float) -> np.ndarray:
    span = abs(t1 - t0)
    if not 0 < spacing < math.inf:
        raise ValueError(f"saveat must be a positive spacing or a list of times, got {spacing}")
    count = math.floor(span / spacing * (1 + 1e-12))
    sign = math.copysign(spacing, t1 - t0)
    times = t0 + sign * np.arange(count + 1)
    if abs(times[-1] - t1) <= 1e-12 * max(abs(t1), span):
        times[-1] = t1
    elif t1 != t0:
        times = np.append(times, t1)
    return times


def snapped(t: float, ends: tuple[float, float], eps: float) -> float:
    """``t``, or the end that it equals to within the rounding ``eps``."""
    for end in ends:
        if abs(t - end) <= eps * abs(end):
            return end
    return t


def _check_order(times: np.ndarray, t0: float, t1: float) -> None:
    sign = 1.0 if t1 >= t0 else -1.0
    first, last = sign * times[0], sign * times[-1]
    if first >= sign * t0 and last <= sign * t1 and (sign * np.diff(times) > 0).all():
        return
    low, high = min(t0, t1), max(t0, t1)
    outside = [t for t in times.tolist() if not low <= t <= high]
    if outside:
        raise ValueError(f"saveat holds {outside[0]}, which is outside of tspan ({t0}, {t1})")
    for before, after in pairwise(times.tolist()):
        if sign * after <= sign * before:
            what = "repeats" if after == before else "is not in the order of integration at"
            raise ValueError(f"saveat {what} {after}: list each time once, from t0 towards t1")


def ordered_stops(
    tstops: Sequence[float], t0: float, t1: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Stops strictly inside the span, in order of integration, and all in it, increasing.

    Raises
    ------
    ValueError
        If a stop is NaN.
    """
    if isinstance(tstops, tuple) and not tstops:
        return (), ()
    given: list[Any] = [tstops] if isinstance(tstops, Real) else list(tstops)
    moving = any(isinstance(t, Tensor) and t.requires_grad for t in given)
    if moving and torch.is_grad_enabled():
        raise ValueError(
            "tstops has no gradient, and that by the time of a jump would be lost. Solve piece by "
            "piece: one solve to the jump, with its time in tspan, which has a gradient, and one "
            "from sol.u[-1] on. Or detach it, where no such gradient is wanted"
        )
    values = [float(t) for t in given]
    if any(math.isnan(t) for t in values):
        raise ValueError("tstops holds NaN")
    low, high = min(t0, t1), max(t0, t1)
    inside = {t for t in values if low < t < high}
    breaks = tuple(sorted({t for t in values if low <= t <= high}))
    return tuple(sorted(inside, reverse=t1 < t0)), breaks
