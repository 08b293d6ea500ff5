"""Pytree states as one flat tensor, and back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils import _pytree as pytree

Number = float | Tensor  # a tensor, 0-d, where the number is differentiated


def detached(x: Any) -> Any:
    """``x`` off the tape, where it is a tensor."""
    return x.detach() if isinstance(x, Tensor) else x


def as_float(x: Any) -> float:
    """A number or 0-d tensor as a float, off the tape."""
    return float(detached(x))


_LEAF = pytree.tree_structure(0)
_NOTHING = nullcontext()
_internals: Any = torch._C  # has no public way to ask for active transforms


def under_transform() -> bool:
    """Whether a ``torch.func`` transform is looking on."""
    return _internals._are_functorch_transforms_active()


def outside_transforms() -> AbstractContextManager[Any]:
    """A context in which no transform looks on, for what has nothing to do with the user's."""
    return temporarily_clear_interpreter_stack() if under_transform() else _NOTHING


class StateStructure:
    """Shape and structure of a state; ``ravel`` and ``unravel`` go to a flat tensor and back."""

    def __init__(
        self, shapes: list[torch.Size], dtype: torch.dtype, device: torch.device, spec: Any = None
    ):
        self.is_tensor = spec is None
        self.spec = _LEAF if spec is None else spec
        self.shapes = shapes
        self._is_flat = self.is_tensor and len(shapes[0]) == 1
        self.sizes = [shape.numel() for shape in shapes]
        self.size = sum(self.sizes)
        self.dtype = dtype
        self.device = device
        #: Real dtype of times and step sizes inside ``f``.
        self.time_dtype = dtype.to_real()

    @classmethod
    def of(cls, u0: Any) -> StateStructure:
        """The structure of a tensor or a pytree of tensors."""
        if isinstance(u0, Tensor):
            return _of_tensor(u0.shape, u0.dtype, u0.device)
        leaves, spec = pytree.tree_flatten(u0)
        return cls([leaf.shape for leaf in leaves], leaves[0].dtype, leaves[0].device, spec)

    def ravel(self, u: Any) -> Tensor:
        if self.is_tensor:
            return u if u.dim() == 1 else u.reshape(-1)
        # by the structure of the state: the keys of a dict may come in another order
        leaves = self.spec.flatten_up_to(u)
        return torch.cat([leaf.reshape(-1) for leaf in leaves])

    def unravel(self, flat: Tensor) -> Any:
        """Structure a flat tensor ``(*batch, size)``; leaves get shape ``(*batch, *shape)``."""
        if self._is_flat:
            return flat
        batch = flat.shape[:-1]
        if self.is_tensor:
            return flat.reshape(batch + self.shapes[0])
        parts = flat.split(self.sizes, -1)
        leaves = [x.reshape(batch + s) for x, s in zip(parts, self.shapes, strict=True)]
        return pytree.tree_unflatten(leaves, self.spec)

    def describe_mismatch(self, du: Any) -> str | None:
        """Why ``du`` cannot be the derivative of this state, or None."""
        try:
            leaves = self.spec.flatten_up_to(du)
        except ValueError as error:
            return f"it returned {type(du).__name__}, not in the structure of u: {error}"
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor):
                return f"it returned {type(leaf).__name__}, expected a tensor{advice_for(leaf)}"
            if leaf.shape != shape:
                return f"it returned shape {tuple(leaf.shape)}, the state has {tuple(shape)}"
            if leaf.dtype != self.dtype:
                return (
                    f"it returned {leaf.dtype}, the state has {self.dtype}: give the parameters "
                    "and constants the dtype of u0"
                )
            if leaf.device != self.device:
                return f"it returned a tensor on {leaf.device}, the state is on {self.device}"
        return None


def advice_for(returned: Any) -> str:
    """How to return a tensor instead of a list, an array or a number, in words."""
    if isinstance(returned, (list, tuple)):
        return ": return torch.stack([...], -1), which keeps the gradient, as torch.tensor does not"
    if isinstance(returned, np.ndarray):
        return ": compute it with the functions of torch, since NumPy's have no gradient"
    if isinstance(returned, (int, float, complex, np.generic)):
        return ": compute it from u, or return torch.full_like(u, ...) where it is a constant"
    return ""


@lru_cache(maxsize=100)
def _of_tensor(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StateStructure:
    """Nothing changes a structure, so solves of one shape share it."""
    return StateStructure([shape], dtype, device)
