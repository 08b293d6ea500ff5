"""The adaptive loop alone: a stub method with scripted errors, a stub controller."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsolve import ODEProblem, ReturnCode
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch.loop import integrate
from diffsolve.engines.torch.step_log import Record, Saving, StepLog
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm, Step
from diffsolve.solvers.norms import Tolerance

F64 = torch.float64
# with these, the scaled norm of a one-component error is that component
TOLERANCE = Tolerance(torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64))


class Line:
    """Continuous extension of a step of ``u' = 1``."""

    def __init__(self, h: float, u: Tensor):
        self.h, self.u = h, u

    def __call__(self, theta: Tensor, derivative: int = 0) -> Tensor:
        return self.u + (theta * self.h)[:, None].to(self.u.dtype)

    def keep(self) -> Line:
        return self


class Scripted(Algorithm):
    """Solves ``u' = 1`` exactly and claims the errors of a script, then ``otherwise``."""

    order = 4
    adaptive = True

    def __init__(self, errors: Iterable[float] = (), otherwise: float = 0.5):
        self.errors = iter(errors)
        self.otherwise = otherwise
        self.tried: list[tuple[float, float]] = []
        self.inits: list[float] = []

    def init(self, field: Any, t: Any, u: Tensor, du: Tensor | None = None) -> tuple[Tensor]:
        self.inits.append(t)
        return (u,)

    def step(self, field: Any, t: Any, h: Any, state: tuple[Tensor, ...]) -> Step:
        self.tried.append((t, h))
        error = torch.full_like(state[0], next(self.errors, self.otherwise))
        return Step((state[0] + h,), error, torch.zeros(()), Line(h, state[0]))


@dataclass
class Factors:
    """Controller that multiplies by fixed factors and notes what it was told."""

    on_accept: float = 1.0
    on_reject: float = 0.5
    told: list[tuple[float, bool]] = field(default_factory=list)

    def start(self) -> tuple:
        return ()

    def propose(self, error: float, memory: tuple, after_rejection: bool = False) -> tuple:
        self.told.append((error, after_rejection))
        accept = error <= 1  # False for NaN
        return accept, self.on_accept if accept else self.on_reject, memory


def run(
    alg: Scripted | None = None,
    span: tuple[float, float] = (0.0, 1.0),
    *,
    controller: Factors | None = None,
    times: Sequence[float] | None = None,
    recorder: Any = None,
    dense: bool = False,
    on_stop: Any = None,
    u0: Tensor | None = None,
    **settings: Any,
) -> StepLog:
    u0 = torch.tensor([span[0]], dtype=F64) if u0 is None else u0
    rhs = VectorField.of(ODEProblem(lambda t, u: torch.ones_like(u), u0, span))
    settings.setdefault("dt", 0.25)
    made = Settings(TOLERANCE, controller or Factors(), **settings)  # type: ignore[arg-type]
    saving = Saving(times, dense, recorder)
    with torch.no_grad():
        return integrate(rhs, alg or Scripted(), u0, *span, made, saving, on_stop=on_stop)


def sizes(result: StepLog) -> list[float]:
    return [abs(h) for h in result.step_h]


# -- accepting and rejecting -------------------------------------------------------------------


def test_rejected_step_is_tried_again_smaller() -> None:
    alg, controller = Scripted([0.5, 2.0, 0.5]), Factors()
    result = run(alg, controller=controller)
    assert alg.tried[:4] == [(0.0, 0.25), (0.25, 0.25), (0.25, 0.125), (0.375, 0.125)]
    assert (result.naccept, result.nreject) == (7, 1)
    assert result.retcode is ReturnCode.SUCCESS
    assert [e.error for e in result.estimates] == [0.5] * 7


def test_controller_is_told_of_rejections() -> None:
    controller = Factors()
    run(Scripted([0.5, 2.0, 3.0, 0.5, 0.5]), controller=controller)
    # only a try right after a rejection may not grow
    assert [flag for _, flag in controller.told[:5]] == [False, False, True, True, False]
    assert [error for error, _ in controller.told[:5]] == [0.5, 2.0, 3.0, 0.5, 0.5]


def test_error_of_one_is_accepted() -> None:
    assert run(Scripted(otherwise=1.0)).nreject == 0


