"""Mixed precision around ``f``: the user's autocast holds inside of it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_NOTHING = nullcontext()


class Autocasting:
    """``f`` under the autocast that was on when the solve began, its result in the state's dtype.

    The reverse pass calls it as well: it differentiates what was computed forward.

    Attributes
    ----------
    f, dtype
        The function, and the lower precision inside of it.
    """

    def __init__(self, f: Callable[..., Any], device: str, state_dtype: torch.dtype):
        self.f = f
        self._device = device
        self.dtype = torch.get_autocast_dtype(device)
        self._state_dtype = state_dtype

    def __call__(self, *args: Any) -> Any:
        # without its cache: that holds casts of parameters for as long as the outermost autocast
        with torch.autocast(self._device, self.dtype, cache_enabled=False):
            du = self.f(*args)
        return pytree.tree_map_only(Tensor, lambda x: x.to(self._state_dtype), du)


def under_current_autocast(
    f: Callable[..., Any], device: torch.device, state_dtype: torch.dtype
) -> Callable[..., Any]:
    """``f``, with the current autocast bound to it where there is one."""
    if is_autocasting(device):
        return Autocasting(f, device.type, state_dtype)
    return f


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context for the solver's own arithmetic, which keeps its precision."""
    if is_autocasting(device):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


def is_autocasting(device: torch.device) -> bool:
    """Whether the user's autocast is on."""
    kind = device.type
    if kind == "cpu":  # always available, and asked often
        return torch.is_autocast_enabled(kind)
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
