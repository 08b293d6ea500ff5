"""Failures in words: what happened, where, why it is likely, what to try."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsolve.problems.structure import detached
from diffsolve.solution import ReturnCode
from diffsolve.solvers.algorithm import Trouble
from diffsolve.solvers.norms import Estimates

_BLOWS_UP = (
    "the solution seems to blow up there, as that of a stable system does backward in time; end "
    "tspan earlier or check the signs in f"
)


def explain(
    code: ReturnCode,
    *,
    t: float,
    h: float,
    t1: float,
    alg: str,
    estimates: Estimates | None,
    dtmin: float,
    maxiters: int,
    state: Tensor,
    adaptive: bool = True,
    trouble: Trouble | None = None,
    own_jacobian: bool = False,
    noisy: bool = False,
) -> str:
    """A message for a solve that stopped at ``t`` with a next step of size ``h``.

    ``adaptive`` tells whether step sizes follow the error, and ``noisy`` whether the problem is an
    SDE. ``trouble`` is that of the last attempt, and ``own_jacobian`` tells whether the method used
    a ``jac`` of the user's.
    """
    size = float(torch.linalg.vector_norm(state.detach(), ord=math.inf))
    error = math.nan if estimates is None else float(detached(estimates.error))
    stiffness = math.nan if estimates is None else float(detached(estimates.stiffness))
    where = f"at t = {t:.8g} (of {t1:.8g}) with step size {h:.3g}"
    facts = f"max|u| = {size:.3g}, error estimate {error:.3g}, stiffness estimate {stiffness:.3g}"
    stiff = math.isfinite(stiffness) and stiffness * abs(t1 - t) > 1e4
    if code is ReturnCode.MAX_ITERS:
        what = f"{maxiters} steps were not enough: {alg} stopped {where}"
        if not adaptive:
            more = abs(t1 - t) / h
            count = f"{math.ceil(more):,}" if more < 1e15 else f"{more:.3g}"
            why = (
                f"there are {count} more of this size to take; raise maxiters, or give a larger dt"
            )
        elif stiff:
            why = (
                "the stiffness estimate says that stability, not accuracy, limits the step; "
                "try a looser tolerance or a stiff method"
            )
        else:
            why = (
                "the problem may be long, fast or stiff for these tolerances; raise maxiters, "
                "loosen rtol and atol, or try a method of another order"
            )
    elif code is ReturnCode.DT_LESS_THAN_MIN:
        floor = f"dtmin = {dtmin:.3g}" if dtmin > 0 and h >= 4 * math.ulp(t) else "rounding of t"
        what = f"{alg} needs a smaller step than {floor} {where}"
        if size > 1e8:
            why = _BLOWS_UP
        else:
            why = (
                "f may jump or be singular there, or the tolerance is below rounding; list jumps "
                "in tstops, loosen rtol and atol, or use float64"
            )
    elif code is ReturnCode.NEWTON_FAILED:
        if trouble is Trouble.SINGULAR:
            what = f"the matrix I - h gamma J of {alg} is singular {where}"
            why = "f, or its Jacobian, is too large there for the precision; try float64"
        else:
            what = f"Newton's iteration of {alg} did not converge {where}"
            instead = "adaptive steps or a smaller dt" if noisy else "a Rosenbrock method"
            why = f"f may jump there, or have a kink; list jumps in tstops, or try {instead}"
    elif trouble is Trouble.JACOBIAN:
        what = f"the Jacobian that {alg} needs holds NaN or Inf {where}"
        why = (
            "a derivative of f does not exist there (that of a root or a norm at zero, say), "
            "though f does"
        )
    else:
        what = f"{alg} met NaN or Inf {where}"
        which = "f, g" if noisy else "f"
        why = (
            f"{which}, or the state, left the range where it is defined (a root or log of a "
            f"negative number, a division by zero, an overflow); check {which} there, or pass a "
            "smaller dt or dtmax"
        )
    if code is not ReturnCode.MAX_ITERS and not size < 1e50:
        why = _BLOWS_UP  # whatever it was that overflowed first
    if own_jacobian and code is not ReturnCode.UNSTABLE:
        why = f"jac is not the Jacobian of f: compare it with check_jacobian(prob). Or else: {why}"
    return f"{what}. {facts}. Likely: {why}."
