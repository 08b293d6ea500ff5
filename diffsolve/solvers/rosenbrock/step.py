"""One step of a Rosenbrock method over torch tensors: linear systems with the exact Jacobian."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsolve.problems.structure import as_float, detached
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Step, Trouble
from diffsolve.solvers.implicit_differentiation import linear_on_tape
from diffsolve.solvers.implicit_estimates import failed, radius_off_tape, radius_on_tape
from diffsolve.solvers.jacobian import linearise, push_forward
from diffsolve.solvers.linear import Linearisation
from diffsolve.solvers.rosenbrock.tableau import RosenbrockStages
from diffsolve.solvers.stage_rows import RKInterpolant, RKState, as_scale, constant


def take_step(field: VectorField, stages: RosenbrockStages, t: Any, h: Any, state: RKState) -> Step:
    """Attempt a step; on the tape when autograd records."""
    if torch.is_grad_enabled():
        return _recorded_step(field, stages, t, h, state)
    return _plain_step(field, stages, t, h, state)


class _StartJacobian(NamedTuple):
    """The Jacobian where a step starts, which serves all attempts of the step."""

    t: float
    u: Tensor
    is_forward: bool
    jacobian: Linearisation


def _start_jacobian(field: VectorField, t: float, h: float, u: Tensor) -> Linearisation:
    last = field.workspace.get(_StartJacobian)
    if last is None or last.t != t or last.u is not u or last.is_forward != (h > 0):
        jacobian = linearise(field, t, h, u, slope=True)
        last = field.workspace.put(_StartJacobian(t, u, h > 0, jacobian))
    return last.jacobian


def _plain_step(
    field: VectorField, stages: RosenbrockStages, t: float, h: float, state: RKState
) -> Step:
    u, du = state
    jacobian = _start_jacobian(field, t, h, u)
    if not jacobian.finite:
        return failed(field, state, Trouble.JACOBIAN)
    lu = jacobian.factor(h, stages.gamma)
    if lu is None:
        return failed(field, state, Trouble.SINGULAR)
    n = stages.n
    rows = torch.empty(n, len(u), dtype=u.dtype, device=u.device)
    rows[0] = du
    times = field.times(t, h, stages.c)
    a, coupling = constant(field, stages.a) * h, constant(field, stages.coupling)
    new, at_end = u, stages.at_end
    for i in range(1, n - 1):
        if i == 1:
            right = du
        else:
            before = rows[1:i].T
            g = torch.addmv(u, before, a[i, 1:i])
            right = field(times[i], g)
            if i == at_end:
                new, rows[-1] = g, right
            right = torch.addmv(right, before, coupling[i, 1:i])
        if jacobian.slope is not None and stages.d[i]:
            right = torch.add(right, jacobian.slope, alpha=h * stages.d[i])
        rows[i] = lu.solve(right)
    if not at_end:
        new = torch.addmv(u, rows[1:-1].T, a[-1, 1:-1])
        rows[-1] = field(times[-1], new)
    error = None
    if stages.b_error is not None:
        error = torch.mv(rows.T, constant(field, stages.b_error) * h)
    return Step(
        RKState(new, rows[-1].clone()),
        error,
        functools.partial(radius_off_tape, field, t, h, u, jacobian, jacobian),
        RKInterpolant(field, t, h, u, rows, stages.interpolant),
    )


def _recorded_step(
    field: VectorField, stages: RosenbrockStages, t: Any, h: Any, state: RKState
) -> Step:
    u, du = state
    jacobian = linearise(field, t, h, u, slope=True, exact=True)
    lu = jacobian.factor(as_float(h), stages.gamma)
    if lu is None:
        return failed(field, state, Trouble.SINGULAR if jacobian.finite else Trouble.JACOBIAN)
    scale, gamma = as_scale(field, h), stages.gamma
    a, coupling = constant(field, stages.a) * scale, constant(field, stages.coupling)
    times = field.times(t, h, stages.c)
    push = push_forward(field, t, h, u, du)
    k, end = [du], None
    for i in range(1, stages.n - 1):
        right = du
        if i > 1:
            before = torch.stack(k[1:], 1)
            g = torch.addmv(u, before, a[i, 1:i])
            right = field(times[i], g)
            if i == stages.at_end:
                end = g, right
            right = torch.addmv(right, before, coupling[i, 1:i])
        d = float(stages.d[i])
        known = right.detach()
        if jacobian.slope is not None:
            known = known + detached(scale) * d * jacobian.slope
        k.append(linear_on_tape(field, lu, lu.solve(known), right, push, scale, gamma, d))
    if end is None:
        new = torch.addmv(u, torch.stack(k[1:], 1), a[-1, 1:-1])
        end = new, field(times[-1], new)
    new, du_new = end
    rows = torch.stack([*k, du_new])
    error = None
    if stages.b_error is not None:
        error = (constant(field, stages.b_error) * scale) @ rows
    return Step(
        RKState(new, du_new),
        error,
        functools.partial(radius_on_tape, field, t, h, state, push),
        RKInterpolant(field, t, h, u, rows, stages.interpolant),
    )
