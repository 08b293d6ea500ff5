"""The exact adjoint of reversible methods, in constant memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsolve.adjoints.backsolved_state import BacksolveWarning
from diffsolve.adjoints.discrete import run_stepwise
from diffsolve.adjoints.sensealg import Outputs, Sensealg
from diffsolve.engines.declined import Declined
from diffsolve.engines.native.plan import NativePlan
from diffsolve.engines.plan import SaveRequest, SolveContext
from diffsolve.engines.torch.step_log import Record
from diffsolve.engines.torch.tape import StepTape
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.stochastic.method import registered


@dataclass(frozen=True)
class ReversibleAdjoint(Sensealg):
    """Differentiate the steps of a reversible method, whose states are computed backward.

    The gradient is that of ``DiscreteAdjoint``, to rounding, and includes ``sol.steps.error``,
    ``error_norm`` and ``stiffness``. No states are kept but those at both ends and at ``tstops``:
    each step is undone algebraically, with one evaluation of ``f`` and ``g``, and then run again
    under autograd. Steps may be adaptive; their sizes are constants.

    Rounding is all that the states computed backward are off by, but where solutions contract it
    grows backward in time. A ``BacksolveWarning`` tells when the initial state was missed by more
    than half of the digits.

    Raises
    ------
    ValueError
        If the method is not reversible.

    References
    ----------
    Kidger, Foster, Li, Lyons, Efficient and accurate gradients for neural SDEs, NeurIPS (2021),
    algorithm 2.
    """

    handles_noise = True
    handles_steps = True

    def refuse_native(self) -> None:
        raise Declined("ReversibleAdjoint computes states backward with torch")

    def compile(self, plan: NativePlan, alg: Algorithm) -> None:
        self.refuse_native()

    def run(self, context: SolveContext) -> Outputs:
        _refuse_irreversible(context.alg)
        request = SaveRequest(context.saves, True, dense=context.dense, tape=ReversibleTape())
        return run_stepwise(context, request)


def _refuse_irreversible(alg: Algorithm) -> None:
    if not hasattr(alg, "inverse"):
        names = ", ".join(repr(x) for x in registered() if hasattr(x, "inverse"))
        raise ValueError(
            f"ReversibleAdjoint() needs a method whose steps can be undone: {names}; {alg!r} is "
            "none. DiscreteAdjoint(checkpoints=...) keeps few states with any method"
        )


class ReversibleTape(StepTape):
    """The first and the last of the steps between restarts; the others are computed backward."""

    def append(self, record: Record) -> None:
        if self.records and not record.restart and not self.records[-1].restart:
            self.forget(self.records[-1])
        self.records.append(record)

    def backward(
        self, field: VectorField
    ) -> Iterator[tuple[int, list[Record], list[tuple[Tensor, ...]]]]:
        worst = 0.0
        state: tuple[Tensor, ...] = ()
        for i in reversed(range(len(self.records))):
            record = self.records[i]
            known = record.state
            if state:
                state = self._undone(record, field, state)
                if known:
                    worst = max(worst, _distance(state[0], known[0]))
            else:  # the last step before a restart, or of all
                state = known
            yield i, [record], [state]
            if record.restart:
                state = ()
        _warn_of(worst, field.dtype)

    def led_to(self, begin: int, state: tuple[Tensor, ...]) -> Tensor:
        known = self.records[begin].state
        return known[0] if known else state[0]

    @staticmethod
    def _undone(
        record: Record, field: VectorField, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        method: Any = record.alg
        with torch.no_grad():
            return method.inverse(field, record.t, record.h, state)


def _distance(reached: Tensor, known: Tensor) -> float:
    """Distance of ``reached`` from ``known``, relative to the largest entry of that."""
    size = float(known.abs().amax())
    apart = float((reached - known).abs().nan_to_num(nan=math.inf).amax())
    return apart / max(size, torch.finfo(known.dtype).tiny)


def _warn_of(worst: float, dtype: torch.dtype) -> None:
    if not worst <= math.sqrt(torch.finfo(dtype).eps):
        warnings.warn(
            f"ReversibleAdjoint computed the states backward in time with a relative error of "
            f"{worst:.3g}: rounding grows where solutions contract, and the gradient is off by "
            "about as much. Use DiscreteAdjoint(checkpoints=...), or double precision.",
            BacksolveWarning,
            stacklevel=3,
        )
