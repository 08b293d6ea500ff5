"""A batch of 1,000 HIRES with different rates on the torch engine, against SciPy's Radau.

diffsolve solves one problem with a state of ``(1000, 8)``: batched factorisations, and steps that
all share. SciPy solves one after the other, with compiled equations and Jacobian; a sample of 20 of
them is timed, and the time of all is 50 times theirs. One core, float64, the same tolerances.

Run ``python benchmarks/stiff_batch.py``.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from native_peers import one_core, timed, versions
from stiff_cases import OURS, Run, StiffCase, counts_of, stiff_cases
from stiff_peers import solve_ivp_states
from timing import Bar, Times, arguments, better, finish, one_thread, ratio, table

from diffsolve import Solution, solve
from diffsolve.solvers.algorithm import Algorithm

BATCH, SAMPLE = 1000, 20
RTOL = 1e-6
SPREAD = 0.2  # of the rates, about those of the problem
METHODS = ("AutoTsit5(Rodas5P)", "Rodas5P", "Rodas4P", "KenCarp4")


def rates(case: StiffCase) -> np.ndarray:
    """``(1000, 10)``: every rate within `SPREAD` of its own."""
    factors = np.random.default_rng(0).uniform(1 - SPREAD, 1 + SPREAD, (BATCH, len(case.p)))
    return case.p * factors


def batched(case: StiffCase, p: np.ndarray, alg: Algorithm, rtol: float, atol: float) -> Solution:
    problem = case.problem.remake(
        u0=case.problem.u0.expand(BATCH, -1).clone(), p=torch.from_numpy(p)
    )
    times = torch.from_numpy(case.t)
    return solve(problem, alg, saveat=times, rtol=rtol, atol=atol, engine="torch")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    one_core()
    one_thread()
    print(versions())

    case = stiff_cases()["HIRES"]
    p, chosen = rates(case), np.arange(0, BATCH, BATCH // SAMPLE)

    def sample(rtol: float) -> np.ndarray:
        """``(T, 20, 8)`` by Radau."""
        each = [solve_ivp_states(case, "Radau", p[i])(*case.limits(rtol)) for i in chosen]
        return np.stack([run()[0] for run in each], 1)

    exact = sample(1e-9)
    size = np.abs(exact).max(0) + case.share

    def error(u: np.ndarray) -> float:
        return float((np.abs(u - exact) / size).max())

    sides: dict[str, Run] = {"SciPy Radau, 20 of 1000": partial(sample, RTOL)}
    for name in METHODS:
        sides[name] = partial(batched, case, p, OURS[f"diffsolve {name}"], *case.limits(RTOL))
    solved = {name: run() for name, run in sides.items()}
    times = timed(sides, args.rounds, least=0.0, warmup=0)
    rows = []
    for name, solution in solved.items():
        ours = isinstance(solution, Solution)
        u = solution.u.numpy()[:, chosen] if ours else solution
        counts = counts_of(solution) if ours else {}
        work = [str(counts.get(x, "")) for x in ("naccept", "nreject", "nf", "njac", "nlu")]
        rows.append([name, str(times[name]), f"{error(u):.1e}", *work])
    header = ("side", "milliseconds", "error", "steps", "rejected", "nf", "njac", "nlu")
    print(table(header, rows), flush=True)

    sampled = times["SciPy Radau, 20 of 1000"]
    every = Times([seconds * BATCH / SAMPLE for seconds in sampled.rounds])
    own = better(times, METHODS)
    speed = ratio(every, times[own])
    note = f"{speed.spread}; {own}; Radau: 50 times a sample of 20"
    finish([Bar("1000 HIRES on torch, SciPy Radau", speed.value, 20, note=note)], args.json)


if __name__ == "__main__":
    main()
