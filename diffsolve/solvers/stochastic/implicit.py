"""Methods that are implicit in the drift, for stiff drift: Euler-Maruyama's and Milstein's.

Off the tape the equation of a step is solved by Newton's iteration; on it the solution is known,
and the implicit function theorem differentiates it.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.structure import Number, as_float
from diffsolve.solvers.algorithm import Step, Trouble
from diffsolve.solvers.implicit_differentiation import linear_on_tape, stage_on_tape
from diffsolve.solvers.implicit_estimates import radius_off_tape
from diffsolve.solvers.jacobian import Push, linearise, push_forward
from diffsolve.solvers.newton import Newton, newton_of
from diffsolve.solvers.spectral_radius import spectral_radius
from diffsolve.solvers.stage_rows import as_scale
from diffsolve.solvers.stochastic.low_order import neglected_noise
from diffsolve.solvers.stochastic.method import (
    ANY_NOISE,
    PathInterpolant,
    StartOfStep,
    StochasticMethod,
    register,
    time_change_of_noise,
)
from diffsolve.solvers.stochastic.milstein import (
    InterpretationMethod,
    ito_correction,
    stratonovich_correction,
)

#: Matrices that are tried for a step, beyond that of its start.
_MATRICES = 4


class DriftImplicit(StochasticMethod):
    """Base of both: ``u_new = u + h f(t + h, u_new) + G W + C``, ``G = g(t, u)``.

    The noise and its correction ``C`` are explicit. The error estimate adds the magnitudes of
    ``h/2 (f(t + h, u_new) - f(t, u))``, the difference of the drift from the trapezoidal rule, and
    of what the noise of Euler-Maruyama's step leaves out. Both are multiplied by ``(I - h J)^{-1}``
    with the Jacobian ``J`` of the drift at ``(t, u)``, as the step does with all that is added to
    it: noise that stiff components damp within a step does not make it short.
    """

    estimate_order = 0.5
    adaptive = True
    is_implicit = True
    is_one_step = False  # no batches of steps: each solves equations

    def step(
        self, field: Any, t: Any, h: Any, state: tuple[Tensor, ...], solved: tuple[Tensor, ...] = ()
    ) -> Step:
        (u,) = state
        if torch.is_grad_enabled():
            if not solved:
                with torch.no_grad():
                    plain = u.detach()
                    step = self._solved_step(field, as_float(t), as_float(h), plain)
                if not step.converged:
                    return step
                solved = step.solved
            return self._recorded_step(field, t, h, u, solved[0])
        return self._solved_step(field, t, h, u)

    def _solved_step(self, field: SDEField, t: float, h: float, u: Tensor) -> Step:
        newton = newton_of(field, 1.0, DriftImplicit)
        now, then = field.both_ends(t, h)
        f, G = field(now, u), field.diffusion(now, u)
        W = field.increment(t, h).W
        base, parts = self.noise(StartOfStep(field, t, h, now, then, u, G, W))
        if not newton.begin(t, h, u, True):
            return _failed(field, t, h, u, G, newton.trouble)
        jacobian, lu = newton.jacobian, newton.lu  # those of the estimates
        assert lu is not None
        solution = newton.solve(functools.partial(newton.field, then), base, h, f)
        if solution is None:
            solution = _solved_afresh(newton, t, h, then, base)
        if solution is None and not field.retries:
            solution = newton.solve(functools.partial(newton.field, then), base, h, f, at=t + h)
        if solution is None:
            return _failed(field, t, h, u, G, newton.trouble)
        k, new = solution
        newton.end()
        error = lu.solve((k - f) * (0.5 * h)).abs()
        for part in parts:
            error = error + (lu.solve(part) if self.is_signed(field) else part).abs()
        return Step(
            (new,),
            error,
            functools.partial(radius_off_tape, field, t, h, u, jacobian, jacobian),
            PathInterpolant(field, t, h, u, new, G),
            solved=(k,),
        )

    def _recorded_step(
        self, field: SDEField, t: Number, h: Number, u: Tensor, known: Tensor
    ) -> Step:
        now, then = field.both_ends(t, h)
        f, G = field(now, u), field.diffusion(now, u)
        W = field.increment(t, h).W
        base, parts = self.noise(StartOfStep(field, t, h, now, then, u, G, W))
        scale = as_scale(field, h)
        k, new = stage_on_tape(field, functools.partial(field, then), base, scale, 1.0, known)
        lu = linearise(field, t, h, u, exact=True).factor(as_float(h), 1.0)
        if lu is None:
            return _failed(field, t, h, u, G, Trouble.SINGULAR)
        push = push_forward(field, t, h, u, f)

        def damped(x: Tensor) -> Tensor:
            return linear_on_tape(field, lu, lu.solve(x.detach()), x, push, scale, 1.0, 0.0)

        error = damped((k - f) * (0.5 * scale)).abs()
        for part in parts:
            error = error + (damped(part) if self.is_signed(field) else part).abs()
        return Step(
            (new,),
            error,
            functools.partial(_radius, push, u),
            PathInterpolant(field, t, h, u, new, G),
            solved=(known,),
        )

    def is_signed(self, field: SDEField) -> bool:
        """Whether the neglected parts that ``noise`` returns have signs, and are no magnitudes."""
        return field.is_diagonal or field.m == 1 or field.noise == "additive"

    @abstractmethod
    def noise(self, start: StartOfStep) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``u + G W + C``, and the parts of what the noise of Euler-Maruyama's step leaves out."""


