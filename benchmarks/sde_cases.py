"""SDEs with known pathwise solutions, and how diffsolve and torchsde solve them.

Both sides are given the same functions of ``(t, u, p)`` in float64, and their own noise; what a
solve returns comes with the Brownian motion at the end, from which the exact solution follows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torchsde
from torch import Tensor

from diffsolve import EM, SOSRI, SDEProblem, solve

DOUBLE = torch.float64


class End(NamedTuple):
    """State of all paths at the end, and the Brownian motion from the start to there."""

    u: Tensor
    W: Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """An Ito equation with diagonal noise, from 0 to 1.

    Attributes
    ----------
    f, g, p
        Drift and diffusion of ``(t, u, p)``.
    start
        ``u(0)`` of every path, of one component.
    exact
        Solution at 1, from ``(u0, W(1), p)``.
    """

    name: str
    f: Callable[[Any, Tensor, Tensor], Tensor]
    g: Callable[[Any, Tensor, Tensor], Tensor]
    p: tuple[float, ...]
    start: float
    exact: Callable[[Tensor, Tensor, Tensor], Tensor]

    def parameters(self) -> Tensor:
        return torch.tensor(self.p, dtype=DOUBLE)

    def u0(self, paths: int) -> Tensor:
        return torch.full((paths, 1), self.start, dtype=DOUBLE)

    def error(self, end: End) -> tuple[float, float]:
        """Sums of squares over the paths, of the error and of the solution."""
        exact = self.exact(self.u0(len(end.u)), end.W(), self.parameters())
        return (end.u - exact).square().sum().item(), exact.square().sum().item()


def gbm(mu: float, sigma: float) -> Case:
    """Geometric Brownian motion; Kloeden, Platen (1992), (4.4.6)."""
    return Case(
        "GBM",
        lambda t, u, p: p[0] * u,
        lambda t, u, p: p[1] * u,
        (mu, sigma),
        1.0,
        lambda u0, W, p: u0 * ((p[0] - p[1] ** 2 / 2) + p[1] * W).exp(),
    )


def hyperbolic_tangent() -> Case:
    """``tanh(W/2 + artanh u0)``; both coefficients vanish at 1, where paths come to rest."""
    return Case(
        "tanh",
        lambda t, u, p: p[0] * (u * (1 - u * u)),
        lambda t, u, p: p[1] * (1 - u * u),
        (-0.25, 0.5),
        0.5,
        lambda u0, W, p: (W / 2 + u0.atanh()).tanh(),
    )


def hyperbolic_sine() -> Case:
    """``sinh(W + t/2 + arsinh u0)``: noise that grows on both sides of zero."""
    return Case(
        "sinh",
        lambda t, u, p: p[0] * (1 + u * u).sqrt() + p[1] * u,
        lambda t, u, p: p[2] * (1 + u * u).sqrt(),
        (0.5, 0.5, 1.0),
        0.0,
        lambda u0, W, p: (W + 0.5 + u0.asinh()).sinh(),
    )


# ---------------------------------------------------------------------------------------------
# diffsolve
# ---------------------------------------------------------------------------------------------


def ours(case: Case, paths: int, alg: Any, engine: str, seed: int = 1, **options: Any) -> End:
    prob = SDEProblem(case.f, case.g, case.u0(paths), (0.0, 1.0), case.parameters())
    sol = solve(prob, alg, engine=engine, seed=seed, save_everystep=False, **options)
    return End(sol.u[-1], lambda: sol.noise.increment(0.0, 1.0).W)


def our_em(case: Case, paths: int, steps: int, engine: str) -> End:
    return ours(case, paths, EM(), engine, dt=1 / steps)


def our_gradient(case: Case, paths: int, steps: int, engine: str) -> End:
    """The gradient of the mean at the end by the parameters, in the place of the state."""
    p = case.parameters().requires_grad_()
    prob = SDEProblem(case.f, case.g, case.u0(paths), (0.0, 1.0), p)
    sol = solve(prob, EM(), engine=engine, seed=1, save_everystep=False, dt=1 / steps)
    (gradient,) = torch.autograd.grad(sol.u[-1].mean(), p)
    return End(gradient, lambda: sol.noise.increment(0.0, 1.0).W)


def our_adaptive(case: Case, paths: int, engine: str) -> Callable[[float, int], End]:
    """Solves with SOSRI, from a tolerance and a seed."""
    return lambda tolerance, seed: ours(
        case, paths, SOSRI(), engine, seed, rtol=tolerance, atol=tolerance
    )


def runs_native(case: Case) -> str:
    """Why the native engine does not run this; empty where it does."""
    try:
        ours(case, 2, EM(), "native", dt=0.5)
    except ValueError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------------------------------
# torchsde
# ---------------------------------------------------------------------------------------------


class Equation(torch.nn.Module):
    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, case: Case, p: Tensor):
        super().__init__()
        self.case, self.p = case, p

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.case.f(t, y, self.p)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.case.g(t, y, self.p)


#: How torchsde's noise is made: as ``sdeint`` makes it, and with the step size announced.
NOISES: dict[str, Callable[[int], dict[str, float]]] = {
    "torchsde": lambda steps: {},
    "torchsde, noise told dt": lambda steps: {"dt": 1 / steps},
}
TIMES = torch.tensor([0.0, 1.0], dtype=DOUBLE)


def _noise(paths: int, levy_area: str = "none", **options: Any) -> torchsde.BrownianInterval:
    return torchsde.BrownianInterval(
        0.0,
        1.0,
        size=(paths, 1),
        dtype=DOUBLE,
        levy_area_approximation=levy_area,
        **options,
    )


def their_em(case: Case, paths: int, steps: int, noise: str) -> End:
    bm = _noise(paths, **NOISES[noise](steps))
    equation = Equation(case, case.parameters())
    with torch.no_grad():
        u = torchsde.sdeint(equation, case.u0(paths), TIMES, bm, "euler", dt=1 / steps)
    return End(u[-1], lambda: bm(0.0, 1.0))


def their_gradient(case: Case, paths: int, steps: int, noise: str) -> End:
    bm = _noise(paths, **NOISES[noise](steps))
    p = case.parameters().requires_grad_()
    u = torchsde.sdeint(Equation(case, p), case.u0(paths), TIMES, bm, "euler", dt=1 / steps)
    (gradient,) = torch.autograd.grad(u[-1].mean(), p)
    return End(gradient, lambda: bm(0.0, 1.0))


def their_adaptive(case: Case, paths: int) -> Callable[[float, int], End]:
    """Solves with srk, from a tolerance and a seed.

    The first step is 0.1, instead of 0.001: which is what torchsde does when nothing is given, and
    takes longer.
    """
    equation = Equation(case, case.parameters())

    @torch.no_grad()
    def run(tolerance: float, seed: int) -> End:
        bm = _noise(paths, "space-time", entropy=seed)
        limits = {"rtol": tolerance, "atol": tolerance, "dt": 0.1, "dt_min": 1e-9}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a step size below dt_min
            u = torchsde.sdeint(equation, case.u0(paths), TIMES, bm, "srk", adaptive=True, **limits)
        return End(u[-1], lambda: bm(0.0, 1.0))

    return run


def gradient_error(case: Case, computed: End, paths: int) -> float:
    """Relative distance from the gradient of the exact solution along the same noise."""
    p = case.parameters().requires_grad_()
    (exact,) = torch.autograd.grad(case.exact(case.u0(paths), computed.W(), p).mean(), p)
    return ((computed.u - exact).norm() / exact.norm()).item()


def strong_error(case: Case, run: Callable[[int], End], seeds: int) -> float:
    """Root mean square of the error at the end, relative to that of the solution."""
    parts = [case.error(run(seed)) for seed in range(seeds)]
    return math.sqrt(sum(x for x, _ in parts) / sum(x for _, x in parts))


def all_seeds(run: Callable[[float, int], End], tolerance: float, seeds: int) -> None:
    for seed in range(seeds):
        run(tolerance, seed)


def at_tolerance(
    run: Callable[[float, int], End], tolerance: float, seeds: int
) -> Callable[[], None]:
    return partial(all_seeds, run, tolerance, seeds)
