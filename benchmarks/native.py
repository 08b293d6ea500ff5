"""The native engine against torchdiffeq, diffrax, heyoka, CVODES and SciPy: the table of its bars.

One core, float64, all sides of a row in turn in one process. A side's time is that of the whole
call, Python included; what is compiled once for an equation was compiled before.

Run ``python benchmarks/native.py``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from native_cases import (
    ENGINE,
    Case,
    library_case,
    long_case,
    our_gradient,
    our_states,
    ours,
    saved_case,
)
from native_peers import (
    GRADIENTS,
    PEERS,
    diffrax_network,
    installed,
    one_core,
    present,
    timed,
    versions,
)
from native_startup import startup_bars
from native_work_precision import EXPONENTS, OURS, all_sides, curves, fastest, seconds_at
from spiral_neural_ode import ATOL, MOMENTS, RTOL, TIMES, dataset, models
from timing import Bar, Times, arguments, better, finish, one_thread, ratio, table
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from diffsolve import DiscreteAdjoint, ODEProblem, Solution, Tsit5, Vern9, solve
from diffsolve.problems.library import lorenz, pleiades

CALLS = 2000  # Python's share of a call is the median of so many
#: The tolerances over [0, 1000]: those of `EXPONENTS` whose errors say something there.
LONG = {
    "diffsolve Tsit5": range(-6, -12, -1),
    "diffrax Tsit5": range(-6, -12, -1),
    "heyoka": range(-3, -16, -1),
}


def microseconds(title: str, times: Mapping[str, Times], errors: Mapping[str, float]) -> None:
    """Print the times of a row; the first side is ours."""
    own = next(iter(times.values()))
    rows = []
    for name, value in times.items():
        cells = [f"{1e6 * value.median:.1f}", f"{1e6 * value.best:.1f}"]
        error = f"{errors[name]:.1e}" if name in errors else ""
        rows.append([name, *cells, f"{value.median / own.median:.3g}", error])
    print(f"\n{title}: microseconds")
    print(table(("side", "median", "best", "over ours", "error"), rows), flush=True)


def bar(
    work: str, times: Mapping[str, Times], rivals: str, limit: float | None = None
) -> list[Bar]:
    """The fastest side whose name starts with ``rivals`` over ours, which comes first, if any."""
    names = [name for name in times if name.startswith(rivals)]
    if not names:
        return []
    rival = better(times, names)
    speedup = ratio(times[rival], next(iter(times.values())))
    return [Bar(f"{work}, {rivals}", speedup.value, limit, note=f"{speedup.spread}; {rival}")]


# ---------------------------------------------------------------------------------------------
# Lotka-Volterra over [0, 10] and [0, 1000]
# ---------------------------------------------------------------------------------------------


def forward_bars(rounds: int) -> list[Bar]:
    case, work = saved_case(), "Lotka-Volterra, forward"
    runs = {"diffsolve Tsit5": our_states(case, Tsit5())(1e-8)}
    runs |= {name: side.make(case)(1e-8) for name, side in present(PEERS).items()}
    times = timed(runs, rounds, least=0.05)
    microseconds(work, times, {name: case.error(run()) for name, run in runs.items()})
    bars = bar(work, times, "torchdiffeq dopri5", 1000)
    for peer in ("diffrax", "heyoka", "CVODES", "SciPy"):
        bars += bar(work, times, peer)
    return bars


def gradient_bars(rounds: int) -> list[Bar]:
    case, work = saved_case(), "Lotka-Volterra, gradient"
    runs = {"diffsolve DiscreteAdjoint": our_gradient(case, Tsit5())(1e-8)}
    runs |= {name: side.make(case)(1e-8) for name, side in present(GRADIENTS).items()}
    times = timed(runs, rounds, least=0.05)
    exact = our_gradient(case, Vern9())(1e-13)().numpy()
    errors = {
        name: float(np.linalg.norm(np.asarray(run()) - exact) / np.linalg.norm(exact))
        for name, run in runs.items()
    }
    microseconds(work, times, errors)
    # forward mode is not an adjoint: its cost grows with the number of parameters, here four
    reverse = {name: value for name, value in times.items() if "ForwardMode" not in name}
    return [
        *bar(work, times, "torchdiffeq", 1000),
        *bar(work, reverse, "diffrax", 3),
        *bar(work, times, "diffrax ForwardMode"),
        *bar(work, times, "heyoka"),
        *bar(work, times, "CVODES"),
    ]


def long_bars(rounds: int) -> list[Bar]:
    case, work = long_case(), "Lotka-Volterra, [0, 1000]"
    runs = {"diffsolve Tsit5": our_states(case, Tsit5())(1e-8)}
    if installed("diffrax"):
        runs["diffrax Tsit5"] = PEERS["diffrax Tsit5"].make(case)(1e-8)
    errors = {name: case.error(run()) for name, run in runs.items()}
    times = timed(runs, rounds, least=0.05)
    microseconds(work, times, errors)

    chosen = [*OURS, "diffrax Tsit5", "diffrax Dopri8", "heyoka"]
    sides = {name: at for name, at in all_sides(case).items() if name in chosen}
    points_of = curves(case, sides, LONG, rounds)
    levels = [errors["diffsolve Tsit5"], *(10.0**e for e in range(-5, -10, -1))]
    rows = [
        [name, *(f"{1e6 * seconds_at(points, error):.0f}" for error in levels)]
        for name, points in points_of.items()
    ]
    print(f"\n{work}: microseconds at an error of")
    print(table(("side", *(f"{error:.0e}" for error in levels)), rows), flush=True)
    bars = bar(work, times, "diffrax Tsit5", 4)
    if "heyoka" in points_of:
        first, *others = [
            fastest(points_of, OURS, error) / fastest(points_of, ["heyoka"], error)
            for error in levels
        ]
        note = f"at an error of {levels[0]:.0e}, that of Tsit5 at 1e-8; at 1e-5 to 1e-9: "
        note += ", ".join(f"{x:.2f}" for x in others)
        bars.append(Bar(f"{work}, our time over heyoka's", first, 2, at_least=False, note=note))
    return bars


# ---------------------------------------------------------------------------------------------
# Lorenz and Pleiades
# ---------------------------------------------------------------------------------------------


def equal_error_bars(case: Case, name: str, exponent: int, rounds: int) -> list[Bar]:
    """One of our methods at one tolerance, against all sides at the error that it has there.

    heyoka chooses its order by the tolerance, so the fastest of our methods is held against it.
    """
    exponents = {**EXPONENTS, **dict.fromkeys(OURS, range(-2, -12, -1)), name: [exponent]}
    points_of = curves(case, all_sides(case), exponents, rounds)
    (own,) = points_of.pop(name)
    times = {side: seconds_at(points, own.error) for side, points in points_of.items()}
    kernel = python_share(ours(case, OURS[name])(10.0**exponent))[1]
    print(f"\n{case.name}: microseconds at an error of {own.error:.1e}")
    rows = [[f"{name}, 1e{exponent}", f"{1e6 * own.seconds:.1f}", ""]]
    rows += [[f"{name}, its kernel alone", f"{1e6 * kernel:.1f}", f"{kernel / own.seconds:.2f}"]]
    rows += [[x, f"{1e6 * s:.1f}", f"{s / own.seconds:.3g}"] for x, s in times.items()]
    print(table(("side", "us", "over ours"), rows), flush=True)

    times = {side: seconds for side, seconds in times.items() if not math.isnan(seconds)}
    heyoka = times.pop("heyoka", None)
    mine = {name: own.seconds} | {x: times.pop(x) for x in OURS if x in times}
    rival = min(times, key=lambda peer: times[peer])
    title = case.name.capitalize()
    work = f"{title}, {name.removeprefix('diffsolve ')} at 1e{exponent}"
    faster = Bar(f"{work}, fastest peer but heyoka", times[rival] / own.seconds, 1, note=rival)
    if heyoka is None:
        return [faster]
    best = min(mine, key=lambda side: mine[side])
    note = ", ".join(f"{side}: {seconds / heyoka:.2f}" for side, seconds in mine.items())
    work = f"{title} at an error of {own.error:.0e}, our time over heyoka's"
    return [faster, Bar(work, mine[best] / heyoka, 2, False, note)]


# ---------------------------------------------------------------------------------------------
# A neural ODE
# ---------------------------------------------------------------------------------------------


def network_bars(rounds: int) -> list[Bar]:
    """One trajectory of the trained network of ``spiral_neural_ode.py``, in double precision."""
    torch.manual_seed(0)
    starts, batch = dataset()
    f = models(starts, batch)[max(MOMENTS)].double()
    u0, data = starts[0].double(), batch[:, 0].double()
    problem, limits = ODEProblem(f, u0, (0.0, 1.5)), {"rtol": RTOL, "atol": ATOL}

    def own() -> Tensor:
        sensealg = DiscreteAdjoint() if torch.is_grad_enabled() else None
        return solve(problem, Tsit5(), sensealg=sensealg, saveat=TIMES, engine=ENGINE, **limits).u

    def theirs(integrate: Any) -> Tensor:
        return integrate(f, u0, TIMES, method="dopri5", **limits)

    def gradient(run: Callable[[], Tensor]) -> None:
        f.zero_grad()
        (run() - data).square().mean().backward()

    forward: dict[str, Callable[[], Any]] = {
        "diffsolve": own,
        "torchdiffeq": lambda: theirs(odeint),
    }
    backward: dict[str, Callable[[], Any]] = {
        "diffsolve": lambda: gradient(own),
        "torchdiffeq odeint": lambda: gradient(lambda: theirs(odeint)),
        "torchdiffeq odeint_adjoint": lambda: gradient(lambda: theirs(odeint_adjoint)),
    }
    if installed("diffrax"):
        weights = [w.detach().numpy() for w in f.parameters()]
        arrays = (x.numpy() for x in (u0, TIMES, data))
        forward["diffrax"], backward["diffrax"] = diffrax_network(weights, *arrays, **limits)

    bars = []
    for work, runs in (("forward", forward), ("gradient", backward)):
        with torch.set_grad_enabled(work == "gradient"):
            times = timed(runs, rounds, least=0.05)
        microseconds(f"Neural ODE, {work}", times, {})
        bars += bar(f"neural ODE, {work}", times, "torchdiffeq", 100)
        bars += bar(f"neural ODE, {work}", times, "diffrax")
    return bars


# ---------------------------------------------------------------------------------------------
# Python around the kernel
# ---------------------------------------------------------------------------------------------


def python_share(run: Callable[[], Solution], calls: int = CALLS) -> tuple[float, float]:
    """Medians over calls: seconds outside of compiled code, and within."""
    outside, within = [], []
    for _ in range(calls):
        start = time.perf_counter()
        stats = run().stats
        seconds = time.perf_counter() - start
        kernel = stats.kernel_s + (stats.adjoint.kernel_s if stats.adjoint else 0.0)
        outside.append(seconds - kernel)
        within.append(kernel)
    return statistics.median(outside), statistics.median(within)


def python_bars(rounds: int) -> list[Bar]:
    """What a call on Lotka-Volterra costs beside the loop; of `auto`, beside that of native."""
    case = saved_case()
    native, auto = (ours(case, Tsit5(), engine)(1e-8) for engine in (ENGINE, "auto"))
    last: list[Solution] = []
    gradient = our_gradient(case, Tsit5(), keep=last.append)(1e-8)

    def with_backward() -> Solution:
        gradient()
        return last.pop()

    bars = []
    for work, run, limit in (("forward", native, 60), ("with backward", with_backward, 120)):
        outside, within = python_share(run)
        note = f"within: {1e6 * within:.1f} us"
        name = f"Python around the kernel, {work}, us"
        bars.append(Bar(name, 1e6 * outside, limit, at_least=False, note=note))

    problem, t = case.problem, torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def evaluation() -> Tensor:
        return problem.f(t, problem.u0, problem.p)

    sides = {"native": native, "auto": auto, "f": evaluation}
    times = timed(sides, rounds, least=0.05)
    microseconds("The guard of engine='auto'", times, {})
    us = {name: 1e6 * value.median for name, value in times.items()}
    beyond = us["auto"] - us["native"] - us["f"]
    name = "guard of auto beyond one evaluation of f, us"
    return [*bars, Bar(name, beyond, 30, at_least=False, note=f"f: {us['f']:.1f} us")]


def parts(rounds: int) -> Iterable[list[Bar]]:
    yield forward_bars(rounds)
    yield gradient_bars(rounds)
    yield long_bars(rounds)
    yield equal_error_bars(library_case(lorenz), "diffsolve Tsit5", -6, rounds)
    yield equal_error_bars(library_case(pleiades), "diffsolve Vern7", -8, rounds)
    yield network_bars(rounds)
    yield python_bars(rounds)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    startup = startup_bars()  # processes that may use every core
    one_core()
    one_thread()
    print(versions())
    finish([*chain.from_iterable(parts(args.rounds)), *startup], args.json)


if __name__ == "__main__":
    main()
