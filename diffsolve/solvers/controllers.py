"""Step-size controllers: from the error of a step to the next step's size.

A controller is an immutable description; what it remembers is a tuple that the loop carries. The
arithmetic works on floats and on 0-d tensors, so that the controller can be put on the tape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Memory = tuple[Any, ...]


@dataclass(frozen=True)
class Controller(ABC):
    """Base of the controllers.

    Parameters
    ----------
    safety
        Factor on every proposal; default 0.9.
    factor_min, factor_max
        Limits of the change of step size; default 0.2 and 10.
    steady
        An accepted step whose factor is between 1 and this keeps its size, so that an implicit
        method can keep its factored matrix; default 1.
    """

    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float = 10.0
    steady: float = 1.0

    def __post_init__(self) -> None:
        if not self.steady >= 1:
            raise ValueError(f"{type(self).__name__}: need steady >= 1, got {self.steady}")
        if not (0 < self.safety <= 1 and 0 < self.factor_min < 1 < self.factor_max):
            raise ValueError(
                f"{type(self).__name__}: need 0 < safety <= 1 and factor_min < 1 < factor_max, "
                f"got {self.safety}, {self.factor_min}, {self.factor_max}"
            )

    @abstractmethod
    def start(self) -> Memory:
        """What the controller remembers before the first step."""

    @abstractmethod
    def accepted(self, error: Any, memory: Memory) -> tuple[Any, Memory]:
        """Unlimited factor for the next step after an accepted one, and the new memory."""

    @abstractmethod
    def rejected(self, error: Any, memory: Memory) -> Any:
        """Unlimited factor for another try."""

    def propose(
        self, error: Any, memory: Memory, after_rejection: bool = False
    ) -> tuple[bool, Any, Memory]:
        """Judge a step.

        Parameters
        ----------
        error
            Scaled norm of the error estimate; accepted when <= 1.
        memory
            What the controller remembers.
        after_rejection
            Whether the try before was rejected: the step then does not grow.

        Returns
        -------
        accept, factor, memory
            ``factor`` multiplies the step size.
        """
        if not error < math.inf:  # NaN too
            return False, self.factor_min, memory
        if error > 1:
            factor = self.safety * self.rejected(error, memory)
            return False, max(self.factor_min, min(factor, 1.0)), memory
        if error == 0:  # a power of zero has no slope
            return True, 1.0 if after_rejection else self.factor_max, memory
        factor, memory = self.accepted(error, memory)
        limit = 1.0 if after_rejection else self.factor_max
        factor = max(self.factor_min, min(self.safety * factor, limit))
        return True, 1.0 if 1 <= factor <= self.steady else factor, memory


@dataclass(frozen=True)
class IController(Controller):
    """Integral controller: ``h *= safety * error**(-1/k)``.

    Parameters
    ----------
    exponent
        ``1/k``; ``k`` is the order of the error estimate plus one.

    References
    ----------
    Hairer, Norsett, Wanner (1993), eq. II.4.13.
    """

    exponent: float = 0.2

    @classmethod
    def for_order(cls, order: float, **options: Any) -> IController:
        """Controller for a method of this order whose estimate has one order less."""
        return cls(exponent=1 / order, **options)

    def start(self) -> Memory:
        return ()

    def accepted(self, error: Any, memory: Memory) -> tuple[Any, Memory]:
        return error**-self.exponent, memory

    def rejected(self, error: Any, memory: Memory) -> Any:
        return error**-self.exponent


@dataclass(frozen=True)
class PIController(Controller):
    """Proportional-integral controller: ``h *= safety * error**-beta1 * previous**beta2``.

    Parameters
    ----------
    beta1, beta2
        Exponents; ``for_order`` gives ``7/(10 k)`` and ``2/(5 k)``; Hairer's dopri5 has 0.17
        and 0.04. The first step is judged by integral control.

    References
    ----------
    Gustafsson, ACM TOMS 17 (1991) 533; Hairer, Wanner, Solving ODEs II (1996), section IV.2.
    """

    beta1: float = 0.14
    beta2: float = 0.08

    @classmethod
    def for_order(cls, order: float, **options: Any) -> PIController:
        """Controller for a method of this order, ``k``."""
        return cls(beta1=7 / (10 * order), beta2=2 / (5 * order), **options)

    def start(self) -> Memory:
        return ()

    def accepted(self, error: Any, memory: Memory) -> tuple[Any, Memory]:
        # before the first step there is nothing to compare with: integral control, whose exponent
        # 1/k is beta1 + 3/4 beta2 in both of the rules above
        if not memory:
            return error ** -(self.beta1 + 0.75 * self.beta2), (max(error, 1e-4),)
        (previous,) = memory
        return error**-self.beta1 * previous**self.beta2, (max(error, 1e-4),)

    def rejected(self, error: Any, memory: Memory) -> Any:
        return error**-self.beta1


@dataclass(frozen=True)
class PIDController(Controller):
    """Controller with the errors of three steps, limited smoothly.

    ``h *= 1 + atan(x - 1)`` with ``x = prod error_i**(-beta_i/k)``.

    Parameters
    ----------
    beta
        Exponents of this step's error, the one before and the one before that.
    k
        Order of the error estimate plus one.

    References
    ----------
    Soderlind, ACM TOMS 29 (2003) 1; coefficients H312PID by default; the limiter is from
    Soderlind and Wang, J. Comput. Appl. Math. 185 (2006) 225.
    """

    beta: tuple[float, float, float] = (1 / 18, 1 / 9, 1 / 18)
    k: float = 5

    @classmethod
    def for_order(cls, order: float, **options: Any) -> PIDController:
        """Controller for a method of this order whose estimate has one order less."""
        return cls(k=order, **options)

    def start(self) -> Memory:
        return (1.0, 1.0)

    def accepted(self, error: Any, memory: Memory) -> tuple[Any, Memory]:
        before, earlier = memory
        return self._limited(error, before, earlier), (max(error, 1e-4), before)

    def rejected(self, error: Any, memory: Memory) -> Any:
        before, earlier = memory
        # a rejected step must shrink, whatever the steps before it say
        return min(self._limited(error, before, earlier), error ** (-1 / self.k))

    def _limited(self, *errors: Any) -> Any:
        x = 1.0
        for error, beta in zip(errors, self.beta, strict=True):
            x = x * error ** (-beta / self.k)
        return 1 + _atan(x - 1)


def _atan(x: Any) -> Any:
    return x.atan() if isinstance(x, Tensor) else math.atan(x)
