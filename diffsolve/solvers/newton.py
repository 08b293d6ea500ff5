"""Simplified Newton iterations for the stages of a step, with a matrix that is used again.

What they decide is the reference for the native engine. The convergence test is that of Hairer,
Wanner, Solving ODEs II (1996), section IV.8, but for the first increment, which counts as the error
that it leaves: the rate of another stage says little of this one. When a Jacobian and a
factorisation are made anew follows Hairer's code RADAU5 and OrdinaryDiffEq.jl.

Without a tolerance an iteration goes on to rounding, until increments are that small or fall no
more (Hairer, McLachlan, Razakarivony, Achieving Brouwer's law with implicit Runge-Kutta methods,
BIT 48 (2008) 231). A step that cannot be tried again with half the size insists: where the matrix
is too far from a stage, each iteration takes the one at its own state.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Trouble
from diffsolve.solvers.jacobian import linearise
from diffsolve.solvers.linear import Factors, Linearisation
from diffsolve.solvers.norms import Tolerance

#: What an iteration may leave of an error, in units of the tolerance.
KAPPA = 0.01
MOST_ITERATIONS = 10
#: A rate of convergence above this asks for a new Jacobian at the next step.
SLOW = 0.2
#: Change of the step size up to which the factors are kept.
REUSE = 0.2
#: Iterations with a matrix at each state, which may approach the solution slowly at first.
_MOST_INSISTENT = 20
#: Units of rounding of each component below which increments are rounding ...
_UNITS = 4.0
#: ... and of the largest component, where increments fall no more.
_MOST_UNITS = 1e3


def kappa(rtol: float, eps: float) -> float:
    """What an iteration may leave of an error, in units of the tolerance.

    More where the tolerance is near rounding, below which increments do not get smaller.
    """
    return min(1.0, max(KAPPA, 4 * eps / rtol)) if rtol > 0 else KAPPA


def newton_of(field: VectorField, gamma: float, method: object) -> Newton:
    """The iteration of this solve and this method, with the matrix of the step before."""
    newton = field.workspace.get(Newton)
    if newton is None or newton.method is not method:
        newton = field.workspace.put(Newton(field, gamma, method))
    return newton


class Newton:
    """Newton's iteration for the stages of one solve.

    Parameters
    ----------
    field
        Right-hand side; ``field.accuracy`` is what increments are measured by.
    gamma
        Diagonal coefficient of the method.
    method
        What the matrix is for: another method makes its own.
    """

    def __init__(self, field: VectorField, gamma: float, method: object = None):
        self._field = weakref.ref(field)  # whose workspace holds this
        self.gamma, self.method = gamma, method
        self.jacobian: Linearisation | None = None
        self.lu: Factors | None = None
        self.stale = False
        self.slowest = 0.0  # rate of convergence in this step
        self.trouble = Trouble.DIVERGED
        self._at: tuple[float, Tensor] | None = None  # where the Jacobian was evaluated
        self._factored_h = math.nan
        self._eps = torch.finfo(field.structure.time_dtype).eps
        tolerance: Tolerance | None = field.accuracy
        self.to_rounding = tolerance is None
        self.kappa = 1.0
        if tolerance is not None:
            self.kappa = kappa(float(tolerance.rtol.min()), self._eps)

    @property
    def field(self) -> VectorField:
        field = self._field()
        assert field is not None
        return field

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
        self._magnitude = u.abs()
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
        jacobian = linearise(self.field, t, h, u)
        self.lu, self.stale = None, False
        if not jacobian.finite:
            self.jacobian, self._at = None, None
            self.trouble = Trouble.JACOBIAN
            return False
        self.jacobian, self._at = jacobian, (t, u)
        return self._factor(h)

    def _factor(self, h: float) -> bool:
        assert self.jacobian is not None
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
        self,
        f: Callable[[Tensor], Tensor],
        base: Tensor,
        h: float,
        k: Tensor,
        at: float | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Solve ``k = f(base + h gamma k)``.

        Parameters
        ----------
        f, base, h
            The right-hand side at the time of the stage, and the stage's equation.
        k
            First guess.
        at
            That time, where the iteration may insist: it starts again, with a matrix at
            each of its states, if the one at hand does not lead to the solution.

        Returns
        -------
        tuple or None
            The stage and the state where ``f`` is evaluated; None: ``trouble`` says why.
        """
        solution = self._iterate(f, base, h, k)
        if solution is None and at is not None:
            solution = self._insist(f, base, h, k, at)
        return solution

    def _iterate(
        self, f: Callable[[Tensor], Tensor], base: Tensor, h: float, k: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """With the matrix at hand."""
        step, g = h * self.gamma, torch.add(base, k, alpha=h * self.gamma)
        before, theta, eta, change = 0.0, 0.0, 1.0, k
        slowest = self.slowest
        for m in range(1, MOST_ITERATIONS + 1):
            change, k, g = self._corrected(f, base, step, k, g)
            size = self._size(change, step, k, g)
            if not size < math.inf:  # NaN too
                self.trouble = Trouble.NOT_FINITE
                return None
            if m > 1:
                theta = max(0.3 * theta, size / before if before > 0 else 0.0)
                slowest, self.slowest = self.slowest, max(self.slowest, theta)
                if theta >= 1:
                    break
                eta = theta / (1 - theta)
                if theta ** (MOST_ITERATIONS - m) / (1 - theta) * size > self.kappa:
                    break
            if eta * size < self.kappa and (m > 1 or self._is_small(change, step)):
                return k, g
            before = size
        if self._is_rounding(change, step, k, g, _MOST_UNITS * self._eps):
            self.slowest = slowest  # the last rate is one of rounding
            return k, g
        self.trouble = Trouble.DIVERGED
        return None

    def _insist(
        self, f: Callable[[Tensor], Tensor], base: Tensor, h: float, k: Tensor, at: float
    ) -> tuple[Tensor, Tensor] | None:
        """With a matrix at each state; the next step then makes its own."""
        step, g = h * self.gamma, torch.add(base, k, alpha=h * self.gamma)
        self._at, self.stale, before = None, True, math.inf
        for _ in range(_MOST_INSISTENT):
            # looking back, since the stage belongs to the step before it
            jacobian = linearise(self.field, at, -h, g)
            if not jacobian.finite:
                break
            self.jacobian = jacobian
            if not self._factor(h):
                break
            change, k, g = self._corrected(f, base, step, k, g)
            size = self._size(change, step, k, g)
            if not size < math.inf:
                self.trouble = Trouble.NOT_FINITE
                return None
            theta = size / before if before > 0 else 0.0
            left = size * theta / (1 - theta) if theta < 1 else math.inf
            if (size if before == math.inf else left) < self.kappa:
                return k, g
            # such an iteration falls fast until there is nothing but rounding left
            if theta > 0.5 and self._is_rounding(change, step, k, g, math.sqrt(self._eps)):
                return k, g
            before = size
        self.trouble = Trouble.DIVERGED
        return None

    def _corrected(
        self, f: Callable[[Tensor], Tensor], base: Tensor, step: float, k: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """An increment, and the stage and the state after it."""
        assert self.lu is not None
        self.field.nnewton += 1
        change = self.lu.solve((f(g) - k) / self.gamma)
        k = k + change
        return change, k, torch.add(base, k, alpha=step)

    def _size(self, change: Tensor, step: float, k: Tensor, g: Tensor) -> float:
        """Of an increment: in tolerances, or in units of rounding where there is none."""
        tolerance: Tolerance | None = self.field.accuracy
        if tolerance is None:
            unit = _UNITS * self._eps * torch.maximum(g.abs(), k.abs() * abs(step))
            return float((change.abs() * abs(step) / (unit + _tiny(unit))).amax())
        return abs(step) * float(
            tolerance.scaled_norm(change, torch.maximum(self._magnitude, g.abs()))
        )

    def _is_small(self, change: Tensor, step: float) -> bool:
        """Whether the first increment is, beside the state at the start.

        A bad guess may lie where tolerances are large; the next increment would show that.
        """
        tolerance: Tolerance | None = self.field.accuracy
        if tolerance is None:
            return True
        return abs(step) * float(tolerance.scaled_norm(change, self._magnitude)) < self.kappa

    def _is_rounding(self, change: Tensor, step: float, k: Tensor, g: Tensor, units: float) -> bool:
        """Whether an increment is small beside the largest component, where that is enough."""
        if self.field.retries:
            return False
        largest = torch.maximum(g.abs().amax(), k.abs().amax() * abs(step))
        return bool(change.abs().amax() * abs(step) <= units * largest)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
