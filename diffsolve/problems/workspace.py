"""What the steps of one solve keep from call to call."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


class Workspace:
    """One object of each class: buffers of a method, its matrices, coefficients as tensors.

    A class that keeps something here is the owner of it: it alone makes, reads and replaces the
    object. Nothing else refers to the contents, which end with the solve.
    """

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: dict[type, Any] = {}

    def get(self, kind: type[T]) -> T | None:
        """The object of this class, or None."""
        return self._entries.get(kind)

    def put(self, entry: T) -> T:
        """Keep an object, in the place of another one of its class; it is returned."""
        self._entries[type(entry)] = entry
        return entry

    def drop(self, kind: type) -> None:
        """Forget the object of this class, if there is one."""
        self._entries.pop(kind, None)
