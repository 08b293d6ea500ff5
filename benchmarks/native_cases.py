"""What the benchmarks of the native engine solve, and diffsolve's side of it.

A side is made in three steps. Its function, called with a `Case`, does what is done once for an
equation (expressions, traces, compilation where it does not depend on the tolerance). What it
returns is called with a tolerance, rtol = atol. What that returns is the solve: it takes nothing,
and returns the states at the case's times, ``(T, n)``, or the gradient of ``u[-1].sum()`` by ``p``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsolve import DiscreteAdjoint, ODEProblem, Solution, Vern9, solve
from diffsolve.problems.library import LibraryProblem, lotka_volterra
from diffsolve.solvers.algorithm import Algorithm

Array = NDArray[np.float64]
Run = Callable[[], Any]
At = Callable[[float], Run]

ENGINE = "native"
MOST_STEPS = 10**7


@dataclass(frozen=True, eq=False)
class Case:
    """What all sides solve.

    Attributes
    ----------
    problem
        For diffsolve and torchdiffeq.
    equations
        ``equations(u, p)``: the derivatives as a list, of scalars of any kind.
    arrays
        ``arrays(numpy, u, p)``: the same with arrays, for NumPy and JAX; None where the list serves
        them as well.
    t
        Times to save, the start among them.
    exact
        Reference solution there.
    """

    name: str
    problem: ODEProblem
    equations: Callable[[Any, Any], list]
    arrays: Callable[[Any, Any, Any], Any] | None
    t: Array
    exact: Array

    @property
    def u0(self) -> Array:
        return self.problem.u0.numpy()

    @property
    def p(self) -> Array:
        return self.problem.p.numpy()

    def error(self, u: Any) -> float:
        """Largest error, relative to the largest value of the component; infinite where NaN."""
        size = np.abs(self.exact).max(0)
        error = float((np.abs(np.asarray(u) - self.exact) / size).max())
        return error if np.isfinite(error) else np.inf


def lotka_volterra_equations(u: Any, p: Any) -> list:
    x, y = u
    a, b, c, d = p
    return [x * (a - b * y), y * (d * x - c)]


def lorenz_equations(u: Any, p: Any) -> list:
    x, y, z = u
    sigma, rho, beta = p
    return [sigma * (y - x), x * (rho - z) - y, x * y - beta * z]


def arenstorf_equations(u: Any, p: Any) -> list:
    x, y, vx, vy = u
    moon = p[0]
    earth = 1 - moon
    from_earth, from_moon = x + moon, x - earth
    a = earth * (from_earth * from_earth + y * y) ** -1.5
    b = moon * (from_moon * from_moon + y * y) ** -1.5
    return [vx, vy, x + 2 * vy - a * from_earth - b * from_moon, y - 2 * vx - (a + b) * y]


def pleiades_equations(u: Any, p: Any) -> list:
    x, y = u[0:7], u[7:14]
    ax: list = [0.0] * 7
    ay: list = [0.0] * 7
    for i in range(7):
        for j in range(i):  # every pair once: the two forces are opposite
            dx, dy = x[j] - x[i], y[j] - y[i]
            w = (dx * dx + dy * dy) ** -1.5
            ax[i], ay[i] = ax[i] + p[j] * w * dx, ay[i] + p[j] * w * dy
            ax[j], ay[j] = ax[j] - p[i] * w * dx, ay[j] - p[i] * w * dy
    return [u[k] for k in range(14, 28)] + ax + ay


def pleiades_arrays(numpy: Any, u: Any, p: Any) -> Any:
    x, y = u[0:7], u[7:14]
    dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
    r = 1 / numpy.sqrt(dx * dx + dy * dy + np.eye(7))  # faster than the power -1.5
    w = r * r * r * p
    return numpy.concatenate([u[14:28], (w * dx).sum(-1), (w * dy).sum(-1)])


_EQUATIONS: dict[str, tuple[Callable[[Any, Any], list], Callable[..., Any] | None]] = {
    "lotka_volterra": (lotka_volterra_equations, None),
    "lorenz": (lorenz_equations, None),
    "pleiades": (pleiades_equations, pleiades_arrays),
    "arenstorf": (arenstorf_equations, None),
}


@cache
def library_case(library: LibraryProblem) -> Case:
    """A problem of the library at the times of its reference."""
    reference = library.reference()
    return Case(library.name, library(), *_EQUATIONS[library.name], reference.t, reference.u)


@cache
def saved_case() -> Case:
    """Lotka-Volterra with 101 saves; exact means `Vern9` at 1e-13."""
    case = library_case(lotka_volterra)
    t = np.linspace(0, 10, 101)
    exact = solve(case.problem, Vern9(), saveat=t, rtol=1e-13, atol=1e-13).u.numpy()
    return Case("lotka_volterra_101", case.problem, case.equations, None, t, exact)


@cache
def long_case() -> Case:
    """Lotka-Volterra over [0, 1000], about 300 rounds of the orbit, saved at the ends.

    The last state is from the extrapolation in 45 digits of ``make_references.py``; its Taylor
    series in extended precision agree to 5e-16.
    """
    problem = lotka_volterra(tspan=(0.0, 1000.0))
    exact = np.array([[1.0, 1.0], [4.771054723956333240, 0.3524722067007054758]])
    return Case(
        "lotka_volterra_1000", problem, *_EQUATIONS["lotka_volterra"], np.array([0.0, 1e3]), exact
    )


# ---------------------------------------------------------------------------------------------
# diffsolve
# ---------------------------------------------------------------------------------------------


def ours(case: Case, alg: Algorithm, engine: str | None = None) -> Callable[[float], Run]:
    """Solves that return the `Solution`."""
    times = torch.from_numpy(case.t)

    def at(tolerance: float) -> Callable[[], Solution]:
        def run() -> Solution:
            return solve(
                case.problem,
                alg,
                saveat=times,
                rtol=tolerance,
                atol=tolerance,
                maxiters=MOST_STEPS,
                engine=engine or ENGINE,
            )

        return run

    return at


def our_states(case: Case, alg: Algorithm) -> At:
    solves = ours(case, alg)

    def at(tolerance: float) -> Run:
        run = solves(tolerance)
        return lambda: run().u.numpy()

    return at


def our_gradient(case: Case, alg: Algorithm, keep: Callable[[Solution], object] = id) -> At:
    """The gradient by `DiscreteAdjoint`; ``keep`` sees every solution after ``backward``."""
    p = case.problem.p.clone().requires_grad_()
    problem, times = case.problem.remake(p=p), torch.from_numpy(case.t)

    def at(tolerance: float) -> Run:
        def run() -> Tensor | None:
            p.grad = None
            solution = solve(
                problem,
                alg,
                sensealg=DiscreteAdjoint(),
                saveat=times,
                rtol=tolerance,
                atol=tolerance,
                engine=ENGINE,
            )
            solution.u[-1].sum().backward()
            keep(solution)
            return p.grad

        return run

    return at
