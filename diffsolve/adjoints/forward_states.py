"""The states of an SDE's forward solve at any time, for a reverse solve."""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from torch import Tensor

from diffsolve.engines.plan import SolveContext
from diffsolve.engines.torch.tape import StepTape
from diffsolve.problems.sde_field import SDEField
from diffsolve.solvers.stochastic.noise.base import Noise

_ULPS = 16  # within which a time is that of a known state, as in the Brownian path


class ForwardStates:
    """States at the ends of the forward steps, and between them.

    Between the ends of a step from ``u`` to ``u_new``, a state is the step's interpolant,
    ``u + theta (u_new - u) + g(t, u) (W(t + theta h) - W(t) - theta W_step)``. With checkpoints,
    the steps of a segment are repeated for its states; those of two neighbouring ones are kept.

    Parameters
    ----------
    context
        The forward solve.
    path
        The Brownian path ``W`` of the reverse solve: both then agree at times that are new to it.
    tape
        Records of the steps.
    end, final
        Where the last step ended, and the state there.
    """

    def __init__(
        self, context: SolveContext, path: Noise, tape: StepTape, end: float, final: Tensor
    ):
        assert isinstance(context.field, SDEField)
        self.field, self.path, self.tape = context.field, path, tape
        self.direction = context.direction
        self.times = [*(record.t for record in tape.records), end]
        self.keys = [self.direction * t for t in self.times]
        self.final = final
        self.segments = tape.segments()
        self.firsts = [begin for begin, _ in self.segments]
        self.made: dict[int, list[tuple[Tensor, ...]]] = {}
        self.inside: tuple[int, Tensor] | None = None  # the step that was read last, and its g

    def at(self, t: float) -> Tensor:
        """The state at ``t``, ``(N,)``, off the tape."""
        key = self.direction * t
        i = min(max(bisect_right(self.keys, key) - 1, 0), len(self.keys) - 2)
        near = _ULPS * math.ulp(max(map(abs, (t, self.times[0], self.times[-1]))))
        for k in (i, i + 1):
            if abs(self.times[k] - t) <= near:
                return self._known(k)
        return self._between(i, t)

    def _between(self, i: int, t: float) -> Tensor:
        start, end = self.times[i], self.times[i + 1]
        u, new = self._known(i), self._known(i + 1)
        if self.inside is None or self.inside[0] != i:
            with torch.no_grad():
                G = self.field.diffusion(self.field.after(start, self.direction), u)
            self.inside = i, G
        theta = (t - start) / (end - start)
        part, whole = self.path.increment(start, t).W, self.path.increment(start, end).W
        bridge = part - theta * whole
        return torch.lerp(u, new, theta) + self.field.product(self.inside[1], bridge)

    def _known(self, k: int) -> Tensor:
        """The state at the start of step ``k``, or at the end of the last one."""
        if k == len(self.times) - 1:
            return self.final
        if self.tape.checkpoints is None:
            return self.tape.records[k].state[0]
        index = bisect_right(self.firsts, k) - 1
        if index not in self.made:
            self.made = {i: states for i, states in self.made.items() if abs(i - index) == 1}
            self.made[index] = self.tape.states(self.segments[index], self.field)
        return self.made[index][k - self.firsts[index]][0]
