"""Failures in words: what happened, where, why it is likely, what to try."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffsolve.engines.examination import Finding, examine, hardest_row, inputs_with_nan
from diffsolve.problems.structure import detached
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import ReturnCode
from diffsolve.solvers.algorithm import Algorithm, Trouble
from diffsolve.solvers.norms import Estimates, Tolerance

_BLOWS_UP = (
    "the solution seems to blow up there, as that of a stable system does backward in time; end "
    "tspan earlier or check the signs in f"
)
_NEAR_STABILITY = 1.5  # h times the stiffness; explicit methods are stable up to 2 to 5
_MANY_REJECTED = 0.1  # of the attempts
_HUGE, _LARGE = 1e50, 1e8


@dataclass
class Failure:
    """A solve that stopped.

    Attributes
    ----------
    code
        Why.
    t0, t, t1
        The span, and where it stopped.
    h
        Size of the step that was to come, or of the one that failed.
    tried
        That of the last attempt, with its sign; NaN if there was none.
    alg, tolerance, adaptive, dtmin, maxiters
        How it was solved; ``adaptive``: whether step sizes follow the error.
    attempts, rejected
        Steps.
    estimates
        Of the last attempt, or None.
    state
        The last one, flat.
    trouble
        Of the last attempt.
    own_jacobian, noisy
        Whether the method used a ``jac`` of the user's, and whether the problem is an SDE.
    field
        The right-hand side; None where it is not the user's own.
    """

    code: ReturnCode
    t0: float
    t: float
    t1: float
    h: float
    tried: float
    alg: Algorithm
    tolerance: Tolerance
    adaptive: bool
    dtmin: float
    maxiters: int
    attempts: int
    rejected: int
    estimates: Estimates | None
    state: Tensor
    trouble: Trouble | None = None
    own_jacobian: bool = False
    noisy: bool = False
    field: VectorField | None = None

    @cached_property
    def size(self) -> float:
        return float(torch.linalg.vector_norm(self.state.detach(), ord=math.inf))

    @cached_property
    def signed(self) -> float:
        """A step size to look around with."""
        size = abs(self.tried) if math.isfinite(self.tried) else abs(self.h)
        size = size if math.isfinite(size) else 1e-6 * abs(self.t1 - self.t)
        return math.copysign(size, self.t1 - self.t)

    @cached_property
    def finding(self) -> Finding | None:
        if self.field is None or not self.size < _HUGE:
            return None
        return examine(self.field, self.t, self.state, self.signed)

    def estimate(self, name: str) -> float:
        return (
            math.nan if self.estimates is None else float(detached(getattr(self.estimates, name)))
        )

    @property
    def stability_limits(self) -> bool:
        product = self.estimate("stiffness") * abs(self.tried)
        return not self.alg.is_implicit and _NEAR_STABILITY < product < math.inf


def explain(failure: Failure) -> str:
    """A message for a solve that stopped."""
    x = failure
    where = f"at t = {x.t:.8g} (of {x.t1:.8g}) with step size {x.h:.3g}"
    facts = (
        f"max|u| = {x.size:.3g}, error estimate {x.estimate('error'):.3g}, "
        f"stiffness estimate {x.estimate('stiffness'):.3g}"
    )
    row = _hardest_row(x)
    if row is not None:
        facts += f"; most of the error is that of row {row} of the batch, u[{row}]"
    why = _WHY[x.code](x)
    if x.code is not ReturnCode.MAX_ITERS and not x.size < _HUGE:
        why = _BLOWS_UP  # whatever it was that overflowed first
    if x.own_jacobian and x.code is not ReturnCode.UNSTABLE:
        why = f"jac is not the Jacobian of f: compare it with check_jacobian(prob). Or else: {why}"
    return f"{_what(x)} {where}. {facts}. Likely: {why}."


def _what(x: Failure) -> str:
    name = x.alg.name
    if x.code is ReturnCode.MAX_ITERS:
        return f"{x.maxiters} steps were not enough: {name} stopped"
    if x.code is ReturnCode.DT_LESS_THAN_MIN:
        small = x.dtmin > 0 and x.h >= 4 * math.ulp(x.t)
        floor = f"dtmin = {x.dtmin:.3g}" if small else "rounding of t"
        return f"{name} needs a smaller step than {floor}"
    if x.code is ReturnCode.NEWTON_FAILED:
        if x.trouble is Trouble.SINGULAR:
            return f"the matrix I - h gamma J of {name} is singular"
        return f"Newton's iteration of {name} did not converge"
    if x.trouble is Trouble.JACOBIAN:
        return f"the Jacobian that {name} needs holds NaN or Inf"
    return f"{name} met NaN or Inf"


def _hardest_row(x: Failure) -> int | None:
    if x.field is None or not x.adaptive or not x.size < _HUGE:
        return None
    scale = x.tolerance.scale(x.state.detach().abs())
    return hardest_row(x.field, x.t, x.state, x.signed, scale)


# -- likely causes -------------------------------------------------------------------------------


def _seen(x: Failure) -> str:
    """What was seen of ``f`` near the point; empty if that is nothing."""
    found = x.finding
    if found is None:
        return ""
    if found.kind == "nan":
        beyond = "where the next steps lead, " if found.ahead else ""
        return (
            f"f gives NaN or Inf {beyond}at t = {found.t:.8g}, in the component of {found.place}: "
            "it left the range where it is defined (a root or log of a negative number, a "
            "division by zero, an overflow); check f there"
        )
    if found.kind == "time":
        return (
            f"f jumps at t = {found.t:.8g}, in the component of {found.place}; list that time in "
            "tstops"
        )
    return (
        f"f jumps as the state changes, near t = {found.t:.8g} in the component of "
        f"{found.place}; make it continuous (torch.sigmoid, torch.clamp), or loosen rtol and atol"
    )


def _why_max_iters(x: Failure) -> str:
    if not x.adaptive:
        more = abs(x.t1 - x.t) / x.h
        count = f"{math.ceil(more):,}" if more < 1e15 else f"{more:.3g}"
        return f"there are {count} more of this size to take; raise maxiters, or give a larger dt"
    seen = _seen(x) if x.rejected > _MANY_REJECTED * x.attempts else ""
    if seen:
        return f"{x.rejected:,} steps were rejected, and {seen}"
    if x.stability_limits:
        return (
            "the stiffness estimate says that stability, not accuracy, limits the step; "
            "try a looser tolerance or a stiff method"
        )
    part = abs((x.t - x.t0) / (x.t1 - x.t0))
    rejected = f", {x.rejected:,} of them rejected" if x.rejected else ""
    pace = f"; at this pace all of it takes {x.attempts / part:.2g}" if part > 1e-6 else ""
    return (
        f"the span is long for these tolerances: {100 * part:.3g} % of it took {x.attempts:,} "
        f"steps{rejected}{pace}. Raise maxiters, loosen rtol and atol, or try a method of another "
        "order"
    )


def _why_too_small(x: Failure) -> str:
    if x.size > _LARGE:
        return _BLOWS_UP
    return _seen(x) or (
        "f may jump or be singular there, or the tolerance is below rounding; list jumps "
        "in tstops, loosen rtol and atol, or use float64"
    )


def _why_newton_failed(x: Failure) -> str:
    if x.trouble is Trouble.SINGULAR:
        return "f, or its Jacobian, is too large there for the precision; try float64"
    instead = "adaptive steps or a smaller dt" if x.noisy else "a Rosenbrock method"
    return _seen(x) or f"f may jump there, or have a kink; list jumps in tstops, or try {instead}"


def _why_unstable(x: Failure) -> str:
    inputs = [] if x.field is None else inputs_with_nan(x.field)
    if inputs:
        names = ", ".join(inputs[:5])
        return f"NaN in {names}, which f uses; check f and where that comes from"
    if x.trouble is Trouble.JACOBIAN:
        return (
            "a derivative of f does not exist there (that of a root or a norm at zero, say), "
            "though f does"
        )
    if x.finding is not None and x.finding.kind == "nan":
        return f"{_seen(x)}, or pass a smaller dt or dtmax"
    which = "f, g" if x.noisy else "f"
    return (
        f"{which}, or the state, left the range where it is defined (a root or log of a "
        f"negative number, a division by zero, an overflow); check {which} there, or pass a "
        "smaller dt or dtmax"
    )


_WHY = {
    ReturnCode.MAX_ITERS: _why_max_iters,
    ReturnCode.DT_LESS_THAN_MIN: _why_too_small,
    ReturnCode.NEWTON_FAILED: _why_newton_failed,
    ReturnCode.UNSTABLE: _why_unstable,
}
