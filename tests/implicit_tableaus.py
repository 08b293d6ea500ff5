"""The tableaus of implicit methods and problems to test them on."""

from __future__ import annotations

import numpy as np

from diffsolve.solvers.rosenbrock import tableaus as rosenbrock
from diffsolve.solvers.rosenbrock.tableau import RosenbrockTableau
from diffsolve.solvers.sdirk import tableaus as sdirk

Real = np.longdouble
ROSENBROCK = {name: getattr(rosenbrock, name) for name in rosenbrock.__all__}
SDIRK = {name: getattr(sdirk, name) for name in sdirk.__all__}
TABLEAUS = {**ROSENBROCK, **SDIRK}


def rebuilt(tableau, **changes):
    names = ["name", "source", "order", "b", "b_error", "error_order", "interpolant"]
    if isinstance(tableau, RosenbrockTableau):
        names += ["alpha", "gamma"]
    else:
        names += ["a", "c", "smoothed", "predictor"]
    return type(tableau)(**{name: getattr(tableau, name) for name in names} | changes)
