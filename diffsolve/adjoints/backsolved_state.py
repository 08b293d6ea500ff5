"""The forward state as a backsolve adjoint solves it again: checked, and reset at saved times."""

from __future__ import annotations

from torch import Tensor

from diffsolve.engines.plan import AdjointEquation, SolveContext
from diffsolve.engines.reverse_solves import in_tolerances
from diffsolve.engines.torch.reverse_field import ReverseField
from diffsolve.solvers.norms import Tolerance


class BacksolveWarning(UserWarning):
    """The state that was solved again, backward in time, is far from the true one."""


class BacksolvedState(ReverseField):
    """A reverse equation whose state carries ``u`` between ``lambda`` and ``mu``.

    Attributes
    ----------
    adjoint, context
        The sensealg, and the forward solve.
    u0
        The initial state, which ``u`` ought to reach.
    worst
        Largest distance of ``u`` from a known state so far, in tolerances.
    """

    def expect(self, adjoint: AdjointEquation, context: SolveContext, u0: Tensor) -> None:
        """Note what ``u`` is compared with; called before the reverse solve."""
        self.adjoint, self.context, self.u0 = adjoint, context, u0
        self.worst = 0.0

    def tolerance(self, rtol: float, atol: float, forward: Tolerance) -> Tolerance:
        """The forward tolerance for the state, where it was not overridden."""
        own = super().tolerance(rtol, atol, forward)

        def blocks(ours: Tensor, theirs: Tensor, overridden: bool) -> Tensor:
            full = ours.expand(sum(self.sizes)).clone()
            if not overridden:
                full[self.n : 2 * self.n] = theirs
            return full

        return Tolerance(
            blocks(own.rtol, forward.rtol, self.adjoint.rtol is not None),
            blocks(own.atol, forward.atol, self.adjoint.atol is not None),
            self.norm,
        )

    def start(self, bar: Tensor, u: Tensor) -> Tensor:
        z = super().start(bar, u)
        z[self.n : 2 * self.n] = u
        return z

    def at_save(self, z: Tensor, bar: Tensor, u: Tensor) -> Tensor:
        z = super().at_save(z, bar, u)
        if self.adjoint.resets_state:
            self._compare(z, u)
            z[self.n : 2 * self.n] = u
        return z

    def finish(self, z: Tensor) -> None:
        self._compare(z, self.u0)
        self.adjoint.warn_of(self.worst)

    def distance(self, reached: Tensor, u: Tensor) -> float:
        """By how many tolerances ``reached`` is off."""
        return in_tolerances(reached, u, self.context.settings.tolerance)

    def _compare(self, z: Tensor, u: Tensor) -> None:
        self.worst = max(self.worst, self.distance(z[self.n : 2 * self.n], u))
