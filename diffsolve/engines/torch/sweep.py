"""The reverse pass of the discrete adjoint: cotangents pulled through the recorded steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffsolve.engines.plan import SolveContext
from diffsolve.engines.torch.forward import integrate_with_torch
from diffsolve.engines.torch.parallel import ParallelSweep, add_up
from diffsolve.engines.torch.step_log import Record
from diffsolve.engines.torch.tape import StepTape
from diffsolve.problems.capture import reached_leaves, refuse_unknown_leaves
from diffsolve.problems.sde_field import SDEField
from diffsolve.solvers.algorithm import Step, read, summands
from diffsolve.solvers.norms import measure, rms
from diffsolve.solvers.sdirk.methods import KenCarp4
from diffsolve.solvers.stochastic.noise.base import Noise

StateBar = list[Tensor | None]
_SMOOTH = KenCarp4()


def _runs(records: list[Record]) -> list[tuple[int, int]]:
    """Ranges of consecutive steps of one method."""
    starts = [i for i, r in enumerate(records) if i == 0 or r.alg is not records[i - 1].alg]
    return list(pairwise([*starts, len(records)]))


class Sweep:
    """Pull the cotangents of the saved states and of the steps' estimates back to the start.

    Parameters
    ----------
    context
        The solve.
    cotangents
        Those of the saved states ``(T, N)`` and of ``error, error_norm, stiffness`` ``(n,)``; None
        where there is none.
    final
        Flat state at the end of the solve.
    """

    def __init__(self, context: SolveContext, cotangents: Sequence[Tensor | None], final: Tensor):
        self.context = context
        self.of_saved = cotangents[0]
        self.of_estimates = cotangents[1:]
        self.field, self.params = context.field.for_vjp()
        self.field.differentiated_once = True
        self.final = final
        self._expect(final)
        self.dparams: list[Tensor | None] = [None] * len(self.params)
        self.parallel = ParallelSweep(context, self.field, self.params, cotangents)

    def run(self, tape: StepTape) -> tuple[Tensor, list[Tensor]]:
        """Gradients by the flat initial state and by the parameters."""
        context = self.context
        state_bar: StateBar = []
        for begin, records, states in tape.backward(self.field):
            state_bar = state_bar or [None] * len(states[0])
            for low, high in reversed(_runs(records)):
                run = slice(low, high)
                state_bar = self._through_run(begin + low, records[run], states[run], state_bar)
                self._after = states[low][0]
            self._after = tape.led_to(begin, states[0])
        if not float(self._off) <= 1 and not self._repeats(tape):
            raise RuntimeError(self.field.changed)
        u_bar = state_bar[0] if state_bar else None
        u_bar = torch.zeros_like(context.u0) if u_bar is None else u_bar
        first_time = context.save_times[0] if context.save_times else context.t0
        if self.of_saved is not None and len(self.of_saved) and first_time == context.t0:
            u_bar = u_bar + self.of_saved[0]
        dparams = zip(self.params, self.dparams, strict=True)
        return u_bar, [torch.zeros_like(p) if g is None else g for p, g in dparams]

    def _through_run(
        self,
        begin: int,
        records: list[Record],
        states: list[tuple[Tensor, ...]],
        state_bar: StateBar,
    ) -> StateBar:
        # steps are taken at once only where the cotangent is that of u alone
        if self.parallel.suits(records) and all(bar is None for bar in state_bar[1:]):
            flat = [s[0] for s in states]
            pulled = self.parallel.through(begin, records, flat, self._after, state_bar[0])
            if pulled is not None:
                u_bar, dparams = pulled
                add_up(self.dparams, dparams)
                return [u_bar, *[None] * (len(state_bar) - 1)]
        for i in reversed(range(len(records))):
            record, state = records[i], states[i]
            if record.end_save is not None and self.of_saved is not None:
                new = self.of_saved[record.end_save]
                state_bar[0] = new if state_bar[0] is None else state_bar[0] + new
            state_bar = self._through_step(begin + i, record, state, state_bar)
            if record.restart or (i == 0 and self.parallel.enabled):
                # at a segment's start too: the next one may then be taken at once
                state_bar = self._through_init(record, state, state_bar)
        return state_bar

    def _through_step(
        self, index: int, record: Record, state: tuple[Tensor, ...], state_bar: StateBar
    ) -> StateBar:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in state]
            step = record.repeat(self.field, tuple(leaves))
        self._compare(step.state[0], record, state)
        grads = self._through(step, index, record, leaves, state_bar)
        estimated = record.alg.is_implicit and any(bar is not None for bar in self.of_estimates)
        if (record.alg.has_jacobian_inside or estimated) and not _all_finite(grads):
            grads = self._through_another(index, record, state, state_bar) or grads
        add_up(self.dparams, grads[len(leaves) :])
        return grads[: len(leaves)]

    def _through_another(
        self, index: int, record: Record, state: tuple[Tensor, ...], state_bar: StateBar
    ) -> StateBar | None:
        """``_through_step`` by a method whose derivative needs no second derivatives of ``f``.

        Where a root or a norm starts at zero, those are infinite or do not exist, though the
        derivative of the solution is finite. That of an SDIRK step is as accurate as its values.

        Raises
        ------
        RuntimeError
            If that cannot be done.
        """
        trouble = (
            f"a gradient of {record.alg.name} is NaN or Inf at t = {record.t:.8g}, where f has no "
            "second derivative, such as u**1.5 and a norm at zero: use a method that needs only "
            "first derivatives, such as KenCarp4()"
        )
        if not _all_finite(state_bar):
            return None  # the incoming cotangents are not finite either
        if any(bar is not None for bar in self.of_estimates):
            raise RuntimeError(trouble + ", and leave the estimates of its steps out of the loss")
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in state]
            step = _SMOOTH.step(
                self.field, record.t, record.h, _SMOOTH.init(self.field, record.t, *leaves)
            )
        if not step.converged:
            raise RuntimeError(trouble)
        return self._through(step, index, record, leaves, state_bar)

    def _through(
        self, step: Step, index: int, record: Record, leaves: list[Tensor], state_bar: StateBar
    ) -> StateBar:
        """Cotangents of the leaves and of the parameters."""
        pulled: list[tuple[Tensor, Tensor]] = []
        with torch.enable_grad():
            pulled += [
                (y, bar) for y, bar in zip(step.state, state_bar, strict=True) if bar is not None
            ]
            if record.thetas and self.of_saved is not None:
                theta = torch.tensor(record.thetas, dtype=torch.float64, device="cpu")
                inside = slice(record.first_save, record.first_save + len(record.thetas))
                times = (self.context.save_times or ())[inside]
                values = read(step.interpolant, times, theta)
                pulled.append((values, self.of_saved[inside]))
            if any(bar is not None for bar in self.of_estimates):
                tolerance = self.context.settings.tolerance
                estimates: Any = measure(step, leaves[0], tolerance, on_tape=True)
                for y, bar in zip(estimates, self.of_estimates, strict=True):
                    if bar is not None:
                        pulled.append((y, bar[index].to(y.dtype)))
        return self._pull(pulled, leaves)

    def _through_init(
        self, record: Record, state: tuple[Tensor, ...], state_bar: StateBar
    ) -> StateBar:
        """Through the restart of the method at ``record.t``, where its state follows from u."""
        with torch.enable_grad():
            u = state[0].detach().requires_grad_()
            made = record.begin(self.field, u)
            pulled = [(y, bar) for y, bar in zip(made, state_bar, strict=True) if bar is not None]
        u_bar, *grads = self._pull(pulled, [u])
        add_up(self.dparams, grads)
        return [u_bar, *[None] * (len(state) - 1)]

    def _repeats(self, tape: StepTape) -> bool:
        """Whether the steps, run just as they were in the solve, lead where they led.

        Under autograd they round in another way. Some ``f`` magnify that until it looks like random
        numbers: in lower precision where terms cancel, or at the corner of a root. Only a
        difference found here is certain to come from a changed ``f``.
        """
        if any(record.solved for record in tape.records):
            return self._solves_again()
        self._expect(self.final)
        with torch.no_grad():
            for _, records, states in tape.backward(self.field):
                for record, state in zip(reversed(records), reversed(states), strict=True):
                    step = record.repeat(self.field, state)
                    self._compare(step.state[0], record, state)
        return float(self._off) <= 1

    def _solves_again(self) -> bool:
        """Whether the whole solve, taken once more, ends where it ended.

        Newton's iteration uses matrices of earlier steps, rejected ones among them. So a step that
        is repeated alone ends elsewhere: within the tolerance, or farther off at a corner of ``f``.
        """
        field = self.context.field.fresh()
        if isinstance(field, SDEField) and isinstance(field.path, Noise):
            field.path = field.path.fork()
        again = integrate_with_torch(replace(self.context, field=field), self.context.u0.detach())
        if again.final is None:
            return False
        return float(self.field.rounding_error(again.final, self.final)) <= 1

    def _expect(self, final: Tensor) -> None:
        self._after = final  # the state that the present step must lead to
        # the largest distance from there so far
        self._off = torch.zeros((), dtype=final.dtype.to_real(), device=final.device)

    def _compare(self, reached: Tensor, record: Record, state: tuple[Tensor, ...]) -> None:
        """Note whether a step leads where it led. ``run`` reads that, so as to wait once."""
        off = self.field.rounding_error(reached, self._after, summands(state, record.h))
        if record.alg.is_implicit:
            # an iteration stops at a part of the tolerance, and a matrix magnifies rounding
            tolerance = self.context.settings.tolerance
            distance = (reached.detach() - self._after) / tolerance.scale(self._after.abs())
            off = torch.minimum(off, rms(distance).to(off))
        self._off = torch.maximum(self._off, off.to(self._off))
        self._after = state[0]

    def _pull(self, pulled: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> StateBar:
        """Cotangents of the leaves, and of the parameters."""
        pulled = [(y, bar) for y, bar in pulled if y.requires_grad]
        if not pulled:
            return [None] * (len(leaves) + len(self.params))
        outputs, bars = zip(*pulled, strict=True)
        # at every step: each may take another branch of f
        refuse_unknown_leaves(reached_leaves(outputs), [*leaves, *self.params])
        return list(torch.autograd.grad(outputs, [*leaves, *self.params], bars, allow_unused=True))


def _all_finite(tensors: Sequence[Tensor | None]) -> bool:
    return all(x is None or bool(torch.isfinite(x).all()) for x in tensors)
