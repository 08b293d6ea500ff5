"""The adjoint equation, solved backward by torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffsolve.engines.plan import AdjointEquation, ForwardSolve, SolveContext
from diffsolve.engines.reverse_solves import reverse_failure, reverse_stops
from diffsolve.engines.torch.loop import OnStop, integrate
from diffsolve.engines.torch.reverse_field import ReverseField, UsedLater
from diffsolve.engines.torch.step_log import Saving


def solve_adjoint(
    context: SolveContext, adjoint: AdjointEquation, forward: ForwardSolve, bars: Tensor
) -> list[Tensor]:
    """Gradients by the flat initial state and by each parameter; see ``Plan.solve_adjoint``."""
    field, params = context.field.for_vjp()
    kept = forward.records(forward.kept)
    # a parameter that f can reach but does not call would only make the reverse state longer
    active = [i for i, p in enumerate(context.field.params) if id(p) in context.field.used]

    def gradients(indices: list[int]) -> list[Tensor]:
        reverse = adjoint.reverse(context, kept, field, [params[i] for i in indices])
        return _gradients(context, adjoint, reverse, forward, bars)

    try:
        by_state, *by_params = gradients(active)
    except UsedLater:
        active = list(range(len(params)))
        by_state, *by_params = gradients(active)
    grads = [torch.zeros_like(p) for p in params]
    for i, g in zip(active, by_params, strict=True):
        grads[i] = g
    return [by_state, *grads]


def _gradients(
    context: SolveContext,
    adjoint: AdjointEquation,
    reverse: ReverseField,
    forward: ForwardSolve,
    bars: Tensor,
) -> list[Tensor]:
    """Gradients by the flat initial state and by the parameters of a reverse equation."""
    times, saved = forward.times, forward.saved
    reverse.check(forward.u0, times, saved)
    row = {t: i for i, t in enumerate(times)}

    def on_stop(t: float, z: Tensor) -> Tensor:
        i = row.get(t)
        return z if i is None else reverse.at_save(z, bars[i], saved[i])

    z = reverse.start(bars[-1], saved[-1])
    if times[-1] != context.t0:
        z = _integrate_reverse(context, adjoint, reverse, z, times, on_stop)
        reverse.finish(z)
        if times[0] == context.t0:
            z = reverse.at_save(z, bars[0], saved[0])
    parts = z.split(reverse.sizes)
    by_params = (_like(part, p) for part, p in zip(parts[2:], reverse.params, strict=True))
    return [parts[0], *by_params]


def _integrate_reverse(
    context: SolveContext,
    adjoint: AdjointEquation,
    reverse: ReverseField,
    z: Tensor,
    times: Sequence[float],
    on_stop: OnStop,
) -> Tensor:
    """The reverse state at ``t0``, from the one at the last of the saved times."""
    alg = adjoint.reverse_method(context)
    start, end = times[-1], context.t0
    forward = context.settings.tolerance
    tolerance = reverse.tolerance(
        float(forward.rtol.min()) if adjoint.rtol is None else adjoint.rtol,
        float(forward.atol.min()) if adjoint.atol is None else adjoint.atol,
        forward,
    )
    stops = reverse_stops(context, times, reverse.pins)
    settings = adjoint.reverse_settings(context, tolerance, stops)
    if reverse.first_size is not None:
        settings = replace(settings, dt=settings.dt or reverse.first_size)
    du = reverse(reverse.after(start, -context.direction), z) if alg.carries_derivative else None
    result = integrate(reverse, alg, z, start, end, settings, Saving(times=()), du, on_stop)
    stats = context.stats.adjoint
    assert stats is not None
    stats.alg = alg.name
    stats.count(reverse.counts())
    stats.naccept, stats.nreject = result.naccept, result.nreject
    if not result.retcode.successful or result.final is None:
        raise reverse_failure(
            type(adjoint).__name__, result.message, result.retcode, result.final_t, result.final_h
        )
    return result.final


def _like(part: Tensor, p: Tensor) -> Tensor:
    """A parameter's part of the reverse state in the shape and dtype of the parameter."""
    if p.is_complex() and not part.is_complex():
        return torch.view_as_complex(part.reshape(*p.shape, 2).clone()).to(p)
    if part.is_complex() and not p.is_complex():
        part = part.real
    return part.reshape(p.shape).to(p)
