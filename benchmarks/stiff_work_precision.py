"""Work and precision of the stiff solvers and of their peers, on five problems of the library.

For each side a range of tolerances, with the problem's ratio of atol to rtol; of each solve the
largest error at the ten times of the stored reference, relative to the size of the component, and
the time of the whole call, on one thread. What is compiled once for an equation is not in it,
neither here nor there.

Run ``python benchmarks/stiff_work_precision.py [--problems ROBER ...]``; it writes
``stiff_work_precision.png`` into ``benchmarks/output``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from native_peers import one_core, timed, versions
from native_work_precision import Point, in_microseconds
from stiff_cases import OURS, At, Run, StiffCase, our_states, stiff_cases
from stiff_peers import PEERS, present
from timing import OUTPUT, Bar, Times, arguments, finish, one_thread, table

from diffsolve import SolveError

LEVELS = [10.0**exponent for exponent in range(-3, -9, -1)]
EXPONENTS = [-0.5 * i for i in range(3, 27)]  # of ten, of rtol: 3e-2 to 1e-13
FINEST = 3e-9  # tighter tolerances than that of this error say nothing more
SLOW = 0.02  # seconds: measured once, as their distance from the others is more than the noise
DEAREST = 0.3  # seconds: tighter tolerances cost more still
SEVERAL = 8  # tolerances that fail, one after the other, before a side is given up
COLORS = dict(zip([*OURS, *PEERS], plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]


def all_sides(case: StiffCase) -> dict[str, At]:
    """diffsolve's methods, and every peer that is installed."""
    own = {name: our_states(case, alg) for name, alg in OURS.items()}
    return {**own, **{name: side.make(case) for name, side in present(PEERS).items()}}


def attempt(case: StiffCase, run: Run) -> float:
    """The error of a solve; infinite where it failed."""
    try:
        return case.error(run()[0])
    except (RuntimeError, ValueError, SolveError):
        return math.inf


def curves(
    case: StiffCase, sides: Mapping[str, At], rounds: int, least: float = 0.02
) -> dict[str, list[Point]]:
    """Every side at its tolerances, all timed in turn; solves that failed are left out."""
    errors: dict[str, tuple[str, float, float]] = {}
    runs: dict[str, Run] = {}
    times: dict[str, Times] = {}
    for name, at in sides.items():
        failures = 0
        for exponent in EXPONENTS:
            key, rtol = f"{name} {exponent}", 10.0**exponent
            run: Any = at(*case.limits(rtol))
            error = attempt(case, run)
            if not math.isfinite(error):
                failures += 1
                if failures == SEVERAL:
                    break
                continue
            failures, errors[key] = 0, (name, rtol, error)
            once = timed({name: run}, rounds=1, least=0.0, warmup=0)[name]
            if once.median < SLOW:
                runs[key] = run
            else:
                times[key] = once
            if error < FINEST or once.median > DEAREST:
                break
    times |= timed(runs, rounds, least, warmup=0)
    points_of: dict[str, list[Point]] = {name: [] for name in sides}
    for key, (name, rtol, error) in errors.items():
        points_of[name].append(Point(rtol, error, times[key].median))
    return points_of


def cost(points: Sequence[Point], error: float) -> float:
    """The least time that reaches an error, also between two tolerances; NaN where none does."""
    times = [point.seconds for point in points if point.error <= error]
    for before, after in itertools.pairwise(points):
        if before.error > error > after.error:
            share = math.log(before.error / error) / math.log(before.error / after.error)
            times.append(before.seconds ** (1 - share) * after.seconds**share)
    return min(times, default=math.nan)


def cheapest(
    points_of: Mapping[str, Sequence[Point]], names: Iterable[str], error: float
) -> tuple[float, str]:
    """The least time at an error, and whose it is; infinite where no side reaches it."""
    costs = {name: cost(points_of[name], error) for name in names}
    reached = {name: x for name, x in costs.items() if not math.isnan(x)}
    if not reached:
        return math.inf, "no side"
    name = min(reached, key=lambda name: reached[name])
    return reached[name], name


def draw(ax: Axes, title: str, points_of: Mapping[str, Sequence[Point]]) -> None:
    for name, points in points_of.items():
        style = {"marker": "o"} if name in OURS else {"marker": "x", "ls": "--"}
        x, y = [point.seconds for point in points], [point.error for point in points]
        ax.loglog(x, y, ms=4, lw=1, label=name, color=COLORS[name], **style)
    ax.set(xlabel="seconds", ylabel="largest relative error", title=title, ylim=(1e-10, 1))


def over_ours(title: str, points_of: Mapping[str, Sequence[Point]]) -> list[Bar]:
    """Times of the fastest peer over the fastest of ours, one bar an error."""
    bars = []
    for error in LEVELS:
        own, method = cheapest(points_of, [name for name in points_of if name in OURS], error)
        peer, rival = cheapest(points_of, [name for name in points_of if name not in OURS], error)
        note = f"{rival}, {1e6 * peer:.0f} us, over {method}, {1e6 * own:.0f} us"
        bars.append(Bar(f"{title} at {error:.0e}: best peer", peer / own, 1, note=note))
    return bars


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--problems", nargs="*", default=list(stiff_cases()))
    args = parser.parse_args()
    one_core()
    one_thread()
    print(versions())

    figure, axes = plt.subplots(2, 3, figsize=(15, 9.5), sharey=True, layout="constrained")
    bars: list[Bar] = []
    for title, ax in zip(args.problems, axes.flat, strict=False):
        case = stiff_cases()[title]
        points_of = curves(case, all_sides(case), args.rounds)
        draw(ax, title, points_of)
        bars += over_ours(title, points_of)
        rows = [
            [name, *(in_microseconds(cost(points, error)) for error in LEVELS)]
            for name, points in points_of.items()
        ]
        print(f"\n{title}: microseconds at an error of")
        print(table(("side", *(f"{error:.0e}" for error in LEVELS)), rows), flush=True)
    for ax in axes.flat[len(args.problems) :]:
        ax.set_axis_off()

    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT / "stiff_work_precision.png", dpi=130)
    print("\nplot: stiff_work_precision.png in benchmarks/output")
    finish(bars, args.json)


if __name__ == "__main__":
    main()
