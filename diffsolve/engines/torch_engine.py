"""The adaptive loop over torch steps: any device, any right-hand side, one host sync a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from diffsolve.engines.diagnosis import Failure, explain
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.structure import detached
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import ReturnCode
from diffsolve.solvers.algorithm import Algorithm, Step, Trouble, read
from diffsolve.solvers.controllers import Controller
from diffsolve.solvers.initial_step import initial_step
from diffsolve.solvers.interpolation import DenseOutput
from diffsolve.solvers.jacobian_layout import MatrixTooLarge
from diffsolve.solvers.norms import Estimates, Tolerance, measure, relative_stiffness
from diffsolve.solvers.stable_steps import StableSteps
from diffsolve.solvers.switching import FACTOR, AutoSwitch, Switch

_STRETCH = 1.01  # a step may grow by this much to land on a stop (Hairer's dopri5)
_ROUNDING = 1 + 1e-8  # the same where sizes differ by rounding alone
_FIRST_ULPS = 16  # units of rounding of t that a first step has at least
_ULPS = 8  # units of rounding by which the time of a fixed step may be off
_AFTER_FAILURE = 0.5  # factor of the size after a step whose equations were not solved


@dataclass
class Settings:
    """How to integrate.

    Attributes
    ----------
    tolerance, controller
        Scaling and norm of the error, and what the step size follows from it.
    adaptive
        False: every step has size ``dt``.
    to_rounding
        Whether the equations of steps are solved to rounding, not to a part of the tolerance.
    dt
        First, or fixed, step size; None: by Hairer's rule. Positive.
    dtmin, dtmax
        Limits of the step size.
    maxiters
        Most attempted steps.
    tstops
        Times strictly inside the span, in order of integration, where a step must end.
    h_on_tape
        Whether step sizes are differentiated.
    progress
        Whether to show a progress bar.
    controller_stiff
        What takes the place of ``controller`` while the stiff method of an ``AutoSwitch`` is
        active; None: the same.
    stable_steps
        Whether explicit steps stay where they are stable for every mode (``StableSteps``).
    """

    tolerance: Tolerance
    controller: Controller
    adaptive: bool = True
    to_rounding: bool = False
    dt: float | None = None
    dtmin: float = 0.0
    dtmax: float = math.inf
    maxiters: int = 100_000
    tstops: tuple[float, ...] = ()
    h_on_tape: bool = False
    progress: bool = False
    controller_stiff: Controller | None = None
    stable_steps: bool = False

    @cached_property
    def differentiated(self) -> Settings:
        """The same for a solve whose steps are to be differentiated."""
        return replace(self, stable_steps=True)

    @property
    def accuracy(self) -> Tolerance | None:
        """What iterations within a step are measured by; None: rounding."""
        return None if self.to_rounding else self.tolerance


@dataclass(slots=True)
class Record:
    """An accepted step, with what is needed to run it again.

    Attributes
    ----------
    t, h, state
        Arguments of the step.
    restart
        Whether ``state`` was made anew by ``alg.init`` at ``t``.
    alg
        The method that took it.
    solved
        What its iterations found (``Step.solved``).
    first_save, thetas
        Saved values inside the step: indices from ``first_save`` on, at these fractions of it.
    end_save
        Index of the saved value that is the step's end, or None.
    """

    t: float
    h: float
    state: tuple[Tensor, ...]
    restart: bool
    alg: Algorithm
    solved: tuple[Tensor, ...] = ()
    first_save: int = 0
    thetas: list[float] = field(default_factory=list)
    end_save: int | None = None

    def begin(self, field: VectorField, u: Tensor) -> tuple[Tensor, ...]:
        """State of the method at the start of the step, where it was made anew from ``u``."""
        if not self.alg.carries_derivative:
            return self.alg.init(field, self.t, u)
        return self.alg.init(field, self.t, u, field(field.after(self.t, self.h), u))

    def repeat(self, field: VectorField, state: tuple[Tensor, ...]) -> Step:
        """The step again, from ``state``; under autograd at the solutions that it found.

        Raises
        ------
        RuntimeError
            If its equations cannot be solved again.
        """
        take: Any = self.alg.step  # a method that leaves solutions takes them
        options = {"solved": self.solved} if self.solved else {}
        step = take(field, self.t, self.h, state, **options)
        if step.trouble is not None:
            why = step.trouble.value
            raise RuntimeError(
                f"a step from t = {self.t:.8g} cannot be repeated: {why}. {field.changed}"
            )
        return step


class Recorder(Protocol):
    def append(self, record: Record, /) -> None: ...


@dataclass
class Saving:
    """What to keep of a solve.

    Attributes
    ----------
    times
        Ordered times to save, or None: every step.
    dense
        Whether to keep the continuous extension.
    recorder
        Receives a ``Record`` of each accepted step.
    """

    times: Sequence[float] | None = None
    dense: bool = False
    recorder: Recorder | None = None


@dataclass
class Trajectory:
    """What an engine gives back."""

    t: list[float] = field(default_factory=list)
    u: list[Tensor] = field(default_factory=list)
    step_t: list[Any] = field(default_factory=list)
    step_h: list[Any] = field(default_factory=list)
    estimates: list[Estimates] = field(default_factory=list)
    dense: DenseOutput | None = None
    nreject: int = 0
    final: Tensor | None = None
    final_t: float = math.nan
    final_h: float = math.nan
    retcode: ReturnCode = ReturnCode.SUCCESS
    message: str = ""
    later: Callable[[], float] | None = None  # the stiffness of the last step, if not known yet

    @property
    def naccept(self) -> int:
        return len(self.step_t)


OnStop = Callable[[float, Tensor], Tensor]


def integrate(
    rhs: VectorField,
    alg: Algorithm,
    u0: Tensor,
    t0: Any,
    t1: Any,
    settings: Settings,
    saving: Saving,
    du0: Tensor | None = None,
    on_stop: OnStop | None = None,
) -> Trajectory:
    """Integrate from ``t0`` to ``t1``; on the tape when autograd records.

    Parameters
    ----------
    rhs, alg, u0
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
    Trajectory
        With the partial result and the reason where the solve failed.
    """
    return _Loop(rhs, alg, u0, t0, t1, settings, saving, on_stop).run(du0)


class _Loop:
    def __init__(
        self,
        rhs: VectorField,
        alg: Algorithm,
        u0: Tensor,
        t0: Any,
        t1: Any,
        settings: Settings,
        saving: Saving,
        on_stop: OnStop | None,
    ):
        self.rhs, self.u0, self.t0, self.t1 = rhs, u0, t0, t1
        self.settings, self.saving, self.on_stop = settings, saving, on_stop
        self.whole = alg
        self.switch = Switch(alg.stability_size) if isinstance(alg, AutoSwitch) else None
        self._activate()
        self.on_tape = torch.is_grad_enabled()
        self.direction = 1.0 if t1 >= t0 else -1.0
        self.stops = [*settings.tstops, t1]
        self.result = Trajectory()
        if saving.dense:
            self.result.dense = DenseOutput(_plain(t0), self.direction, u0)

    def _activate(self) -> None:
        """Take up the method whose turn it is, and its controller."""
        self.alg, self.controller = self.whole, self.settings.controller
        if isinstance(self.whole, AutoSwitch) and self.switch is not None:
            self.alg = self.whole.stiff if self.switch.stiff else self.whole.nonstiff
            if self.switch.stiff and self.settings.controller_stiff is not None:
                self.controller = self.settings.controller_stiff
        self.memory = self.controller.start()
        self.stable: StableSteps | None = None
        sizes = self.alg.stable_sizes
        if self.settings.stable_steps and self.settings.adaptive and sizes is not None:
            span = abs(float(detached(self.t1)) - float(detached(self.t0)))
            self.stable = StableSteps(self.rhs, sizes[0], sizes[1], span)

    def run(self, du0: Tensor | None) -> Trajectory:
        bar = progress_bar(self.t0, self.t1) if self.settings.progress else None
        self.t, self.h = self.t0, math.nan
        # only for now: a norm may be a method of the right-hand side
        outside, self.rhs.accuracy = self.rhs.accuracy, self.settings.accuracy
        retried, self.rhs.retries = self.rhs.retries, self.settings.adaptive
        ended, self.rhs.span_end = self.rhs.span_end, _plain(self.t1)
        try:
            self._start(du0)
            while self.result.retcode is ReturnCode.SUCCESS and self.stop < len(self.stops):
                before = _plain(self.t)
                self._advance()
                if bar is not None:
                    bar.update(abs(_plain(self.t) - before))
        except Exception as error:
            error.add_note(f"raised during a step from t = {_plain(self.t):.8g}, h = {self.h:.3g}")
            raise
        finally:
            self.rhs.accuracy, self.rhs.retries, self.rhs.span_end = outside, retried, ended
            if bar is not None:
                bar.close()
        result = self.result
        result.final, result.final_t = self.state[0], _plain(self.t)
        result.final_h = _plain(self.h)
        return result

    def _start(self, du0: Tensor | None) -> None:
        settings = self.settings
        self.stop = 0  # index of the next time to land on
        self.saved = 0  # number of saved values
        self.attempts = 0
        self.last: Estimates | None = None  # estimates of the last attempt
        self.rejections = 0  # in a row
        self.not_finite = False  # whether the last rejection was for NaN or Inf
        self.trouble: Trouble | None = None  # of the last attempt
        self.restarted = True
        self.anchor, self.since = self.t0, 0  # last stop, and the steps since
        if du0 is None:
            du0 = self._derivative(self.t0, self.u0)
        self.state = self.alg.init(self.rhs, self.t0, self.u0, du0)
        times = self.saving.times
        if times is None or (len(times) and times[0] == _plain(self.t0)):
            self._save(_plain(self.t0), self.u0)
        if self.t1 == self.t0:
            self.stop = len(self.stops)
            return
        self.size: Any = settings.dt
        if self.size is None:
            if du0 is None:
                du0 = self.rhs(self.rhs.after(self.t0, self.direction), self.u0)
            with torch.set_grad_enabled(settings.h_on_tape):
                self.size = initial_step(
                    self.rhs,
                    self.t0,
                    self.u0,
                    du0,
                    self.direction,
                    self.alg.order,
                    settings.tolerance,
                    min(settings.dtmax, abs(self.t1 - self.t0)),
                )
        if not self.size < math.inf:  # NaN too
            self._fail(ReturnCode.UNSTABLE, None)
        elif settings.adaptive:
            # t must be able to tell the first step; the guess knows nothing of that
            self.size = max(self.size, settings.dtmin, _FIRST_ULPS * math.ulp(_plain(self.t0)))

    def _advance(self) -> None:
        """One attempted step, accepted or not."""
        settings, t = self.settings, self.t
        if self.stable is not None and self.rejections == 0:
            asked = min(self.size, settings.dtmax)
            self.stable.update(t, self.direction, self.state[0], self.state[1], asked)
        size, lands = self._fit()
        floor = max(settings.dtmin if settings.adaptive else 0.0, 4 * math.ulp(_plain(t)))
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
            step = take(self.rhs, t, h, self.state, **options)
        except MatrixTooLarge:
            if self.switch is None:
                raise
            return self._stay_explicit()
        self.trouble = step.trouble
        if not step.converged:
            return self._give_up(size)
        estimates = self.last = measure(step, self.state[0], settings.tolerance, self.on_tape)
        error = estimates.error
        if self.on_tape:
            if not all(bool(torch.isfinite(x).all()) for x in step.state):
                error = math.nan
            elif settings.h_on_tape:
                error = torch.as_tensor(
                    error, dtype=torch.float64, device="cpu"
                )  # times live on the host
            else:
                error = float(detached(error))
        accept, factor = error < math.inf, 1.0
        if settings.adaptive:
            judged = self._error_within(step, before, h, lands, error)
            accept, factor, memory = self.controller.propose(
                judged, self.memory, self.rejections > 0
            )
            # one cut short has an error of no account
            if not (lands and size * _ROUNDING < self.size):
                self.memory = memory
            if accept and self.stable is not None and size > settings.dtmin:
                u, du = step.state[:2]
                stiffness = estimates.stiffness
                if self.stable.refuses(t + h, self.direction, u, du, size, stiffness):
                    accept, factor = False, self.stable.limit / size
        if accept:
            self._accept(step, h, lands, estimates)
        else:
            self.result.nreject += 1
            self.rejections += 1
            self.not_finite = not error < math.inf
            if not settings.adaptive:
                return self._fail(ReturnCode.UNSTABLE, estimates)
        if not settings.adaptive:
            self.size = settings.dt
        elif accept and lands:
            # a step cut short by a stop says nothing against the size before it
            self.size = max(size * factor, min(self.size, settings.dtmax))
        else:
            self.size = size * factor
        if accept and self.switch is not None:
            stiffness = relative_stiffness(step, before, settings.tolerance, estimates.stiffness)
            if self.stable is not None:
                stiffness = self.stable.stiffness_of(size, stiffness)
            self._consider_switching(stiffness, h, bool(step.solved))
        return None

    def _error_within(self, step: Step, before: Tensor, h: Any, lands: bool, error: Any) -> Any:
        """The error of a step, or that of the values saved inside of it where it is larger."""
        times = self.saving.times
        if times is None or self.saved >= len(times):
            return error
        end = self.stops[self.stop] if lands else self.t + h
        if not self.direction * times[self.saved] < self.direction * _plain(end):
            return error
        between = self.alg.interpolation_error(self.rhs, h, step)
        if between is None:
            return error
        magnitude = torch.maximum(before.abs(), step.state[0].abs())
        found = self.settings.tolerance.scaled_norm(between, magnitude)
        if not self.settings.h_on_tape:
            found = _plain(found)
        elif isinstance(found, Tensor):
            found = found.to("cpu", torch.float64)
        return found if found > error else error

    def _ends_open(self) -> bool:
        """Whether nothing reads the derivative at the end of the step that lands on a stop.

        That is the last of fixed steps, where no value inside of it is wanted, then or later.
        """
        saving, stop, times = self.saving, self.stops[-1], self.saving.times
        is_last = self.stop == len(self.stops) - 1 and not self.settings.adaptive
        kept = self.on_tape or saving.dense or saving.recorder is not None
        if not is_last or kept or self.switch is not None or not self.alg.may_end_open:
            return False
        return times is None or self.saved >= len(times) or times[self.saved] == stop

    def _give_up(self, size: Any) -> None:
        """The equations of a step were not solved: it says nothing of the error."""
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
        """The implicit method of two cannot be used: the other one goes on alone."""
        assert isinstance(self.whole, AutoSwitch)
        self.whole, self.switch = self.whole.nonstiff, None
        self._activate()
        self.size = self.size / FACTOR

    def _consider_switching(self, stiffness: float, h: Any, iterated: bool) -> None:
        assert self.switch is not None
        if self.switch.changes(stiffness, _plain(h)):
            self._activate()
            self.size = self.size * (FACTOR if self.switch.stiff else 1 / FACTOR)
            self.rhs.scratch.pop("newton", None)  # what it learnt is of another time
            if iterated:  # the derivative at hand is one up to the tolerance only
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
            largest = max(abs(_plain(self.anchor)), abs(_plain(self.stops[self.stop])))
            rounding = min(_ULPS * math.ulp(largest), _plain(size) / 2)  # that of the time at hand
            lands = remaining <= size * _ROUNDING + rounding
            return (remaining, True) if lands else (size, False)
        if remaining <= size * _STRETCH and remaining <= settings.dtmax * _ROUNDING:
            return remaining, True
        if remaining >= 2 * settings.dtmin:
            return remaining / 2, False  # two even steps rather than a sliver at the end
        return size, False

    def _accept(self, step: Step, h: Any, lands: bool, estimates: Estimates) -> None:
        result, saving = self.result, self.saving
        start = self.t
        self.since += 1
        if lands:
            t_new = self.stops[self.stop]
        elif self.settings.adaptive:
            t_new = start + h
        else:  # counted from the last stop, so that rounding does not add up
            t_new = self.anchor + self.since * h
        record = None
        if saving.recorder is not None:
            record = Record(start, h, self.state, self.restarted, self.alg, step.solved)
        self._save_within(step, start, h, t_new, record)
        if record is not None and saving.recorder is not None:
            saving.recorder.append(record)
        if result.dense is not None:
            result.dense.append(_plain(t_new), step.interpolant)
        result.step_t.append(start)
        result.step_h.append(h)
        result.estimates.append(estimates)
        result.later = step.later
        self.t, self.state = t_new, step.state
        self.rejections, self.not_finite, self.restarted = 0, False, False
        if self.stable is not None:
            self.stable.accepted()
        if lands:
            self.anchor, self.since = t_new, 0
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
        self.state = self.alg.init(self.rhs, self.t, u, self._derivative(self.t, u))
        self.restarted = True

    def _derivative(self, t: Any, u: Tensor) -> Tensor | None:
        """What the method wants to start with."""
        if not self.alg.carries_derivative:
            return None
        return self.rhs(self.rhs.after(t, self.direction), u)

    def _save_within(self, step: Step, t: Any, h: Any, t_new: Any, record: Record | None) -> None:
        times, end = self.saving.times, _plain(t_new)
        if times is None:
            if record is not None:
                record.end_save = self.saved
            self._save(end, step.state[0])
            return
        first = self.saved
        last = first
        while last < len(times) and self.direction * times[last] <= self.direction * end:
            last += 1
        if last == first:
            return
        ends_on_save = times[last - 1] == end
        inside = times[first : last - 1 if ends_on_save else last]
        if inside:
            thetas = [(x - t) / h for x in inside]
            if self.settings.h_on_tape:
                theta = torch.stack(
                    [torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in thetas]
                )
            else:
                theta = torch.tensor(thetas, dtype=torch.float64, device="cpu")
            values = read(step.interpolant, inside, theta)
            for x, value in zip(inside, values.unbind(0), strict=True):
                self._save(x, value)
        if record is not None:
            record.first_save, record.thetas = first, [(x - t) / h for x in inside]
            record.end_save = last - 1 if ends_on_save else None
        if ends_on_save:
            self._save(end, step.state[0])

    def _save(self, t: float, u: Tensor) -> None:
        self.result.t.append(t)
        self.result.u.append(u)
        self.saved += 1

    def _fail(self, code: ReturnCode, estimates: Estimates | None) -> None:
        if estimates is not None and self.stable is not None:
            stiffness = self.stable.stiffness_of(abs(self.h), estimates.stiffness)
            estimates = replace(estimates, stiffness=stiffness)
        self.result.retcode = code
        self.result.message = explain(
            Failure(
                code,
                t0=_plain(self.t0),
                t=_plain(self.t),
                t1=_plain(self.t1),
                h=_plain(self.size),
                tried=_plain(self.h),
                alg=self.alg,
                tolerance=self.settings.tolerance,
                adaptive=self.settings.adaptive,
                dtmin=self.settings.dtmin,
                maxiters=self.settings.maxiters,
                attempts=self.attempts,
                rejected=self.result.nreject,
                estimates=estimates,
                state=self.state[0],
                trouble=self.trouble,
                own_jacobian=self.alg.is_implicit and self.rhs.jac is not None,
                noisy=isinstance(self.rhs, SDEField),
                field=self.rhs if self.rhs.is_of_user else None,
            )
        )


def progress_bar(t0: Any, t1: Any) -> Any:
    from tqdm.auto import tqdm

    layout = "{l_bar}{bar}| t {n:.4g}/{total:.4g} [{elapsed}<{remaining}]"
    return tqdm(total=abs(_plain(t1) - _plain(t0)), bar_format=layout, desc="solve")


def _plain(t: Any) -> float:
    return float(detached(t))
