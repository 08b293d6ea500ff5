"""What the continuous adjoints share: one reverse solve of the adjoint equation.

With ``L`` a function of the saved states, ``lambda = dL/du(t)`` obeys ``d lambda/dt = -J^T lambda``
and jumps by ``dL/du_i`` at each saved time; ``dL/dp`` is the integral of ``f_p^T lambda``
(Pontryagin 1962; Cao, Li, Petzold, Serban, SIAM J. Sci. Comput. 24 (2003) 1076). One solve from the
last saved time to the start, with stops at the saved times, gives both: its state is
``[lambda, (u,) mu]``, see ``engines/torch/reverse_field.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffsolve.adjoints.reverse_sde import check_explicit, check_reverse_method, reverse_method
from diffsolve.adjoints.sensealg import Handover, Outputs, Sensealg, forbid_double_backward
from diffsolve.engines.declined import Declined
from diffsolve.engines.native.plan import NativePlan
from diffsolve.engines.plan import AdjointEquation, ForwardSolve, SolveContext
from diffsolve.engines.settings import Settings
from diffsolve.problems.sde_field import SDEField
from diffsolve.solution import Stats
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.norms import Tolerance
from diffsolve.solvers.stochastic.method import StochasticMethod
from diffsolve.solvers.switching import AutoSwitch

Restore = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class ContinuousAdjoint(Sensealg, AdjointEquation):
    """Base of the adjoints that solve the adjoint equation.

    Parameters
    ----------
    alg
        Method of the reverse solve; None: that of the forward solve. Behind fixed steps it takes
        fixed ones, of the same size. For an SDE ``EulerHeun()`` or
        ``LambaEulerHeun()``; None: the latter where the forward steps are adaptive, else the other.
    rtol, atol
        Tolerances of the reverse solve, numbers; None: those of the forward solve. ``atol``
        counts in units of the largest cotangent.
    """

    alg: Algorithm | None = None
    rtol: float | None = None
    atol: float | None = None

    handles_noise = True

    def __post_init__(self) -> None:
        if self.alg is not None and not isinstance(self.alg, Algorithm):
            hint = f"; write {self.alg.__name__}()" if isinstance(self.alg, type) else ""
            raise TypeError(f"{type(self).__name__}: alg must be a method{hint}, got {self.alg!r}")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and 0 <= value < float("inf")
            if value is not None and not number:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a number >= 0, got {value!r}"
                )

    def prepared(self, settings: Settings) -> Settings:
        if self.alg is not None and not self.alg.adaptive and settings.adaptive:
            raise ValueError(
                f"{self.alg.name} has no error estimate, so {type(self).__name__} cannot use it "
                "behind an adaptive forward solve: choose an adaptive one, or pass "
                "adaptive=False and dt"
            )
        return settings

    def compile(self, plan: NativePlan, alg: Algorithm) -> None:
        if isinstance(alg, StochasticMethod):
            raise Declined("the adjoint equation of an SDE is solved by torch")
        plan.compile_adjoint(self.alg or alg, self.along_path, self.kept_states)

    def reverse_method(self, context: SolveContext) -> Algorithm:
        if isinstance(context.field, SDEField):
            return reverse_method(self.alg, context)
        return self.alg or context.alg

    def run(self, context: SolveContext) -> Outputs:
        if self.alg is not None:
            check_reverse_method(self.alg, isinstance(context.field, SDEField))
        if isinstance(context.alg, StochasticMethod):
            check_explicit(context.alg, context.settings)
        handover = Handover(context)
        u: Any = _Continuous.apply(self, handover, context.u0, *context.field.params)
        trajectory = handover.take()
        return Outputs(trajectory, u, trajectory.steps.estimates())

    def reverse_settings(
        self, context: SolveContext, tolerance: Tolerance, stops: Sequence[float]
    ) -> Settings:
        forward = context.settings
        alg = self.reverse_method(context)
        same = self.alg is None and alg.name == context.alg.name
        stiff = forward.controller_stiff if same else None
        if not same and isinstance(alg, AutoSwitch):
            stiff = alg.stiff.default_controller()
        return replace(
            forward,
            tolerance=tolerance,
            controller=forward.controller if same else alg.default_controller(),
            controller_stiff=stiff,
            adaptive=forward.adaptive and alg.adaptive,
            to_rounding=forward.to_rounding and self.rtol is None and self.atol is None,
            dt=None if forward.adaptive else forward.dt,
            maxiters=forward.maxiters + len(stops),  # each ends a step
            tstops=tuple(stops),
            progress=False,
        )


class _Continuous(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sensealg: ContinuousAdjoint, handover: Handover, u0: Tensor, *params: Tensor
    ) -> Tensor:
        context = handover.context
        trajectory, kept, ctx.records = context.plan.forward(context, sensealg, u0.detach())
        handover.put(trajectory)
        ctx.sensealg, ctx.context = sensealg, context.plan.for_reverse(context)
        ctx.times = trajectory.t
        # autograd frees these after backward, and notices a parameter that was changed in place
        ctx.save_for_backward(u0, *params, trajectory.u, *kept)
        return trajectory.u

    @staticmethod
    @forbid_double_backward
    def backward(ctx: Any, bars: Tensor) -> Any:
        u0, *rest = ctx.saved_tensors  # raises if a parameter was changed in place
        started = time.perf_counter()
        context = ctx.context
        params = context.field.params
        ctx.inputs = (u0, *params)
        saved, *kept = rest[len(params) :]
        stats = context.stats.adjoint = Stats(engine=context.stats.engine)
        u0 = u0.detach()
        context.plan.refuse_changed(context, u0)
        size = float(bars.abs().max()) if bars.numel() else 0.0
        if not size < float("inf"):
            raise RuntimeError("the cotangent of the saved states is NaN or Inf: check the loss")
        if size == 0:
            grads: Sequence[Tensor] = [torch.zeros_like(x) for x in (u0, *params)]
        else:
            # the equation is linear: tolerances then mean the same for every loss
            forward = ForwardSolve(u0, ctx.times, saved, kept, ctx.records)
            scaled = (bars / size).contiguous()
            grads = context.plan.solve_adjoint(context, ctx.sensealg, forward, scaled)
            grads = [g * size for g in grads]
        stats.wall_s = time.perf_counter() - started
        return (None, None, *grads)
