"""Named test problems with their sources and reference solutions."""

from diffsolve.problems.library.catalog import LibraryProblem, Reference, library_problem
from diffsolve.problems.library.mechanics import arenstorf, henon_heiles, pleiades, rigid_body
from diffsolve.problems.library.nonstiff import (
    fitzhugh_nagumo,
    linear,
    lorenz,
    lotka_volterra,
    lotka_volterra_time,
    spiral,
)

__all__ = [
    "LibraryProblem",
    "Reference",
    "arenstorf",
    "fitzhugh_nagumo",
    "henon_heiles",
    "library_problem",
    "linear",
    "lorenz",
    "lotka_volterra",
    "lotka_volterra_time",
    "pleiades",
    "rigid_body",
    "spiral",
]
