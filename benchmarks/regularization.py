"""Neural ODEs regularized by the solver's error estimate: what a trained model costs.

Runs the study of ``examples/regularized_spiral.py``: from each of three seeds a vanilla training
and a regularized one, of the same length. The bars: the regularized models need at most 0.75 of the
evaluations for a prediction, fit within 10 % as well, and took no longer to train; each the ratio
of the means over the seeds.

Run ``python benchmarks/regularization.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from timing import Bar, arguments, finish, one_thread

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from regularized_spiral import HEADER, study

MOST_EVALUATIONS, MOST_LOSS, MOST_TRAINING = 0.75, 1.1, 1.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=600)
    args = parser.parse_args()
    one_thread()
    print(f"\n{HEADER}")
    result = study(
        args.seeds, args.iterations, ("error",), report=lambda row: print(row, flush=True)
    )
    ratios = result["ratios"]["error"]
    vanilla, regularized = (result["means"][name] for name in ("vanilla", "error"))
    evaluations = f"{vanilla['evaluations']:.0f} to {regularized['evaluations']:.0f}"
    losses = f"{vanilla['loss']:.3g} to {regularized['loss']:.3g}"
    seconds = f"{vanilla['training']:.1f} s to {regularized['training']:.1f} s"
    finish(
        [
            Bar("regularized, nf", ratios["evaluations"], MOST_EVALUATIONS, False, evaluations),
            Bar("regularized, final loss", ratios["loss"], MOST_LOSS, False, losses),
            Bar("regularized, training time", ratios["training"], MOST_TRAINING, False, seconds),
            Bar("regularized, prediction time", ratios["prediction"]),
        ],
        args.json,
    )


if __name__ == "__main__":
    main()
