"""Work and precision of the explicit methods on library problems, with SciPy's beside them.

For each method a range of tolerances (rtol = atol); of each solve the largest error at the eleven
times of the stored reference, relative to the largest value of the component, the evaluations of
``f`` and the time. SciPy's RK45 (the pair of DP5) and DOP853 (that of DP8) call the same ``f``
through NumPy arrays, so their time is as much PyTorch's as that of diffsolve.

Run ``python benchmarks/work_precision.py``; it writes ``work_precision_<problem>.png`` into
``benchmarks/output``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from timing import OUTPUT, Bar, arguments, finish, in_turn, one_thread, table

from diffsolve import BS3, DP5, DP8, ExplicitRK, Tsit5, Vern6, Vern7, Vern9, solve
from diffsolve.problems.library import (
    LibraryProblem,
    Reference,
    arenstorf,
    lorenz,
    lotka_volterra,
    pleiades,
)

PROBLEMS: tuple[LibraryProblem, ...] = (lotka_volterra, lorenz, pleiades, arenstorf)
#: Method: exponents of ten of its tolerances.
METHODS: dict[str, tuple[ExplicitRK | None, Sequence[int]]] = {
    "BS3": (BS3(), range(-3, -7, -1)),
    "DP5": (DP5(), range(-3, -10, -1)),
    "Tsit5": (Tsit5(), range(-3, -10, -1)),
    "Vern6": (Vern6(), range(-4, -12, -1)),
    "Vern7": (Vern7(), range(-4, -13, -1)),
    "DP8": (DP8(), range(-4, -13, -1)),
    "Vern9": (Vern9(), range(-6, -14, -1)),
    "RK45": (None, range(-3, -10, -1)),
    "DOP853": (None, range(-4, -13, -1)),
}
PAIRS = {"DP5": "RK45", "DP8": "DOP853"}  # the same coefficients in SciPy
MOST_NF = 40_000  # dearer solves say nothing more


class Point(NamedTuple):
    tolerance: float
    error: float
    nf: int
    seconds: float


def ours(
    problem: LibraryProblem, reference: Reference, alg: ExplicitRK, tolerance: float
) -> tuple[NDArray[np.float64], int]:
    limits = {"rtol": tolerance, "atol": tolerance}
    solution = solve(problem(), alg, saveat=reference.t, engine="torch", **limits)
    return solution.u.numpy(), solution.stats.nf


def scipys(
    problem: LibraryProblem, reference: Reference, name: str, tolerance: float
) -> tuple[NDArray[np.float64], int]:
    made = problem()
    f, p = made.f, made.p

    def rhs(t: float, u: NDArray[np.float64]) -> NDArray[np.float64]:
        return f(t, torch.from_numpy(u), p).numpy()

    result: Any = solve_ivp(
        rhs,
        (reference.t[0], reference.t[-1]),
        made.u0.numpy(),
        method=name,
        t_eval=reference.t,
        rtol=tolerance,
        atol=tolerance,
    )
    return result.y.T, result.nfev


def curves(problem: LibraryProblem, rounds: int) -> dict[str, list[Point]]:
    """Every method at its tolerances."""
    reference = problem.reference()
    size = np.abs(reference.u).max(0)
    points_of: dict[str, list[Point]] = {}
    for name, (alg, exponents) in METHODS.items():
        points = points_of[name] = []
        for exponent in exponents:
            tolerance = 10.0**exponent

            def run(
                name: str = name, alg: ExplicitRK | None = alg, tolerance: float = tolerance
            ) -> tuple[NDArray[np.float64], int]:
                if alg is None:
                    return scipys(problem, reference, name, tolerance)
                return ours(problem, reference, alg, tolerance)

            u, nf = run()
            if nf > MOST_NF:
                break
            error = float((np.abs(u - reference.u) / size).max())
            times = in_turn({name: run}, rounds, least=0.0, warmup=0)
            points.append(Point(tolerance, error, nf, times[name].best))
    return points_of


def at_error(points: Sequence[Point], error: float, value: Callable[[Point], float]) -> float:
    """``value`` at an error, between the two tolerances around it; NaN outside of the curve."""
    for before, after in itertools.pairwise(points):
        if before.error >= error >= after.error and before.error > after.error:
            share = math.log(before.error / error) / math.log(before.error / after.error)
            return value(before) ** (1 - share) * value(after) ** share
    return math.nan


def draw(problem: LibraryProblem, points_of: dict[str, list[Point]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for name, points in points_of.items():
        style = {"ls": "--", "marker": "x"} if METHODS[name][0] is None else {"marker": "o"}
        errors = [point.error for point in points]
        for ax, work in zip(axes, ("nf", "seconds"), strict=True):
            label = f"SciPy {name}" if METHODS[name][0] is None else name
            ax.loglog([getattr(x, work) for x in points], errors, ms=4, lw=1, label=label, **style)
    axes[0].set(xlabel="evaluations of f", ylabel="largest relative error")
    axes[1].set(xlabel="seconds")
    axes[1].legend(fontsize=8)
    figure.suptitle(problem.name)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT / f"work_precision_{problem.name}.png", dpi=130)
    plt.close(figure)


def median_ratio(
    all_points: Sequence[dict[str, list[Point]]], a: str, b: str, value: Callable[[Point], float]
) -> tuple[float, float, float]:
    """``value`` of ``a`` over that of ``b`` at equal error: median, least and greatest."""
    ratios = []
    for curve in all_points:
        for exponent in range(-3, -12, -1):
            x, y = (at_error(curve[name], 10.0**exponent, value) for name in (a, b))
            if not math.isnan(x / y):
                ratios.append(x / y)
    return float(np.median(ratios)), min(ratios), max(ratios)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    one_thread()

    everything = []
    for problem in PROBLEMS:
        points_of = curves(problem, args.rounds)
        everything.append(points_of)
        draw(problem, points_of)
        print(f"\n{problem.name}: nf and milliseconds at an error of")
        errors = [10.0**e for e in (-3, -5, -7, -9, -11)]
        rows = []
        for name, points in points_of.items():
            cells = []
            for error in errors:
                nf = at_error(points, error, lambda x: x.nf)
                ms = 1e3 * at_error(points, error, lambda x: x.seconds)
                cells.append("-" if math.isnan(nf) else f"{nf:.0f} ({ms:.0f})")
            rows.append([name, *cells])
        print(table(("method", *(f"{error:.0e}" for error in errors)), rows), flush=True)

    bars = []
    for a, b in PAIRS.items():
        for what, value in (("nf", lambda x: x.nf), ("time", lambda x: x.seconds)):
            middle, low, high = median_ratio(everything, a, b, value)
            note = f"from {low:.2f} to {high:.2f} over problems and errors of 1e-3 to 1e-11"
            bars.append(Bar(f"{a} over SciPy's {b}, {what} at equal error", middle, note=note))
    print(f"\nplots: {len(PROBLEMS)} files work_precision_*.png in benchmarks/output")
    finish(bars, args.json)


if __name__ == "__main__":
    main()
