"""Regularizers that ask for dynamics which are easy to solve.

The solver's own estimates enter the training loss: ``loss + coefficient * error_estimate(sol)``.

References
----------
Pal, Ma, Shah, Rackauckas, Opening the Blackbox: Accelerating Neural Differential Equations by
Regularizing Internal Solver Heuristics, ICML 2021 (global regularizers). Pal, Edelman, Rackauckas,
Locally Regularized Neural Differential Equations: Some Black Boxes Were Meant to Remain Closed!,
ICML 2023 (local ones).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffsolve.engines.plan import SolveContext
from diffsolve.problems.sde_field import SDEField
from diffsolve.solution import Solution
from diffsolve.solvers.initial_step import initial_step
from diffsolve.solvers.norms import Estimates, measure
from diffsolve.solvers.stochastic.setup import brownian_path

Reduction = Literal["sum", "mean", "max"]
Sampling = Literal["unbiased", "biased"]


def error_estimate(
    sol: Solution,
    reduction: Reduction = "sum",
    power: Literal[1, 2] = 1,
    weight_by_step: bool = True,
) -> Tensor:
    """Error estimates of the accepted steps, reduced to a regularizer.

    Parameters
    ----------
    sol
        A solution under ``DiscreteAdjoint``, whose estimates can be differentiated.
    reduction
        ``"sum"``: the paper's formula; ``"mean"`` or ``"max"``: those of its published code.
    power
        1 for ``E |h|``, 2 for ``E**2``, the paper's variant (then with ``weight_by_step=False``).
    weight_by_step
        Multiply each estimate by the step's size.

    Returns
    -------
    Tensor
        0-d. ``E`` is ``sol.steps.error``, scaled by the tolerances: it is of order one at any
        tolerance, and so is the coefficient that suits it.

    Raises
    ------
    ValueError
        If ``reduction`` or ``power`` is unknown.
    RuntimeError
        In backward, under a continuous adjoint.

    References
    ----------
    Pal et al. (2021), section 3.1.
    """
    return _reduce(sol, sol.steps.error, reduction, power, weight_by_step)


def stiffness_estimate(
    sol: Solution,
    reduction: Reduction = "sum",
    power: Literal[1, 2] = 1,
    weight_by_step: bool = False,
) -> Tensor:
    """Stiffness estimates of the accepted steps, reduced to a regularizer.

    Parameters
    ----------
    sol, reduction, power, weight_by_step
        As for ``error_estimate``. By default the estimates, in 1/time, are not multiplied by the
        step; the published code uses ``reduction="max"`` or ``"mean"``.

    Returns
    -------
    Tensor
        0-d.

    Raises
    ------
    ValueError, RuntimeError
        As ``error_estimate``.

    References
    ----------
    Pal et al. (2021), section 3.2; the estimate itself: Shampine, ACM TOMS 3 (1977) 44.
    """
    return _reduce(sol, sol.steps.stiffness, reduction, power, weight_by_step)


def _reduce(
    sol: Solution, estimates: Tensor, reduction: str, power: int, weight_by_step: bool
) -> Tensor:
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if not len(estimates):
        return estimates.sum()
    values = estimates**power
    if weight_by_step:
        values = values * sol.steps.h.abs().to(values)
    reductions = {"sum": torch.sum, "mean": torch.mean, "max": torch.max}
    if reduction not in reductions:
        raise ValueError(f"reduction must be one of {sorted(reductions)}, got {reduction!r}")
    return reductions[reduction](values)


def local_error_estimate(
    sol: Solution,
    sampling: Sampling = "unbiased",
    power: Literal[1, 2] = 1,
    weight_by_step: bool = True,
    *,
    at: tuple[float, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Error estimate of one extra step from a random time: a regularizer for every sensealg.

    As in the published code, the time, the state there and the step's size are constants, and
    the gradient flows through the one step into the parameters.

    Parameters
    ----------
    sol
        A solution with dense output (``dense=True``), unless ``at`` is given.
    sampling
        ``"unbiased"``: a time uniform in ``tspan``; ``"biased"``: the start of a random accepted
        step, so that dense places are sampled more.
    power, weight_by_step
        As for ``error_estimate``.
    at
        Take the step at this ``(t, u)`` instead, for instance a saved time and state, through
        which gradients flow too.
    generator
        Source of the random time, and of the noise of an SDE's step, which follows a path of its
        own; None: torch's default.

    Returns
    -------
    Tensor
        0-d.

    Raises
    ------
    ValueError
        If the solution has no dense output or no accepted step, ``sampling`` or ``power`` is
        unknown, ``at`` is the end of ``tspan``, or the method has no such estimate.

    References
    ----------
    Pal, Edelman, Rackauckas (2023), section 3.
    """
    if not sol._context.alg.adaptive:
        raise ValueError(f"{sol._context.alg.name} has no error estimate to take a gradient of")
    estimates, h = _local_step(sol, sampling, at, generator)
    return _weighted(estimates.error, h, power, weight_by_step)


