"""Stochastic equations against torchsde: the table of its bars.

One core, float64, all sides of a row in turn in one process; a side's time is that of the whole
call, noise included. Errors are those at the end, against the exact solution along each side's own
noise.

- Geometric Brownian motion, 1,000 paths, 1,000 Euler-Maruyama steps, and the gradient of the mean
  at the end by drift and volatility. The bars are for ``torchsde.sdeint`` as it is called. It is
  four times faster where it is given noise that was told the step size, and builds its tree ahead:
  the rows below each bar.
- Adaptive SOSRI against adaptive srk at equal strong errors: times at several tolerances,
  interpolated; the least ratio of three errors. The bar is for the engine that ``solve`` chooses,
  torch alone is in the row below.
- A bridge value of the path: ``sde_noise.py``.

Run ``python benchmarks/sde.py``; it writes ``sde.png`` into ``benchmarks/output``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from sde_cases import (
    NOISES,
    Case,
    at_tolerance,
    gbm,
    gradient_error,
    hyperbolic_sine,
    hyperbolic_tangent,
    our_adaptive,
    our_em,
    our_gradient,
    runs_native,
    strong_error,
    their_adaptive,
    their_em,
    their_gradient,
)
from timing import (
    OUTPUT,
    Bar,
    Times,
    arguments,
    finish,
    in_turn,
    one_thread,
    ratio,
    table,
)
from work_precision import Point, at_error

PATHS, STEPS = 1000, 1000
TORCH, NATIVE = "diffsolve, torch", "diffsolve, native"
LIMITS = {TORCH: 3, NATIVE: 50}
#: Cases and numbers of paths of the adaptive rows.
ADAPTIVE = (
    (gbm(1.5, 1.0), 100),
    (gbm(1.5, 1.0), 1000),
    (hyperbolic_tangent(), 1000),
    (hyperbolic_sine(), 1000),
)
TOLERANCES = [10.0 ** (-0.5 * k) for k in range(1, 11)]
DEAREST = 0.5  # seconds: tighter tolerances cost more still
LEAST = 10  # the bar of the adaptive rows


def milliseconds(title: str, times: Mapping[str, Times], errors: Mapping[str, float]) -> None:
    rows = [
        [name, f"{1e3 * x.median:.2f}", f"{1e3 * x.best:.2f}", f"{errors[name]:.2e}"]
        for name, x in times.items()
    ]
    print(f"\n{title}: milliseconds")
    print(table(("side", "median", "best", "error"), rows), flush=True)


def fixed_bars(
    work: str, sides: dict[str, Callable[[], Any]], errors: dict[str, float], rounds: int
) -> list[Bar]:
    """Each of torchsde's over each of ours."""
    times = in_turn(sides, rounds)
    milliseconds(work, times, errors)
    bars = []
    for name, limit in LIMITS.items():
        for k, rival in enumerate(NOISES) if name in times else ():
            speedup = ratio(times[rival], times[name])
            if k == 0:
                bars.append(Bar(f"{work}, {name}", speedup.value, limit, note=speedup.spread))
            else:
                bars.append(Bar(f"  over {rival}", speedup.value, note=speedup.spread))
    return bars


def em_bars(rounds: int, engines: Mapping[str, str]) -> list[Bar]:
    case = gbm(0.1, 0.2)
    sides: dict[str, Callable[[], Any]] = {
        name: partial(our_em, case, PATHS, STEPS, engine) for name, engine in engines.items()
    }
    sides |= {name: partial(their_em, case, PATHS, STEPS, name) for name in NOISES}
    errors = {name: strong_error(case, lambda seed, run=run: run(), 1)
              for name, run in sides.items()}  # fmt: skip
    bars = fixed_bars("GBM, 1,000 EM steps", sides, errors, rounds)

    sides = {name: partial(our_gradient, case, PATHS, STEPS, engine)
             for name, engine in engines.items()}  # fmt: skip
    sides |= {name: partial(their_gradient, case, PATHS, STEPS, name) for name in NOISES}
    errors = {name: gradient_error(case, run(), PATHS) for name, run in sides.items()}
    return bars + fixed_bars("gradient of its mean", sides, errors, rounds)


