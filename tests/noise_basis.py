"""Normals as unit vectors: what is drawn becomes a linear form, whose covariance is exact."""

from __future__ import annotations

import itertools

import torch

from diffsolve.solvers.stochastic.noise.bridge import divide
from diffsolve.solvers.stochastic.noise.philox import INV_SQRT_12


class Basis:
    """Stands for `Draws` of one path: each normal of each counter is a row of its own.

    What a path adds up from normals are then coefficients, and products of two results the
    covariance of what they stand for.
    """

    device = torch.device("cpu")

    def __init__(self, rows: int = 200):
        self.rows, self.m = rows, 1
        self.known: dict[tuple[int, int], int] = {}

    def kernel(self, name: str) -> None:
        return None

    def _unit(self, counter: int, which: int) -> torch.Tensor:
        row = self.known.setdefault((counter, which), len(self.known))
        unit = torch.zeros(self.rows, 1, dtype=torch.float64)
        unit[row] = INV_SQRT_12 if which else 1.0
        return unit

    def __call__(self, counter: int, count: int, both: bool) -> torch.Tensor:
        kinds = range(1 + both)
        return torch.stack(
            [torch.stack([self._unit(counter + i, k) for i in range(count)]) for k in kinds]
        )

    def divide(self, whole, row, scale, counter, left, right):
        W, H = whole[row : row + 2] * scale
        return divide(W, H, self(counter, 1, True)[:, 0], left, right)


def covariance(noise, points) -> torch.Tensor:
    """Of ``W`` and ``H`` of the intervals between points, each in units of its deviation."""
    rows = []
    for a, b in itertools.pairwise(points):
        W, H = noise.increment(a, b)
        rows += [W[:, 0] / abs(b - a) ** 0.5, H[:, 0] / (abs(b - a) / 12) ** 0.5]
    forms = torch.stack(rows)
    return forms @ forms.T
