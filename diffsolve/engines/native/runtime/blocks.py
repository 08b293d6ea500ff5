"""Arrays that the kernels work with, many in one piece of memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

_WORD = 8  # bytes
_BYTES = ctypes.c_char * 0
ArraySpec = tuple[int, tuple[int, ...], Any]


def place(array: Any) -> int:
    """Address of an array that may be written to; ``method.address`` in a quarter of the time."""
    return ctypes.addressof(_BYTES.from_buffer(array))


class Block:
    """Where each of some arrays lies in one piece of memory, for as many pieces as are made.

    Parameters
    ----------
    parts
        Of each array the slot of ``layout`` that gets its address, its shape and its type.
    """

    def __init__(self, parts: Iterable[ArraySpec]):
        self._parts: dict[int, tuple[int, tuple[int, ...], Any]] = {}
        self._offsets: list[tuple[int, int]] = []
        words = 0
        for slot, shape, dtype in parts:
            self._parts[slot] = words, shape, dtype
            self._offsets.append((slot, words * _WORD))
            words += -(-math.prod(shape) * dtype.itemsize // _WORD)
        self._words = words

    @property
    def slots(self) -> list[int]:
        return list(self._parts)

    def lay(self, integers: Any, zero: bool = False) -> np.ndarray:
        """A new piece of memory, whose addresses are written to ``integers``."""
        array = np.zeros(self._words) if zero else np.empty(self._words)
        self.lay_at(place(array), integers)
        return array

    def lay_at(self, start: int, integers: Any) -> None:
        """The same for one that begins at an address."""
        for slot, offset in self._offsets:
            integers[slot] = start + offset

    def part(self, array: np.ndarray, slot: int) -> np.ndarray:
        """One of the arrays in such a piece."""
        first, shape, dtype = self._parts[slot]
        count = math.prod(shape)
        return array[first:].view(dtype)[:count].reshape(shape)

    def move(self, array: np.ndarray, wider: Block, integers: Any) -> np.ndarray:
        """What lies in ``array``, in a piece whose arrays have more rows."""
        new = wider.lay(integers)
        for slot in self._parts:
            old = self.part(array, slot)
            wider.part(new, slot)[: len(old)] = old
        return new
