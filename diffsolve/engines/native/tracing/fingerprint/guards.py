"""A quick check, at every solve, that the places which were read hold the same objects."""

from __future__ import annotations

import types
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.tracing.fingerprint.kinds import ABSENT

_torch_modules: Any = torch.nn.modules.module


class Guards:
    """The places that a fingerprint read, and what each held.

    Each kind of place has a list of its own, in the form that is compared fastest.

    Attributes
    ----------
    functions
        Functions that ran, each with its code, defaults and keyword defaults.
    """

    def __init__(self) -> None:
        self.functions: list[tuple[Any, Any, Any, Any]] = []
        self._entries: list[tuple[Any, str, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._lengths: list[tuple[Any, int]] = []
        self._arrays: list[tuple[np.ndarray, bytes]] = []
        self._attributes: list[tuple[Any, str, Any]] = []
        self._classes: list[tuple[Any, Any]] = []
        self._mros: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Any, ...]] = []
        self._results: list[tuple[Any, Any]] = []
        self._has_hooks: bool | None = None

    def add_entry(self, get: Any, name: str, x: Any) -> None:
        """Entry ``name`` of the dict whose ``get`` this is."""
        self._entries.append((get, name, x))

    def add_cell(self, cell: Any, content: Any) -> None:
        """A variable of a closure."""
        self._cells.append((cell, content))

    def add_contents(self, x: Any, inside: tuple[Any, ...]) -> None:
        """All entries of a container."""
        self._contents.append((x, inside))

    def add_length(self, x: Any) -> None:
        """The size of a container whose entries are added one by one."""
        self._lengths.append((x, len(x)))

    def add_array(self, x: np.ndarray, data: bytes) -> None:
        """The bytes of an array."""
        self._arrays.append((x, data))

    def add_attribute(self, x: Any, name: str, value: Any) -> None:
        self._attributes.append((x, name, value))

    def add_class(self, x: Any, kind: Any) -> None:
        """The class of an object."""
        self._classes.append((x, kind))

    def add_mro(self, kind: Any) -> None:
        """The classes in which a class looks for attributes."""
        self._mros.append((kind, kind.__mro__))

    def add_tensor(self, x: Tensor) -> None:
        """Shape, type and ``requires_grad`` of a tensor, whose numbers may change."""
        self._tensors.append((x, x.shape, x.dtype, x.requires_grad))

    def add_function(self, f: types.FunctionType) -> None:
        self.functions.append((f, f.__code__, f.__defaults__, f.__kwdefaults__))

    def add_result(self, read: Any, value: Any) -> None:
        """What a function without arguments returns."""
        self._results.append((read, value))

    def add_global_hooks(self) -> bool:
        """Whether there are hooks on all modules; that is a place, too."""
        if self._has_hooks is None:
            self._has_hooks = bool(_torch_modules._has_any_global_hook())
        return self._has_hooks

    def hold(self) -> bool:
        """Whether every place holds what it held."""
        for get, name, x in self._entries:
            if get(name, ABSENT) is not x:
                return False
        for x, kind in self._classes:
            if type(x) is not kind:
                return False
        for kind, order in self._mros:
            if kind.__mro__ is not order:
                return False
        try:
            for cell, x in self._cells:
                if cell.cell_contents is not x:
                    return False
        except ValueError:  # it was emptied
            return False
        for x, shape, dtype, grad in self._tensors:
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
        for read, value in self._results:
            if read() != value:
                return False
        has_hooks = self._has_hooks
        if has_hooks is not None and bool(_torch_modules._has_any_global_hook()) is not has_hooks:
            return False
        return all(x.tobytes() == data for x, data in self._arrays)
