"""The stiff solvers against CVODES, diffsol, diffrax and SciPy: forward solves and gradients.

One core, float64, all sides of a row in turn in one process, at the same tolerances. A side's time
is that of the whole call, Python included; what is compiled once for an equation was compiled
before. Of diffsolve's methods the fastest counts.

Run ``python benchmarks/stiff.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

import numpy as np
from native import bar, microseconds
from native_cases import Array
from native_peers import installed, one_core, timed, versions
from stiff_cases import OURS, At, Run, StiffCase, our_gradient, our_states, rober_saved, stiff_cases
from stiff_peers import GRADIENTS, PEERS, StiffSide, diffrax_states, present
from timing import Bar, Times, arguments, better, finish, one_thread, table

from diffsolve import SolveError

RTOL = 1e-6
TIGHT = 1e-12
SIMILAR = 1e-2  # an error of a gradient that is larger is not one of the same problem
METHODS = ("Rodas5P", "Rodas4P", "Rodas4", "KenCarp4", "Kvaerno5", "AutoTsit5(Rodas5P)")


def own_sides(make: Callable[..., At], case: StiffCase) -> dict[str, At]:
    """diffsolve by several methods."""
    return {f"diffsolve {name}": make(case, OURS[f"diffsolve {name}"]) for name in METHODS}


def usable(
    case: StiffCase,
    sides: Mapping[str, At],
    error_of: Callable[[object], float],
    largest: float,
) -> tuple[dict[str, Run], dict[str, float]]:
    """The sides that solve the problem at `RTOL`, with the errors they have."""
    runs, errors = {}, {}
    for name, at in sides.items():
        try:
            run = at(*case.limits(RTOL))
            error = error_of(run())
        except (RuntimeError, ValueError, SolveError) as failure:
            print(f"({name} is left out: {str(failure).splitlines()[0][:100]})", flush=True)
            continue
        if not error <= largest:
            print(f"({name} is left out: its error is {error:.1e})", flush=True)
            continue
        runs[name], errors[name] = run, error
    return runs, errors


def best_first(times: Mapping[str, Times]) -> dict[str, Times]:
    """With our fastest side as the first, and the others of ours left out."""
    own = better(times, [name for name in times if name.startswith("diffsolve")])
    return {own: times[own]} | {
        name: value for name, value in times.items() if not name.startswith("diffsolve")
    }


def present_peers(
    table: dict[str, StiffSide], case: StiffCase, skip: str = "none"
) -> dict[str, At]:
    return {name: side.make(case) for name, side in present(table).items() if skip not in name}


# ---------------------------------------------------------------------------------------------
# ROBER, forward
# ---------------------------------------------------------------------------------------------


def forward_bars(rounds: int) -> list[Bar]:
    case, work = rober_saved(), "ROBER, forward"
    sides = {**own_sides(our_states, case), **present_peers(PEERS, case)}
    runs, errors = usable(case, sides, lambda solved: case.error(solved[0]), 1e-2)  # type: ignore[index]
    times = timed(runs, rounds, least=0.05)
    microseconds(work, times, errors)
    times = best_first(times)
    return [
        *bar(work, times, "CVODES", 5),
        *bar(work, times, "diffrax", 40),
        *bar(work, times, "diffsol "),
        *bar(work, times, "SciPy"),
    ]


# ---------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------


def exact_gradient(case: StiffCase) -> Array:
    """By the logarithms of the parameters, at tight tolerances, agreeing with CVODES's."""
    own = our_gradient(case, OURS["diffsolve Rodas5P"])(*case.limits(TIGHT))().numpy() * case.p
    if installed("casadi"):
        side = GRADIENTS["CVODES (CasADi), forward"]
        other = side.make(case)(*case.limits(TIGHT))() * case.p
        off = np.abs(other - own).max() / np.abs(own).max()
        print(f"\n{case.name}: gradients of diffsolve and CVODES at {TIGHT:g} differ by {off:.1e}")
        if off > 1e-6:
            raise RuntimeError("the gradients of diffsolve and CVODES disagree")
    return own


