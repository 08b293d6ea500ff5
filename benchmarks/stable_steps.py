"""What it costs to keep explicit steps stable where they are differentiated.

Run ``python benchmarks/stable_steps.py``. It counts evaluations of ``f``, which do not depend on
the load of the machine: those of the same solve with a gradient over those without.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timing import arguments, finish, one_thread, table
from torch import Tensor

from diffsolve import BS3, DP8, Heun, ODEProblem, Tsit5, Vern7, solve
from diffsolve.problems import library

METHODS = (Heun(), BS3(), Tsit5(), Vern7(), DP8())
POINTS = 100
GRID = torch.linspace(0, 1, POINTS + 2, dtype=torch.float64)[1:-1]


def heat(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    ends = torch.nn.functional.pad(u, (1, 1))
    return p[0] * (POINTS + 1) ** 2 * (ends[2:] - 2 * u + ends[:-2])


def fisher(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return heat(t, u, p) + u * (1 - u)


def advection(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[0] * (POINTS / 2) * (u.roll(1) - u.roll(-1))


def cases() -> dict[str, ODEProblem]:
    one, bump = torch.ones(1, dtype=torch.float64), torch.exp(-100 * (GRID - 0.5) ** 2)
    return {
        "Lotka-Volterra": library.lotka_volterra(),
        "Lorenz, to t = 20": library.lorenz().remake(tspan=(0.0, 20.0)),
        "one decay, 1,000 of its times": ODEProblem(
            lambda t, u, p: -100 * p * u, one, (0.0, 10.0), one
        ),
        "heat, 100 points": ODEProblem(heat, torch.sin(math.pi * GRID), (0.0, 0.1), one),
        "Fisher's equation, 100 points": ODEProblem(fisher, bump, (0.0, 0.1), one),
        "advection, 100 points, to t = 2": ODEProblem(advection, bump, (0.0, 2.0), one),
        "the same, to t = 20": ODEProblem(advection, bump, (0.0, 20.0), one),
    }


def ratio(prob: ODEProblem, alg: Any, tol: float) -> float:
    """Evaluations with a gradient over those without."""
    options: dict[str, Any] = {"rtol": tol, "atol": 1e-3 * tol, "saveat": [prob.tspan[1]]}
    options["maxiters"] = 1_000_000
    counts = []
    for wanted in (True, False):
        p = prob.p.clone().requires_grad_(wanted)
        counts.append(solve(prob.remake(p=p), alg, engine="native", **options).stats.nf)
    return counts[0] / counts[1]


def main() -> None:
    args = arguments(__doc__).parse_args()
    one_thread()
    for tol in (1e-3, 1e-5):
        rows = [
            (name, *(f"{ratio(prob, alg, tol):.2f}" for alg in METHODS))
            for name, prob in cases().items()
        ]
        print(f"\nrtol {tol:g}: evaluations with a gradient over those without")
        print(table(("problem", *(alg.name for alg in METHODS)), rows), flush=True)
    finish([], args.json)


if __name__ == "__main__":
    main()
