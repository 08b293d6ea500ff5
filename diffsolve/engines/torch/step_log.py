"""What the loop keeps of a solve: saved states, accepted steps, and how it ended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffsolve.problems.structure import Number, as_float
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import ReturnCode
from diffsolve.solvers.algorithm import Algorithm, Step, read
from diffsolve.solvers.interpolation import DenseOutput
from diffsolve.solvers.norms import Estimates


@dataclass(slots=True)
class Record:
    """An accepted step, with what is needed to take it again.

    Attributes
    ----------
    t, h, state
        Arguments of the step.
    restart
        Whether ``alg.init`` made ``state`` at ``t``.
    alg
        The method that took it.
    solved
        The solutions of its equations (``Step.solved``).
    first_save, thetas
        Saved values inside the step: indices from ``first_save`` on, at these fractions of it.
    end_save
        Index of the saved value that is the step's end, or None.
    """

    t: float
    h: float
    state: tuple[Tensor, ...]
    restart: bool
    alg: Algorithm
    solved: tuple[Tensor, ...] = ()
    first_save: int = 0
    thetas: list[float] = dataclasses.field(default_factory=list)
    end_save: int | None = None

    def begin(self, field: VectorField, u: Tensor) -> tuple[Tensor, ...]:
        """State of the method at the start of a step after a restart, from the state ``u``."""
        if not self.alg.carries_derivative:
            return self.alg.init(field, self.t, u)
        return self.alg.init(field, self.t, u, field(field.after(self.t, self.h), u))

    def repeat(self, field: VectorField, state: tuple[Tensor, ...]) -> Step:
        """Take the step again from ``state``, with ``solved`` as the solutions of its equations.

        Raises
        ------
        RuntimeError
            If its equations cannot be solved again.
        """
        take: Any = self.alg.step  # only methods with such equations take the keyword
        options = {"solved": self.solved} if self.solved else {}
        step = take(field, self.t, self.h, state, **options)
        if step.trouble is not None:
            why = step.trouble.value
            raise RuntimeError(
                f"a step from t = {self.t:.8g} cannot be repeated: {why}. {field.changed}"
            )
        return step


class Recorder(Protocol):
    def append(self, record: Record, /) -> None: ...


@dataclass
class Saving:
    """What to keep of a solve.

    Attributes
    ----------
    times
        Ordered times to save, or None: every step.
    dense
        Whether to keep the continuous extension.
    recorder
        Receives a ``Record`` of each accepted step.
    """

    times: Sequence[float] | None = None
    dense: bool = False
    recorder: Recorder | None = None


@dataclass
class StepLog:
    """The notes that the loop makes of a solve, step by step."""

    t: list[float] = dataclasses.field(default_factory=list)
    u: list[Tensor] = dataclasses.field(default_factory=list)
    step_t: list[Number] = dataclasses.field(default_factory=list)
    step_h: list[Number] = dataclasses.field(default_factory=list)
    estimates: list[Estimates] = dataclasses.field(default_factory=list)
    dense: DenseOutput | None = None
    nreject: int = 0
    final: Tensor | None = None
    final_t: float = math.nan
    final_h: float = math.nan
    retcode: ReturnCode = ReturnCode.SUCCESS
    message: str = ""
    #: Computes the stiffness of the last step, where that step left it open (``Step``).
    last_stiffness: Callable[[], float] | None = None

    @property
    def naccept(self) -> int:
        return len(self.step_t)


class SavedValues:
    """Writes the states at the times of a ``Saving`` to a log, step by step.

    Attributes
    ----------
    count
        Number of values saved so far.
    """

    def __init__(self, saving: Saving, log: StepLog, direction: float, h_on_tape: bool):
        self._times, self._log = saving.times, log
        self._direction, self._h_on_tape = direction, h_on_tape
        self.count = 0

    def start(self, t: float, u: Tensor) -> None:
        """Save the initial state, where it was asked for."""
        times = self._times
        if times is None or (len(times) and times[0] == t):
            self._save(t, u)

    def next_is_before(self, t: float) -> bool:
        """Whether a time to save comes before ``t``."""
        times = self._times
        if times is None or self.count >= len(times):
            return False
        return self._direction * times[self.count] < self._direction * t

    def only_end_is_left(self, end: float) -> bool:
        """Whether no time is left to save but ``end``, or every step is saved."""
        times = self._times
        return times is None or self.count >= len(times) or times[self.count] == end

    def add(self, step: Step, t: Number, h: Number, end: float, record: Record | None) -> None:
        """Save the values that lie in an accepted step up to ``end``, and note them in its record.

        Parameters
        ----------
        step, t, h
            The step.
        end, record
            Its end, and where to note which values are inside.
        """
        times = self._times
        if times is None:
            if record is not None:
                record.end_save = self.count
            self._save(end, step.state[0])
            return
        first = last = self.count
        while last < len(times) and self._direction * times[last] <= self._direction * end:
            last += 1
        if last == first:
            return
        ends_on_save = times[last - 1] == end
        inside = times[first : last - 1 if ends_on_save else last]
        thetas: list[Any] = [(x - t) / h for x in inside]
        if inside:
            values = read(step.interpolant, inside, self._as_tensor(thetas))
            for x, value in zip(inside, values.unbind(0), strict=True):
                self._save(x, value)
        if record is not None:
            record.first_save, record.thetas = first, thetas
            record.end_save = last - 1 if ends_on_save else None
        if ends_on_save:
            self._save(end, step.state[0])

    def _as_tensor(self, thetas: Sequence[Any]) -> Tensor:
        if not self._h_on_tape:
            return torch.tensor(thetas, dtype=torch.float64, device="cpu")
        return torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in thetas])

    def _save(self, t: float, u: Tensor) -> None:
        self._log.t.append(t)
        self._log.u.append(u)
        self.count += 1


def progress_bar(t0: Number, t1: Number) -> Any:
    from tqdm.auto import tqdm

    layout = "{l_bar}{bar}| t {n:.4g}/{total:.4g} [{elapsed}<{remaining}]"
    return tqdm(total=abs(as_float(t1) - as_float(t0)), bar_format=layout, desc="solve")
