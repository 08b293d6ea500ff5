"""The contract between ``solve`` and the ways to differentiate it."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsolve.engines.native.programs.bound import RowBound as NativeSDE
from diffsolve.engines.native.programs.bound import ScalarBound as NativeField
from diffsolve.engines.native.runtime import solve as native
from diffsolve.engines.native.runtime import stochastic_solve as stochastic_engine
from diffsolve.engines.native.runtime.solve import NativeTrajectory
from diffsolve.engines.native.runtime.template import Wanted
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch_engine import integrate
from diffsolve.engines.trajectory import Recorder, Saving, Trajectory
from diffsolve.problems.autocast import without_autocast
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import Stats
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.times import SaveTimes


@dataclass
class Job:
    """A solve, normalised and ready to run.

    Attributes
    ----------
    field, alg
        Right-hand side over the flat state, and the method.
    u0, du0
        Flat initial state, possibly on the tape, and the derivative there, off the tape.
    t0, t1
        Span, floats; ``span`` holds the same as the user gave it.
    settings
        How to integrate.
    saves
        Times to save.
    dense
        Whether the user wants dense output.
    native
        Machine code of the right-hand side; None: the torch engine runs.
    stats
        To be filled; ``stats.adjoint`` by the reverse pass.
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
    native: NativeField | None = None
    stats: Stats = dataclasses.field(default_factory=Stats)

    def for_reverse(self) -> Job:
        """What a reverse pass in machine code reads of it: nothing that refers to ``f``."""
        assert self.native is not None
        self.native.forget_functions()
        job = object.__new__(Job)
        job.__dict__.update(self.__dict__, field=self.field.without_functions())
        return job

    @property
    def save_times(self) -> Sequence[float] | None:
        """Ordered times to save; None: every step."""
        return self.saves.times

    def run(
        self, u0: Tensor, recorder: Recorder | None = None, dense: bool | None = None
    ) -> Trajectory:
        """Integrate forward with torch, off the tape."""
        saving = Saving(self.save_times, self.dense if dense is None else dense, recorder)
        with torch.no_grad(), without_autocast(self.field.device):
            return integrate(
                self.field, self.alg, u0, self.t0, self.t1, self.settings, saving, self.du0
            )

    def run_native(self, u0: Tensor, wanted: Wanted) -> NativeTrajectory:
        """Integrate forward in machine code."""
        assert self.native is not None
        span = self.t0, self.t1
        if isinstance(self.native, NativeSDE):
            field: Any = self.field
            found = stochastic_engine.integrate(
                self.native, field, self.alg, u0, *span, self.settings, wanted
            )
        else:
            found = native.integrate(
                self.native, self.alg, u0, *span, self.settings, wanted, self.field
            )
        self.stats.kernel_s = found.kernel_s
        return found

    def stacked(self, saved: Sequence[Tensor]) -> Tensor:
        """Saved flat states ``(T, N)``."""
        if saved:
            return torch.stack(list(saved))
        return torch.empty(0, len(self.u0), dtype=self.u0.dtype, device=self.u0.device)

    def estimates(self, trajectory: Trajectory) -> tuple[Tensor, Tensor, Tensor]:
        """``error, error_norm, stiffness`` of the accepted steps, ``(n,)`` each."""
        rows = [(e.error, e.error_norm, e.stiffness) for e in trajectory.estimates]
        if trajectory.last_stiffness is not None:
            with torch.no_grad(), without_autocast(self.field.device):
                rows[-1] = (*rows[-1][:2], trajectory.last_stiffness())
        table = torch.tensor(
            rows, dtype=self.field.structure.time_dtype, device=self.field.device
        ).reshape(-1, 3)
        error, error_norm, stiffness = table.T.unbind(0)
        return error, error_norm, stiffness


@dataclass
class Outputs:
    """Differentiable results of a solve: saved states ``(T, N)`` and the steps' estimates.

    Attributes
    ----------
    estimates
        ``error, error_norm, stiffness``, in order: rows of one tensor, or a tensor each. None:
        those of the trajectory, which nothing differentiates.
    """

    trajectory: Trajectory | NativeTrajectory
    u: Tensor
    estimates: Tensor | Sequence[Tensor] | None = None


