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
from diffsolve.problems.sde_field import Increment, SDEField

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


class GridPath:
    """A Brownian path that is known on a fine grid of the unit of time, with ``W`` and ``H``."""

    def __init__(self, points: int, rows: int, m: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        h = 1 / points
        shape = points, rows, m
        W = torch.randn(shape, generator=generator, dtype=torch.float64) * h**0.5
        H = torch.randn(shape, generator=generator, dtype=torch.float64) * (h / 12) ** 0.5
        zero = torch.zeros(1, rows, m, dtype=torch.float64)
        self.points, self.W, self.H = points, W, H
        self.values = torch.cat([zero, W.cumsum(0)])
        self.integral = torch.cat([zero, (h * (self.values[:-1] + W / 2 + H)).cumsum(0)])

    def increment(self, s: float, t: float) -> Increment:
        i, j = round(s * self.points), round(t * self.points)
        if j < i:
            W, H = self.increment(t, s)
            return Increment(-W, H)
        W, h = self.values[j] - self.values[i], (j - i) / self.points
        area = self.integral[j] - self.integral[i] - h * self.values[i]
        return Increment(W, area / h - W / 2)

    def at(self, times: Sequence[float], since: float | None = None) -> Tensor:
        start = self.values[round((since or 0.0) * self.points)]
        return torch.stack([self.values[round(x * self.points)] - start for x in times])

    def area(self) -> Tensor:
        """The Levy area of the first two motions over the whole, up to ``0.3 / sqrt(points)``."""
        (x, y), (dx, dy) = self.values[:-1].unbind(-1), self.W.unbind(-1)
        a, b = self.H.unbind(-1)
        return (0.5 * (x * dy - y * dx) + a * dy - b * dx).sum(0)


def fixed_steps(prob: SDEProblem, alg: Any, path: Any, n: int) -> Tensor:
    """The end of ``n`` equal steps over the unit of time along any path."""
    field, h = field_of(prob, path), 1 / n
    u = field.structure.ravel(prob.u0)
    with torch.no_grad():
        state = alg.init(field, 0.0, u)
        for i in range(n):
            state = alg.step(field, i * h, h, state).state
    return state[0].reshape(prob.u0.shape)
