"""A tour in a minute: three ways to differentiate a neural ODE, and a way to make it cheap.

python examples/demo.py             # prints two tables, writes figures to examples/output/
python examples/demo.py --quick     # a few iterations of each, to see that it runs
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import demo_figures
import torch
from regularized_spiral import QUANTITIES, study
from spiral import U0, Data, History, mean_squared_error, neural_spiral, predict, spiral_data, train
from torch import Tensor

from diffsolve import BacksolveAdjoint, DiscreteAdjoint, InterpolatingAdjoint, Sensealg
from diffsolve.nn import NeuralODE

SEED = 0
FIT_ITERATIONS, STUDY_ITERATIONS = 160, 400
SENSEALGS: tuple[Sensealg, ...] = (DiscreteAdjoint(), BacksolveAdjoint(), InterpolatingAdjoint())


@dataclass
class Fit:
    """A neural ODE that was trained with one sensealg."""

    name: str
    model: NeuralODE
    gradient_error: float
    history: History
    loss: float


def gradient(model: NeuralODE, data: Data, **overrides: Any) -> Tensor:
    """Gradient of the loss with respect to all parameters, as one vector."""
    loss = mean_squared_error(model.solve(U0, **overrides), data)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def fit(sensealg: Sensealg, data: Data, iterations: int) -> Fit:
    """Train with one sensealg; before, compare its first gradient with an accurate one."""
    model = neural_spiral(data, SEED, sensealg, rtol=1e-4, atol=1e-6)
    exact = gradient(model, data, sensealg=DiscreteAdjoint(), rtol=1e-12, atol=1e-12)
    off = (gradient(model, data) - exact).norm() / exact.norm()
    history = train(model, data, iterations, learning_rate=0.1)
    loss = mean_squared_error(predict(model), data).item()
    return Fit(type(sensealg).__name__, model, off.item(), history, loss)


def print_fits(fits: list[Fit]) -> None:
    """The table of the sensealgs."""
    print(f"{'':<22}{'evaluations an iteration':>28}{'':>12}{'gradient':>12}{'final':>12}")
    print(f"{'sensealg':<22}{'forward':>14}{'reverse':>14}{'seconds':>12}{'error':>12}{'loss':>12}")
    for f in fits:
        forward, reverse = fmean(f.history.forward_nf), fmean(f.history.reverse_nf)
        print(
            f"{f.name:<22}{forward:>14.0f}{reverse:>14.0f}{f.history.seconds:>12.1f}"
            f"{f.gradient_error:>12.1e}{f.loss:>12.5f}"
        )


def print_study(results: dict[str, Any]) -> None:
    """The table of vanilla against regularized."""
    print(f"{'':<26}{'vanilla':>14}{'regularized':>14}{'ratio':>10}")
    labels = ("evaluations", "prediction, ms", "training, s", "final loss")
    for quantity, label in zip(QUANTITIES, labels, strict=True):
        unit = 1e3 if quantity == "prediction" else 1.0
        vanilla, regularized = (results["means"][n][quantity] * unit for n in ("vanilla", "error"))
        ratio = results["ratios"]["error"][quantity]
        print(f"{label:<26}{vanilla:>14.4g}{regularized:>14.4g}{ratio:>10.2f}")


def main() -> None:
    """Run both parts, print their tables, and draw."""
    parser = argparse.ArgumentParser(description="Fit a spiral with neural ODEs.")
    parser.add_argument("--quick", action="store_true", help="a few iterations of everything")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the network is small: more threads only wait for each other
    started = time.perf_counter()
    data = spiral_data()

    print("1. Three ways to differentiate one neural ODE\n")
    fits = [fit(sensealg, data, 5 if args.quick else FIT_ITERATIONS) for sensealg in SENSEALGS]
    print_fits(fits)

    print("\n2. A loss that asks for dynamics which are easy to solve\n")
    results = study(seeds=(SEED,), iterations=10 if args.quick else STUDY_ITERATIONS)
    print_study(results)

    figures = demo_figures.draw(args.output, data, fits, results["runs"])
    print(f"\nFigures: {', '.join(str(path) for path in figures)}")
    print(f"Done in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
