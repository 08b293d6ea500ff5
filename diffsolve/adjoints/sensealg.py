"""The contract between ``solve`` and the ways to differentiate it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsolve.engines.native.plan import NativePlan
from diffsolve.engines.plan import SaveRequest, SolveContext, Trajectory
from diffsolve.engines.settings import Settings
from diffsolve.problems.autocast import without_autocast
from diffsolve.solvers.algorithm import Algorithm


@dataclass
class Outputs:
    """Differentiable results of a solve: saved states ``(T, N)`` and the steps' estimates.

    Attributes
    ----------
    estimates
        ``error, error_norm, stiffness``, ``(3, n)``. None: those of the trajectory, which nothing
        differentiates.
    """

    trajectory: Trajectory
    u: Tensor
    estimates: Tensor | None = None


class Sensealg(ABC):
    """A way to differentiate a solve.

    Attributes
    ----------
    handles_time
        Whether its outputs already have gradients by the times, so that none must be attached.
    handles_noise
        Whether it can go back through the solve of an SDE.
    handles_steps
        Whether the estimates of the steps can be differentiated.
    reads_params
        Whether its reverse pass reads the parameters, of which the engine must then keep a copy.
    """

    reads_params: bool = True
    handles_time: bool = False
    handles_noise: bool = False
    handles_steps: bool = False

    @abstractmethod
    def run(self, context: SolveContext) -> Outputs:
        """Integrate and return outputs that autograd can go back through."""

    def prepared(self, settings: Settings) -> Settings:
        """The settings that a solve with this sensealg takes."""
        return settings

    def refuse_native(self) -> None:  # noqa: B027
        """Decline, before anything is traced, where the native engine never has this reverse pass.

        Raises
        ------
        Declined
            If it has not.
        """

    def compile(self, plan: NativePlan, alg: Algorithm) -> None:  # noqa: B027
        """Make the machine code that the reverse pass needs, before the solve.

        Raises
        ------
        Declined
            If the native engine has no such reverse pass.
        """


class NoAdjoint(Sensealg):
    """Nothing requires a gradient."""

    reads_params = False
    handles_noise = True
    handles_steps = True

    def run(self, context: SolveContext) -> Outputs:
        request = SaveRequest(context.saves, dense=context.dense)
        trajectory = context.integrate(context.u0.detach(), request)
        return Outputs(trajectory, trajectory.u)

    def __repr__(self) -> str:
        return "none"


class Handover:
    """Takes objects that are no tensors into an autograd function and out of it.

    Attributes
    ----------
    context, request
        The solve, and what to keep of it.
    trajectory
        What the engine gave back, until it is taken.
    """

    def __init__(self, context: SolveContext, request: SaveRequest | None = None):
        self.context, self.request = context, request
        self._trajectory: Trajectory | None = None

    def put(self, trajectory: Trajectory) -> Trajectory:
        self._trajectory = trajectory
        return trajectory

    def take(self) -> Trajectory:
        """The trajectory, which is forgotten: a graph must not keep it and its dense output."""
        trajectory, self._trajectory = self._trajectory, None
        assert trajectory is not None
        return trajectory


_FIRST_ORDER_ONLY = (
    "second derivatives do not go through this sensealg's reverse pass: use "
    "sensealg=DiscreteAdjoint(tape=True)"
)


def forbid_double_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``backward`` off the tape, without autocast; its results refuse to be differentiated."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *bars: Any) -> Any:
        if not ctx.__dict__:  # released
            return ctx.saved_tensors  # which raises: the graph is freed
        quiet = without_autocast(ctx.context.field.device)
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
    """``x``, which raises ``message`` when autograd wants its gradient.

    Parameters
    ----------
    anchor
        A tensor on the tape that ``x`` depends on.
    """
    with torch.enable_grad():
        return _Undifferentiable.apply(x.detach(), anchor, message)  # type: ignore[return-value]
