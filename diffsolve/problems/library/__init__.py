"""Named test problems with their sources and reference solutions."""

from diffsolve.problems.library.catalog import LibraryProblem, Reference, library_problem
from diffsolve.problems.library.kinetics import e5, hires, orego, rober
from diffsolve.problems.library.mechanics import arenstorf, henon_heiles, pleiades, rigid_body
from diffsolve.problems.library.nonstiff import (
    fitzhugh_nagumo,
    linear,
    lorenz,
    lotka_volterra,
    lotka_volterra_time,
    spiral,
)
from diffsolve.problems.library.pollution import pollu
from diffsolve.problems.library.stiff import (
    brusselator_1d,
    prothero_robinson,
    stiff_linear,
    van_der_pol,
)

__all__ = [
    "LibraryProblem",
    "Reference",
    "arenstorf",
    "brusselator_1d",
    "e5",
    "fitzhugh_nagumo",
    "henon_heiles",
    "hires",
    "library_problem",
    "linear",
    "lorenz",
    "lotka_volterra",
    "lotka_volterra_time",
    "orego",
    "pleiades",
    "pollu",
    "prothero_robinson",
    "rigid_body",
    "rober",
    "spiral",
    "stiff_linear",
    "van_der_pol",
]
