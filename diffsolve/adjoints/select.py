"""Which sensealg to use when the user names none, and which combinations cannot work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffsolve.adjoints.discrete import DiscreteAdjoint
from diffsolve.adjoints.sensealg import NoAdjoint, Sensealg
from diffsolve.problems.structure import under_transform

_DEFAULT, _NONE = DiscreteAdjoint(), NoAdjoint()
_internals: Any = torch._C  # has no public way to ask for active transforms


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is active."""
    return under_transform() or forward_ad._current_level >= 0


def refuse_moving_times(times: list[Any]) -> None:
    """Refuse a time that carries a tangent, or a gradient of a transform, which would be lost.

    Raises
    ------
    TypeError
        If one does.
    """
    for t in times:
        if isinstance(t, Tensor) and (
            _internals._functorch.is_functorch_wrapped_tensor(t)
            or forward_ad.unpack_dual(t).tangent is not None
        ):
            raise TypeError(
                "a time of the solve is differentiated by a torch.func transform or in forward "
                "mode: use reverse mode, or DiscreteAdjoint(through_step_size=True) for tspan"
            )


def refuse_for_noise(sensealg: Sensealg | None, moving_times: bool) -> None:
    """Refuse what cannot be differentiated in the solve of an SDE.

    Raises
    ------
    ValueError
        If a gradient by a time is wanted, or the sensealg cannot go back through noise.
    """
    if moving_times:
        raise ValueError(
            "tspan and saveat have no gradient in an SDE, because a Brownian path has no "
            "derivative by time: detach them"
        )
    if isinstance(sensealg, Sensealg) and not sensealg.handles_noise:
        raise ValueError(
            f"{sensealg!r} cannot go back through the noise of an SDE: use DiscreteAdjoint(), "
            "BacksolveAdjoint(), InterpolatingAdjoint() or ReversibleAdjoint()"
        )


def choose_sensealg(sensealg: Sensealg | None, differentiate: bool, transformed: bool) -> Sensealg:
    """The sensealg of a solve: the user's, or a default where that is None.

    It is ``NoAdjoint()`` where nothing requires a gradient. The default is ``DiscreteAdjoint()``,
    because its gradient is exact at every tolerance and its memory is one state a step. Under
    ``torch.func`` transforms and forward mode, which differentiate every operation, it is
    ``DiscreteAdjoint(tape=True)``.

    Raises
    ------
    TypeError
        If ``sensealg`` is not a sensealg, or cannot work under a transform.
    """
    if sensealg is not None and not isinstance(sensealg, Sensealg):
        raise TypeError(
            f"sensealg must be e.g. DiscreteAdjoint() or InterpolatingAdjoint(), got {sensealg!r}"
        )
    if transformed:
        if sensealg is None:
            return DiscreteAdjoint(tape=True)
        if not (isinstance(sensealg, DiscreteAdjoint) and sensealg.tape):
            raise TypeError(
                f"{type(sensealg).__name__} cannot be seen through by torch.func transforms or "
                "forward-mode differentiation: use DiscreteAdjoint(tape=True)"
            )
        return sensealg
    if not differentiate:
        return _NONE
    return sensealg or _DEFAULT
