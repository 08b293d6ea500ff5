"""One step of an (E)SDIRK method over torch tensors.

Off the tape the stages are found by Newton's iteration; on it they are known solutions, which the
implicit function theorem differentiates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffsolve.problems.structure import as_float
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Step, Trouble
from diffsolve.solvers.implicit_differentiation import linear_on_tape, stage_on_tape
from diffsolve.solvers.implicit_estimates import failed, radius_off_tape, radius_on_tape
from diffsolve.solvers.jacobian import linearise, push_forward
from diffsolve.solvers.newton import Newton, newton_of
from diffsolve.solvers.sdirk.tableau import INSIDE, SDIRKStages
from diffsolve.solvers.stage_rows import RKInterpolant, RKState, as_scale, constant


def take_step(
    field: VectorField,
    stages: SDIRKStages,
    t: Any,
    h: Any,
    state: RKState,
    solved: tuple[Tensor, ...] = (),
) -> Step:
    """Attempt a step; on the tape when autograd records.

    Parameters
    ----------
    field, stages, t, h, state
        The step.
    solved
        Its implicit stages, where they are known.
    """
    if not torch.is_grad_enabled():
        return _solved_step(field, stages, t, h, state)
    if solved:
        return _recorded_step(field, stages, t, h, state, solved)
    with torch.no_grad():
        plain = RKState(*(x.detach() for x in state))
        step = _solved_step(field, stages, as_float(t), as_float(h), plain)
    if not step.converged:
        return step
    return _recorded_step(field, stages, t, h, state, step.solved)


def _solved_step(
    field: VectorField, stages: SDIRKStages, t: float, h: float, state: RKState
) -> Step:
    newton = newton_of(field, stages.gamma, stages)
    u = state.u
    ready, found = newton.begin(t, h, u, stages.smoothed), None
    if ready:
        fresh = newton.is_here(t, u)
        found = _solve_stages(field, stages, newton, t, h, state, fresh)
        if found is None and not fresh:  # the Jacobian may be to blame
            ready = newton.renew(t, h, u)
            found = _solve_stages(field, stages, newton, t, h, state, True) if ready else None
    if found is not None and stages.smoothed and not newton.is_here(t, u):
        found = found if newton.renew(t, h, u) else None  # the matrix was one of a stage
    if found is None:
        return failed(field, state, newton.trouble)
    rows, new = found
    newton.end()
    error = None
    if stages.b_error is not None:
        error = torch.mv(rows.T, constant(field, stages.b_error) * h)
        if stages.smoothed:
            assert newton.lu is not None
            error = newton.lu.solve(error / stages.gamma)
    at_hand = newton.jacobian if newton.is_here(t, u) else None
    return Step(
        RKState(new, rows[-1].clone()),
        error,
        functools.partial(radius_off_tape, field, t, h, u, at_hand, newton.jacobian),
        RKInterpolant(field, t, h, u, rows, stages.interpolant),
        solved=tuple(rows[i] for i in range(stages.n) if stages.implicit[i]),
    )


def _solve_stages(
    field: VectorField,
    stages: SDIRKStages,
    newton: Newton,
    t: float,
    h: float,
    state: RKState,
    fresh: bool,
) -> tuple[Tensor, Tensor] | None:
    """Rows ``(n, N)`` and the new state; None where Newton's iteration failed.

    ``fresh``: its matrix is that of the step, so that a step which cannot be smaller insists.
    """
    u, du = state
    rows = torch.empty(stages.n, len(u), dtype=u.dtype, device=u.device)
    rows[0] = du
    times = field.times(t, h, stages.c)
    a, predictor = constant(field, stages.a) * h, constant(field, stages.predictor)
    g, insists = u, fresh and not field.retries
    for i in range(1, stages.n):
        before = rows[:i].T
        g = torch.addmv(u, before, a[i, :i])
        if stages.implicit[i]:
            guess = torch.mv(before, predictor[i, :i])
            at = t + min(float(stages.c[i]), 1.0) * h if insists else None
            f = _right_hand_side(field, stages, t, h, i, times[i])
            found = newton.solve(f, g, h, guess, at)
            if found is None:
                return None
            rows[i], g = found
        else:
            rows[i] = field(times[i], g)
    return rows, g


def _right_hand_side(
    field: VectorField, stages: SDIRKStages, t: Any, h: Any, i: int, time: Tensor
) -> Callable[[Tensor], Tensor]:
    """``f`` at the time of row ``i``; extrapolated in time where that is out of bounds."""
    weights, c = stages.inside[i], float(stages.c[i])
    if c <= 1 or not field.leaves(as_float(t), as_float(h), c):
        return functools.partial(field, time)
    times = field.times(t, h, INSIDE)

    def extrapolated(u: Tensor) -> Tensor:
        pairs = zip(weights.tolist(), times, strict=True)
        return functools.reduce(torch.add, [w * field(at, u) for w, at in pairs])

    return extrapolated


def _recorded_step(
    field: VectorField,
    stages: SDIRKStages,
    t: Any,
    h: Any,
    state: RKState,
    solved: tuple[Tensor, ...],
) -> Step:
    u, du = state
    scale = as_scale(field, h)
    a, known = constant(field, stages.a) * scale, iter(solved)
    times = field.times(t, h, stages.c)
    k, g = [du], u
    for i in range(1, stages.n):
        g = torch.addmv(u, torch.stack(k, 1), a[i, :i])
        if stages.implicit[i]:
            f = _right_hand_side(field, stages, t, h, i, times[i])
            stage, g = stage_on_tape(field, f, g, scale, stages.gamma, next(known))
        else:
            stage = field(times[i], g)
        k.append(stage)
    rows = torch.stack(k)
    error, push = None, None
    if stages.b_error is not None:
        error = (constant(field, stages.b_error) * scale) @ rows
        if stages.smoothed:
            lu = linearise(field, t, h, u, exact=True).factor(as_float(h), stages.gamma)
            if lu is None:
                return failed(field, state, Trouble.SINGULAR)
            push = push_forward(field, t, h, u, du)
            right = error / stages.gamma
            smooth = lu.solve(right.detach())
            error = linear_on_tape(field, lu, smooth, right, push, scale, stages.gamma, 0.0)
    return Step(
        RKState(g, k[-1]),
        error,
        functools.partial(radius_on_tape, field, t, h, state, push),
        RKInterpolant(field, t, h, u, rows, stages.interpolant),
        solved=solved,
    )
