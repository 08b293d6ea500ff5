"""From the results of an engine to a ``Solution``, whose parts have gradients or refuse them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffsolve.adjoints.discrete import DiscreteAdjoint
from diffsolve.adjoints.select import transforms_active
from diffsolve.adjoints.sensealg import Outputs, Sensealg, undifferentiable
from diffsolve.adjoints.time_gradient import attach_saved, attach_slopes
from diffsolve.engines.plan import Dense, SolveContext
from diffsolve.solution import Solution, Steps
from diffsolve.times import snapped

_STEPS_NEED_DISCRETE = (
    "sol.steps.{name} has no gradient under {sensealg}: a continuous adjoint differentiates the "
    "equation, not the solver's steps. Use sensealg=DiscreteAdjoint(), or the local regularizer "
    "diffsolve.regularization.local_error_estimate, which works under every sensealg."
)
_NO_ESTIMATE = (
    "sol.steps.{name} has no gradient: a step of {alg} estimates no such thing. Use a method that "
    "does, such as LambaEM(), LambaEulerHeun() or SOSRI()."
)
_DENSE_NEEDS_TAPE = (
    "sol(t) has no gradient under {sensealg}: list the times in saveat, whose values do, or use "
    "sensealg=DiscreteAdjoint(tape=True)."
)


def solution_of(context: SolveContext, sensealg: Sensealg, outputs: Outputs) -> Solution:
    """The solution, whose times, states and steps have gradients or refuse them."""
    trajectory, field, stats = outputs.trajectory, context.field, context.stats
    u, saves = outputs.u, context.saves
    times: Any = saves.array
    if times is None or trajectory.t is not times or saves.differentiable(context.span):
        times = saves.as_tensor(context.span, trajectory.t)
        moving = saves.inside(times, context.span) if sensealg.handles_time else times
        u = attach_saved(u, moving, field, context.t0, context.t1)
    # made when they are read, since most users never look
    steps: Any = partial(trajectory.steps.steps, outputs.estimates)
    if u.requires_grad and not sensealg.handles_steps:
        steps = _refusing_gradients(steps(), u, sensealg)
    elif u.requires_grad and field.is_stochastic and not transforms_active():
        steps = _refusing_missing(steps(), u, context.alg)
    stats.count(field.counts() if trajectory.counts is None else trajectory.counts)
    stats.naccept, stats.nreject = len(trajectory.steps), trajectory.nreject
    read_dense = None
    if trajectory.dense is not None:
        read_dense = _DenseReader(context, sensealg, trajectory.dense, u)
    return Solution(
        _t=times,
        u=field.structure.unravel(u),
        retcode=trajectory.retcode,
        stats=stats,
        _steps=steps,
        message=trajectory.message,
        noise=field.path,
        _interpolate=read_dense,
        _context=context,
    )


class _DenseReader:
    """``sol(t)``: states with gradients where the whole solve is on the tape, else a refusal.

    Gradients by ``t`` are there in both cases. It does not refer to the solution, which keeps it.

    Parameters
    ----------
    anchor
        The saved states, which tell whether anything requires a gradient.
    """

    def __init__(self, context: SolveContext, sensealg: Sensealg, dense: Dense, anchor: Tensor):
        self.dense, self.anchor = dense, anchor
        self.structure = context.field.structure
        self.ends = (context.t0, dense.direction * dense.ends[-1])
        self.on_tape = isinstance(sensealg, DiscreteAdjoint) and sensealg.tape
        self.is_noisy = context.field.is_stochastic
        self.refusal = _DENSE_NEEDS_TAPE.format(sensealg=sensealg)

    def __deepcopy__(self, memo: dict[int, Any]) -> _DenseReader:
        return self  # nothing changes it

    def __call__(self, t: Any, derivative: int) -> Any:
        if not isinstance(derivative, int) or derivative < 0:
            raise ValueError(f"derivative must be 0, 1, 2, ..., got {derivative!r}")
        eps = torch.finfo(t.dtype).eps if isinstance(t, Tensor) and t.is_floating_point() else 0.0
        at = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        times = [snapped(x, self.ends, eps) for x in at.detach().reshape(-1).tolist()]
        if self.is_noisy and at.requires_grad and torch.is_grad_enabled():
            self.dense(times, 1)  # raises: a path has no derivative
        flat = self._read(at.reshape(-1), times, derivative)
        return self.structure.unravel(flat.reshape(*at.shape, self.structure.size))

    def _read(self, at: Tensor, times: list[float], derivative: int) -> Tensor:
        """Flat states at ``times``, the values of ``at``."""
        recording = torch.is_grad_enabled()
        with torch.set_grad_enabled(self.on_tape and recording):
            flat = self.dense(times, derivative)
        if recording and not self.on_tape and self.anchor.requires_grad:
            flat = undifferentiable(flat, self.anchor, self.refusal)
        if recording and at.requires_grad:
            flat = attach_slopes(flat, at, lambda at: self._read(at, times, derivative + 1))
        return flat


def _refusing_gradients(steps: Steps, anchor: Tensor, sensealg: Sensealg) -> Steps:
    def guard(name: str) -> Tensor:
        message = _STEPS_NEED_DISCRETE.format(name=name, sensealg=sensealg)
        return undifferentiable(getattr(steps, name), anchor, message)

    return Steps(steps.t, steps.h, guard("error"), guard("error_norm"), guard("stiffness"))


def _refusing_missing(steps: Steps, anchor: Tensor, alg: Any) -> Steps:
    """Refuse gradients of estimates that a method lacks: these are zero, and so would those be."""
    missing = [] if alg.adaptive else ["error", "error_norm"]
    missing += [] if alg.estimates_stiffness else ["stiffness"]
    refusing = {
        name: undifferentiable(
            getattr(steps, name), anchor, _NO_ESTIMATE.format(name=name, alg=alg.name)
        )
        for name in missing
    }
    return replace(steps, **refusing)
