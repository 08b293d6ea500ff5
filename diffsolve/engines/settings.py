"""How to integrate: what an engine is told besides the problem and the method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from diffsolve.solvers.controllers import Controller
from diffsolve.solvers.norms import Tolerance


@dataclass
class Settings:
    """How to integrate.

    Attributes
    ----------
    tolerance, controller
        Scaling and norm of the error, and the rule that makes a step size of it.
    adaptive
        False: every step has size ``dt``.
    to_rounding
        Whether implicit steps solve their equations to rounding. If not, to a part of the
        tolerance.
    dt
        First step size, or the one of all fixed steps. Positive. None: by Hairer's rule.
    dtmin, dtmax
        Limits of the step size.
    maxiters
        Largest number of attempted steps.
    tstops
        Times strictly inside the span, in order of integration, where a step must end.
    h_on_tape
        Whether step sizes are differentiated.
    progress
        Whether to show a progress bar.
    controller_stiff
        Controller of the stiff method of an ``AutoSwitch``; None: the same.
    stable_steps
        Whether explicit steps stay where they are stable for every mode (``StableSteps``).
    """

    tolerance: Tolerance
    controller: Controller
    adaptive: bool = True
    to_rounding: bool = False
    dt: float | None = None
    dtmin: float = 0.0
    dtmax: float = math.inf
    maxiters: int = 100_000
    tstops: tuple[float, ...] = ()
    h_on_tape: bool = False
    progress: bool = False
    controller_stiff: Controller | None = None
    stable_steps: bool = False

    @cached_property
    def differentiated(self) -> Settings:
        """These settings for a solve whose steps will be differentiated."""
        return replace(self, stable_steps=True)

    @property
    def accuracy(self) -> Tolerance | None:
        """Tolerance of the iterations within a step; None: they go on to rounding."""
        return None if self.to_rounding else self.tolerance
