"""What the tests of stochastic methods share: solves and single steps on the torch engine.

The native engine is compared with it elsewhere (``test_native_sde*.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from sdes import rms, slope
from torch import Tensor

import diffsolve
from diffsolve import SDEProblem, Solution
from diffsolve.problems.sde_field import SDEField

solve = partial(diffsolve.solve, engine="torch")


def integral_of(alg: Any) -> str:
    """The integral that a method is for."""
    return min(alg.interpretation)


def same_path(prob: SDEProblem, alg: Any, steps: Sequence[int], seed: int = 1) -> list[Solution]:
    """Solutions with these numbers of equal steps, the largest last, along one path."""
    span = abs(prob.tspan[1] - prob.tspan[0])
    fine = solve(prob, alg, dt=span / steps[-1], adaptive=False, seed=seed)
    rest = [
        solve(prob, alg, dt=span / n, adaptive=False, noise=fine.noise, save_everystep=False)
        for n in steps[:-1]
    ]
    return [*rest, fine]


def observed(
    prob: SDEProblem, alg: Any, exact: Callable[[Tensor], Tensor], steps: Sequence[int]
) -> tuple[float, list[float]]:
    """Strong order, and the errors, from a solution at the end that ``W`` at time 1 tells."""
    sols = same_path(prob, alg, steps)
    solution = exact(sols[-1].noise.at([1.0])[0])
    errors = [rms(sol.u[-1] - solution) for sol in sols]
    return slope(steps, errors), errors


def observed_against(
    prob: SDEProblem, alg: Any, steps: Sequence[int], reference: Any, fine: int
) -> tuple[float, list[float]]:
    """The same from a solution by another method with short steps."""
    (sol,) = same_path(prob, reference, [fine])
    errors = []
    for n in steps:
        rough = solve(prob, alg, dt=1 / n, adaptive=False, noise=sol.noise, save_everystep=False)
        errors.append(rms(rough.u[-1] - sol.u[-1]))
    return slope(steps, errors), errors


def field_of(prob: SDEProblem, path: Any = None) -> SDEField:
    field = SDEField.of(prob)
    field.discover(float(prob.tspan[0]), field.structure.ravel(prob.u0), 1.0, False)
    field.path = path
    return field


def one_step(prob: SDEProblem, alg: Any, h: float, seed: int = 3) -> tuple[Any, Any]:
    """A step from the start of a batch of paths, and its path."""
    sol = solve(prob.remake(tspan=(0.0, h)), alg, dt=h, adaptive=False, seed=seed)
    field = field_of(prob, sol.noise)
    u = field.structure.ravel(prob.u0)
    with torch.no_grad():
        return alg.step(field, 0.0, h, alg.init(field, 0.0, u)), sol.noise
