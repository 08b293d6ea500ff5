"""What the backsolve adjoints of ODEs and SDEs share: a reconstructed state, checked and reset."""

from __future__ import annotations

from torch import Tensor

from diffsolve.engines.plan import AdjointEquation, SolveContext
from diffsolve.engines.reverse_solves import in_tolerances
from diffsolve.engines.torch.reverse import ReverseField
from diffsolve.solvers.norms import Tolerance


class BacksolveWarning(UserWarning):
    """The state reconstructed backward in time is far from the true one."""


class Reconstruction(ReverseField):
    """A reverse problem whose state carries ``u`` between ``lambda`` and ``mu``.

    Attributes
    ----------
    sensealg, context
        How it is differentiated, and the forward solve.
    u0
        The initial state that the reconstruction ought to reach.
    worst
        Its largest distance from a known state so far, in tolerances.
    """

    def expect(self, sensealg: AdjointEquation, context: SolveContext, u0: Tensor) -> None:
        """Begin; called before the reverse solve."""
        self.sensealg, self.context, self.u0 = sensealg, context, u0
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
            blocks(own.rtol, forward.rtol, self.sensealg.rtol is not None),
            blocks(own.atol, forward.atol, self.sensealg.atol is not None),
            self.norm,
        )

    def start(self, bar: Tensor, u: Tensor) -> Tensor:
        z = super().start(bar, u)
        z[self.n : 2 * self.n] = u
        return z

    def at_save(self, z: Tensor, bar: Tensor, u: Tensor) -> Tensor:
        z = super().at_save(z, bar, u)
        if self.sensealg.resets_state:
            self._compare(z, u)
            z[self.n : 2 * self.n] = u
        return z

    def finish(self, z: Tensor) -> None:
        self._compare(z, self.u0)
        self.sensealg.warn_of(self.worst)

    def distance(self, reached: Tensor, u: Tensor) -> float:
        """By how many tolerances a reconstructed state is off."""
        return in_tolerances(reached, u, self.context.settings.tolerance)

    def _compare(self, z: Tensor, u: Tensor) -> None:
        self.worst = max(self.worst, self.distance(z[self.n : 2 * self.n], u))
