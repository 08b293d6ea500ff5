"""The contract of sensealgs and engines: what is solved, what is kept, what is differentiated."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.settings import Settings
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import ReturnCode, Stats, Steps
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.norms import Tolerance
from diffsolve.times import SaveTimes


@dataclass(slots=True)
class SaveRequest:
    """What to keep of a solve.

    Attributes
    ----------
    saves
        Times to save.
    states
        Whether to keep the states of the steps, for a reverse pass through them.
    checkpoints
        How many states; None: those of all steps.
    dense
        Whether to keep the continuous extension.
    complete
        Whether to compute the extra stages of the interpolant during the solve.
    tape
        A ``StepTape`` for the torch engine to record the steps on; None: it makes its own.
    """

    saves: SaveTimes
    states: bool = False
    checkpoints: int | None = None
    dense: bool = False
    complete: bool = False
    tape: Any = None

    @property
    def times(self) -> np.ndarray | None:
        """Ordered times to save; None: every step."""
        return self.saves.array


class StepTable(ABC):
    """Start, size and estimates of the accepted steps; tensors are made when they are read."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def times(self) -> tuple[Tensor, Tensor]:
        """Starts and signed sizes, ``(n,)`` float64 on the CPU."""

    @abstractmethod
    def estimates(self) -> Tensor:
        """``error, error_norm, stiffness``: ``(3, n)``."""

    def steps(self, estimates: Tensor | None = None) -> Steps:
        """All columns; ``estimates`` replaces those of the table: the same, but on the tape."""
        rows = self.estimates() if estimates is None else estimates
        return Steps(*self.times(), rows[0], rows[1], rows[2])


class Dense(Protocol):
    """A continuous extension, with its ends in the direction of the solve."""

    direction: float
    ends: list[float]

    def __call__(self, times: Sequence[float], derivative: int = 0) -> Tensor: ...


@dataclass
class Trajectory:
    """A solve as an engine returns it.

    Attributes
    ----------
    t, u
        Saved times, and the flat states there, ``(T, N)``.
    steps
        The accepted steps.
    counts
        Work done, as ``Stats.count`` takes it; None: ``field.counts()`` tells.
    nreject
        Rejected steps.
    final_t, final_h
        Where the last step ended, and its size.
    retcode, message
        How the solve ended, and why it failed.
    dense
        Continuous extension, if it was asked for.
    kernel_s
        Seconds in compiled code.
    records
        What the engine needs for a reverse pass; it alone reads this.
    """

    t: Sequence[float] | np.ndarray
    u: Tensor
    steps: StepTable
    counts: tuple[int, ...] | None
    nreject: int
    final_t: float
    final_h: float
    retcode: ReturnCode
    message: str = ""
    dense: Dense | None = None
    kernel_s: float = 0.0
    records: Any = dataclasses.field(default=None, repr=False)


@dataclass
class SolveContext:
    """A solve, normalised and ready to run.

    Attributes
    ----------
    field, alg
        Right-hand side over the flat state, and the method.
    u0, du0
        Flat initial state, possibly on the tape, and ``f(t0, u0)``, off the tape; None where that
        is not known.
    t0, t1
        Span, as floats; ``span`` holds what the user gave.
    settings
        How to integrate.
    saves
        Times to save.
    dense
        Whether the user wants dense output.
    plan
        The engine.
    stats
        Filled on the way; the reverse pass fills ``stats.adjoint``.
    """

    field: VectorField
    alg: Algorithm
    u0: Tensor
    du0: Tensor | None
    t0: float
    t1: float
    span: tuple[Any, Any]
    settings: Settings
    saves: SaveTimes
    dense: bool
    plan: Plan
    stats: Stats

    @property
    def direction(self) -> float:
        """1, or -1 where time runs backward."""
        return 1.0 if self.t1 >= self.t0 else -1.0

    @property
    def save_times(self) -> Sequence[float] | None:
        """Ordered times to save; None: every step."""
        return self.saves.times

    def integrate(self, u0: Tensor, request: SaveRequest) -> Trajectory:
        """Integrate forward, off the tape."""
        return self.plan.integrate(self, u0, request)


@dataclass
class ForwardSolve:
    """What the reverse solve of an adjoint equation knows of the forward one.

    Attributes
    ----------
    u0
        Flat initial state.
    times, saved
        Saved times, and the states there, ``(T, N)``.
    kept, records
        What ``Plan.forward`` gave the engine to keep: tensors, and the rest.
    """

    u0: Tensor
    times: Sequence[float]
    saved: Tensor
    kept: Sequence[Tensor]
    records: Any


