"""Whether the places that were read still hold the same objects: a quick look, at every solve."""

from __future__ import annotations

import types
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.tracing.objects import ABSENT

_modules: Any = torch.nn.modules.module


class Checks:
    """What a survey saw where, in the form that is compared fastest.

    Attributes
    ----------
    functions
        The functions that ran, each with its code, defaults and keyword defaults.
    """

    def __init__(self) -> None:
        self.functions: list[tuple[Any, Any, Any, Any]] = []
        self._entries: list[tuple[Any, str, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._lengths: list[tuple[Any, int]] = []
        self._arrays: list[tuple[np.ndarray, bytes]] = []
        self._attributes: list[tuple[Any, str, Any]] = []
        self._kinds: list[tuple[Any, Any]] = []
        self._orders: list[tuple[Any, Any]] = []
        self._forms: list[tuple[Any, ...]] = []
        self._states: list[tuple[Any, Any]] = []
        self._has_hooks: bool | None = None

    def entry(self, get: Any, name: str, x: Any) -> None:
        """What a dict has under a name, by its ``get``."""
        self._entries.append((get, name, x))

    def cell(self, cell: Any, content: Any) -> None:
        self._cells.append((cell, content))

    def contents(self, x: Any, inside: tuple[Any, ...]) -> None:
        """All of a container."""
        self._contents.append((x, inside))

    def length(self, x: Any) -> None:
        """How much is in a container whose entries are checked one by one."""
        self._lengths.append((x, len(x)))

    def array(self, x: np.ndarray, data: bytes) -> None:
        self._arrays.append((x, data))

    def attribute(self, x: Any, name: str, value: Any) -> None:
        self._attributes.append((x, name, value))

    def kind(self, x: Any, kind: Any) -> None:
        """The class of an object."""
        self._kinds.append((x, kind))

    def order(self, kind: Any) -> None:
        """Where a class looks for attributes."""
        self._orders.append((kind, kind.__mro__))

    def form(self, x: Tensor) -> None:
        self._forms.append((x, x.shape, x.dtype, x.requires_grad))

    def function(self, f: types.FunctionType) -> None:
        self.functions.append((f, f.__code__, f.__defaults__, f.__kwdefaults__))

    def state(self, read: Any, value: Any) -> None:
        """What a function without arguments returns."""
        self._states.append((read, value))

    def global_hooks(self) -> bool:
        """Whether there are hooks on all modules."""
        if self._has_hooks is None:
            self._has_hooks = bool(_modules._has_any_global_hook())
        return self._has_hooks

    def hold(self) -> bool:
        """Whether nothing is another object than it was."""
        for get, name, x in self._entries:
            if get(name, ABSENT) is not x:
                return False
        for x, kind in self._kinds:
            if type(x) is not kind:
                return False
        for kind, order in self._orders:
            if kind.__mro__ is not order:
                return False
        try:
            for cell, x in self._cells:
                if cell.cell_contents is not x:
                    return False
        except ValueError:  # it was emptied
            return False
        for x, shape, dtype, grad in self._forms:
            if x.shape != shape or x.dtype is not dtype or x.requires_grad is not grad:
                return False
            if x._backward_hooks:
                return False
        for f, code, defaults, more in self.functions:
            if (
                f.__code__ is not code
                or f.__defaults__ is not defaults
                or f.__kwdefaults__ is not more
            ):
                return False
        for x, inside in self._contents:
            if len(x) != len(inside) or not all(map(is_, x, inside)):
                return False
        for x, length in self._lengths:
            if len(x) != length:
                return False
        for x, name, value in self._attributes:
            if getattr(x, name, ABSENT) is not value:
                return False
        for read, value in self._states:
            if read() != value:
                return False
        has_hooks = self._has_hooks
        if has_hooks is not None and bool(_modules._has_any_global_hook()) is not has_hooks:
            return False
        return all(x.tobytes() == data for x, data in self._arrays)
