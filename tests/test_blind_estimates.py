"""Error estimates see quadrature, linear problems, constant parts and noise that changes with time.

An estimate that is zero for such a problem lets steps grow without bound, and the solve ends as if
all were well. So every adaptive method solves each of them, on both engines, and the error is
compared with the tolerance.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsolve
from diffsolve import (
    SOSRA,
    ImplicitEM,
    LambaEM,
    ODEProblem,
    ReversibleHeun,
    RKMil,
    RKMilCommute,
    RKMilGeneral,
    SDEProblem,
    solve,
)
from diffsolve.problems.sde_field import Increment, SDEField
from diffsolve.solvers.stochastic.method import registered

DOUBLE = torch.float64
EXPLICIT = ["Heun", "Ralston", "BS3", "DP5", "Tsit5", "Vern6", "Vern7", "Vern9", "DP8"]
ROSENBROCK = [
    "Rosenbrock23",
    "Rosenbrock32",
    "ROS3P",
    "Rodas3",
    "Rodas4",
    "Rodas4P",
    "Rodas5",
    "Rodas5P",
]
SDIRK = [
    "ImplicitEuler",
    "Trapezoid",
    "SDIRK2",
    "TRBDF2",
    "Kvaerno3",
    "Kvaerno4",
    "Kvaerno5",
    "KenCarp3",
    "KenCarp4",
    "KenCarp5",
]
METHODS = [*EXPLICIT, *ROSENBROCK, *SDIRK, "AutoTsit5", "AutoVern7"]
MOST = 60  # error, in tolerances: methods of order 1 and 2 have the largest, at most 51


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=DOUBLE)


MATRIX = torch.tensor([[-1.0, 2.0, 0.0], [-2.0, -1.0, 0.5], [0.0, 0.3, -0.2]], dtype=DOUBLE)
ONES = vector(1.0, 1.0, 1.0)


def dose(t: float) -> float:
    """Integral of exp(-t) (1 + sin 5t)."""
    waves = math.cos(5 * t) + math.sin(5 * t) / 5
    return 1 - math.exp(-t) + 5 / 26 * (1 - math.exp(-t) * waves)


def dose_at_rest(t: Tensor, u: Tensor) -> Tensor:
    return torch.stack([1 - u[0], torch.exp(-t) * (1 + torch.sin(5 * t)) + 0 * u[1]])


#: Right-hand side, start, end of the span, and the solution there.
FAMILY: dict[str, tuple[Any, Tensor, float, Any]] = {
    "quadrature": (
        lambda t, u: torch.cos(t) + 0 * u, vector(0.0), 20.0, lambda t: vector(math.sin(t)),
    ),
    "a clock and quadrature": (
        lambda t, u: torch.stack([1 + 0 * u[0], torch.cos(u[0])]), vector(0.0, 0.0), 20.0,
        lambda t: vector(t, math.sin(t)),
    ),
    "quadrature beside rest": (
        dose_at_rest, vector(1.0, 0.0), 10.0, lambda t: vector(1.0, dose(t)),
    ),
    "linear": (lambda t, u: -u, vector(1.0), 5.0, lambda t: vector(math.exp(-t))),
    "linear system": (
        lambda t, u: MATRIX @ u, ONES, 10.0, lambda t: torch.linalg.matrix_exp(MATRIX * t) @ ONES,
    ),
    "linear with constant parts": (
        lambda t, u: torch.stack([1 - u[0], 0.7 + 0 * u[1], -u[2]]), vector(1.0, 0.0, 1.0), 5.0,
        lambda t: vector(1.0, 0.7 * t, math.exp(-t)),
    ),
    "forced linear": (
        lambda t, u: torch.sin(3 * t) - u, vector(0.0), 10.0,
        lambda t: vector((math.sin(3 * t) - 3 * math.cos(3 * t) + 3 * math.exp(-t)) / 10),
    ),
    "linear by time": (
        lambda t, u: -t * u, vector(1.0), 3.0, lambda t: vector(math.exp(-t * t / 2)),
    ),
}  # fmt: skip


def worst(problem: str, alg: Any, tol: float, engine: str) -> float:
    """Largest error of all steps, in tolerances."""
    f, u0, end, exact = FAMILY[problem]
    sol = solve(ODEProblem(f, u0, (0.0, end)), alg, rtol=tol, atol=tol, engine=engine)
    assert sol.stats.engine == engine
    exact = torch.stack([exact(float(t)) for t in sol.t])
    return float(((sol.u - exact).abs() / (tol + tol * exact.abs())).max())


@pytest.mark.parametrize("problem", ["quadrature", "linear system"])
@pytest.mark.parametrize("name", ["Rodas5", "ROS3P"])
def test_what_the_published_estimates_do_not_see(name: str, problem: str) -> None:
    for tol in (1e-3, 1e-6):
        assert worst(problem, getattr(diffsolve, name)(), tol, "native") < 4


@pytest.mark.slow
@pytest.mark.parametrize("problem", FAMILY)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_sees_it(name: str, problem: str) -> None:
    alg = getattr(diffsolve, name)()
    assert alg.adaptive
    assert worst(problem, alg, 1e-3 if alg.order == 1 else 1e-5, "native") < MOST


@pytest.mark.parametrize("name", METHODS)
def test_every_method_sees_it_on_the_torch_engine(name: str) -> None:
    for problem in ("quadrature", "linear system", "linear with constant parts"):
        assert worst(problem, getattr(diffsolve, name)(), 1e-2, "torch") < MOST / 4


def test_the_list_is_complete() -> None:
    kinds = [getattr(diffsolve, name) for name in diffsolve.__all__]
    made = {
        kind.__name__
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, diffsolve.Algorithm) and kind.family
    }
    fixed = {"Euler", "Midpoint", "RK4", "ImplicitMidpoint"}
    families = {"ExplicitRK", "Rosenbrock", "SDIRK"}
    of_noise = {type(alg).__name__ for alg in registered()} | {"SRA", "SRI"}
    assert made - of_noise - fixed - families == set(METHODS) - {"AutoTsit5", "AutoVern7"}
    for name in fixed:
        assert not getattr(diffsolve, name)().adaptive


def test_gradients_of_the_estimates_that_have_a_stage_more() -> None:
    """The error of a step is differentiated through that stage, on both engines alike."""
    for name in ("Rodas5", "ROS3P"):
        found = []
        for engine in ("torch", "native"):
            p = vector(1.3, 0.7).requires_grad_()
            prob = ODEProblem(
                lambda t, u, p: torch.stack([torch.cos(p[0] * t) + 0 * u[0], -p[1] * u[1] ** 2]),
                vector(0.0, 1.0), (0.0, 3.0), p,
            )  # fmt: skip
            alg = getattr(diffsolve, name)()
            sol = solve(prob, alg, rtol=1e-4, atol=1e-4, engine=engine)
            (sol.steps.error.sum() + sol.u[-1].sum()).backward()
            assert p.grad is not None
            found.append(p.grad)
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)  # sizes of steps round
        assert float(sol.steps.error.max()) > 0.05


def test_stages_at_the_end_share_an_evaluation() -> None:
    for name, per_step in (("Rodas5", 8), ("ROS3P", 3), ("Rosenbrock23", 2)):
        for engine in ("torch", "native"):
            prob = ODEProblem(FAMILY["linear system"][0], ONES, (0.0, 1.0))
            few, many = (
                solve(prob, getattr(diffsolve, name)(), dt=1 / n, adaptive=False, engine=engine)
                for n in (10, 30)
            )
            assert many.stats.nf - few.stats.nf == 20 * per_step


# -- noise ---------------------------------------------------------------------------------------

RATE, ROWS = 12.0, 40


def wave(t: Tensor, u: Tensor) -> Tensor:
    return torch.cos(RATE * t) + 0 * u


def two_waves(t: Tensor, u: Tensor) -> Tensor:
    return torch.stack([wave(t, u), 0.5 * torch.sin(RATE * t) + 0 * u], -1)


def period(t: Tensor, u: Tensor) -> Tensor:
    """The same at both ends of the span, and flat there."""
    return torch.cos(2 * math.pi * t) + 0 * u


def nothing(t: Tensor, u: Tensor) -> Tensor:
    return 0 * u


def constant(t: Tensor, u: Tensor) -> Tensor:
    return 0.3 + 0 * u


def pull(t: Tensor, u: Tensor) -> Tensor:
    return -5 * u


#: Drift, diffusion of one and of two Brownian motions.
NOISES: dict[str, tuple[Any, Any, Any]] = {
    "noise by time": (nothing, wave, two_waves),
    "periodic noise": (nothing, period, lambda t, u: torch.stack([period(t, u), 0.5 + 0 * u], -1)),
    "drift by time": (wave, constant, lambda t, u: torch.stack([constant(t, u), 0 * u], -1)),
    "linear from rest": (pull, constant, lambda t, u: torch.stack([constant(t, u), 1 + 0 * u], -1)),
    "all of it": (lambda t, u: wave(t, u) - 5 * u, wave, two_waves),
}
CASES = [
    (alg, kind)
    for alg in registered()
    if alg.adaptive
    for kind in ("diagonal", "scalar", "additive", "general")
    if kind in alg.noise_types
]
COMPILED = ("LambaEM", "LambaEulerHeun", "RKMil", "RKMilCommute", "SOSRI", "SRIW1", "SOSRA", "SRA1")


def along_the_path(f: Any, g: Any, path: Any) -> Tensor:
    """The end of ``du = f dt + g dW`` with additive noise, by small steps along the same path."""
    u0 = torch.zeros(ROWS, 1, dtype=DOUBLE)
    prob = SDEProblem(f, g, u0, (0.0, 1.0), noise="additive")
    fine = solve(prob, SOSRA(), dt=1 / 400, adaptive=False, noise=path, saveat=[1.0])
    return fine.u[-1]


def distance(problem: str, alg: Any, kind: str, tol: float, engine: str) -> tuple[float, int]:
    """Root mean square error at the end in tolerances, and the steps."""
    f, one, two = NOISES[problem]
    g = two if kind == "general" else one
    u0 = torch.zeros(ROWS, 1, dtype=DOUBLE)
    sense = min(alg.interpretation)
    prob = SDEProblem(f, g, u0, (0.0, 1.0), noise=kind, interpretation=sense)
    sol = solve(prob, alg, rtol=tol, atol=tol, seed=1, saveat=[1.0], engine=engine)
    assert sol.stats.engine == engine
    exact = along_the_path(f, g, sol.noise)
    off = (sol.u[-1] - exact) / (tol + tol * exact.abs())
    return float(off.square().mean().sqrt()), sol.stats.naccept


@pytest.mark.slow
@pytest.mark.parametrize("problem", NOISES)
@pytest.mark.parametrize(("alg", "kind"), CASES, ids=lambda x: x if isinstance(x, str) else repr(x))
def test_every_stochastic_method_sees_it(alg: Any, kind: str, problem: str) -> None:
    name = type(alg).__name__
    compiled = name in COMPILED or (name == "RKMilGeneral" and kind != "general")
    error, steps = distance(problem, alg, kind, 3e-2, "native" if compiled else "torch")
    assert error < 10
    assert steps < (200 if name == "ReversibleHeun" else 100)  # whose decays need small steps


@pytest.mark.parametrize(
    ("alg", "kind"),
    [
        (LambaEM(), "general"), (LambaEM(), "additive"), (RKMil(), "diagonal"),
        (RKMilCommute("stratonovich"), "additive"), (RKMilGeneral(), "general"),
        (ImplicitEM(), "additive"), (ReversibleHeun(), "additive"),
    ],
    ids=repr,
)  # fmt: skip
def test_the_error_follows_the_tolerance_where_noise_changes_with_time(alg: Any, kind: str) -> None:
    rough, fine = (distance("noise by time", alg, kind, tol, "torch") for tol in (1e-1, 1e-2))
    assert rough[0] < 8 and fine[0] < 8
    assert 3 * rough[1] < fine[1] < 150


def test_a_single_path_is_not_missed_where_its_increment_is_small() -> None:
    """The part of the estimate for noise that changes with time does not vanish with ``W``."""
    u, h = torch.zeros(1, dtype=DOUBLE), 0.1
    least = (1 - math.cos(RATE * h)) * math.sqrt(h / 12)
    for alg, kind in ((RKMil(), "diagonal"), (LambaEM(), "additive"), (ImplicitEM(), "additive")):
        field = SDEField.of(SDEProblem(nothing, wave, u.view(1, 1), (0.0, 1.0), noise=kind))
        field.discover(0.0, u, 1.0, False)
        still = Increment(torch.zeros(1, 1, dtype=DOUBLE), None)
        field.increment = lambda t, h, still=still: still  # type: ignore[method-assign]
        with torch.no_grad():
            step = alg.step(field, 0.0, h, alg.init(field, 0.0, u))
        assert step.error is not None
        torch.testing.assert_close(step.error, vector(least))


def test_noise_that_damps_away_does_not_shorten_steps() -> None:
    """What stiff drift damps within a step is seen so by the estimate, also of noise by time."""

    def stiff(t: Tensor, u: Tensor) -> Tensor:
        return -1e6 * u

    u0 = torch.zeros(10, 1, dtype=DOUBLE)
    prob = SDEProblem(stiff, wave, u0, (0.0, 1.0), noise="additive")
    sol = solve(prob, ImplicitEM(), rtol=1e-2, atol=1e-2, seed=0, engine="torch")
    assert float(sol.steps.h.max()) > 0.05 and sol.stats.nreject == 0
