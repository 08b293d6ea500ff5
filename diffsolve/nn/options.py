"""What the layers check and change of what they are given."""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.problems.autocast import is_autocasting
from diffsolve.solve import solve

_HALF = (torch.float16, torch.bfloat16)


@functools.cache
def _names() -> frozenset[str]:
    kinds = inspect.signature(solve).parameters.values()
    return frozenset(x.name for x in kinds if x.kind is x.KEYWORD_ONLY)


def check_options(layer: str, options: dict[str, Any]) -> None:
    """Refuse names that are no options of ``solve``, when the layer is made.

    Raises
    ------
    TypeError
        If a name is none of an option.
    """
    for name in options:
        if name not in _names():
            near = difflib.get_close_matches(name, _names(), 1)
            hint = f": did you mean {near[0]}?" if near else f", which are {sorted(_names())}"
            raise TypeError(f"{layer}: {name} is none of the options of solve{hint}")


def lifted(u0: Any) -> Any:
    """A state whose half-precision tensors, which autocast made, become float32.

    Under autocast the layer before hands over a lower precision than an error estimate can have.
    """
    return _lifted(u0) if isinstance(u0, Tensor) else pytree.tree_map_only(Tensor, _lifted, u0)


def _lifted(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF and is_autocasting(x.device) else x


def with_dtypes_of(u: Any, u0: Any) -> Any:
    """``u`` with the dtypes of ``u0``."""
    if isinstance(u0, Tensor):
        return u if u.dtype is u0.dtype else u.to(u0.dtype)
    return pytree.tree_map(lambda x, given: x.to(given.dtype), u, u0)