def local_stiffness_estimate(
    sol: Solution,
    sampling: Sampling = "unbiased",
    power: Literal[1, 2] = 1,
    weight_by_step: bool = False,
    *,
    at: tuple[float, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Stiffness estimate of one extra step from a random time.

    Parameters
    ----------
    sol, sampling, power, weight_by_step, at, generator
        As for ``local_error_estimate``; by default the estimate is not multiplied by the step.

    Returns
    -------
    Tensor
        0-d, in 1/time.

    Raises
    ------
    ValueError
        As ``local_error_estimate``.
    """
    alg: Any = sol._context.alg
    if not getattr(alg, "estimates_stiffness", True):
        raise ValueError(f"{alg.name} has no stiffness estimate to take a gradient of")
    estimates, h = _local_step(sol, sampling, at, generator)
    return _weighted(estimates.stiffness, h, power, weight_by_step)


def _weighted(value: Any, h: float, power: int, weight_by_step: bool) -> Tensor:
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    return value**power * (abs(h) if weight_by_step else 1.0)


def _local_step(
    sol: Solution, sampling: str, at: tuple[float, Any] | None, generator: torch.Generator | None
) -> tuple[Estimates, float]:
    context: SolveContext = sol._context
    field, alg, settings = context.field, context.alg, context.settings
    if at is not None:
        t, u = float(at[0]), field.structure.ravel(at[1])
    else:
        t = _sampled_time(sol, sampling, generator)
        u = field.structure.ravel(sol(t)).detach()
    remaining = context.t1 - t
    if remaining == 0:
        raise ValueError(f"no step can be taken from t = {t:.8g}: it is the end of tspan")
    direction = math.copysign(1.0, remaining)
    if isinstance(field, SDEField):
        field = field.along(brownian_path(field, alg, generator, None, (t, context.t1)))
    with torch.no_grad():
        du = field(field.time(t), u)
        size = initial_step(
            field, t, u.detach(), du, direction, alg.order, settings.tolerance, abs(remaining)
        )
    h = direction * size
    state = alg.init(field, t, u)
    step = alg.step(field, t, h, state)
    return measure(step, u, settings.tolerance, on_tape=True), h


def _sampled_time(sol: Solution, sampling: str, generator: torch.Generator | None) -> float:
    if not len(sol.steps):
        raise ValueError("the solution has no accepted step to sample from")
    r = float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))
    starts = sol.steps.t.detach()
    if sampling == "biased":
        return float(starts[int(r * len(starts))])
    if sampling != "unbiased":
        raise ValueError(f'sampling must be "unbiased" or "biased", got {sampling!r}')
    last = len(starts) - 1
    t0, t1 = float(starts[0]), float(starts[last] + sol.steps.h[last].detach())
    return t0 + r * (t1 - t0)


@dataclass(frozen=True)
class ExponentialAnnealing:
    """Coefficient of a regularizer that decays from ``start`` to ``end`` over ``length`` epochs.

    Parameters
    ----------
    start, end
        Positive values at epoch 0 and at epoch ``length``; constant afterwards.
    length
        Number of epochs (or iterations).

    Examples
    --------
    >>> from diffsolve.regularization import ExponentialAnnealing
    >>> coefficient = ExponentialAnnealing(100.0, 10.0, 75)
    >>> coefficient(0), coefficient(75)
    (100.0, 10.0)

    References
    ----------
    Pal et al. (2021), section 4: 100 to 10 for MNIST, 1000 to 100 for the latent ODE.
    """

    start: float
    end: float
    length: int

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0 and self.length > 0):
            raise ValueError(f"start, end and length must be positive, got {self}")

    def __call__(self, epoch: float) -> float:
        fraction = min(max(epoch / self.length, 0.0), 1.0)
        return self.start ** (1 - fraction) * self.end**fraction
