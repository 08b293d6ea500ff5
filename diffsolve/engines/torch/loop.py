"""The adaptive loop over torch steps: any device, any right-hand side, one host sync a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsolve.engines.diagnosis import Failure, explain
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch.step_log import Record, SavedValues, Saving, StepLog, progress_bar
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.structure import Number, as_float
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import ReturnCode
from diffsolve.solvers.algorithm import Algorithm, Step, Trouble
from diffsolve.solvers.initial_step import initial_step
from diffsolve.solvers.interpolation import DenseOutput
from diffsolve.solvers.jacobian_layout import MatrixTooLarge
from diffsolve.solvers.newton import Newton
from diffsolve.solvers.norms import Estimates, measure, relative_stiffness
from diffsolve.solvers.stable_steps import StableSteps
from diffsolve.solvers.switching import FACTOR, AutoSwitch, Switch

_STRETCH = 1.01  # a step may grow by this much to land on a stop (Hairer's dopri5)
_ROUNDING = 1 + 1e-8  # the same where sizes differ by rounding alone
_FIRST_ULPS = 16  # units of rounding of t that a first step has at least
_ULPS = 8  # units of rounding by which the time of a fixed step may be off
_AFTER_FAILURE = 0.5  # factor of the size after a step whose equations were not solved

OnStop = Callable[[float, Tensor], Tensor]


def integrate(
    field: VectorField,
    alg: Algorithm,
    u0: Tensor,
    t0: Number,
    t1: Number,
    settings: Settings,
    saving: Saving,
    du0: Tensor | None = None,
    on_stop: OnStop | None = None,
) -> StepLog:
    """Integrate from ``t0`` to ``t1``; on the tape when autograd records.

    Parameters
    ----------
    field, alg, u0
        Right-hand side, method and flat initial state.
    t0, t1
        Floats, or 0-d tensors when ``settings.h_on_tape``.
    settings, saving
        How to integrate and what to keep.
    du0
        ``f(t0, u0)`` where it is known.
    on_stop
        Called with ``(t, u)`` at each of ``settings.tstops``, returns the state to go on with.

    Returns
    -------
    StepLog
        With the partial result and the reason where the solve failed.
    """
    return _Loop(field, alg, u0, t0, t1, settings, saving, on_stop).run(du0)


@dataclass(eq=False)
class _Loop:
    field: VectorField
    chosen_alg: Algorithm
    u0: Tensor
    t0: Any
    t1: Any
    settings: Settings
    saving: Saving
    on_stop: OnStop | None

    def __post_init__(self) -> None:
        alg, settings = self.chosen_alg, self.settings
        self.switch = Switch(alg.stability_size) if isinstance(alg, AutoSwitch) else None
        self._activate()
        self.on_tape = torch.is_grad_enabled()
        self.direction = 1.0 if self.t1 >= self.t0 else -1.0
        self.stops = [*settings.tstops, self.t1]
        self.result = StepLog()
        self.saved = SavedValues(self.saving, self.result, self.direction, settings.h_on_tape)
        if self.saving.dense:
            self.result.dense = DenseOutput(as_float(self.t0), self.direction, self.u0)

    def _activate(self) -> None:
        """Set the method that takes the next steps, and its controller."""
        self.alg, self.controller = self.chosen_alg, self.settings.controller
        if isinstance(self.chosen_alg, AutoSwitch) and self.switch is not None:
            self.alg = self.chosen_alg.stiff if self.switch.stiff else self.chosen_alg.nonstiff
            if self.switch.stiff and self.settings.controller_stiff is not None:
                self.controller = self.settings.controller_stiff
        self.memory = self.controller.start()
        self.stable: StableSteps | None = None
        sizes = self.alg.stable_sizes
        if self.settings.stable_steps and self.settings.adaptive and sizes is not None:
            span = abs(as_float(self.t1) - as_float(self.t0))
            self.stable = StableSteps(self.field, sizes[0], sizes[1], span)

    def run(self, du0: Tensor | None) -> StepLog:
        field, bar = self.field, None
        if self.settings.progress:
            bar = progress_bar(self.t0, self.t1)
        self.t, self.h = self.t0, math.nan
        # restored at the end: a norm of the user's may be a method of the right-hand side
        before = field.accuracy, field.retries, field.span_end
        field.accuracy, field.retries = self.settings.accuracy, self.settings.adaptive
        field.span_end = as_float(self.t1)
        try:
            self._start(du0)
            while self.result.retcode is ReturnCode.SUCCESS and self.stop < len(self.stops):
                t = as_float(self.t)
                self._advance()
                if bar is not None:
                    bar.update(abs(as_float(self.t) - t))
        except Exception as error:
            error.add_note(
                f"raised during a step from t = {as_float(self.t):.8g}, h = {self.h:.3g}"
            )
            raise
        finally:
            field.accuracy, field.retries, field.span_end = before
            if bar is not None:
                bar.close()
        result = self.result
        result.final, result.final_t = self.state[0], as_float(self.t)
        result.final_h = as_float(self.h)
        return result

    def _start(self, du0: Tensor | None) -> None:
        settings = self.settings
        self.stop = 0  # index of the next time to land on
        self.attempts = 0
        self.last: Estimates | None = None  # estimates of the last attempt
        self.rejections = 0  # in a row
        self.not_finite = False  # whether the last rejection was for NaN or Inf
        self.trouble: Trouble | None = None  # of the last attempt
        self.restarted = True
        self.last_stop, self.steps_since_stop = self.t0, 0
        if du0 is None:
            du0 = self._derivative(self.t0, self.u0)
        self.state = self.alg.init(self.field, self.t0, self.u0, du0)
        self.saved.start(as_float(self.t0), self.u0)
        if self.t1 == self.t0:
            self.stop = len(self.stops)
            return
        self.size: Any = self._guessed_size(du0) if settings.dt is None else settings.dt
        if not self.size < math.inf:  # NaN too
            self._fail(ReturnCode.UNSTABLE, None)
        elif settings.adaptive:
            # the guess may be too small for t + h to differ from t
            self.size = max(self.size, settings.dtmin, _FIRST_ULPS * math.ulp(as_float(self.t0)))

    def _guessed_size(self, du0: Tensor | None) -> Any:
        settings = self.settings
        if du0 is None:
            du0 = self.field(self.field.after(self.t0, self.direction), self.u0)
        with torch.set_grad_enabled(settings.h_on_tape):
            return initial_step(
                self.field,
                self.t0,
                self.u0,
                du0,
                self.direction,
                self.alg.order,
                settings.tolerance,
                min(settings.dtmax, abs(self.t1 - self.t0)),
            )

    def _advance(self) -> None:
        """Attempt one step."""
        settings = self.settings
        if self.stable is not None and self.rejections == 0:
            size = min(self.size, settings.dtmax)
            self.stable.update(self.t, self.direction, self.state[0], self.state[1], size)
        size, lands = self._fit()
        floor = max(settings.dtmin if settings.adaptive else 0.0, 4 * math.ulp(as_float(self.t)))
        if not lands and self.size < floor:
            return self._fail(self._why_too_small(), self.last)
        if self.attempts >= settings.maxiters:
            return self._fail(ReturnCode.MAX_ITERS, self.last)
        self.attempts += 1
        self.h = h = self.direction * size
        before = self.state[0]
        try:
            take: Any = self.alg.step
            options = {"open_end": True} if lands and self._ends_open() else {}
            step = take(self.field, self.t, h, self.state, **options)
        except MatrixTooLarge:
            if self.switch is None:
                raise
            return self._stay_explicit()
        self.trouble = step.trouble
        if not step.converged:
            return self._give_up(size)
        estimates = self.last = measure(step, before, settings.tolerance, self.on_tape)
        accept, factor = self._decide(step, size, lands, estimates)
        if accept:
            self._accept(step, h, lands, estimates)
        else:
            self.result.nreject += 1
            self.rejections += 1
            if not settings.adaptive:
                return self._fail(ReturnCode.UNSTABLE, estimates)
        if not settings.adaptive:
            self.size = settings.dt
        elif accept and lands:
            # the size before a step that was cut short may still be right
            self.size = max(size * factor, min(self.size, settings.dtmax))
        else:
            self.size = size * factor
        if accept and self.switch is not None:
            self._consider_switching(step, before, size, estimates.stiffness)
        return None

    def _decide(
        self, step: Step, size: Number, lands: bool, estimates: Estimates
    ) -> tuple[bool, Number]:
        """Whether to accept a step, and the factor of the next step's size."""
        settings, error, h = self.settings, estimates.error, self.h
        if self.on_tape:
            if not all(bool(torch.isfinite(x).all()) for x in step.state):
                error = math.nan
            elif settings.h_on_tape:  # times live on the host
                error = torch.as_tensor(error, dtype=torch.float64, device="cpu")
            else:
                error = as_float(error)
        self.not_finite = not error < math.inf
        if not settings.adaptive:
            return not self.not_finite, 1.0
        error = self._error_within(step, h, lands, error)
        accept, factor, memory = self.controller.propose(error, self.memory, self.rejections > 0)
        # the error of a step that a stop cut short tells the controller nothing
        if not (lands and size * _ROUNDING < self.size):
            self.memory = memory
        if accept and self.stable is not None and size > settings.dtmin:
            u, du = step.state[:2]
            end, stiffness = self.t + h, estimates.stiffness
            if self.stable.refuses(end, self.direction, u, du, size, stiffness):
                return False, self.stable.limit / size
        return accept, factor

    def _error_within(self, step: Step, h: Number, lands: bool, error: Number) -> Number:
        """The error of a step, or that of the values saved inside of it where it is larger."""
        end = self.stops[self.stop] if lands else self.t + h
        if not self.saved.next_is_before(as_float(end)):
            return error
        between = self.alg.interpolation_error(self.field, h, step)
        if between is None:
            return error
        magnitude = torch.maximum(self.state[0].abs(), step.state[0].abs())
        of_values = self.settings.tolerance.scaled_norm(between, magnitude)
        if not self.settings.h_on_tape:
            of_values = as_float(of_values)
        elif isinstance(of_values, Tensor):
            of_values = of_values.to("cpu", torch.float64)
        return of_values if of_values > error else error

    def _ends_open(self) -> bool:
        """Whether nothing reads the derivative at the end of the step that lands on a stop.

        That is the last of fixed steps, if no value inside of it is read, during the solve or
        later.
        """
        saving = self.saving
        is_last = self.stop == len(self.stops) - 1 and not self.settings.adaptive
        is_read_later = self.on_tape or saving.dense or saving.recorder is not None
        if not is_last or is_read_later or self.switch is not None or not self.alg.may_end_open:
            return False
        return self.saved.only_end_is_left(self.stops[-1])

    def _give_up(self, size: Number) -> None:
        """Reject a step whose equations were not solved: it has no error estimate."""
        self.result.nreject += 1
        self.rejections += 1
        self.not_finite = self.trouble in (Trouble.NOT_FINITE, Trouble.JACOBIAN)
        if self.settings.adaptive:
            self.size = size * _AFTER_FAILURE
        if not self.settings.adaptive or self.trouble is Trouble.JACOBIAN:
            self._fail(self._why_too_small(), None)  # a smaller step would have the same Jacobian

    def _why_too_small(self) -> ReturnCode:
        if self.not_finite:
            return ReturnCode.UNSTABLE
        unsolved = self.trouble in (Trouble.DIVERGED, Trouble.SINGULAR)
        return ReturnCode.NEWTON_FAILED if unsolved else ReturnCode.DT_LESS_THAN_MIN

    def _stay_explicit(self) -> None:
        """Go on with the explicit method alone: the matrix of the implicit one is too large."""
        assert isinstance(self.chosen_alg, AutoSwitch)
        self.chosen_alg, self.switch = self.chosen_alg.nonstiff, None
        self._activate()
        self.size = self.size / FACTOR

    def _consider_switching(
        self, step: Step, before: Tensor, size: Number, stiffness: Number
    ) -> None:
        assert self.switch is not None
        relative = relative_stiffness(step, before, self.settings.tolerance, stiffness)
        if self.stable is not None:
            relative = self.stable.stiffness_of(size, relative)
        if self.switch.changes(relative, as_float(self.h)):
            self._activate()
            self.size = self.size * (FACTOR if self.switch.stiff else 1 / FACTOR)
            self.field.workspace.drop(Newton)  # its matrix is one of an earlier time
            if step.solved:  # the method's derivative is exact up to the tolerance only
                self._begin_anew(self.state[0])

    def _fit(self) -> tuple[Any, bool]:
        """Size of the next step, and whether it lands on the next stop."""
        settings = self.settings
        size = min(self.size, settings.dtmax)
        if self.stable is not None:
            size = min(size, max(self.stable.limit, settings.dtmin))
        remaining = self.direction * (self.stops[self.stop] - self.t)
        if remaining > 2 * size:
            return size, False
        if not settings.adaptive:
            largest = max(abs(as_float(self.last_stop)), abs(as_float(self.stops[self.stop])))
            rounding = min(_ULPS * math.ulp(largest), as_float(size) / 2)  # of the present time
            lands = remaining <= size * _ROUNDING + rounding
            return (remaining, True) if lands else (size, False)
        if remaining <= size * _STRETCH and remaining <= settings.dtmax * _ROUNDING:
            return remaining, True
        if remaining >= 2 * settings.dtmin:
            return remaining / 2, False  # two even steps rather than a sliver at the end
        return size, False

    def _accept(self, step: Step, h: Any, lands: bool, estimates: Estimates) -> None:
        result, recorder = self.result, self.saving.recorder
        start = self.t
        self.steps_since_stop += 1
        if lands:
            t_new = self.stops[self.stop]
        elif self.settings.adaptive:
            t_new = start + h
        else:  # counted from the last stop, so that rounding does not add up
            t_new = self.last_stop + self.steps_since_stop * h
        record = None
        if recorder is not None:
            record = Record(start, h, self.state, self.restarted, self.alg, step.solved)
        end = as_float(t_new)
        self.saved.add(step, start, h, end, record)
        if record is not None and recorder is not None:
            recorder.append(record)
        if result.dense is not None:
            result.dense.append(end, step.interpolant)
        result.step_t.append(start)
        result.step_h.append(h)
        result.estimates.append(estimates)
        result.last_stiffness = step.stiffness_later
        self.t, self.state = t_new, step.state
        self.rejections, self.restarted = 0, False
        if self.stable is not None:
            self.stable.accepted()
        if lands:
            self.last_stop, self.steps_since_stop = t_new, 0
            self.stop += 1
            if self.stop < len(self.stops):
                self._restart()

    def _restart(self) -> None:
        """Go on from a stop: the state may jump there, and so may the right-hand side."""
        u = self.state[0]
        self._begin_anew(u if self.on_stop is None else self.on_stop(self.t, u))

    def _begin_anew(self, u: Tensor) -> None:
        if self.stable is not None:
            self.stable.look_again()
        self.state = self.alg.init(self.field, self.t, u, self._derivative(self.t, u))
        self.restarted = True

    def _derivative(self, t: Any, u: Tensor) -> Tensor | None:
        """The derivative for ``alg.init``, if the method carries one."""
        if not self.alg.carries_derivative:
            return None
        return self.field(self.field.after(t, self.direction), u)

    def _fail(self, code: ReturnCode, estimates: Estimates | None) -> None:
        if estimates is not None and self.stable is not None:
            stiffness = self.stable.stiffness_of(abs(self.h), estimates.stiffness)
            estimates = estimates._replace(stiffness=stiffness)
        self.result.retcode = code
        self.result.message = explain(
            Failure(
                code,
                self.alg,
                self.settings,
                t0=as_float(self.t0),
                t=as_float(self.t),
                t1=as_float(self.t1),
                h=as_float(self.size),
                last_h=as_float(self.h),
                attempts=self.attempts,
                rejected=self.result.nreject,
                estimates=estimates,
                state=self.state[0],
                trouble=self.trouble,
                own_jacobian=self.alg.is_implicit and self.field.jac is not None,
                is_sde=isinstance(self.field, SDEField),
                field=self.field if self.field.is_of_user else None,
            )
        )
