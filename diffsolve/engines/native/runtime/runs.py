"""Who took which steps of a solve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffsolve.engines.native.runtime.template import ScalarTemplate


@dataclass
class Run:
    """Consecutive steps of one method.

    Attributes
    ----------
    template
        Of the method.
    begin, end
        Its first step, and the one behind its last.
    state
        ``(2, N)``, the state and derivative that it took over; None: those of the start.
    """

    template: ScalarTemplate
    begin: int
    end: int = 0
    state: np.ndarray | None = None
