"""Work and precision of the native engine and of its peers, on four problems of the library.

For each side a range of tolerances (rtol = atol); of each solve the largest error at the eleven
times of the stored reference, relative to the largest value of the component, and the time of the
whole call. What is compiled once for an equation is not in it, neither here nor there.

Run ``python benchmarks/native_work_precision.py``; it writes ``native_work_precision.png`` into
``benchmarks/output``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.colors as mcolors
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from native_cases import At, Case, Run, library_case, our_states
from native_peers import PEERS, one_core, present, timed, versions
from timing import OUTPUT, Bar, Times, arguments, finish, one_thread, table
from work_precision import at_error

from diffsolve import Tsit5, Vern7, Vern9
from diffsolve.problems.library import arenstorf, lorenz, lotka_volterra, pleiades

PROBLEMS = (lotka_volterra, lorenz, pleiades, arenstorf)
OURS = {f"diffsolve {alg.name}": alg for alg in (Tsit5(), Vern7(), Vern9())}
#: Exponents of ten of the tolerances: of the methods of order 5, and of the others.
LOW, HIGH = range(-3, -11, -1), range(-4, -14, -1)
EXPONENTS = {
    "diffsolve Tsit5": LOW,
    "diffrax Tsit5": LOW,
    "SciPy RK45": LOW,
    "torchdiffeq dopri5": LOW,
    "heyoka": range(-3, -16, -1),
}
COLORS = dict(zip([*OURS, *PEERS], [*mcolors.TABLEAU_COLORS, "black"], strict=True))
SLOW = 0.01  # seconds: measured once, as their distance from the others is more than the noise
DEAREST = 0.4  # seconds: tighter tolerances say nothing more


class Point(NamedTuple):
    tolerance: float
    error: float
    seconds: float


def all_sides(case: Case) -> dict[str, At]:
    """diffsolve's methods, and every peer that is installed."""
    own = {name: our_states(case, alg) for name, alg in OURS.items()}
    return {**own, **{name: side.make(case) for name, side in present(PEERS).items()}}


def curves(
    case: Case,
    sides: Mapping[str, At],
    exponents: Mapping[str, Iterable[int]],
    rounds: int,
    least: float = 0.04,
) -> dict[str, list[Point]]:
    """Every side at its tolerances, all timed in turn."""
    errors: dict[tuple[str, int], float] = {}
    runs: dict[tuple[str, int], Run] = {}
    times: dict[tuple[str, int], Times] = {}
    for name, at in sides.items():
        for exponent in exponents.get(name, HIGH):
            key = (name, exponent)
            try:
                run = at(10.0**exponent)
                errors[key] = case.error(run())
            except RuntimeError:  # it cannot reach this tolerance
                break
            once = timed({name: run}, rounds=1, least=0.0, warmup=0)[name]
            if once.median < SLOW:
                runs[key] = run
            else:
                times[key] = once
            if once.median > DEAREST:
                break
    timings = timed({str(key): run for key, run in runs.items()}, rounds, least, warmup=0)
    times |= {key: timings[str(key)] for key in runs}
    return {
        name: [
            Point(10.0**exponent, errors[name, exponent], times[name, exponent].median)
            for exponent in exponents.get(name, HIGH)
            if (name, exponent) in times and math.isfinite(errors[name, exponent])
        ]
        for name in sides
    }


def seconds_at(points: Sequence[Point], error: float) -> float:
    """Time that an error costs, between the two tolerances around it; NaN outside of the curve."""
    return at_error(points, error, lambda point: point.seconds)


def fastest(points_of: Mapping[str, Sequence[Point]], names: Iterable[str], error: float) -> float:
    """The least time at an error, of the sides that reach it; NaN where none does."""
    times = [seconds_at(points_of[name], error) for name in names]
    return min((x for x in times if not math.isnan(x)), default=math.nan)


def draw(ax: Axes, title: str, points_of: Mapping[str, Sequence[Point]]) -> None:
    for name, points in points_of.items():
        style = {"marker": "o"} if name in OURS else {"marker": "x", "ls": "--"}
        style["color"] = COLORS[name]
        x, y = [point.seconds for point in points], [point.error for point in points]
        ax.loglog(x, y, ms=4, lw=1, label=name, **style)
    ax.set(xlabel="seconds", ylabel="largest relative error", title=title, ylim=(1e-14, 1))


def in_microseconds(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{1e6 * seconds:.3g}"


def over_ours(case: Case, points_of: Mapping[str, Sequence[Point]]) -> list[Bar]:
    """Times of heyoka, and of the fastest other peer, over the fastest of ours at equal error."""
    bars = []
    others = [name for name in points_of if name not in OURS and name != "heyoka"]
    for label, names in {"heyoka": ["heyoka"], "the fastest other peer": others}.items():
        ratios = {}
        for exponent in range(-3, -12, -1):
            error = 10.0**exponent
            peer = fastest(points_of, [name for name in names if name in points_of], error)
            ratio = peer / fastest(points_of, OURS, error)
            if not math.isnan(ratio):
                ratios[exponent] = ratio
        if ratios:
            note = ", ".join(f"1e{exponent}: {ratio:.2g}" for exponent, ratio in ratios.items())
            middle = sorted(ratios.values())[len(ratios) // 2]
            bars.append(Bar(f"{case.name}: {label} over diffsolve", middle, note=note))
    return bars


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    one_core()
    one_thread()
    print(versions())

    figure, axes = plt.subplots(2, 2, figsize=(11, 9.5), sharey=True, layout="constrained")
    bars: list[Bar] = []
    for problem, ax in zip(PROBLEMS, axes.flat, strict=True):
        case = library_case(problem)
        points_of = curves(case, all_sides(case), EXPONENTS, args.rounds)
        draw(ax, case.name, points_of)
        bars += over_ours(case, points_of)
        errors = [10.0**exponent for exponent in (-3, -5, -7, -9, -11)]
        rows = [
            [name, *(in_microseconds(seconds_at(points, error)) for error in errors)]
            for name, points in points_of.items()
        ]
        print(f"\n{case.name}: microseconds at an error of")
        print(table(("side", *(f"{error:.0e}" for error in errors)), rows), flush=True)

    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT / "native_work_precision.png", dpi=130)
    print("\nplot: native_work_precision.png in benchmarks/output; bars: medians over the errors")
    finish(bars, args.json)


if __name__ == "__main__":
    main()
