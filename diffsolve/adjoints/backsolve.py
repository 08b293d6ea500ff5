"""The backsolve adjoint: the forward solution is solved again, backward in time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsolve.adjoints.backsolved_state import BacksolvedState, BacksolveWarning
from diffsolve.adjoints.continuous import ContinuousAdjoint, Restore
from diffsolve.adjoints.reverse_sde import BacksolveSDE, ForwardSteps, diffusion_at_start
from diffsolve.engines.plan import SolveContext
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch.forward import integrate_with_torch
from diffsolve.engines.torch.reverse_field import ReverseField, ReverseODE
from diffsolve.engines.torch.reverse_jacobian import Lagrangian
from diffsolve.engines.torch.step_log import StepLog
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.norms import Tolerance


@dataclass(frozen=True)
class BacksolveAdjoint(ContinuousAdjoint):
    """Solve state and adjoint together, backward in time; memory independent of the steps.

    The state that is solved again is compared with the initial state and with every saved one. A
    ``BacksolveWarning`` tells when it is off by more than ``warn_above`` tolerances: backward in
    time, stable dynamics are unstable, and the gradient is then wrong. On a stiff problem it is
    always wrong, or the reverse solve fails: it may take 50 times the steps of the forward one, or
    10,000 where that is more.

    Of an SDE, the adjoint is a Stratonovich equation along the same Brownian path, also for Ito
    equations, whose drift is corrected by vector-Jacobian products of ``g`` with itself (one for
    diagonal and scalar noise, ``d`` where a component of diagonal noise depends on other
    components, ``m`` for general noise; ``g`` needs second derivatives). It is solved with
    Euler-Heun steps: adaptive where the forward ones are, else of the forward sizes. The gradient
    is that of the equation: it differs from the one of the steps by their strong error, and by the
    strong error of the reverse steps, of order 1 (1/2 where the noise is not commutative).

    Parameters
    ----------
    alg, rtol, atol
        Method and tolerances of the reverse solve; None: those of the forward solve. Behind fixed
        steps the reverse ones are fixed too.
    checkpointing
        Reset the state at saved times to the stored one.

    Raises
    ------
    SolveError
        In backward, if the reverse solve fails.

    References
    ----------
    Chen, Rubanova, Bettencourt, Duvenaud, NeurIPS 2018, algorithm 1; its instability: Gholami,
    Keutzer, Biros, IJCAI 2019. SDEs: Li, Wong, Chen, Duvenaud, Scalable gradients for stochastic
    differential equations, AISTATS 2020.
    """

    checkpointing: bool = True

    #: Warn above this multiple of the tolerance (in the scaled norm).
    warn_above: ClassVar[float] = 1000.0

    #: Bound on the reverse steps: a multiple of the forward attempts, or a number if that is more.
    most_steps: ClassVar[tuple[int, int]] = (50, 10_000)

    @property
    def resets_state(self) -> bool:
        return self.checkpointing

    def reverse_settings(
        self, context: SolveContext, tolerance: Tolerance, stops: Sequence[float]
    ) -> Settings:
        """With a bound on the steps: an unstable reverse solve can ask for any number of them."""
        settings = super().reverse_settings(context, tolerance, stops)
        times, least = self.most_steps
        most = max(least, times * (context.stats.naccept + context.stats.nreject)) + len(stops)
        return replace(settings, maxiters=min(settings.maxiters, most))

    def forward(self, context: SolveContext, u0: Tensor) -> tuple[StepLog, list[Tensor], Restore]:
        if not isinstance(context.field, SDEField):
            return integrate_with_torch(context, u0), [u0], lambda tensors: tensors[0]
        G0 = diffusion_at_start(context, u0)
        log = integrate_with_torch(context, u0)
        steps = ForwardSteps.of(log)
        return log, [u0, G0], lambda tensors: (steps, *tensors)

    def warn_of(self, worst: float) -> None:
        """Warn where the state that was solved again is off by more tolerances than is safe."""
        if not worst <= self.warn_above:
            warnings.warn(
                f"BacksolveAdjoint reconstructed the solution backward in time with an error of "
                f"{worst:.3g} tolerances (warned above {self.warn_above:g}): the "
                "gradient is unreliable. Use DiscreteAdjoint() or InterpolatingAdjoint(), save "
                "more times, or tighten the tolerances.",
                BacksolveWarning,
                stacklevel=3,
            )

    def reverse(
        self, context: SolveContext, kept: Any, field: VectorField, params: list[Tensor]
    ) -> ReverseField:
        if isinstance(context.field, SDEField):
            return BacksolveSDE(self, context, field, params, *kept)
        reverse = _BacksolveODE(field, params, extra=field.structure.size)
        reverse.expect(self, context, kept)
        return reverse


class _BacksolveODE(BacksolvedState, ReverseODE):
    def derivative(self, t: Tensor, z: Tensor) -> Tensor:
        bar, u, _ = self.blocks(z)
        du, u_bar, p_bars = self.products(t, u, bar)
        return torch.cat([-u_bar, du, *[-x for x in p_bars]])

    def state_at(self, time: Tensor, z: Tensor) -> Tensor:
        return self.blocks(z)[1]

    def slope_at(self, time: Tensor, at: Lagrangian, by_time: Tensor | None) -> Tensor:
        by_u, by_p = at.second(None, 1.0)
        return torch.cat([-by_u, torch.zeros_like(by_u) if by_time is None else by_time, -by_p])
