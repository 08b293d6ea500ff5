"""Dense output over a whole solve: the steps' continuous extensions, joined."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from diffsolve.solvers.algorithm import StepInterpolant, read


class DenseOutput:
    """Continuous extension of consecutive steps, in either direction of time.

    Parameters
    ----------
    t0
        Start of the first step.
    direction
        1.0 forward, -1.0 backward in time.
    u0
        Flat state at ``t0``.
    """

    def __init__(self, t0: float, direction: float, u0: Tensor):
        self.direction = direction
        self.u0 = u0
        self.ends: list[float] = [direction * t0]  # increasing: times by the direction
        self.steps: list[StepInterpolant] = []

    def append(self, t_end: float, interpolant: StepInterpolant) -> None:
        self.steps.append(interpolant.keep())
        self.ends.append(self.direction * t_end)

    def flatten(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], DenseOutput]]:
        """The tensors of its steps, and a function that makes the same of such tensors."""
        direction, u0, ends = self.direction, self.u0, self.ends
        flat = [step.flatten() for step in self.steps]
        rebuilders = [(len(tensors), rebuild) for tensors, rebuild in flat]

        def rebuilt(tensors: Sequence[Tensor]) -> DenseOutput:
            dense = DenseOutput(direction * ends[0], direction, u0)
            rest = iter(tensors)
            dense.steps = [make(*islice(rest, count)) for count, make in rebuilders]
            dense.ends = ends
            return dense

        return [x for tensors, _ in flat for x in tensors], rebuilt

    def locate(self, t: float) -> tuple[int, float]:
        """Index of the step that holds ``t`` (the earlier one at a joint), and theta in it.

        Raises
        ------
        ValueError
            If ``t`` is outside of the steps.
        """
        s = self.direction * t
        if not self.ends[0] <= s <= self.ends[-1]:
            ends = sorted((self.direction * self.ends[0], self.direction * self.ends[-1]))
            raise ValueError(f"t = {t} is outside of the solved interval {ends}")
        if not self.steps:
            return 0, 0.0
        i = min(max(bisect_left(self.ends, s) - 1, 0), len(self.steps) - 1)
        return i, (s - self.ends[i]) / (self.ends[i + 1] - self.ends[i])

    def at(self, t: float, derivative: int = 0) -> Tensor:
        """State, or a derivative of it, at one time."""
        i, theta = self.locate(t)
        at = torch.tensor([theta], dtype=torch.float64, device="cpu")
        return read(self.steps[i], [t], at, derivative)[0]

    def __call__(self, times: Sequence[float], derivative: int = 0) -> Tensor:
        """States ``(m, N)`` at times in any order."""
        values = torch.empty(len(times), len(self.u0), dtype=self.u0.dtype, device=self.u0.device)
        located = [self.locate(t) for t in times]
        if not self.steps:  # an empty span: every time is t0
            return self.u0.expand_as(values) if not derivative else torch.zeros_like(values)
        chunks, order = [values[:0]], []
        for index in sorted({i for i, _ in located}):
            here = [j for j, (i, _) in enumerate(located) if i == index]
            theta = torch.tensor([located[j][1] for j in here], dtype=torch.float64, device="cpu")
            chunks.append(read(self.steps[index], [times[j] for j in here], theta, derivative))
            order += here
        back = torch.tensor(order, dtype=torch.long, device=self.u0.device).argsort()
        return torch.cat(chunks)[back]
