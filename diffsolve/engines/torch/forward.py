"""A forward solve by torch, and its results as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsolve.engines.plan import SolveContext, StepTable, Trajectory, stacked
from diffsolve.engines.torch.loop import integrate
from diffsolve.engines.torch.step_log import Recorder, Saving, StepLog
from diffsolve.engines.torch.tape import StepTape
from diffsolve.problems.autocast import without_autocast
from diffsolve.problems.structure import Number


class LoggedSteps(StepTable):
    """The steps of a log; it does not keep the states alive."""

    def __init__(self, context: SolveContext, log: StepLog):
        self._t, self._h, self._estimates = log.step_t, log.step_h, log.estimates
        self._last_stiffness = log.last_stiffness
        self._dtype, self._device = context.field.structure.time_dtype, context.field.device

    def __len__(self) -> int:
        return len(self._t)

    def times(self) -> tuple[Tensor, Tensor]:
        return _as_column(self._t), _as_column(self._h)

    def estimates(self) -> Tensor:
        if self._last_stiffness is not None:
            with torch.no_grad(), without_autocast(self._device):
                last = self._estimates[-1]._replace(stiffness=self._last_stiffness())
            self._estimates, self._last_stiffness = [*self._estimates[:-1], last], None
        rows = [[e[k] for e in self._estimates] for k in range(3)]
        return torch.tensor(rows, dtype=self._dtype, device=self._device)


def _as_column(values: Sequence[Number]) -> Tensor:
    if any(isinstance(x, Tensor) for x in values):
        return torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in values])
    return torch.tensor(values, dtype=torch.float64, device="cpu")


@dataclass
class TapedSteps:
    """The recorded steps of a solve, and the state at their end."""

    tape: StepTape
    final: Tensor


def integrate_with_torch(
    context: SolveContext, u0: Tensor, recorder: Recorder | None = None, dense: bool | None = None
) -> StepLog:
    """Integrate forward, off the tape; ``dense``: keep that; None: where the user wants it."""
    saving = Saving(context.save_times, context.dense if dense is None else dense, recorder)
    field, alg, settings, du0 = context.field, context.alg, context.settings, context.du0
    with torch.no_grad(), without_autocast(field.device):
        return integrate(field, alg, u0, context.t0, context.t1, settings, saving, du0)


def trajectory_of(context: SolveContext, log: StepLog, tape: StepTape | None = None) -> Trajectory:
    """A log as a trajectory; ``tape`` has the steps, if they were recorded."""
    assert log.final is not None
    return Trajectory(
        t=log.t,
        u=stacked(log.u, log.final),
        steps=LoggedSteps(context, log),
        counts=None,
        nreject=log.nreject,
        final_t=log.final_t,
        final_h=log.final_h,
        retcode=log.retcode,
        message=log.message,
        dense=log.dense,
        records=None if tape is None else TapedSteps(tape, log.final),
    )
