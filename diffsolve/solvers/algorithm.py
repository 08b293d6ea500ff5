"""The contract between a method and everything that runs or differentiates it.

A step is a pure function of ``(field, t, h, state)``. What depends only on those can be run again
under autograd, so the discrete adjoint is written once for every method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.controllers import Controller, PIController
from diffsolve.solvers.kernels.family import Family


class StepInterpolant(Protocol):
    """Continuous extension of one step."""

    def __call__(self, theta: Tensor, derivative: int = 0) -> Tensor:
        """State, or its time derivative, at ``t + theta h``: ``theta`` ``(m,)`` to ``(m, N)``."""
        ...

    def keep(self) -> StepInterpolant:
        """A version that stays valid after the next step."""
        ...

    def parts(self) -> tuple[tuple[Tensor, ...], Callable[..., StepInterpolant]]:
        """Its tensors, and what makes a kept one of them again."""
        ...


def read(
    interpolant: StepInterpolant, times: Sequence[float], theta: Tensor, derivative: int = 0
) -> Tensor:
    """Values ``(m, N)`` at ``times``, the fractions ``theta`` of a step.

    An interpolant that has a method ``at`` is asked by the times too: a Brownian path is looked at
    there, and ``t + theta h`` may be a time beside them.
    """
    at: Any = getattr(interpolant, "at", None)
    return interpolant(theta, derivative) if at is None else at(times, theta, derivative)


class Trouble(Enum):
    """Why the equations of a step have no solution that could be found."""

    DIVERGED = "Newton's iteration did not converge"
    SINGULAR = "the matrix of the step is singular"
    NOT_FINITE = "a stage is NaN or Inf"
    JACOBIAN = "the Jacobian holds NaN or Inf"


@dataclass(slots=True)
class Step:
    """Result of one attempted step.

    Attributes
    ----------
    state
        The new state of the method, a tuple of tensors whose first entry is ``u``.
    error
        Local error estimate ``(N,)`` in units of the state, or None.
    stiffness
        Estimate of the dominant eigenvalue's magnitude: a 0-d tensor, what computes it when asked,
        or the pair (difference of two derivatives, difference of their states) whose ratio of norms
        it is. None where the method has none.
    interpolant
        Continuous extension, valid until the next step unless kept.
    error_low
        Second estimate that damps the first: with scaled norms ``e`` and ``e_low`` the step's
        error is ``e**2 / sqrt(e**2 + 0.01 e_low**2)`` (Hairer's 8(5,3) method).
    converged
        False: the equations of the step could not be solved. The rest then has no meaning, and the
        step is tried again with half the size.
    solved
        Solutions of those equations that an iteration found, for ``step(..., solved=...)``.
    trouble
        What went wrong.
    stiffness_later
        Computes the stiffness of a step with an open end, which most solves never ask for.
    """

    state: tuple[Tensor, ...]
    error: Tensor | None
    stiffness: Tensor | tuple[Tensor, Tensor] | Callable[[], Tensor] | None
    interpolant: StepInterpolant
    error_low: Tensor | None = None
    converged: bool = True
    solved: tuple[Tensor, ...] = ()
    trouble: Trouble | None = None
    stiffness_later: Callable[[], float] | None = None


def summands(state: tuple[Tensor, ...], h: Any) -> tuple[Tensor, Tensor]:
    """Largest entries of what a step adds up: of ``u``, and of ``h`` times the derivatives.

    A method that keeps no derivatives takes steps by which ``u`` changes about as much as it is.
    """
    u, *derivatives = (x.detach().abs().amax() for x in state)
    return u, abs(h) * torch.stack(derivatives).amax() if derivatives else u


@cache
def pi_controller(order: int, steady: float = 1.0) -> PIController:
    """The controller of methods of this order, made once."""
    return PIController.for_order(order, steady=steady)


class Algorithm(ABC):
    """A method of integration and what it declares about itself.

    Attributes
    ----------
    order
        Order of convergence.
    adaptive
        Whether it has an error estimate.
    has_jacobian_inside
        Whether a step multiplies with the Jacobian of ``f`` itself, so that its derivative needs
        second derivatives of ``f``.
    supports_mass_matrix
        Whether it can solve ``M du/dt = f``.
    is_one_step
        Whether the state of the method follows from ``(t, u)``, as ``init`` makes it.
    stable_sizes
        Of an explicit method the table of sizes of ``h lambda`` up to which its steps keep a mode
        from growing (``explicit_rk/stability.py``), and its evaluations in a step; None: nothing
        limits them.
    carries_derivative
        Whether ``init`` wants the derivative at ``t``, so that callers may make it for several.
    family
        The family whose compiled steps are those of this class; None: there are none.
    is_implicit
        Whether a step solves equations: it then needs a Jacobian and a real state. Where an
        iteration solves them, what it found is in ``Step.solved``; ``step`` then takes it as the
        keyword ``solved`` and, under autograd, differentiates the equations there (the implicit
        function theorem) instead of solving them.
    """

    order: float
    adaptive: bool
    stable_sizes: tuple[Any, int] | None = None
    has_jacobian_inside: ClassVar[bool] = False
    supports_mass_matrix: ClassVar[bool] = False
    is_one_step: ClassVar[bool] = False
    family: ClassVar[Family | None] = None
    carries_derivative: ClassVar[bool] = True
    is_implicit: ClassVar[bool] = False

    @property
    def may_end_open(self) -> bool:
        """Whether ``step(..., open_end=True)`` leaves out the derivative at the new point.

        Nothing may read it: no error estimate, no value inside, no step that follows.
        """
        return False

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def key(self) -> Any:
        """Equal, and hashable, for methods that are the same."""
        return self

    @abstractmethod
    def init(
        self, field: VectorField, t: Any, u: Tensor, du: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """State of the method at ``(t, u)``; ``du`` is ``f(t, u)`` where the caller has it."""

    @abstractmethod
    def step(self, field: VectorField, t: Any, h: Any, state: tuple[Tensor, ...]) -> Step:
        """Attempt a step; ``t`` and ``h`` are floats, or 0-d tensors to differentiate by them."""

    def interpolation_error(self, field: VectorField, h: Any, step: Step) -> Tensor | None:
        """Estimate ``(N,)`` of the error between the ends of a step; None: ``error`` sees it."""
        return None

    def default_controller(self) -> Controller:
        """Step-size controller that the literature gives this method."""
        return pi_controller(self.order)

    def __repr__(self) -> str:
        return f"{self.name}()"
