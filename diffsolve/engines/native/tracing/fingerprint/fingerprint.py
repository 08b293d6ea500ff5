"""What a function depends on besides its arguments, as it is now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from diffsolve.engines.native.tracing.fingerprint.code_reads import ReadPlan
from diffsolve.engines.native.tracing.fingerprint.kinds import state_of
from diffsolve.engines.native.tracing.fingerprint.walk import Walk
from diffsolve.engines.native.tracing.tracer import Lifted


@dataclass
class Source:
    """Where a block of the flat parameters comes from.

    Attributes
    ----------
    kind
        ``"p"``: a leaf of ``p``; ``"tensor"``: a tensor of a fingerprint; ``"numbers"``: the tensor
        ``numbers``.
    index
        Which leaf, or which tensor.
    numbers
        Values that are the same in all solves that the trace is for.
    """

    kind: str
    index: int
    numbers: Tensor | None = None


class Fingerprint:
    """What a function depends on, read along a plan.

    Two functions with equal ``items`` compute the same of their arguments and of ``tensors``,
    whichever objects they are made of, unless ``why_incomplete`` says that something was missed.

    Parameters
    ----------
    plan
        Where to look.
    roots
        The function, and other objects it is given.

    Attributes
    ----------
    items
        All that it depends on, but for the numbers of tensors.
    tensors
        The tensors that were met, in order.
    why_incomplete
        Why there may be more than was read; empty where there is not.
    """

    __slots__ = (
        "_alive", "_arrays", "_generators", "_guards", "_states", "items", "tensors",
        "why_incomplete",
    )  # fmt: skip

    def __init__(self, plan: ReadPlan, roots: Any):
        walk = Walk(plan, roots)
        self.items: list[Any] = walk.items
        self.tensors: list[Tensor] = walk.tensors
        self.why_incomplete = walk.why_incomplete
        self._arrays: list[np.ndarray] = walk.arrays
        self._generators: list[Any] = walk.generators
        self._guards = walk.guards
        self._states: list[Any] = []
        self._alive = walk.alive  # else a weak reference among them could give None later

    def mark_incomplete(self, why: str) -> None:
        """Note that there may be more than was read. The first reason stays."""
        self.why_incomplete = self.why_incomplete or why

    def still_holds(self) -> bool:
        """Whether every place that was read holds the same object; much faster than to read anew.

        Numbers of tensors may be others.
        """
        return self._guards.hold()

    def index_of(self, x: Tensor) -> int | None:
        """Which of ``tensors`` it is."""
        return next((i for i, y in enumerate(self.tensors) if y is x), None)

    def is_array(self, x: Tensor) -> bool:
        """Whether a tensor lies in the memory of an array that was read."""
        if not x.is_cpu:
            return False
        address = x.untyped_storage().data_ptr()
        ranges = ((y.ctypes.data, y.nbytes) for y in self._arrays)
        return any(start <= address < start + size for start, size in ranges)

    def source_of(self, x: Lifted) -> Source:
        """Where a block of parameters comes from; marks this incomplete if it was not met."""
        if x.tensor is None:
            return Source("p", x.p_position or 0)
        index = self.index_of(x.tensor)
        if index is not None:
            return Source("tensor", index)
        if self.is_array(x.tensor):  # its numbers are among the items
            return Source("numbers", 0, x.tensor.detach().clone())
        self.mark_incomplete("it uses a tensor that was not found")
        return Source("numbers", 0, x.tensor)

    def tensor_of(self, source: Source, leaves: list[Any]) -> Tensor:
        """The tensor that a block comes from now; ``leaves`` are those of ``p``."""
        if source.kind == "p":
            return leaves[source.index]
        if source.kind == "tensor":
            return self.tensors[source.index]
        assert source.numbers is not None
        return source.numbers

    def note_generators(self) -> None:
        """Note the states of the generators of random numbers, for ``generators_advanced``."""
        self._states = [state_of(x) for x in self._generators]

    def generators_advanced(self) -> bool:
        """Whether random numbers were drawn since ``note_generators``."""
        return self._states != [state_of(x) for x in self._generators]
