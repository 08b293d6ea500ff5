"""What the reverse solves of both engines share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffsolve.engines.plan import SolveContext
from diffsolve.solution import ReturnCode, SolveError
from diffsolve.solvers.norms import Tolerance, rms


def reverse_stops(
    context: SolveContext, times: Sequence[float], pins: Sequence[float] = ()
) -> list[float]:
    """Where the reverse solve from the last of ``times``, the saved ones, must stop, in its order.

    ``pins`` are further times.
    """
    start, end = times[-1], context.t0
    direction = -context.direction
    stops = {*times, *pins, *context.settings.tstops} - {start, end}
    inside = (t for t in stops if direction * start < direction * t < direction * end)
    return sorted(inside, reverse=direction < 0)


def reverse_failure(
    sensealg: str, message: str, retcode: ReturnCode, t: float, h: float
) -> SolveError:
    unstable = (
        "Backward in time, what decays grows: on a stiff problem no step size can help. "
        if sensealg == "BacksolveAdjoint"
        else ""
    )
    return SolveError(
        f"the reverse solve of {sensealg} failed: {message} {unstable}"
        "DiscreteAdjoint() has no reverse solve that could fail.",
        retcode,
        t,
        h,
    )


def in_tolerances(reached: Tensor, true: Tensor, tolerance: Tolerance) -> float:
    """By how many tolerances a state is off."""
    return float(rms((reached - true) / tolerance.scale(true.abs())))