def curves(
    case: Case, paths: int, engines: Mapping[str, str], rounds: int
) -> dict[str, list[Point]]:
    """Strong errors and times of all sides at their tolerances, timed in turn."""
    seeds = max(1, 1000 // paths)
    sides = {name: our_adaptive(case, paths, engine) for name, engine in engines.items()}
    sides["torchsde"] = their_adaptive(case, paths)
    errors: dict[str, tuple[str, float, float]] = {}
    runs: dict[str, Callable[[], None]] = {}
    for name, run in sides.items():
        for tolerance in TOLERANCES:
            key = f"{name} {tolerance}"
            error = strong_error(case, partial(run, tolerance), seeds)
            errors[key] = name, tolerance, error
            runs[key] = at_tolerance(run, tolerance, seeds)
            once = in_turn({key: runs[key]}, rounds=1, least=0.0, warmup=0)[key]
            if once.best > DEAREST:
                break
    times = in_turn(runs, rounds, least=0.02, warmup=0)
    points_of: dict[str, list[Point]] = {name: [] for name in sides}
    for key, (name, tolerance, error) in errors.items():
        points_of[name].append(Point(tolerance, error, 0, times[key].median / seeds))
    return points_of


def levels(points_of: Mapping[str, list[Point]]) -> list[float]:
    """Three errors within what all sides reached, evenly spaced in their logarithms."""
    low = max(min(p.error for p in points) for points in points_of.values())
    high = min(max(p.error for p in points) for points in points_of.values())
    return [high * (low / high) ** share for share in (0.25, 0.5, 0.75)]


def adaptive_bars(case: Case, paths: int, engines: Mapping[str, str], rounds: int, ax: Axes):
    points_of = curves(case, paths, engines, rounds)
    rows = [
        [name, f"{p.tolerance:.1e}", f"{p.error:.2e}", f"{1e3 * p.seconds:.2f}"]
        for name, points in points_of.items()
        for p in points
    ]
    title = f"{case.name}, {paths} paths"
    print(f"\n{title}, adaptive")
    print(table(("side", "tolerance", "strong error", "milliseconds"), rows), flush=True)
    for name, points in points_of.items():
        ax.loglog([p.seconds for p in points], [p.error for p in points], "o-", ms=4, label=name)
    ax.set(title=title, xlabel="seconds", ylabel="strong error")

    speeds: dict[str, list[tuple[float, str]]] = {name: [] for name in engines}
    for error in levels(points_of):
        seconds = {
            name: at_error(points, error, lambda p: p.seconds) for name, points in points_of.items()
        }
        theirs = seconds["torchsde"]
        for name in engines:
            note = f"{1e3 * theirs:.1f} ms over {1e3 * seconds[name]:.2f} ms at {error:.0e}"
            speeds[name].append((theirs / seconds[name], note))
    bars = []
    for name in reversed(engines):  # the chosen one first
        (least, note), (most, _) = min(speeds[name]), max(speeds[name])
        note = f"{note}; up to {most:.3g}"
        if not bars:
            bars.append(Bar(f"SOSRI, {title}, {name}", least, LEAST, note=note))
        else:
            bars.append(Bar(f"  {name}", least, note=note))
    return bars


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    one_thread()
    print(f"torchsde {version('torchsde')}")
    engines = {TORCH: "torch", NATIVE: "native"}
    if declined := runs_native(gbm(0.1, 0.2)):
        print(f"no rows of the native engine: {declined}")
        del engines[NATIVE]

    bars = em_bars(args.rounds, engines)
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    for (case, paths), ax in zip(ADAPTIVE, axes.flat, strict=True):
        bars += adaptive_bars(case, paths, engines, max(3, args.rounds // 2), ax)
    axes.flat[0].legend()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT / "sde.png", dpi=130)
    print("\nplot: sde.png in benchmarks/output")
    finish(bars, args.json)


if __name__ == "__main__":
    main()
