"""Failures in words: what happened, where, what the likely cause is, and what to try.

``EVENTS`` says what happened and ``CAUSES`` why. Both are tables: the first diagnosis that fits a
failure gives the text. A new diagnosis is a new row, above the more general ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffsolve.engines.examination import Finding, examine, hardest_row, inputs_with_nan
from diffsolve.engines.settings import Settings
from diffsolve.problems.structure import as_float
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import ReturnCode
from diffsolve.solvers.algorithm import Algorithm, Trouble
from diffsolve.solvers.norms import Estimates

_NEAR_STABILITY = 1.5  # h times the stiffness; explicit methods are stable up to 2 to 5
_MANY_REJECTED = 0.1  # of the attempts
_HUGE, _LARGE = 1e50, 1e8


@dataclass
class Failure:
    """A solve that stopped.

    Attributes
    ----------
    code
        Why it stopped.
    alg, settings
        How it was solved.
    t0, t, t1
        The span, and where it stopped.
    h
        Size of the step that was to come, or of the one that failed.
    last_h
        Size of the last attempt, with its sign; NaN if there was none.
    attempts, rejected
        Numbers of steps.
    estimates
        Of the last attempt, or None.
    state
        The last one, flat.
    trouble
        Of the last attempt.
    own_jacobian, is_sde
        Whether the method used a ``jac`` of the user's, and whether the problem is an SDE.
    field
        The right-hand side; None where it is not the user's own.
    """

    code: ReturnCode
    alg: Algorithm
    settings: Settings
    t0: float
    t: float
    t1: float
    h: float
    last_h: float
    attempts: int
    rejected: int
    estimates: Estimates | None
    state: Tensor
    trouble: Trouble | None = None
    own_jacobian: bool = False
    is_sde: bool = False
    field: VectorField | None = None

    @cached_property
    def largest(self) -> float:
        """The largest magnitude in the state."""
        return float(torch.linalg.vector_norm(self.state.detach(), ord=math.inf))

    @cached_property
    def probe_h(self) -> float:
        """A step size, with its sign, for evaluations of ``f`` near the point."""
        size = abs(self.last_h) if math.isfinite(self.last_h) else abs(self.h)
        size = size if math.isfinite(size) else 1e-6 * abs(self.t1 - self.t)
        return math.copysign(size, self.t1 - self.t)

    @cached_property
    def finding(self) -> Finding | None:
        """What an examination of ``f`` near the point shows."""
        if self.field is None or not self.largest < _HUGE:
            return None
        return examine(self.field, self.t, self.state, self.probe_h)

    @cached_property
    def nan_inputs(self) -> list[str]:
        return [] if self.field is None else inputs_with_nan(self.field)

    @cached_property
    def hardest_row(self) -> int | None:
        """The row of a batch with most of the error, if one stands out."""
        if self.field is None or not self.settings.adaptive or not self.largest < _HUGE:
            return None
        scale = self.settings.tolerance.scale(self.state.detach().abs())
        return hardest_row(self.field, self.t, self.state, self.probe_h, scale)

    @property
    def stability_limits(self) -> bool:
        product = self.estimate("stiffness") * abs(self.last_h)
        return not self.alg.is_implicit and _NEAR_STABILITY < product < math.inf

    @property
    def has_many_rejections(self) -> bool:
        return self.rejected > _MANY_REJECTED * self.attempts

    def estimate(self, name: str) -> float:
        return math.nan if self.estimates is None else as_float(getattr(self.estimates, name))


@dataclass(frozen=True)
class Diagnosis:
    """A text for failures with one of ``codes`` (empty: any) that fulfil ``condition``."""

    codes: tuple[ReturnCode, ...]
    condition: Callable[[Failure], object]
    text: str | Callable[[Failure], str]


def explain(failure: Failure) -> str:
    """A message for a solve that stopped."""
    x = failure
    where = f"at t = {x.t:.8g} (of {x.t1:.8g}) with step size {x.h:.3g}"
    facts = (
        f"max|u| = {x.largest:.3g}, error estimate {x.estimate('error'):.3g}, "
        f"stiffness estimate {x.estimate('stiffness'):.3g}"
    )
    row = x.hardest_row
    if row is not None:
        facts += f"; most of the error is that of row {row} of the batch, u[{row}]"
    cause = _first_text(CAUSES, x)
    if x.own_jacobian and x.code is not ReturnCode.UNSTABLE:
        cause = (
            f"jac is not the Jacobian of f: compare it with check_jacobian(prob). Or else: {cause}"
        )
    return f"{_first_text(EVENTS, x)} {where}. {facts}. Likely: {cause}."


def _first_text(table: Sequence[Diagnosis], x: Failure) -> str:
    fits = (d for d in table if (not d.codes or x.code in d.codes) and d.condition(x))
    text = next(fits).text
    return text if isinstance(text, str) else text(x)


def _always(x: Failure) -> bool:
    return True


# -- what happened -------------------------------------------------------------------------------


def _limit_of_step(x: Failure) -> str:
    reached_dtmin = x.settings.dtmin > 0 and x.h >= 4 * math.ulp(x.t)
    return f"dtmin = {x.settings.dtmin:.3g}" if reached_dtmin else "rounding of t"


_MAX_ITERS = (ReturnCode.MAX_ITERS,)
_TOO_SMALL = (ReturnCode.DT_LESS_THAN_MIN,)
_NEWTON = (ReturnCode.NEWTON_FAILED,)
_UNSTABLE = (ReturnCode.UNSTABLE,)

EVENTS = (
    Diagnosis(
        _MAX_ITERS,
        _always,
        lambda x: f"{x.settings.maxiters} steps were not enough: {x.alg.name} stopped",
    ),
    Diagnosis(
        _TOO_SMALL, _always, lambda x: f"{x.alg.name} needs a smaller step than {_limit_of_step(x)}"
    ),
    Diagnosis(
        _NEWTON,
        lambda x: x.trouble is Trouble.SINGULAR,
        lambda x: f"the matrix I - h gamma J of {x.alg.name} is singular",
    ),
    Diagnosis(_NEWTON, _always, lambda x: f"Newton's iteration of {x.alg.name} did not converge"),
    Diagnosis(
        (),
        lambda x: x.trouble is Trouble.JACOBIAN,
        lambda x: f"the Jacobian that {x.alg.name} needs holds NaN or Inf",
    ),
    Diagnosis((), _always, lambda x: f"{x.alg.name} met NaN or Inf"),
)


# -- likely causes -------------------------------------------------------------------------------

_BLOWS_UP = (
    "the solution seems to blow up there, as that of a stable system does backward in time; end "
    "tspan earlier or check the signs in f"
)


def _finding_in_words(x: Failure) -> str:
    finding = x.finding
    assert finding is not None
    if finding.kind == "nan":
        beyond = "where the next steps lead, " if finding.ahead else ""
        return (
            f"f gives NaN or Inf {beyond}at t = {finding.t:.8g}, in the component of "
            f"{finding.place}: it left the range where it is defined (a root or log of a negative "
            "number, a division by zero, an overflow); check f there"
        )
    if finding.kind == "time":
        return (
            f"f jumps at t = {finding.t:.8g}, in the component of {finding.place}; list that time "
            "in tstops"
        )
    return (
        f"f jumps as the state changes, near t = {finding.t:.8g} in the component of "
        f"{finding.place}; make it continuous (torch.sigmoid, torch.clamp), or loosen rtol and atol"
    )


def _too_many_fixed_steps(x: Failure) -> str:
    more = abs(x.t1 - x.t) / x.h
    count = f"{math.ceil(more):,}" if more < 1e15 else f"{more:.3g}"
    return f"there are {count} more of this size to take; raise maxiters, or give a larger dt"


def _long_span(x: Failure) -> str:
    part = abs((x.t - x.t0) / (x.t1 - x.t0))
    rejected = f", {x.rejected:,} of them rejected" if x.rejected else ""
    pace = f"; at this pace all of it takes {x.attempts / part:.2g}" if part > 1e-6 else ""
    return (
        f"the span is long for these tolerances: {100 * part:.3g} % of it took {x.attempts:,} "
        f"steps{rejected}{pace}. Raise maxiters, loosen rtol and atol, or try a method of another "
        "order"
    )


def _jump_or_kink(x: Failure) -> str:
    instead = "adaptive steps or a smaller dt" if x.is_sde else "a Rosenbrock method"
    return f"f may jump there, or have a kink; list jumps in tstops, or try {instead}"


def _left_its_range(x: Failure) -> str:
    which = "f, g" if x.is_sde else "f"
    return (
        f"{which}, or the state, left the range where it is defined (a root or log of a "
        f"negative number, a division by zero, an overflow); check {which} there, or pass a "
        "smaller dt or dtmax"
    )


CAUSES = (
    # whatever it was that overflowed first
    Diagnosis(_TOO_SMALL + _NEWTON + _UNSTABLE, lambda x: not x.largest < _HUGE, _BLOWS_UP),
    Diagnosis(_MAX_ITERS, lambda x: not x.settings.adaptive, _too_many_fixed_steps),
    Diagnosis(
        _MAX_ITERS,
        lambda x: x.has_many_rejections and x.finding,
        lambda x: f"{x.rejected:,} steps were rejected, and {_finding_in_words(x)}",
    ),
    Diagnosis(
        _MAX_ITERS,
        lambda x: x.stability_limits,
        "the stiffness estimate says that stability, not accuracy, limits the step; "
        "try a looser tolerance or a stiff method",
    ),
    Diagnosis(_MAX_ITERS, _always, _long_span),
    Diagnosis(_TOO_SMALL, lambda x: x.largest > _LARGE, _BLOWS_UP),
    Diagnosis(
        _NEWTON,
        lambda x: x.trouble is Trouble.SINGULAR,
        "f, or its Jacobian, is too large there for the precision; try float64",
    ),
    Diagnosis(_TOO_SMALL + _NEWTON, lambda x: x.finding, _finding_in_words),
    Diagnosis(
        _TOO_SMALL,
        _always,
        "f may jump or be singular there, or the tolerance is below rounding; list jumps "
        "in tstops, loosen rtol and atol, or use float64",
    ),
    Diagnosis(_NEWTON, _always, _jump_or_kink),
    Diagnosis(
        _UNSTABLE,
        lambda x: x.nan_inputs,
        lambda x: (
            f"NaN in {', '.join(x.nan_inputs[:5])}, which f uses; check f and where that comes from"
        ),
    ),
    Diagnosis(
        _UNSTABLE,
        lambda x: x.trouble is Trouble.JACOBIAN,
        "a derivative of f does not exist there (that of a root or a norm at zero, say), "
        "though f does",
    ),
    Diagnosis(
        _UNSTABLE,
        lambda x: x.finding is not None and x.finding.kind == "nan",
        lambda x: f"{_finding_in_words(x)}, or pass a smaller dt or dtmax",
    ),
    Diagnosis((), _always, _left_its_range),
)
