"""What stochastic methods share: declarations, the registry of them, their interpolant, the choice.

A method declares which noise and which integral it is for. A combination that does not fit is
refused before any work, with the methods that do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.structure import Number
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.controllers import Controller, PIController

ANY_NOISE = frozenset({"diagonal", "scalar", "additive", "general"})
#: Most that a step may grow after an accepted one (StochasticDiffEq.jl, whose limits these are).
_GROWTH = 9 / 8

_registry: list[StochasticMethod] = []
M = TypeVar("M", bound="StochasticMethod")


class StochasticMethod(Algorithm):
    """Base of the methods for SDEs, whose state is ``(u,)``.

    A step asks its field for the increment of the Brownian path over ``(t, h)``
    (``SDEField.increment``), so it is still a pure function of ``(field, t, h, state)``. Its ``t``
    and ``h`` are floats, or 0-d tensors where many steps run at once under ``torch.vmap``:
    ``add_scaled``, ``scaled`` and ``sqrt_abs`` take both.

    Attributes
    ----------
    noise_types
        Noise that it can take: of ``"diagonal"``, ``"scalar"``, ``"additive"``, ``"general"``. A
        method that names ``"additive"`` or ``"scalar"`` takes both shapes of ``g`` that are allowed
        there.
    interpretation
        Integrals that it solves: of ``"ito"`` and ``"stratonovich"``, which are the same where the
        noise is additive.
    strong_order, weak_order
        Orders of convergence of paths and of expectations.
    needs_levy_area
        Whether a step needs ``H``, the path's space-time Levy area.
    estimate_order
        Strong order of the solution whose error a step estimates: the estimate is proportional to
        ``h**(estimate_order + 1/2)``. Default: that of the method.
    estimates_stiffness
        Whether a step gives a stiffness estimate.
    order
        The order of the estimate, by which step sizes are chosen.
    """

    noise_types: ClassVar[frozenset[str]]
    interpretation: frozenset[str]
    strong_order: ClassVar[float]
    weak_order: ClassVar[float]
    needs_levy_area: ClassVar[bool] = False
    estimate_order: ClassVar[float | None] = None
    estimates_stiffness: ClassVar[bool] = True
    is_one_step = True
    carries_derivative = False

    @property
    def order(self) -> float:  # type: ignore[override]
        return self.strong_order if self.estimate_order is None else self.estimate_order

    def init(
        self, field: VectorField, t: Number, u: Tensor, du: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return (u,)

    def default_controller(self) -> Controller:
        return _controller(self.order + 0.5)


def scaled(x: Tensor, a: Any) -> Tensor:
    """``a x`` in the dtype of ``x``, for a number or a 0-d tensor ``a``."""
    return x * (a.to(x.dtype) if isinstance(a, Tensor) else a)


def add_scaled(u: Tensor, f: Tensor, h: Number) -> Tensor:
    """``u + h f``, for a number or a 0-d tensor ``h``."""
    return u + scaled(f, h) if isinstance(h, Tensor) else torch.add(u, f, alpha=h)


def sqrt_abs(h: Number, dtype: torch.dtype = torch.float64) -> Any:
    """``sqrt(|h|)``, for a number or a 0-d tensor ``h``, then in this dtype."""
    return h.abs().sqrt().to(dtype) if isinstance(h, Tensor) else math.sqrt(abs(h))


def magnitude_of(h: Number, dtype: torch.dtype) -> Any:
    """``|h|``, for a number or a 0-d tensor ``h``, then in this dtype."""
    return h.abs().to(dtype) if isinstance(h, Tensor) else abs(h)


class StartOfStep(NamedTuple):
    """A step, with the noise as it is at its start.

    Attributes
    ----------
    field, t, h, u
        The step.
    now, then
        ``t`` and ``t + h`` as ``f`` and ``g`` see them.
    G, W
        Diffusion at ``(t, u)``, and the increment.
    """

    field: SDEField
    t: Number
    h: Number
    now: Tensor
    then: Tensor
    u: Tensor
    G: Tensor
    W: Tensor


def time_change_of_noise(start: StartOfStep) -> Tensor:
    """What noise that changes with time adds to a step which knows ``G = g(t, u)``: ``(N,)``.

    Where ``g`` changes evenly that is ``(g(t + h, u) - G) I_(0,1) / h``. The increment leaves the
    integral the mean ``h W / 2`` and the variance ``h^3 / 12`` (Kloeden, Platen (1992), section
    5.7): its root mean square stands for it, with the sign of ``W``. So it is zero only where ``g``
    is the same at both ends.
    """
    field, W = start.field, start.W
    size = torch.sqrt(0.25 * W * W + magnitude_of(start.h, W.dtype) / 12)
    return field.product(field.diffusion(start.then, start.u) - start.G, torch.copysign(size, W))


@cache
def _controller(exponent: float) -> PIController:
    return PIController.for_order(exponent, factor_max=_GROWTH)


def register(method: M) -> M:
    """Add a method to those that refusals name."""
    _registry.append(method)
    return method


def registered() -> list[StochasticMethod]:
    """One of each method there is, in the order in which they are recommended."""
    return sorted(_registry, key=lambda method: -method.strong_order)


def fits(method: StochasticMethod, noise: str, interpretation: str) -> bool:
    """Whether a method is for this noise and this integral."""
    same = noise == "additive" or interpretation in method.interpretation
    return noise in method.noise_types and same


def fitting(noise: str, interpretation: str) -> list[StochasticMethod]:
    """The methods for this noise and this integral."""
    return [method for method in registered() if fits(method, noise, interpretation)]


def check_method(method: Any, noise: str, interpretation: str) -> StochasticMethod:
    """``method``, if it is for this noise and this integral.

    Raises
    ------
    TypeError
        If it is no method.
    ValueError
        If it is one for ODEs, or for another noise or integral; the message names those that fit.
    """
    names = ", ".join(map(repr, fitting(noise, interpretation)))
    if not isinstance(method, Algorithm):
        hint = f"; write {method.__name__}()" if isinstance(method, type) else ""
        raise TypeError(f"alg must be a method for SDEs such as {names}; got {method!r}{hint}")
    article = "an" if interpretation == "ito" else "a"
    problem = f"{article} {interpretation.capitalize()} equation with {noise} noise"
    if not isinstance(method, StochasticMethod):
        raise ValueError(f"{method!r} is a method for ODEs. For {problem}: {names}")
    if fits(method, noise, interpretation):
        return method
    of = " or ".join(sorted(x.capitalize() for x in method.interpretation))
    kinds = ", ".join(sorted(method.noise_types))
    raise ValueError(
        f"{method!r} is for {of} equations with {kinds} noise, this is {problem}: use {names}"
    )


class PathInterpolant:
    """Continuous extension of a step that follows the Brownian path.

    ``u(t + theta h) = u + theta (u_new - u) + G (W(t + theta h) - W(t) - theta (W(t + h) - W(t)))``
    with ``G = g(t, u)``: a straight line where there is no noise, and the Brownian bridge where
    there is no drift. It has the strong order 1/2 of the Euler-Maruyama scheme between steps.

    References
    ----------
    Kloeden, Platen, Numerical Solution of Stochastic Differential Equations (1992), section 10.6.
    """

    __slots__ = ("G", "field", "h", "t", "u", "u_new")

    def __init__(self, field: SDEField, t: Number, h: Number, u: Tensor, u_new: Tensor, G: Tensor):
        self.field, self.t, self.h, self.u, self.u_new, self.G = field, t, h, u, u_new, G

    def __call__(self, theta: Tensor, derivative: int = 0) -> Tensor:
        given = self.field.given is not None  # a batch of steps brings the noise at these fractions
        times = () if given else (self.t + theta * self.h).tolist()
        return self.at(times, theta, derivative)

    def at(self, times: Sequence[float], theta: Tensor, derivative: int = 0) -> Tensor:
        """Values at ``times``, the fractions ``theta`` of the step: ``(k, N)``."""
        if derivative:
            raise ValueError(
                "the solution of an SDE has no derivative by time: a Brownian path has none. For "
                "the drift, evaluate f at the state"
            )
        field = self.field
        theta = theta.to(device=self.u.device, dtype=self.u.dtype)
        line = torch.lerp(self.u, self.u_new, theta[:, None])
        return line + field.product(self.G, field.bridges(self.t, self.h, times))

    def keep(self) -> PathInterpolant:
        return self

    def flatten(self) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[..., PathInterpolant]]:
        field, t, h = self.field, self.t, self.h

        def rebuild(u: Tensor, u_new: Tensor, G: Tensor) -> PathInterpolant:
            return PathInterpolant(field, t, h, u, u_new, G)

        return (self.u, self.u_new, self.G), rebuild