class Sensealg(ABC):
    """A way to differentiate a solve.

    Attributes
    ----------
    handles_time
        Whether gradients by times are already on the tape, so that none must be attached.
    handles_noise
        Whether it can go back through the solve of an SDE.
    handles_steps
        Whether the estimates of the steps can be differentiated.
    reads_params
        Whether its reverse pass reads the parameters beside what the native engine keeps.
    """

    reads_params: bool = True
    handles_time: bool = False
    handles_noise: bool = False
    handles_steps: bool = False

    @abstractmethod
    def run(self, job: Job) -> Outputs:
        """Integrate and return outputs that autograd can go back through."""

    def prepared(self, settings: Settings) -> Settings:
        """Settings as this way needs them."""
        return settings

    def refuse_native(self) -> None:  # noqa: B027
        """Say before anything is traced that the native engine never goes this way.

        Raises
        ------
        Declined
            If it does not.
        """

    def compile(self, native: NativeField, alg: Algorithm) -> None:  # noqa: B027
        """Make the machine code that the reverse pass needs, before the solve.

        Raises
        ------
        Declined
            If the native engine cannot go this way.
        """


class NoAdjoint(Sensealg):
    """Nothing requires a gradient."""

    reads_params = False
    handles_noise = True
    handles_steps = True

    def run(self, job: Job) -> Outputs:
        if job.native is not None:
            found = job.run_native(job.u0.detach(), Wanted(job.saves.array, dense=job.dense))
            return Outputs(found, found.u)
        trajectory = job.run(job.u0.detach())
        known = None if trajectory.last_stiffness is not None else job.estimates(trajectory)
        return Outputs(trajectory, job.stacked(trajectory.u), known)

    def __repr__(self) -> str:
        return "none"


class Carrier:
    """Takes what is no tensor into an autograd function and out of it.

    Attributes
    ----------
    job
        The solve.
    trajectory
        What the engine gave back, until it is handed over.
    kept
        What the reverse pass needs besides.
    """

    def __init__(self, job: Job, kept: Any = None):
        self.job = job
        self.trajectory: Any = None
        self.kept = kept

    def handed_over(self) -> Trajectory:
        """The trajectory, for the outputs alone: a graph must not keep it, and dense output."""
        trajectory, self.trajectory = self.trajectory, None
        return trajectory


def add_up(totals: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Add gradients, None where there is none, to their totals."""
    for i, g in enumerate(grads):
        if g is not None:
            total = totals[i]
            totals[i] = g if total is None else total + g


_FIRST_ORDER_ONLY = (
    "second derivatives do not go through this sensealg's reverse pass: use "
    "sensealg=DiscreteAdjoint(tape=True)"
)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward`` off the tape and without autocast; its results refuse another one."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *bars: Any) -> Any:
        if not ctx.__dict__:  # released
            return ctx.saved_tensors  # which raises: the graph is freed
        quiet = without_autocast(ctx.job.field.device)
        if not torch.is_grad_enabled():  # entering no_grad takes a microsecond
            with quiet:
                grads = backward(ctx, *bars)
            release(ctx)
            return grads
        with torch.no_grad(), quiet:
            grads = backward(ctx, *bars)
        inputs = [x for x in (*bars, *ctx.inputs) if isinstance(x, Tensor) and x.requires_grad]
        release(ctx)
        if not inputs:
            return grads
        return tuple(
            undifferentiable(g, inputs[0], _FIRST_ORDER_ONLY) if isinstance(g, Tensor) else g
            for g in grads
        )

    return wrapper


_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph  # pyright: ignore


def release(ctx: Any) -> None:
    """Forget what a reverse pass needed, if autograd frees the graph after it.

    ``f`` may belong to a model that keeps the solution. Python's collector does not see a cycle
    through a graph, so that neither would ever be freed.
    """
    if not _keeps_graph():
        ctx.__dict__.clear()


class _Undifferentiable(torch.autograd.Function):
    """Identity whose gradient is an error that explains itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, message: str) -> Tensor:
        ctx.message = message
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.message)


def undifferentiable(x: Tensor, anchor: Tensor, message: str) -> Tensor:
    """``x``, made to raise ``message`` when a gradient is asked of it.

    Parameters
    ----------
    anchor
        A tensor on the tape that ``x`` depends on.
    """
    with torch.enable_grad():
        return _Undifferentiable.apply(x.detach(), anchor, message)  # type: ignore[return-value]
