"""Simplified Newton iterations for the stages of a step, with a matrix that is used again.

What they decide is the reference for the native engine. The convergence test is that of Hairer,
Wanner, Solving ODEs II (1996), section IV.8; when a Jacobian and a factorisation are made anew
follows Hairer's code RADAU5 and OrdinaryDiffEq.jl.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Trouble
from diffsolve.solvers.jacobian import linearise
from diffsolve.solvers.norms import Tolerance

#: What an iteration may leave of an error, in units of the tolerance.
KAPPA = 0.01
MOST_ITERATIONS = 10
#: A rate of convergence above this asks for a new Jacobian at the next step.
SLOW = 0.2
#: Change of the step size up to which the factors are kept.
REUSE = 0.2
#: An increment so small, at the first iteration, that the equation was solved already.
EXACT = 1e-5
_SMALLEST_ETA = 2.2e-16


def kappa(rtol: float, eps: float) -> float:
    """What an iteration may leave of an error, in units of the tolerance.

    More where the tolerance is near rounding, below which increments do not get smaller.
    """
    return min(1.0, max(KAPPA, 4 * eps / rtol)) if rtol > 0 else KAPPA


class Newton:
    """Newton's iteration for the stages of one solve.

    Parameters
    ----------
    field
        Right-hand side; ``field.accuracy`` is what increments are measured by.
    gamma
        Diagonal coefficient of the method.
    """

    def __init__(self, field: VectorField, gamma: float):
        self._field = weakref.ref(field)  # which keeps this
        self.gamma = gamma
        self.jacobian: Any = None
        self.lu: Any = None
        self.stale = False
        self.eta = 1.0  # of the last stage that converged: theta / (1 - theta)
        self.slowest = 0.0  # rate of convergence in this step
        self.trouble = Trouble.DIVERGED
        self._at: tuple[float, Tensor] | None = None  # where the Jacobian was evaluated
        self._factored_h = math.nan
        rtol = float(self.tolerance.rtol.min())
        eps = torch.finfo(field.structure.time_dtype).eps
        self.kappa = kappa(rtol, eps)

    @property
    def field(self) -> VectorField:
        field = self._field()
        assert field is not None
        return field

    @property
    def tolerance(self) -> Tolerance:
        """What increments are measured by."""
        field = self.field
        return _rounding(field) if field.accuracy is None else field.accuracy

    def is_here(self, t: float, u: Tensor) -> bool:
        """Whether the Jacobian is that of this time and state."""
        return self._at is not None and self._at[0] == t and self._at[1] is u

    def begin(self, t: float, h: float, u: Tensor, smoothed: bool) -> bool:
        """Prepare the matrix of a step; False: there is none, and ``trouble`` says why.

        Parameters
        ----------
        t, h, u
            The step.
        smoothed
            Whether its error estimate needs the matrix of just this step.
        """
        self.slowest = 0.0
        self._scale = self.tolerance.scale(u.abs())
        if self.jacobian is None or ((self.stale or smoothed) and not self.is_here(t, u)):
            return self.renew(t, h, u)
        if self.lu is not None:
            change = abs(h / self._factored_h - 1)
            if change == 0 or (change <= REUSE and not smoothed):
                return True
        return self._factor(h)

    def renew(self, t: float, h: float, u: Tensor) -> bool:
        """Evaluate and factor at this step; False: the matrix cannot be used."""
        self.slowest = 0.0
        found = linearise(self.field, t, h, u)
        self.lu, self.stale = None, False
        if not found.finite:
            self.jacobian, self._at = None, None
            self.trouble = Trouble.JACOBIAN
            return False
        self.jacobian, self._at = found, (t, u)
        return self._factor(h)

    def _factor(self, h: float) -> bool:
        self.lu = self.jacobian.factor(h, self.gamma)
        self._factored_h = h
        if self.lu is None:
            self.trouble = Trouble.SINGULAR
        return self.lu is not None

    def end(self) -> None:
        """Called when every stage of a step converged."""
        if self.slowest > SLOW:
            self.stale = True

    def solve(
        self, time: Tensor, base: Tensor, h: float, k: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Solve ``k = f(time, base + h gamma k)``.

        Parameters
        ----------
        time, base, h
            Of the stage.
        k
            First guess.

        Returns
        -------
        tuple or None
            The stage and the state where ``f`` is evaluated; None: ``trouble`` says why.
        """
        step = h * self.gamma
        # factors of another step size converge no faster than that differs
        eta = max(max(self.eta, _SMALLEST_ETA) ** 0.8, abs(h / self._factored_h - 1))
        before = theta = 0.0
        self.eta = 1.0  # unless the iteration converges
        for m in range(1, MOST_ITERATIONS + 1):
            self.field.nnewton += 1
            value = self.field(time, torch.add(base, k, alpha=step))
            change = self.lu.solve((value - k) / self.gamma)
            k = k + change
            size = abs(step) * self._norm(change)
            if not size < math.inf:  # NaN too
                self.trouble = Trouble.NOT_FINITE
                return None
            if m > 1:
                theta = max(0.3 * theta, size / before if before > 0 else 0.0)
                self.slowest = max(self.slowest, theta)
                if theta >= 1:
                    break
                eta = theta / (1 - theta)
                if theta ** (MOST_ITERATIONS - m) / (1 - theta) * size > self.kappa:
                    break
            if eta * size < self.kappa or (m == 1 and size <= EXACT):
                self.eta = eta
                return k, torch.add(base, k, alpha=step)
            before = size
        self.trouble = Trouble.DIVERGED
        return None

    def _norm(self, x: Tensor) -> float:
        scaled = x / self._scale
        if self.tolerance.norm is not None:
            return float(self.tolerance.norm(scaled))
        return float(torch.linalg.vector_norm(scaled)) / math.sqrt(max(x.numel(), 1))


def _rounding(field: VectorField) -> Tolerance:
    """For steps that are taken outside of a solve."""
    dtype, device = field.structure.time_dtype, field.device
    rtol = torch.tensor(1e5 * torch.finfo(dtype).eps, dtype=dtype, device=device)
    return Tolerance(rtol, 1e-6 * rtol)