def gradient_times(case: StiffCase, work: str, rounds: int, skip: str) -> dict[str, Times]:
    exact = exact_gradient(case)

    def error(gradient: object) -> float:
        off = np.abs(np.asarray(gradient) * case.p - exact).max() / np.abs(exact).max()
        return float(off) if np.isfinite(off) else math.inf

    sides = {**own_sides(our_gradient, case), **present_peers(GRADIENTS, case, skip)}
    runs, errors = usable(case, sides, error, SIMILAR)
    times = timed(runs, rounds, least=0.05)
    microseconds(work, times, errors)
    return best_first(times)


def rober_gradient_bars(rounds: int) -> list[Bar]:
    work = "ROBER, gradient"
    times = gradient_times(rober_saved(), work, rounds, skip="DirectAdjoint")
    # forward mode is not an adjoint: its cost grows with the number of parameters, here three
    reverse = {name: value for name, value in times.items() if "ForwardMode" not in name}
    return [
        *bar(work, times, "CVODES", 10),
        *bar(work, reverse, "diffrax", 100),
        *bar(work, times, "diffrax ForwardMode"),
        *bar(work, times, "diffsol "),
    ]


def pollu_gradient_bars(rounds: int) -> list[Bar]:
    work = "POLLU, gradient"
    times = gradient_times(stiff_cases()["POLLU"], work, rounds, skip="diffrax")
    return [*bar(work, times, "CVODES", 5), *bar(work, times, "diffsol ")]


# ---------------------------------------------------------------------------------------------
# Jacobians and factorisations
# ---------------------------------------------------------------------------------------------


def count_bars(_: int) -> list[Bar]:
    """Per accepted step; diffrax has one Jacobian and one factorisation an attempted step."""
    bars, rows = [], []
    for title, case in (("ROBER", rober_saved()), ("HIRES", stiff_cases()["HIRES"])):
        theirs = 1.0  # at the least
        if installed("diffrax"):
            counts = diffrax_states(case)(*case.limits(RTOL))()[1]()
            steps, attempts = counts["num_accepted_steps"], counts["num_steps"]
            theirs = attempts / steps
            rows.append([f"diffrax Kvaerno5, {title}", steps, attempts, theirs, theirs])
        for method in ("Kvaerno5", "KenCarp4"):
            own = our_states(case, OURS[f"diffsolve {method}"])(*case.limits(RTOL))()[1]()
            steps, attempts = own["naccept"], own["naccept"] + own["nreject"]
            shares = {"Jacobians": own["njac"] / steps, "factorisations": own["nlu"] / steps}
            rows.append([f"diffsolve {method}, {title}", steps, attempts, *shares.values()])
            for what, share in shares.items():
                note = f"a step: {share:.3f} to {theirs:.3f}"
                work = f"{title}, {method}: {what} over diffrax's"
                bars.append(Bar(work, share / theirs, 0.5, at_least=False, note=note))
            rejected = own["nreject"] / attempts
            work = f"{title}, {method}: rejected steps"
            bars.append(Bar(work, rejected, 0.2, at_least=False, note=f"of {attempts}"))
    print(f"\nCounts at rtol {RTOL:g}, per accepted step")
    cells = [[*row[:3], *(f"{x:.3f}" for x in row[3:])] for row in rows]
    print(table(("side", "steps", "attempts", "Jacobians", "factorisations"), cells), flush=True)
    return bars


def parts(rounds: int) -> Iterable[list[Bar]]:
    yield forward_bars(rounds)
    yield rober_gradient_bars(rounds)
    yield pollu_gradient_bars(rounds)
    yield count_bars(rounds)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    one_core()
    one_thread()
    print(versions())
    finish([*chain.from_iterable(parts(args.rounds))], args.json)


if __name__ == "__main__":
    main()
