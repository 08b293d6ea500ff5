"""Neural SDEs regularized by the solver's error estimate: what a trained model costs.

Runs the study of ``examples/spiral_neural_sde.py``: from each of ten seeds a vanilla training and
regularized ones, of the same length, from the same weights and with the same noise. The bars are
those of error regularization: at most 0.95 of the evaluations for a prediction, a loss within 10 %,
and a training that took no longer; each the ratio of the means over the seeds. From seed to seed
losses differ by a third, so the means are known to a tenth. The coefficients were chosen on other
seeds, 100 to 111.

Without bars: stiffness regularization, and both at the paper's nominal tolerance, 0.3, where ten
steps are all that is taken (the docstring of the example says why that is so).

Run ``python benchmarks/sde_regularization.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from timing import Bar, arguments, finish, one_thread

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from spiral_neural_sde import HEADER, ITERATIONS, TOLERANCE, study

MOST_EVALUATIONS, MOST_LOSS, MOST_TRAINING = 0.95, 1.1, 1.0
NOMINAL = 0.3


def bars_of(result: dict[str, Any], name: str, label: str, judged: bool) -> list[Bar]:
    """The ratios of one regularizer, with the bars where it is ``judged``."""
    ratios, means = result["ratios"][name], result["means"]
    vanilla, regularized = means["vanilla"], means[name]
    rows = (
        ("evaluations", "nf", MOST_EVALUATIONS, ".0f", ""),
        ("loss", "final loss", MOST_LOSS, ".3g", ""),
        ("training", "training time", MOST_TRAINING, ".2f", " s"),
        ("prediction", "prediction time", None, ".2g", " s"),
    )
    return [
        Bar(
            f"{label}, {text}",
            ratios[quantity],
            limit if judged else None,
            at_least=False,
            note=f"{vanilla[quantity]:{form}}{unit} to {regularized[quantity]:{form}}{unit}",
        )
        for quantity, text, limit, form, unit in rows
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    args = parser.parse_args()
    one_thread()
    bars = []
    for tolerance in (TOLERANCE, NOMINAL):
        print(f"\ntolerance {tolerance:g}\n{HEADER}")
        result = study(
            args.seeds,
            args.iterations,
            report=lambda row: print(row, flush=True),
            tolerance=tolerance,
        )
        for name in result["ratios"]:
            judged = tolerance == TOLERANCE and name == "error"
            label = f"neural SDE, {name}" + ("" if tolerance == TOLERANCE else f" at {NOMINAL}")
            bars += bars_of(result, name, label, judged)
    finish(bars, args.json)


if __name__ == "__main__":
    main()
