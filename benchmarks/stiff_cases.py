"""What the benchmarks of stiff problems solve, and diffsolve's side of it.

A side is made in three steps. Its function, called with a `StiffCase`, does what is done once for
an equation. What it returns is called with ``(rtol, atol)``. What that returns takes nothing, and
returns ``(states, counts)``: the states at the case's times, ``(T, n)``, and a function that says
what the solve cost. Sides that differentiate return the gradient of the case's `loss` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from native_cases import ENGINE, MOST_STEPS, Array, Case
from stiff_equations import (
    hires_equations,
    orego_equations,
    pollu_equations,
    rober_equations,
    van_der_pol_equations,
)
from torch import Tensor

from diffsolve import DiscreteAdjoint, Solution, solve
from diffsolve.problems.library import LibraryProblem, hires, orego, pollu, rober, van_der_pol
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.rosenbrock.methods import Rodas4, Rodas4P, Rodas5P, Rosenbrock23
from diffsolve.solvers.sdirk.methods import KenCarp4, Kvaerno5
from diffsolve.solvers.switching import AutoTsit5, AutoVern7

Counts = dict[str, int]
Solved = tuple[Any, Callable[[], Counts]]
Run = Callable[[], Any]
At = Callable[[float, float], Run]

OURS: dict[str, Algorithm] = {
    f"diffsolve {alg.name}": alg
    for alg in (
        *(Rosenbrock23(), Rodas4(), Rodas4P(), Rodas5P(), Kvaerno5(), KenCarp4()),
        *(AutoTsit5(), AutoVern7()),
    )
}
MU = 1e6  # of van der Pol's equation


@dataclass(frozen=True, eq=False)
class StiffCase(Case):
    """What all sides solve.

    Attributes
    ----------
    share
        ``atol`` over ``rtol``: the size below which components are as good as zero.
    t
        Times to save, the start not among them.
    """

    share: float = 1.0

    @property
    def t0(self) -> float:
        return float(self.problem.tspan[0])

    @property
    def size(self) -> Array:
        """Of each component: its largest value at the saved times, and ``share`` more."""
        return np.abs(self.exact).max(0) + self.share

    def error(self, u: Any) -> float:
        """Largest error, relative to the sizes; infinite where NaN."""
        found = float((np.abs(np.asarray(u) - self.exact) / self.size).max())
        return found if np.isfinite(found) else np.inf

    def limits(self, rtol: float) -> tuple[float, float]:
        return rtol, rtol * self.share


# ---------------------------------------------------------------------------------------------
# The cases
# ---------------------------------------------------------------------------------------------


def _library_case(
    library: LibraryProblem, equations: Callable[[Any, Any], list], share: float, **given: Any
) -> StiffCase:
    reference = library.reference(**given)
    t, exact = reference.t[1:], reference.u[1:]
    return StiffCase(library.name, library(**given), equations, None, t, exact, share)


@cache
def stiff_cases() -> dict[str, StiffCase]:
    """Problems of the library at the times of their references.

    ``share`` is that of a chemist who knows the scales: small species count where they matter.
    Van der Pol's second component is of the size of ``1 / mu`` but in the jumps.
    """
    return {
        "ROBER": _library_case(rober, rober_equations, 1e-4),
        "HIRES": _library_case(hires, hires_equations, 1e-4),
        "OREGO": _library_case(orego, orego_equations, 1.0),
        "VdP 1e6": _library_case(van_der_pol, van_der_pol_equations, 1 / MU, mu=MU),
        "POLLU": _library_case(pollu, pollu_equations, 1e-4),
    }


@cache
def rober_saved() -> StiffCase:
    """ROBER with 51 saves from 1e-5 to 1e5; exact means `Rodas5P` at 1e-13."""
    case, t = stiff_cases()["ROBER"], np.logspace(-5, 5, 51)
    rtol, atol = 1e-13, 1e-19
    exact = solve(case.problem, Rodas5P(), saveat=t, rtol=rtol, atol=atol, engine=ENGINE).u.numpy()
    off = case.error(exact[5::5])
    if off > 1e-10:
        raise RuntimeError(f"the solution of ROBER is off by {off:.1e} from the reference")
    return StiffCase("rober_51", case.problem, rober_equations, None, t, exact, case.share)


# ---------------------------------------------------------------------------------------------
# diffsolve
# ---------------------------------------------------------------------------------------------


def counts_of(solution: Solution) -> Counts:
    stats = solution.stats
    names = ("naccept", "nreject", "nf", "njac", "nlu", "nsolve", "nnewton")
    return {name: getattr(stats, name) for name in names}


def our_states(case: StiffCase, alg: Algorithm) -> At:
    times = torch.from_numpy(case.t)

    def at(rtol: float, atol: float) -> Run:
        limits: dict[str, Any] = {"rtol": rtol, "atol": atol, "maxiters": MOST_STEPS}

        def run() -> Solved:
            solution = solve(case.problem, alg, saveat=times, engine=ENGINE, **limits)
            return solution.u.numpy(), lambda: counts_of(solution)

        return run

    return at


def our_gradient(case: StiffCase, alg: Algorithm) -> At:
    """The gradient of ``((u / size) ** 2).mean()`` by `DiscreteAdjoint`."""
    p = case.problem.p.clone().requires_grad_()
    problem, times = case.problem.remake(p=p), torch.from_numpy(case.t)
    scale, adjoint = 1 / torch.from_numpy(case.size), DiscreteAdjoint()

    def at(rtol: float, atol: float) -> Run:
        limits: dict[str, Any] = {"rtol": rtol, "atol": atol, "maxiters": MOST_STEPS}

        def run() -> Tensor | None:
            p.grad = None
            solution = solve(problem, alg, sensealg=adjoint, saveat=times, engine=ENGINE, **limits)
            (solution.u * scale).square().mean().backward()
            return p.grad

        return run

    return at
