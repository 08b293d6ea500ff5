"""Neural ODEs that are easy to solve: the error estimate of the solver as a regularizer.

Two trainings from the same weights, with the same optimizer and data, differ in one term of the
loss: the sum of the error estimates of the solver's steps. Afterwards one of them needs fewer
evaluations of its network for a prediction.

    python examples/regularized_spiral.py                       # 3 seeds, two trainings each
    python examples/regularized_spiral.py --regularizers all    # all the regularizers below

References
----------
Pal, Ma, Shah, Rackauckas, Opening the Blackbox: Accelerating Neural Differential Equations by
Regularizing Internal Solver Heuristics, ICML 2021: 1083 evaluations fall to 676 on a spiral.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from spiral import (
    Data,
    Regularizer,
    mean_squared_error,
    neural_spiral,
    predict,
    prediction_seconds,
    spiral_data,
    train,
)
from torch import Tensor

from diffsolve import Solution
from diffsolve.regularization import (
    ExponentialAnnealing,
    error_estimate,
    local_error_estimate,
    stiffness_estimate,
)


def local_error(sol: Solution) -> Tensor:
    """Error estimate of one more step, from a random saved state."""
    i = int(torch.randint(len(sol.t) - 1, ()))
    return local_error_estimate(sol, at=(float(sol.t[i]), sol.u[i].detach()))


#: Name: the regularizer, and its coefficient at the first and at the last iteration.
REGULARIZERS: dict[str, tuple[Callable[[Solution], Tensor], float, float]] = {
    "error": (error_estimate, 0.05, 0.003),
    "mean error": (
        lambda sol: error_estimate(sol, "mean", weight_by_step=False),
        0.1,
        0.005,
    ),
    "mean squared error": (
        lambda sol: error_estimate(sol, "mean", power=2, weight_by_step=False),
        0.1,
        0.005,
    ),
    "local error": (local_error, 30.0, 1.0),
    "stiffness": (lambda sol: stiffness_estimate(sol, "mean"), 0.003, 0.0001),
}


def annealed(name: str, iterations: int) -> Regularizer | None:
    """The named regularizer with its falling coefficient; None for ``"vanilla"``."""
    if name == "vanilla":
        return None
    estimate, start, end = REGULARIZERS[name]
    coefficient = ExponentialAnnealing(start, end, iterations)
    return lambda sol, i: coefficient(i) * estimate(sol)


def run(name: str, seed: int, data: Data, iterations: int) -> dict[str, Any]:
    """Train from one seed, and measure the trained model."""
    model = neural_spiral(data, seed)
    history = train(model, data, iterations, regularizer=annealed(name, iterations))
    sol = predict(model)
    return {
        "seed": seed,
        "model": model,
        "history": history,
        "solution": sol,
        "evaluations": sol.stats.nf,
        "loss": mean_squared_error(sol, data).item(),
        "training": history.seconds,
        "prediction": prediction_seconds(model),
    }


#: What is compared: each as the ratio of the regularized model's to the vanilla one's.
QUANTITIES = ("evaluations", "prediction", "training", "loss")


def study(
    seeds: Sequence[int] = (0, 1, 2),
    iterations: int = 600,
    regularizers: Sequence[str] = ("error",),
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a vanilla and regularized neural ODEs from each seed.

    Parameters
    ----------
    seeds
        Seeds of the initial weights.
    iterations
        Length of each training.
    regularizers
        Names in ``REGULARIZERS``.
    report
        Called with a line of text after each training.

    Returns
    -------
    dict
        As ``compare``.
    """
    data = spiral_data()
    return compare(
        lambda name, seed: run(name, seed, data, iterations), seeds, regularizers, report
    )


def compare(
    run: Callable[[str, int], dict[str, Any]],
    seeds: Sequence[int],
    regularizers: Sequence[str],
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a vanilla and regularized models from each seed, and average what they cost.

    Parameters
    ----------
    run
        Trains from ``(name, seed)``, and returns what it measured: among it ``QUANTITIES``.
    seeds, regularizers, report
        As for ``study``.

    Returns
    -------
    dict
        ``runs``: for ``"vanilla"`` and each regularizer, what ``run`` gave for each seed.
        ``means``: each of ``QUANTITIES`` averaged over the seeds.
        ``ratios``: for each regularizer, these averages divided by vanilla's.
    """
    names = ("vanilla", *regularizers)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            runs[name].append(run(name, seed))
            report(line(f"seed {seed}", name, runs[name][-1], runs["vanilla"][-1]))
    means = {name: {q: fmean(r[q] for r in runs[name]) for q in QUANTITIES} for name in names}
    for name in names:
        report(line("mean", name, means[name], means["vanilla"]))
    ratios = {
        name: {q: means[name][q] / means["vanilla"][q] for q in QUANTITIES} for name in regularizers
    }
    return {"runs": runs, "means": means, "ratios": ratios}


COLUMNS = "".join(f"{quantity:>18}" for quantity in QUANTITIES)
HEADER = f"{'':<28}{COLUMNS}"


def line(label: str, name: str, result: dict[str, Any], vanilla: dict[str, Any]) -> str:
    """A row of the table: the measured values and, in brackets, their ratios to vanilla's."""
    texts = {
        "evaluations": f"{result['evaluations']:.0f}",
        "prediction": f"{result['prediction'] * 1e3:.1f} ms",
        "training": f"{result['training']:.1f} s",
        "loss": f"{result['loss']:.5f}",
    }
    cells = "".join(f"{text:>11} ({result[q] / vanilla[q]:.2f})" for q, text in texts.items())
    return f"{label:<8}{name:<20}{cells}"


def main() -> None:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument(
        "--regularizers", nargs="+", default=["error"], choices=["all", *REGULARIZERS]
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = list(REGULARIZERS) if "all" in args.regularizers else args.regularizers
    print("In brackets: the ratio to vanilla. Training in seconds of processor time.")
    print(HEADER)
    study(args.seeds, args.iterations, names, report=lambda row: print(row, flush=True))


if __name__ == "__main__":
    main()
