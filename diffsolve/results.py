"""What a solve gives back: times, states and steps, and the gradients that they have or refuse."""

from __future__ import annotations

from collections.abc import Callable
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
    """The result of a solve: times, states and steps, with gradients or with a refusal of them."""
    trajectory, field, stats = outputs.trajectory, context.field, context.stats
    u, saves = outputs.u, context.saves
    times: Any = saves.array
    if times is None or trajectory.t is not times or saves.differentiable(context.span):
        times = saves.as_tensor(context.span, trajectory.t)
        moving = saves.inside(times, context.span) if sensealg.handles_time else times
        u = attach_saved(u, moving, field, context.t0, context.t1)
    # made when they are read: most users never look
    steps: Any = partial(trajectory.steps.steps, outputs.estimates)
    if u.requires_grad and not sensealg.handles_steps:
        steps = _refusing_gradients(steps(), u, sensealg)
    elif u.requires_grad and field.is_stochastic and not transforms_active():
        steps = _refusing_missing(steps(), u, context.alg)
    stats.count(field.counts() if trajectory.counts is None else trajectory.counts)
    stats.naccept, stats.nreject = len(trajectory.steps), trajectory.nreject
    return Solution(
        _t=times,
        u=field.structure.unravel(u),
        retcode=trajectory.retcode,
        stats=stats,
        _steps=steps,
        message=trajectory.message,
        noise=field.path,
        _interpolate=_dense_reader(context, sensealg, trajectory.dense, u),
        _context=context,
    )


def _dense_reader(
    context: SolveContext, sensealg: Sensealg, dense: Dense | None, anchor: Tensor
) -> Callable[[Any, int], Any] | None:
    """``sol(t)``; its values are on the tape where the whole solve is, and else say that not."""
    if dense is None:
        return None
    structure = context.field.structure
    ends = (context.t0, dense.direction * dense.ends[-1])
    on_tape = isinstance(sensealg, DiscreteAdjoint) and sensealg.tape
    noisy = context.field.is_stochastic

    def interpolate(t: Any, derivative: int) -> Any:
        if not isinstance(derivative, int) or derivative < 0:
            raise ValueError(f"derivative must be 0, 1, 2, ..., got {derivative!r}")
        eps = torch.finfo(t.dtype).eps if isinstance(t, Tensor) and t.is_floating_point() else 0.0
        at = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        times = [snapped(x, ends, eps) for x in at.detach().reshape(-1).tolist()]
        if noisy and at.requires_grad and torch.is_grad_enabled():
            dense(times, 1)  # raises: a path has no derivative
        flat = _read_dense(dense, on_tape, anchor, why, at.reshape(-1), times, derivative)
        return structure.unravel(flat.reshape(*at.shape, structure.size))

    why = _DENSE_NEEDS_TAPE.format(sensealg=sensealg)
    return interpolate


def _read_dense(
    dense: Dense,
    on_tape: bool,
    anchor: Tensor,
    why: str,
    at: Tensor,
    times: list[float],
    derivative: int,
) -> Tensor:
    """Flat states at ``times``, with gradients by ``at``, or with ``why`` there are none.

    It stands alone: a closure that names itself would keep the solution alive.
    """
    recording = torch.is_grad_enabled()
    with torch.set_grad_enabled(on_tape and recording):
        flat = dense(times, derivative)
    if recording and not on_tape and anchor.requires_grad:
        flat = undifferentiable(flat, anchor, why)
    if recording and at.requires_grad:
        again = partial(_read_dense, dense, on_tape, anchor, why)
        flat = attach_slopes(flat, at, lambda at: again(at, times, derivative + 1))
    return flat


def _refusing_gradients(steps: Steps, anchor: Tensor, sensealg: Sensealg) -> Steps:
    def guard(name: str) -> Tensor:
        message = _STEPS_NEED_DISCRETE.format(name=name, sensealg=sensealg)
        return undifferentiable(getattr(steps, name), anchor, message)

    return Steps(steps.t, steps.h, guard("error"), guard("error_norm"), guard("stiffness"))


def _refusing_missing(steps: Steps, anchor: Tensor, alg: Any) -> Steps:
    """Estimates that a method lacks are zero: to optimise them would do nothing, silently."""
    missing = [] if alg.adaptive else ["error", "error_norm"]
    missing += [] if alg.estimates_stiffness else ["stiffness"]
    refusing = {
        name: undifferentiable(
            getattr(steps, name), anchor, _NO_ESTIMATE.format(name=name, alg=alg.name)
        )
        for name in missing
    }
    return replace(steps, **refusing)