def test_maxiters_counts_rejected_steps() -> None:
    result = run(Scripted([2.0, 2.0]), maxiters=5)
    assert result.retcode is ReturnCode.MAX_ITERS
    assert (result.naccept, result.nreject) == (3, 2)
    assert result.final_t == result.t[-1] == pytest.approx(3 * 0.0625)
    assert "5 steps were not enough" in result.message


def test_maxiters_that_suffice_suffice() -> None:
    assert run(maxiters=4).retcode is ReturnCode.SUCCESS


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_error_only_shrinks(bad: float) -> None:
    result = run(Scripted([0.5, bad]))
    assert result.retcode is ReturnCode.SUCCESS
    assert result.nreject == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_errors_end_as_unstable(bad: float) -> None:
    alg = Scripted([0.5], otherwise=bad)
    result = run(alg)
    assert result.retcode is ReturnCode.UNSTABLE
    assert result.final_t == 0.25
    tried = [h for _, h in alg.tried[1:]]
    assert all(b < a for a, b in pairwise(tried))
    assert len(tried) < 60  # halving from 0.25 down to rounding of t


def test_endless_rejection_ends_at_rounding() -> None:
    result = run(Scripted(otherwise=2.0), span=(1.0, 2.0))
    assert result.retcode is ReturnCode.DT_LESS_THAN_MIN
    assert result.naccept == 0 and result.nreject < 60
    assert result.t == [1.0]  # the partial result


def test_dtmin_ends_the_solve() -> None:
    alg = Scripted(otherwise=2.0)
    result = run(alg, dt=0.3, dtmin=0.1)
    assert result.retcode is ReturnCode.DT_LESS_THAN_MIN
    assert [h for _, h in alg.tried] == [0.3, 0.15]
    assert "dtmin" in result.message


@pytest.mark.parametrize("end", [0.15, 0.45])
def test_dtmin_allows_for_even_steps_at_the_end(end: float) -> None:
    # the loop, not the error, asks for half of 0.15 here: that is no failure
    assert run(span=(0.0, end), dt=0.12, dtmin=0.1).retcode is ReturnCode.SUCCESS


def test_dtmin_lifts_the_first_guess() -> None:
    # from u = 0 Hairer's guess is at most 1e-4, whatever the problem needs
    assert run(dt=None, dtmin=1e-2).retcode is ReturnCode.SUCCESS


@pytest.mark.parametrize("dt", [0.04, 0.1, 0.3])
@pytest.mark.parametrize("adaptive", [True, False])
def test_dtmax_holds(dt: float, adaptive: bool) -> None:
    result = run(controller=Factors(on_accept=10.0), dt=dt, dtmax=0.07, adaptive=adaptive)
    assert max(sizes(result)) <= 0.07 * (1 + 1e-7)
    assert result.final_t == 1.0


# -- landing -----------------------------------------------------------------------------------

