"""(E)SDIRK methods on the native engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.family import ImplicitFamily, Numbers
from diffsolve.solvers.sdirk.tableau import INSIDE


class _SDIRKFamily(ImplicitFamily):
    needs_jvp = True
    iterates = True

    def write(self, numbers: Numbers, method: Any) -> None:
        super().write(numbers, method)
        numbers.array(L.PREDICTOR, method.predictor)
        numbers.array(L.IMPLICIT, method.implicit, np.int64)
        numbers.array(L.INSIDE, np.vstack([INSIDE, method.inside]))
        numbers.number(L.SMOOTHED, method.smoothed)


FAMILY = _SDIRKFamily("sdirk", "diffsolve.solvers.sdirk.kernel")