class ImplicitEM(DriftImplicit):
    """Euler-Maruyama with the implicit Euler method for the drift, for any noise of Ito equations.

    ``u_new = u + h f(t + h, u_new) + g(t, u) W``, stable for any step where the drift is stiff and
    stable; noise that is stiff needs short steps. Strong order 1/2 (1 where the noise is additive),
    weak order 1. Two evaluations of ``f`` and ``g`` a step, those of Newton's iteration not
    counted, and a Jacobian of ``f``.

    References
    ----------
    Kloeden, Platen, Numerical Solution of Stochastic Differential Equations (1992), section 12.2;
    Higham, SIAM J. Numer. Anal. 38 (2000) 753, on its stability.
    """

    noise_types = ANY_NOISE
    interpretation = frozenset({"ito"})
    strong_order = 0.5
    weak_order = 1.0

    def noise(self, start: StartOfStep) -> tuple[Tensor, tuple[Tensor, ...]]:
        return start.field.add_noise(start.u, start.G, start.W), (neglected_noise(start),)


class ImplicitRKMil(InterpretationMethod, DriftImplicit):
    """The Milstein method with the implicit Euler method for the drift, for diagonal noise.

    ``u_new = u + h f(t + h, u_new) + g(t, u) W + C`` with the correction ``C`` of ``RKMil``, for
    diagonal or scalar noise. Strong and weak order 1. Two evaluations of ``f`` a step, those of
    Newton's iteration not counted, three of ``g``, two for Stratonovich equations, and a Jacobian
    of ``f``.

    Parameters
    ----------
    interpretation
        ``"ito"`` (default) or ``"stratonovich"``.

    Raises
    ------
    ValueError
        If ``interpretation`` is neither.

    References
    ----------
    Kloeden, Platen, Numerical Solution of Stochastic Differential Equations (1992), section 12.2.
    The correction leaves the drift out of the point beside ``u`` where it evaluates ``g``: an
    explicit step of a stiff drift would lead far away.
    """

    noise_types = frozenset({"diagonal", "scalar"})
    strong_order = 1.0
    weak_order = 1.0

    def noise(self, start: StartOfStep) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.integral == "ito":
            correction = ito_correction(start, start.now, start.u)
            parts = correction, time_change_of_noise(start)
        else:
            correction = stratonovich_correction(start, start.u)
            parts = (correction,)
        return start.field.add_noise(start.u, start.G, start.W) + correction, parts


def _solved_afresh(
    newton: Newton, t: float, h: float, then: Tensor, base: Tensor
) -> tuple[Tensor, Tensor] | None:
    """A step's equation once more, with matrices of states that are nearer to its solution.

    Noise may lead far from the start of the step, where the matrix was made. Here the first matrix
    is made at the state after the noise, the next ones at states that the iteration then reaches.
    """
    trouble = newton.trouble
    k, x = torch.zeros_like(base), base
    for _ in range(_MATRICES):
        if not newton.renew(t, h, x):
            newton.trouble = trouble  # that of the step, not the one at x
            return None
        solution = newton.solve(functools.partial(newton.field, then), base, h, k)
        if solution is not None:
            return solution
        assert newton.lu is not None
        k = k + newton.lu.solve(newton.field(then, x) - k)
        x = torch.add(base, k, alpha=h)
    newton.trouble = trouble
    return None


def _failed(field: SDEField, t: Number, h: Number, u: Tensor, G: Tensor, trouble: Trouble) -> Step:
    dense = PathInterpolant(field, t, h, u, u, G)
    return Step((u,), None, None, dense, converged=False, trouble=trouble)


def _radius(push: Push, u: Tensor) -> Tensor:
    """Spectral radius of the Jacobian at the start of a step, differentiable."""
    return spectral_radius(lambda v: push(v, 0.0), u)


register(ImplicitRKMil())
register(ImplicitRKMil("stratonovich"))
register(ImplicitEM())
