"""The interpolating adjoint: the forward solution is read from its dense output."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffsolve.adjoints.continuous import ContinuousAdjoint, Restore
from diffsolve.adjoints.reverse_sde import ForwardSteps, InterpolatingSDE, diffusion_at_start
from diffsolve.engines.plan import SolveContext
from diffsolve.engines.torch.forward import integrate_with_torch
from diffsolve.engines.torch.reverse_field import ReverseField, ReverseODE
from diffsolve.engines.torch.reverse_jacobian import Lagrangian
from diffsolve.engines.torch.step_log import StepLog
from diffsolve.engines.torch.tape import StepTape, check_checkpoints
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.interpolation import DenseOutput


class _Readable(Protocol):
    """A forward solution, read at any time."""

    def at(self, t: float, derivative: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class InterpolatingAdjoint(ContinuousAdjoint):
    """Solve the adjoint equation backward along the forward solution's continuous extension.

    Stable where backsolve is not. Memory until backward: the stages of every forward step, or with
    ``checkpoints`` a few states; those then need the stages of two segments during backward, and a
    second forward solve. The gradient's error follows the tolerances and the interpolant's order.

    Of an SDE, the adjoint is a Stratonovich equation along the same Brownian path, as for
    ``BacksolveAdjoint``. Reverse steps end where forward steps did, and are shorter where the
    tolerance asks for it: so the states at the ends are all that is kept, and the strong order is
    that of the reverse steps, 1 (1/2 where the noise is not commutative).

    Parameters
    ----------
    alg, rtol, atol
        Method and tolerances of the reverse solve; None: those of the forward solve. Behind fixed
        steps the reverse ones are fixed too.
    checkpoints
        Number of states to keep; the solution between them is computed again. None: keep all.

    Raises
    ------
    SolveError
        In backward, if the reverse solve fails.

    References
    ----------
    Hindmarsh et al., SUNDIALS, ACM TOMS 31 (2005) 363, section on CVODES; Rackauckas et al.,
    Universal Differential Equations (2020).
    """

    checkpoints: int | None = None

    along_path: ClassVar[bool] = True

    @property
    def kept_states(self) -> int | None:
        return self.checkpoints

    def __post_init__(self) -> None:
        super().__post_init__()
        check_checkpoints(self.checkpoints)

    def forward(self, context: SolveContext, u0: Tensor) -> tuple[StepLog, list[Tensor], Restore]:
        if isinstance(context.field, SDEField):
            return self._along_noise(context, u0)
        if self.checkpoints is None:
            log = integrate_with_torch(context, u0, dense=True)
            assert log.dense is not None
            tensors, restore = log.dense.flatten()
            if not context.dense:
                log.dense = None
            return log, tensors, restore
        tape = StepTape(self.checkpoints)
        log = integrate_with_torch(context, u0, tape)
        end = log.final_t
        return log, tape.unload(), lambda x: _SegmentwiseOutput(context, tape.loaded(x), end)

    def _along_noise(
        self, context: SolveContext, u0: Tensor
    ) -> tuple[StepLog, list[Tensor], Restore]:
        """The same for an SDE: the states at the ends of its steps are kept."""
        G0 = diffusion_at_start(context, u0)
        tape = StepTape(self.checkpoints)
        log = integrate_with_torch(context, u0, tape)
        steps = ForwardSteps.of(log)
        assert log.final is not None

        def restore(tensors: Sequence[Tensor]) -> Any:
            return steps, tensors[0], tape.loaded(tensors[2:]), tensors[1]

        return log, [G0, log.final, *tape.unload()], restore

    def reverse(
        self, context: SolveContext, kept: Any, field: VectorField, params: list[Tensor]
    ) -> ReverseField:
        if isinstance(context.field, SDEField):
            return InterpolatingSDE(context, field, params, *kept)
        return _InterpolatingODE(kept, context, field, params)


class _InterpolatingODE(ReverseODE):
    def __init__(
        self, solution: _Readable, context: SolveContext, field: VectorField, params: list[Tensor]
    ):
        super().__init__(field, params, extra=0)
        self.solution = solution
        self.low, self.high = sorted((context.t0, context.t1))

    def derivative(self, t: Tensor, z: Tensor) -> Tensor:
        bar, _, _ = self.blocks(z)
        _, u_bar, p_bars = self.products(t, self.state_at(t, z), bar)
        return torch.cat([-u_bar, *[-x for x in p_bars]])

    def state_at(self, time: Tensor, z: Tensor) -> Tensor:
        return self.solution.at(self._inside(time))

    def slope_at(self, time: Tensor, at: Lagrangian, by_time: Tensor | None) -> Tensor:
        by_u, by_p = at.second(self.solution.at(self._inside(time), 1), 1.0)
        return torch.cat([-by_u, -by_p])

    def _inside(self, time: Tensor) -> float:
        # rounding of t to the state's precision may step out of the interval
        return min(max(float(time), self.low), self.high)


class _SegmentwiseOutput:
    """Dense output from checkpoints, with two neighbouring segments made at a time."""

    def __init__(self, context: SolveContext, tape: StepTape, end: float):
        self.context, self.tape, self.end = context, tape, end
        self.direction = context.direction
        self.segments = tape.segments()
        self.starts = [self.direction * tape.records[begin].t for begin, _ in self.segments]
        self.made: dict[int, DenseOutput] = {}

    def at(self, t: float, derivative: int = 0) -> Tensor:
        index = max(bisect_right(self.starts, self.direction * t) - 1, 0)
        if index not in self.made:
            self.made = {i: d for i, d in self.made.items() if abs(i - index) == 1}
            self.made[index] = self._make(self.segments[index])
        return self.made[index].at(t, derivative)

    def _make(self, segment: tuple[int, int]) -> DenseOutput:
        records = self.tape.records
        begin, end = segment
        field = self.context.field
        states = self.tape.states(segment, field)
        dense = DenseOutput(records[begin].t, self.direction, states[0][0])
        with torch.no_grad():
            for i, state in zip(range(begin, end), states, strict=True):
                record = records[i]
                t_end = records[i + 1].t if i + 1 < len(records) else self.end
                dense.append(t_end, record.repeat(field, state).interpolant)
        return dense
