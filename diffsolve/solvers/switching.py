"""An explicit and an implicit method by turns, as the stiffness of the problem asks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffsolve.problems.structure import Number
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm, Step
from diffsolve.solvers.controllers import Controller
from diffsolve.solvers.explicit_rk.methods import ExplicitRK, Tsit5, Vern7
from diffsolve.solvers.rosenbrock.methods import Rodas5P

#: So many accepted steps in a row at the limit of stability mean that a problem is stiff.
STIFF_STEPS = 10
#: So many in a row well inside of it mean that it is stiff no more.
NONSTIFF_STEPS = 3
#: Where that limit is, as a part of the explicit method's interval of stability.
LIMIT = 0.6
#: What the step size is multiplied with at a switch to the implicit method, and divided by back.
FACTOR = 2.0


class Switch:
    """Which of two methods is active, decided at accepted steps.

    Parameters
    ----------
    stability_size
        Length of the explicit method's real interval of stability.

    Attributes
    ----------
    stiff
        Whether the implicit method is active.
    count
        Steps in a row that speak for the other one.
    """

    def __init__(self, stability_size: float):
        self.stability_size = stability_size
        self.stiff = False
        self.count = 0

    def changes(self, stiffness: float, h: float) -> bool:
        """Take note of an accepted step; whether the other method goes on from it.

        Parameters
        ----------
        stiffness, h
            Its estimate of the largest eigenvalue's magnitude, and its size. NaN counts as stiff.
        """
        used = stiffness * abs(h) / self.stability_size
        if self.stiff:
            self.count = self.count + 1 if used < LIMIT else 0
        else:
            self.count = 0 if used <= LIMIT else self.count + 1
        if self.count < (NONSTIFF_STEPS if self.stiff else STIFF_STEPS):
            return False
        self.stiff, self.count = not self.stiff, 0
        return True


class AutoSwitch(Algorithm):
    """An explicit method where the problem is not stiff, an implicit one where it is.

    A solve begins with the explicit method. When ten accepted steps in a row come near the limit of
    its stability, ``stiffness * |h| > 0.6 stability_interval``, the implicit one goes on from there
    with twice the step; when three of its steps in a row are inside of that limit, the explicit one
    goes on with half of it. The explicit method's estimate of stiffness is taken here with norms in
    units of the tolerance, so that small fast components count. Both methods carry the same state
    from step to step, so a switch costs nothing, and each step is differentiated as the method that
    took it.

    Parameters
    ----------
    nonstiff
        Explicit Runge-Kutta method whose tableau has a ``stability_interval``.
    stiff
        Implicit method with an error estimate.

    Raises
    ------
    TypeError, ValueError
        If these are others.

    References
    ----------
    Petzold, SIAM J. Sci. Stat. Comput. 4 (1983) 136; Rackauckas, Nie, J. Open Res. Softw. 5 (2017)
    15. Theirs is the limit 0.9, which tight tolerances never reach on stiff problems: there the
    error in the fast components keeps steps at 0.6 to 0.8 of the stability limit.

    Examples
    --------
    >>> method = AutoSwitch(Tsit5(), Rodas5P())
    """

    is_implicit = True

    def __init__(self, nonstiff: Algorithm, stiff: Algorithm):
        for method in (nonstiff, stiff):
            if not isinstance(method, Algorithm):
                hint = f"; write {method.__name__}()" if isinstance(method, type) else ""
                raise TypeError(f"AutoSwitch needs two methods, got {method!r}{hint}")
        size = nonstiff.tableau.stability_interval if isinstance(nonstiff, ExplicitRK) else None
        if size is None:
            raise ValueError(
                f"{nonstiff!r} cannot be the nonstiff method: it needs a tableau with a "
                "stability_interval, as that of Tsit5()"
            )
        if not stiff.is_implicit or isinstance(stiff, AutoSwitch):
            raise ValueError(f"{stiff!r} cannot be the stiff method: it is not implicit")
        if not (nonstiff.adaptive and stiff.adaptive):
            raise ValueError("AutoSwitch needs two methods with error estimates")
        self.nonstiff, self.stiff = nonstiff, stiff
        self.stability_size: float = size
        self.order, self.adaptive = nonstiff.order, True

    @property
    def name(self) -> str:
        return f"AutoSwitch({self.nonstiff.name}, {self.stiff.name})"

    @property
    def has_jacobian_inside(self) -> bool:  # type: ignore[override]
        return self.stiff.has_jacobian_inside

    @property
    def key(self) -> Any:
        return type(self), self.nonstiff.key, self.stiff.key

    def init(
        self, field: VectorField, t: Number, u: Tensor, du: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return self.nonstiff.init(field, t, u, du)

    def step(self, field: VectorField, t: Number, h: Number, state: tuple[Tensor, ...]) -> Step:
        """A step of the nonstiff method: the loop, which sees the steps before, chooses."""
        return self.nonstiff.step(field, t, h, state)

    def default_controller(self) -> Controller:
        """That of the nonstiff method; the stiff one has its own."""
        return self.nonstiff.default_controller()

    def __repr__(self) -> str:
        return f"AutoSwitch({self.nonstiff!r}, {self.stiff!r})"


class AutoTsit5(AutoSwitch):
    """``Tsit5()``, switching to ``stiff`` where the problem is stiff; default ``Rodas5P()``."""

    def __init__(self, stiff: Algorithm | None = None):
        super().__init__(Tsit5(), Rodas5P() if stiff is None else stiff)

    @property
    def name(self) -> str:
        return f"AutoTsit5({self.stiff.name})"

    def __repr__(self) -> str:
        return f"AutoTsit5({self.stiff!r})"


class AutoVern7(AutoSwitch):
    """``Vern7()``, switching to ``stiff`` where the problem is stiff; default ``Rodas5P()``."""

    def __init__(self, stiff: Algorithm | None = None):
        super().__init__(Vern7(), Rodas5P() if stiff is None else stiff)

    @property
    def name(self) -> str:
        return f"AutoVern7({self.stiff.name})"

    def __repr__(self) -> str:
        return f"AutoVern7({self.stiff!r})"
