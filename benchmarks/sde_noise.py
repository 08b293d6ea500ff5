"""Drawing a bridge value of a Brownian path, against torchsde's BrownianInterval.

Both know the path over the whole interval, and are then asked for increments to 256 new times in
it, each of which divides an interval that is known: in order, as steps go through one that was
rejected, and at random, each from the known point before it. Both sides are asked the same, in
float64; with and without the space-time Levy area ``H``. One core.

BrownianInterval is made as ``torchsde.sdeint`` makes it. With the length of steps announced
(``dt``) it builds its tree ahead, and is faster where they then are of this length. That comparison
is shown without a verdict: what follows a rejected step is not known ahead.

Run ``python benchmarks/sde_noise.py``.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import pairwise

import numpy as np
import torch
import torchsde
from timing import Bar, arguments, finish, in_turn, one_thread, ratio, table

from diffsolve.solvers.stochastic.noise import BrownianPath, VirtualBrownianTree

COUNT = 256
ROWS = (1, 1000)
OURS, TREE = "BrownianPath", "VirtualBrownianTree"
PEER, PEER_DT = "BrownianInterval", "BrownianInterval, dt"
Pairs = Sequence[tuple[float, float]]


def in_order() -> Pairs:
    """Steps through the whole interval, but for the last, which divides nothing."""
    points = [i / (COUNT + 1) for i in range(COUNT + 1)]
    return list(pairwise(points))


def at_random() -> Pairs:
    """From the known point before each of some times to it."""
    known, pairs = [0.0, 1.0], []
    for t in np.random.default_rng(0).uniform(0.01, 0.99, COUNT).tolist():
        pairs.append((max(x for x in known if x < t), t))
        insort(known, t)
    return pairs


def ours(pairs: Pairs, rows: int, area: bool) -> None:
    path = BrownianPath(7, rows, levy_area=area)
    path.increment(0.0, 1.0)
    for s, t in pairs:
        path.increment(s, t)


def tree(pairs: Pairs, rows: int, area: bool) -> None:
    path = VirtualBrownianTree(7, 0.0, 1.0, rows, levy_area=area)
    for s, t in pairs:
        path.increment(s, t)


def peer(pairs: Pairs, rows: int, area: bool, dt: float | None) -> None:
    bm = torchsde.BrownianInterval(
        0.0,
        1.0,
        size=(rows, 1),
        dtype=torch.float64,
        entropy=7,
        dt=dt,
        levy_area_approximation="space-time" if area else "none",
    )
    bm(0.0, 1.0)
    for s, t in pairs:
        bm(s, t, return_U=area)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    one_thread()
    print(f"torchsde {version('torchsde')}")

    bars, lines = [], []
    for order, pairs in (("in order", in_order()), ("at random", at_random())):
        for rows in ROWS:
            for area in (False, True):
                sides: dict[str, Callable[[], object]] = {
                    OURS: partial(ours, pairs, rows, area),
                    TREE: partial(tree, pairs, rows, area),
                    PEER: partial(peer, pairs, rows, area, None),
                    PEER_DT: partial(peer, pairs, rows, area, 1 / COUNT),
                }
                times = in_turn(sides, args.rounds, least=0.05)
                paths = "1 path" if rows == 1 else f"{rows} paths"
                values = f"{order}, {paths}, {'W and H' if area else 'W'}"
                each = [f"{1e6 * times[name].median / COUNT:.1f}" for name in sides]
                lines.append([values, *each])
                speed = ratio(times[PEER], times[OURS])
                bars.append(Bar(f"bridge value {values}", speed.value, 10, note=speed.spread))
                if area:
                    for name, rival in ((OURS, PEER_DT), (TREE, PEER)):
                        other = ratio(times[rival], times[name])
                        bars.append(Bar(f"  {name}, {rival}", other.value, note=other.spread))
    print("\nmicroseconds of CPU time for a value, new objects included:")
    print(table(("values", OURS, TREE, PEER, PEER_DT), lines))
    finish(bars, args.json)


if __name__ == "__main__":
    main()