class AdjointEquation(ABC):
    """What an engine asks of a continuous adjoint.

    Attributes
    ----------
    along_path
        Whether the reverse solve reads the forward solution, rather than solving it again.
    alg, rtol, atol
        Method and tolerances of the reverse solve; None: those of the forward one.
    """

    along_path: ClassVar[bool] = False
    alg: Algorithm | None
    rtol: float | None
    atol: float | None

    @property
    def kept_states(self) -> int | None:
        """How many states of the forward solution are kept; None: its continuous extension."""
        return None

    @property
    def resets_state(self) -> bool:
        """Whether a state that is solved again is set to the stored one at saved times."""
        return False

    def warn_of(self, worst: float) -> None:  # noqa: B027
        """Warn where a state that was solved again is off by so many tolerances."""

    @abstractmethod
    def reverse_method(self, context: SolveContext) -> Algorithm:
        """The method of the reverse solve."""

    @abstractmethod
    def reverse_settings(
        self, context: SolveContext, tolerance: Tolerance, stops: Sequence[float]
    ) -> Settings:
        """Settings of the reverse solve, which stops at ``stops``."""

    @abstractmethod
    def forward(self, context: SolveContext, u0: Tensor) -> tuple[Any, list[Tensor], Any]:
        """Integrate with torch.

        Returns
        -------
        tuple
            The ``StepLog``, tensors for autograd to save, and a function that makes ``kept`` of
            them in the reverse pass.
        """

    @abstractmethod
    def reverse(
        self, context: SolveContext, kept: Any, field: VectorField, params: list[Tensor]
    ) -> Any:
        """The reverse equation for torch, a ``ReverseField``; ``kept`` is that of ``forward``."""


class NoSecondDerivative(Exception):
    """A gradient is not finite: it needs a second derivative that ``f`` does not have."""


class Plan(ABC):
    """An engine, with all that it has prepared for one solve and its reverse pass.

    Attributes
    ----------
    engine
        ``"native"`` or ``"torch"``.
    reason
        Why the native engine does not run this solve; empty where it does, or was not asked to.
    """

    engine: ClassVar[str]
    reason: str = ""

    def __str__(self) -> str:
        because = f", because native declined: {self.reason}" if self.reason else ""
        return f"{self.engine}{because}"

    @abstractmethod
    def integrate(self, context: SolveContext, u0: Tensor, request: SaveRequest) -> Trajectory:
        """Integrate forward from the flat state ``u0``, off the tape.

        Returns
        -------
        Trajectory
            With the partial result and the reason where the solve failed.
        """

    @abstractmethod
    def keep(self, trajectory: Trajectory) -> tuple[list[Tensor], Any]:
        """What ``pull`` needs of a solve: tensors, which autograd keeps alive, and the rest."""

    @abstractmethod
    def pull(
        self,
        context: SolveContext,
        kept: Sequence[Tensor],
        records: Any,
        u0: Tensor,
        cotangents: Sequence[Tensor | None],
        by_state: bool,
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Pull cotangents back through the steps of a solve.

        Parameters
        ----------
        kept, records
            What ``keep`` returned.
        u0
            Flat initial state.
        cotangents
            Those of the saved states ``(T, N)`` and of ``error, error_norm, stiffness`` ``(n,)``;
            None where there is none.
        by_state
            Whether the gradient by the initial state is wanted.

        Returns
        -------
        tuple
            Gradients by the flat initial state and by each of the field's parameters.

        Raises
        ------
        NoSecondDerivative
            If the gradient is not finite, but a method with first derivatives may have one.
        """

    @abstractmethod
    def forward(
        self, context: SolveContext, adjoint: AdjointEquation, u0: Tensor
    ) -> tuple[Trajectory, list[Tensor], Any]:
        """Integrate forward; the trajectory, and what ``solve_adjoint`` needs as of ``keep``."""

    @abstractmethod
    def solve_adjoint(
        self, context: SolveContext, adjoint: AdjointEquation, forward: ForwardSolve, bars: Tensor
    ) -> Sequence[Tensor]:
        """Solve the adjoint equation backward, for cotangents ``(T, N)`` of the saved states.

        Returns
        -------
        sequence
            Gradients by the flat initial state and by each of the field's parameters.

        Raises
        ------
        SolveError
            If the reverse solve fails.
        """

    def keep_params(self) -> None:  # noqa: B027
        """Copy the parameters that are read after the solve, since the user may change them."""

    def compile_s(self) -> float:
        """Seconds that tracing and compiling took."""
        return 0.0

    def refuse_changed(self, context: SolveContext, u0: Tensor) -> None:  # noqa: B027
        """Refuse a reverse pass through an ``f`` that gives other values than in the solve.

        Raises
        ------
        RuntimeError
            If it does.
        """

    def for_reverse(self, context: SolveContext) -> SolveContext:
        """The context for the reverse pass to keep."""
        return context


def stacked(saved: Sequence[Tensor], like: Tensor) -> Tensor:
    """Saved flat states as one tensor ``(T, N)``; ``like`` is another such state."""
    return torch.stack(list(saved)) if saved else like.new_empty(0, len(like))
