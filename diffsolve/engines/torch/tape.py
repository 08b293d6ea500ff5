"""The record of a solve's accepted steps, with all of their states or a few; read backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from diffsolve.engines.torch.step_log import Record
from diffsolve.problems.vector_field import VectorField


def check_checkpoints(checkpoints: int | None) -> None:
    """Raise a ``ValueError`` if that is no number of states to keep."""
    if checkpoints is not None and not (isinstance(checkpoints, int) and checkpoints >= 1):
        raise ValueError(f"checkpoints must be a positive integer, got {checkpoints!r}")


class StepTape:
    """Records of accepted steps.

    Parameters
    ----------
    checkpoints
        How many states to keep; None: all. They are spread evenly although the number of steps is
        not known: where there are too many, every second one is dropped. The others are made
        again, a segment at a time, by repeating its steps.
    """

    def __init__(self, checkpoints: int | None = None):
        self.checkpoints = checkpoints
        self.records: list[Record] = []
        self._stride = 1
        # of the unloaded records: index, number of tensors in the state, and in the solutions
        self._unloaded: list[tuple[int, int, int]] = []

    def append(self, record: Record) -> None:
        index = len(self.records)
        self.records.append(record)
        if self.checkpoints is None or index == 0:
            return
        if index % self._stride:
            self.forget(record)
        elif index // self._stride >= self.checkpoints:
            self._stride *= 2
            for i, kept in enumerate(self.records):
                if i % self._stride:
                    self.forget(kept)

    @staticmethod
    def forget(record: Record) -> None:
        """Drop the state that a step began with, and the solutions of its equations."""
        record.state = record.solved = ()

    def unload(self) -> list[Tensor]:
        """Give the tensors away, for autograd to save; see ``loaded``."""
        records = self.records
        self._unloaded = [
            (i, len(r.state), len(r.solved)) for i, r in enumerate(records) if r.state
        ]
        tensors = [x for record in records for x in (*record.state, *record.solved)]
        for record in records:
            self.forget(record)
        return tensors

    def loaded(self, tensors: Sequence[Tensor]) -> StepTape:
        """A copy of this tape with the tensors that ``unload`` gave away."""
        tape = type(self)(self.checkpoints)
        tape.records = [replace(record) for record in self.records]
        rest = iter(tensors)
        for i, states, solutions in self._unloaded:
            tape.records[i].state = tuple(next(rest) for _ in range(states))
            tape.records[i].solved = tuple(next(rest) for _ in range(solutions))
        return tape

    def segments(self) -> list[tuple[int, int]]:
        """Ranges of steps that begin with a kept state, in order."""
        starts = [i for i, record in enumerate(self.records) if record.state]
        return list(pairwise([*starts, len(self.records)]))

    def states(self, segment: tuple[int, int], field: VectorField) -> list[tuple[Tensor, ...]]:
        """States at the steps of a segment, repeated from the one that was kept."""
        begin, end = segment
        state = self.records[begin].state
        states = [state]
        with torch.no_grad():
            for i in range(begin, end - 1):
                record, following = self.records[i], self.records[i + 1]
                state = record.repeat(field, state).state
                if following.restart:
                    state = following.begin(field, state[0])
                states.append(state)
        return states

    def led_to(self, begin: int, state: tuple[Tensor, ...]) -> Tensor:
        """Where the step before the one at ``begin`` led, which starts from ``state``."""
        return state[0]

    def backward(
        self, field: VectorField
    ) -> Iterator[tuple[int, list[Record], list[tuple[Tensor, ...]]]]:
        """Segments, the last one first: index of the first step, the records, their states."""
        if self.checkpoints is None:
            if self.records:
                yield 0, self.records, [record.state for record in self.records]
            return
        for segment in reversed(self.segments()):
            begin, end = segment
            yield begin, self.records[begin:end], self.states(segment, field)