SIZES = [0.07, 0.1, 0.3, 1 / 3, 0.35, 0.499, 0.5, 0.51, 0.97, 0.995, 1.0, 1.005, 1.5, 20.0]
SPANS = [(0.0, 1.0), (1.0, 0.0), (-0.3, 0.7), (1e3, 1e3 + 1)]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("dt", SIZES)
def test_end_is_exact_without_sliver(dt: float, span: tuple[float, float]) -> None:
    result = run(span=span, dt=dt)
    assert result.final_t == result.t[-1] == span[1]
    allowed = min(dt, 1.0) / 2
    assert min(sizes(result)) >= allowed * (1 - 1e-9)
    assert max(sizes(result)) <= dt * 1.01 + 1e-12
    assert sum(sizes(result)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("stops", [(0.1,), (0.3, 0.31), (0.2, 0.4, 0.6, 0.8), (1e-9, 1 - 1e-9)])
def test_stops_are_step_ends(stops: tuple[float, ...], span: tuple[float, float]) -> None:
    ordered = tuple(sorted(stops, reverse=span[1] < span[0]))
    result = run(span=span, tstops=ordered)
    assert set(stops) <= set(result.t)
    assert result.t == sorted(result.t, reverse=span[1] < span[0])
    assert result.final_t == span[1]


def test_stop_cuts_a_step_but_not_the_proposal() -> None:
    alg = Scripted()
    run(alg, tstops=(0.1,), span=(0.0, 2.0))
    assert alg.tried[0] == (0.0, 0.1)
    assert alg.tried[1] == (0.1, 0.25)


def test_error_after_a_stop_may_still_shrink() -> None:
    alg = Scripted([0.5, 2.0])
    run(alg, tstops=(0.1,), span=(0.0, 2.0))
    assert alg.tried[1:3] == [(0.1, 0.25), (0.1, 0.125)]


# -- fixed steps -------------------------------------------------------------------------------

FIXED = [
    # t0, t1, dt, steps
    (0.0, 1.0, 0.1, 10),
    (0.0, 0.3, 0.1, 3),
    (0.0, 1.0, 0.01, 100),
    (0.0, 1.0, 1e-3, 1000),
    (0.0, 1.0, 1 / 3, 3),
    (0.0, 1.0, 1.0, 1),
    (0.0, 1.0, 3.0, 1),
    (0.0, 1.0, 0.07, 15),
    (0.1, 0.7, 0.1, 6),
    (1.0, 0.0, 0.1, 10),
    (-0.7, 0.7, 0.1, 14),
    # rounding of t adds up to more than the steps' own: 1e-11 after a thousand of them
    (1e3, 1e3 + 1, 1e-3, 1000),
    (1e5, 1e5 + 1, 1e-2, 100),
    pytest.param(0.0, 1.0, 1e-5, 100_000, marks=pytest.mark.slow),
    # and of t alone to more than 1e-8 of a step
    (1.7e9, 1.7e9 + 1, 0.2, 5),
    (1.7e9 + 1, 1.7e9, 0.2, 5),
    (1e4, 1e4 + 0.1, 1e-4, 1000),
    (1e4 + 0.1, 1e4, 1e-4, 1000),
    (-1e9, 1e9, 2e9 / 7, 7),
    # where a step is a few units of rounding, each is still taken
    (2.0**32, 2.0**32 + 16 * 2.0**-20, 8 * 2.0**-20, 2),
]


@pytest.mark.parametrize(("t0", "t1", "dt", "steps"), FIXED)
def test_fixed_steps_are_counted_right(t0: float, t1: float, dt: float, steps: int) -> None:
    # errors are no reason to reject a fixed step
    result = run(Scripted(otherwise=5.0), (t0, t1), dt=dt, adaptive=False)
    assert result.retcode is ReturnCode.SUCCESS
    assert result.naccept == steps
    assert result.nreject == 0
    assert result.final_t == t1
    whole = sizes(result)[:-1]
    assert whole == pytest.approx([dt] * len(whole), rel=1e-6)
    assert min(sizes(result)) > dt * 1e-3 or steps == 1


def test_fixed_steps_start_anew_at_stops() -> None:
    result = run(dt=0.25, adaptive=False, tstops=(0.6,))
    assert result.t == pytest.approx([0, 0.25, 0.5, 0.6, 0.85, 1.0])


def test_fixed_step_that_is_not_finite_fails_at_once() -> None:
    alg = Scripted([0.5, math.nan])
    result = run(alg, adaptive=False)
    assert result.retcode is ReturnCode.UNSTABLE
    assert len(alg.tried) == 2 and result.final_t == 0.25


# -- saving ------------------------------------------------------------------------------------

SAVES = [
    [0.0],
    [1.0],
    [0.0, 1.0],
    [0.25, 0.5],
    [0.1, 0.2, 0.24],
    [0.0, 0.1, 0.25, 0.26, 0.5, 0.99, 1.0],
    [0.3],
    [0.25 + 1e-15, 0.5 - 1e-15],
]


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("times", SAVES)
def test_saves_are_the_wanted_times(times: list[float], backward: bool, adaptive: bool) -> None:
    wanted = [1 - t for t in times] if backward else times
    span = (1.0, 0.0) if backward else (0.0, 1.0)
    result = run(span=span, times=wanted, adaptive=adaptive)
    assert result.t == wanted
    assert torch.cat(result.u).tolist() == pytest.approx(wanted, abs=1e-15)
    assert result.naccept == 4  # saving does not cut steps


def test_nothing_is_saved_beyond_a_failure() -> None:
    result = run(Scripted([0.5, 0.5], otherwise=math.nan), times=[0.0, 0.1, 0.4, 0.6, 1.0])
    assert result.retcode is ReturnCode.UNSTABLE
    assert result.t == [0.0, 0.1, 0.4]
    assert len(result.u) == 3


def test_every_step_is_saved_without_times() -> None:
    assert run().t == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_span_of_zero_length_saves_the_start() -> None:
    alg = Scripted()
    result = run(alg, span=(2.0, 2.0))
    assert (result.t, result.naccept, alg.tried) == ([2.0], 0, [])
    assert result.retcode is ReturnCode.SUCCESS


def test_dense_output_joins_the_steps() -> None:
    dense = run(Scripted([0.5, 2.0]), dense=True, tstops=(0.1,)).dense
    assert dense is not None
    times = [0.0, 0.05, 0.1, 0.6, 1.0]
    assert dense(times)[:, 0].tolist() == pytest.approx(times, abs=1e-15)


# -- records, stops, states --------------------------------------------------------------------


def test_records_tell_how_to_run_again() -> None:
    records: list[Record] = []
    alg = Scripted([0.5, 2.0, 0.5])
    run(alg, recorder=records, tstops=(0.75,), times=[0.0, 0.1, 0.2, 0.25, 0.3, 0.75, 0.9])
    assert [(r.t, r.h) for r in records] == [
        step for i, step in enumerate(alg.tried) if i != 1
    ]  # the rejected one is not there
    assert [r.t for r in records if r.restart] == [0.0, 0.75]
    assert [r.state[0].item() for r in records] == pytest.approx([r.t for r in records])
    first = records[0]
    assert first.thetas == pytest.approx([0.4, 0.8])
    assert (first.first_save, first.end_save) == (1, 3)
    saved = [(r.first_save + i, r.t + x * r.h) for r in records for i, x in enumerate(r.thetas)]
    saved += [(r.end_save, r.t + r.h) for r in records if r.end_save is not None]
    expected = [(1, 0.1), (2, 0.2), (3, 0.25), (4, 0.3), (5, 0.75), (6, 0.9)]
    for (i, t), (j, s) in zip(sorted(saved), expected, strict=True):
        assert i == j and t == pytest.approx(s)


def test_records_of_every_step_point_to_their_ends() -> None:
    records: list[Record] = []
    run(recorder=records)
    assert [r.end_save for r in records] == [1, 2, 3, 4]
    assert all(not r.thetas for r in records)


def test_on_stop_changes_the_state() -> None:
    seen: list[tuple[float, float]] = []

    def jump(t: float, u: Tensor) -> Tensor:
        seen.append((t, u.item()))
        return u + 100

    records: list[Record] = []
    result = run(tstops=(0.25, 0.6), on_stop=jump, recorder=records, times=[0.25, 0.5, 1.0])
    assert [t for t, _ in seen] == [0.25, 0.6]  # not at the end of the span
    assert [u for _, u in seen] == pytest.approx([0.25, 100.6])
    # the value saved at a stop is the one before the jump
    assert torch.cat(result.u).tolist() == pytest.approx([0.25, 100.5, 201.0])
    assert [r.state[0].item() for r in records if r.restart] == pytest.approx([0, 100.25, 200.6])


def test_method_restarts_at_stops_only() -> None:
    alg = Scripted([0.5, 2.0, 2.0])
    run(alg, tstops=(0.3, 0.6))
    assert alg.inits == [0.0, 0.3, 0.6]


@pytest.mark.parametrize("span", [(0.0, 0.1), (0.1, 0.0), (1e4, 1e4 + 0.1)])
def test_time_is_double_whatever_the_state(span: tuple[float, float]) -> None:
    result = run(span=span, dt=0.01, adaptive=False, u0=torch.zeros(1))
    assert result.naccept == 10
    assert result.final_t == span[1]
    assert all(isinstance(t, float) for t in result.t)
    assert all(u.dtype == torch.float32 for u in result.u)


def test_exception_of_a_step_names_its_time() -> None:
    class Broken(Scripted):
        def step(self, *args: Any) -> Step:
            if len(self.tried) == 2:
                raise KeyError("mine")
            return super().step(*args)

    with pytest.raises(KeyError, match="mine") as caught:
        run(Broken())
    (note,) = caught.value.__notes__
    assert "0.5" in note and "0.25" in note
