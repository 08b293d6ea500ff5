"""Bad input, and problems that cannot be solved: each gives an error that names its cause.

A solve must never hang: those that could go on for long have ``maxiters``.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from failing_problems import F64, decay, problem
from torch import Tensor

from diffsolve import (
    BS3,
    DP5,
    DP8,
    RK4,
    DiscreteAdjoint,
    Euler,
    PIController,
    ReturnCode,
    SolveError,
    Tsit5,
    Vern7,
    Vern9,
    solve,
)

ADAPTIVE = [BS3, DP5, Tsit5, DP8, Vern7, Vern9]


# -- the table of refused input ----------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Input that is refused: what was passed, the error, and words that its message must hold."""

    what: str
    error: type[Exception]
    words: str
    problem: dict[str, Any]
    options: dict[str, Any]


def bad_problem(what: str, error: type[Exception], words: str, **changes: Any) -> Case:
    return Case(what, error, words, changes, {})


def bad_option(what: str, error: type[Exception], words: str, **options: Any) -> Case:
    return Case(what, error, words, {}, options)


CASES = [
    # u0
    bad_problem("NaN in u0", ValueError, "u0 NaN", u0=torch.tensor([1.0, math.nan])),
    bad_problem("Inf in u0", ValueError, "u0 Inf", u0=torch.tensor([1.0, -math.inf])),
    bad_problem("complex NaN in u0", ValueError, "u0 NaN", u0=torch.tensor([1j * math.nan])),
    bad_problem("integer u0", ValueError, "u0 int64 double", u0=torch.tensor([1, 2])),
    bad_problem("boolean u0", ValueError, "u0 bool double", u0=torch.tensor([True])),
    bad_problem("half u0", ValueError, "u0 float16 float32", u0=torch.ones(2).half()),
    bad_problem("bfloat16 u0", ValueError, "u0 bfloat16 float32", u0=torch.ones(2).bfloat16()),
    bad_problem("no elements", ValueError, "u0 elements (0,)", u0=torch.ones(0)),
    bad_problem("empty structure", ValueError, "u0 empty", u0={}),
    bad_problem("u0 of floats", TypeError, "u0 tensor float as_tensor", u0=[1.0, 2.0]),
    bad_problem("mixed dtypes", ValueError, "u0 dtype", u0=(torch.ones(1), torch.ones(1).double())),
    # tspan
    bad_problem("NaN in tspan", ValueError, "tspan finite nan", tspan=(0.0, math.nan)),
    bad_problem("Inf in tspan", ValueError, "tspan finite inf", tspan=(0.0, math.inf)),
    bad_problem("three times in tspan", ValueError, "tspan two", tspan=(0.0, 1.0, 2.0)),
    bad_problem("tspan a number", ValueError, "tspan two", tspan=1.0),
    # f
    bad_problem("f not callable", TypeError, "f callable f(t, u, p)", f=3),
    bad_problem("f of p, no p", TypeError, "f(t, u)", f=lambda t, u, p: -u),
    bad_problem("f without p, p", TypeError, "f(t, u, p)", f=decay, p=torch.ones(1)),
    bad_problem("wrong shape", ValueError, "f(t, u) shape (1,) (2,)", f=lambda t, u: -u[:1]),
    bad_problem("wrong rank", ValueError, "f(t, u) shape (1, 2) (2,)", f=lambda t, u: -u[None]),
    bad_problem(
        "wrong dtype", ValueError, "f(t, u) float32 float64 dtype", f=lambda t, u: -u.float()
    ),
    bad_problem("complex f of real u", ValueError, "f(t, u) complex128", f=lambda t, u: 1j * u),
    bad_problem(
        "wrong device", ValueError, "f(t, u) meta cpu",
        f=lambda t, u: torch.empty_like(u, device="meta"),
    ),
    bad_problem("f gives None", ValueError, "f(t, u) None tensor", f=lambda t, u: None),
    bad_problem("f gives a float", ValueError, "f(t, u) float tensor", f=lambda t, u: -1.0),
    bad_problem("f gives a list", ValueError, "f(t, u) list tensor torch.stack",
                f=lambda t, u: [u[0], u[1]]),
    bad_problem("f gives a tuple", ValueError, "f(t, u) tuple tensor torch.stack",
                f=lambda t, u: (u[0], u[1])),
    bad_problem("f gives an array", ValueError, "f(t, u) ndarray tensor NumPy gradient",
                f=lambda t, u: -u.numpy()),
    bad_problem("module of u alone", TypeError, "f(t, u) state alone lambda t, u: f(u)",
                f=torch.nn.Linear(2, 2).double()),
    bad_problem("function of u alone", TypeError, "f(t, u) state alone lambda t, u: f(u)",
                f=lambda u: -u),
    bad_problem("module of u alone, p", TypeError, "f(t, u, p) alone lambda t, u, p: f(u)",
                f=torch.nn.Linear(2, 2).double(), p=torch.ones(1)),
    bad_problem("f without p, p: what to do", TypeError, "takes no p lambda t, u, p: f(t, u)",
                f=decay, p=torch.ones(1)),
    bad_problem(
        "tensor for a dict", ValueError, "f(t, u) structure", u0={"a": torch.ones(2)},
        f=lambda t, u: -u["a"],
    ),
    bad_problem("f raises at once", ZeroDivisionError, "", f=lambda t, u: 1 / 0),
    # times
    bad_option("unsorted saveat", ValueError, "saveat order 0.2", saveat=[0.5, 0.2]),
    bad_option("repeated saveat", ValueError, "saveat repeats 0.2", saveat=[0.2, 0.2]),
    bad_option("saveat after tspan", ValueError, "saveat 1.5 outside tspan", saveat=[0.5, 1.5]),
    bad_option("saveat before tspan", ValueError, "saveat -1.0 outside tspan", saveat=[-1.0, 0.5]),
    bad_option("NaN in saveat", ValueError, "saveat nan", saveat=[math.nan]),
    bad_option("no saveat", ValueError, "saveat (0,)", saveat=[]),
    bad_option("saveat of rank two", ValueError, "saveat (2, 2)", saveat=torch.ones(2, 2)),
    bad_option("zero spacing", ValueError, "saveat positive spacing", saveat=0.0),
    bad_option("negative spacing", ValueError, "saveat positive spacing", saveat=-0.1),
    bad_option("two ways to save", ValueError, "saveat save_everystep drop", saveat=0.1,
               save_everystep=True),
    bad_option("NaN in tstops", ValueError, "tstops NaN", tstops=[math.nan]),
    # tolerances
    bad_option("negative rtol", ValueError, "rtol positive -1", rtol=-1.0),
    bad_option("negative atol", ValueError, "atol positive -1", atol=-1.0),
    bad_option("NaN rtol", ValueError, "rtol nan", rtol=math.nan),
    bad_option("Inf atol", ValueError, "atol inf", atol=math.inf),
    bad_option("no tolerance", ValueError, "rtol atol zero", rtol=0, atol=0),
    bad_option("no tolerance for one", ValueError, "rtol atol zero", rtol=0,
               atol=torch.tensor([1.0, 0.0])),
    bad_option("negative component", ValueError, "atol positive", atol=torch.tensor([1.0, -1.0])),
    bad_option("rtol of wrong shape", ValueError, "rtol broadcast", rtol=torch.ones(3)),
    bad_option("rtol of wrong length", ValueError, "rtol broadcast", rtol=[1e-3] * 3),
    # steps
    bad_option("negative dt", ValueError, "dt positive -0.1", dt=-0.1),
    bad_option("zero dt", ValueError, "dt positive", dt=0.0),
    bad_option("NaN dt", ValueError, "dt nan", dt=math.nan),
    bad_option("fixed steps of no size", ValueError, "adaptive=False dt=", adaptive=False),
    bad_option("fixed-step method", ValueError, "Euler error dt=", alg=Euler()),
    bad_option("negative dtmin", ValueError, "dtmin -1", dtmin=-1.0),
    bad_option("zero dtmax", ValueError, "dtmax", dtmax=0.0),
    bad_option("dtmin above dtmax", ValueError, "dtmin dtmax", dtmin=2.0, dtmax=1.0),
    bad_option("no iterations", ValueError, "maxiters positive", maxiters=0),
    # choices
    bad_option("class for alg", TypeError, "alg Tsit5()", alg=Tsit5),
    bad_option("name for alg", TypeError, "alg Tsit5() 'dopri5'", alg="dopri5"),
    bad_option("class for sensealg", TypeError, "sensealg DiscreteAdjoint()",
               sensealg=DiscreteAdjoint),
    bad_option("name for sensealg", TypeError, "sensealg 'adjoint'", sensealg="adjoint"),
    bad_option("class for controller", TypeError, "controller PIController()",
               controller=PIController),
    bad_option("norm not callable", TypeError, "norm", norm=3),
    bad_option("unknown engine", ValueError, "engine auto torch 'fast'", engine="fast"),
    Case("mass matrix", ValueError, "Tsit5 mass matrix inverse",
         {"mass_matrix": torch.eye(2)}, {"alg": Tsit5()}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_refused(case: Case) -> None:
    options = {"maxiters": 1000, **case.options}
    with pytest.raises(case.error) as caught:
        solve(problem(**case.problem), options.pop("alg", None), **options)
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    missing = [w for w in case.words.split() if w.lower() not in said.lower()]
    assert not missing, f"{said!r} does not mention {missing}"


def test_prob_must_be_a_problem() -> None:
    with pytest.raises(TypeError, match="ODEProblem"):
        solve(decay, Tsit5())  # type: ignore[arg-type]


# -- f that goes wrong on the way --------------------------------------------------------------


def test_exception_of_f_is_kept() -> None:
    class MineError(Exception):
        pass

    def f(t: Tensor, u: Tensor) -> Tensor:
        if t > 0.5:
            raise MineError("the reason")
        return -u

    with pytest.raises(MineError, match="the reason") as caught:
        solve(problem(f), Tsit5())
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "f"  # the traceback leads into the user's code
    (note,) = caught.value.__notes__
    assert "t = " in note and "h = " in note


def test_exception_at_the_start_says_when() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        solve(problem(lambda t, u: u * (1 // 0), tspan=(2.5, 3.0)), Tsit5())
    assert "2.5" in " ".join(getattr(caught.value, "__notes__", []))


@pytest.mark.parametrize(
    "late",
    [
        lambda u: -u[:1],  # broadcasts
        lambda u: -u.T,  # as many elements
        lambda u: -u.float(),
        lambda u: 1j * u,
        lambda u: None,
    ],
    ids=["shape", "transposed", "dtype", "complex", "None"],
)
def test_derivative_that_changes_kind_is_noticed(late: Callable) -> None:
    # a branch of f that is not taken at t0: no silent broadcast, no silent cast
    prob = problem(lambda t, u: -u if t < 0.5 else late(u), torch.ones(2, 3, dtype=F64))
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        solve(prob, Tsit5(), maxiters=1000)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_nan_on_the_way_is_unstable(method: type) -> None:
    prob = problem(lambda t, u: torch.where(t < 0.5, -u, math.nan))
    with pytest.raises(SolveError, match=r"NaN or Inf.*check f") as caught:
        solve(prob, method(), maxiters=1000)
    error = caught.value
    assert error.retcode is ReturnCode.UNSTABLE
    assert error.t == pytest.approx(0.5, abs=1e-8)
    assert error.solution is not None
    assert bool(torch.isfinite(error.solution.u).all())
    expected = torch.exp(-error.solution.t)[:, None].expand(-1, 2)
    torch.testing.assert_close(error.solution.u, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("method", [Euler, RK4, Tsit5])
def test_nan_on_the_way_ends_fixed_steps(method: type) -> None:
    prob = problem(lambda t, u: torch.where(t < 0.5, -u, math.nan))
    with pytest.raises(SolveError) as caught:
        solve(prob, method(), dt=0.1, adaptive=False)
    assert caught.value.retcode is ReturnCode.UNSTABLE
    assert 0.3 < caught.value.t <= 0.6 + 1e-12


def test_nan_at_the_start_is_unstable() -> None:
    sol = solve(problem(lambda t, u: u / 0), Tsit5(), throw=False)
    assert sol.retcode is ReturnCode.UNSTABLE
    assert (len(sol), sol.stats.naccept) == (1, 0)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("method", [Tsit5, DP5, DP8, Vern7])
def test_overflow_of_the_state_is_unstable(method: type, adaptive: bool) -> None:
    # every stage is finite, their sum is not; the scale of the error is then infinite as well
    prob = problem(lambda t, u: torch.full_like(u, 1e307), tspan=(0.0, 100.0))
    with pytest.raises(SolveError) as caught:
        solve(prob, method(), atol=1e300, dt=1.0, adaptive=adaptive, maxiters=10_000)
    assert caught.value.t < 18  # u = 1e307 t is a number up to t = 17.97, though its square is none
    if method in (Tsit5, DP5):  # the others' sums overflow earlier: their coefficients are large
        assert caught.value.retcode is ReturnCode.UNSTABLE
        assert caught.value.t > 10
    assert bool(torch.isfinite(caught.value.solution.u).all())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("method", "tol"),
    [
        pytest.param(m, tol, marks=[pytest.mark.slow] if m is BS3 and tol < 1e-3 else [])
        for m in ADAPTIVE
        for tol in (1e-3, 1e-8)
    ],
)
def test_blow_up_stops_near_the_singularity(method: type, tol: float) -> None:
    with pytest.raises(SolveError, match=r"blow up|NaN or Inf") as caught:
        solve(problem(lambda t, u: u * u, tspan=(0.0, 2.0)), method(), rtol=tol, atol=tol,
              maxiters=20_000)  # fmt: skip
    error = caught.value
    assert error.retcode in (ReturnCode.DT_LESS_THAN_MIN, ReturnCode.UNSTABLE)
    assert error.t == pytest.approx(1.0, abs=max(1e-6, 10 * tol))  # u = 1 / (1 - t)
    partial = error.solution
    assert partial is not None and not partial.success and len(partial) > 3
    early = partial.t < 0.9
    expected = 1 / (1 - partial.t[early, None]).expand(-1, 2)
    torch.testing.assert_close(partial.u[early], expected, rtol=100 * tol, atol=0)


@pytest.mark.parametrize("tspan", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("method", [Tsit5, DP5, Vern7, BS3])
def test_tstops_spare_the_rejections_of_a_jump(method: type, tspan: tuple[float, float]) -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.where(t < 0.4, -u, 10.0)

    # forward: exp(-0.4) + 6; backward: (1 - 6) * exp(0.4)
    exact = math.exp(-0.4) + 6 if tspan[1] > 0 else -5 * math.exp(0.4)
    tol = {"rtol": 1e-6, "atol": 1e-6}
    blind = solve(problem(f, tspan=tspan), method(), **tol)
    told = solve(problem(f, tspan=tspan), method(), tstops=[0.4], **tol)
    assert told.stats.nreject < blind.stats.nreject
    assert told.stats.nf < blind.stats.nf
    assert 0.4 in told.t.tolist()
    assert float((told.u[-1] - exact).abs().max()) < 2e-5


@pytest.mark.parametrize("stop", [0.7680224171238862, 1.757087971196787, 1.870409615979148])
def test_stages_stay_on_their_side_of_a_stop(stop: float) -> None:
    # from these starts, t + (stop - t) rounds to a neighbour of the stop
    start = {0.7680224171238862: 0.14690805613867747, 1.757087971196787: 0.06563431120130658}
    t0 = start.get(stop, 0.2112069426990214)
    assert t0 + (stop - t0) != stop
    seen: list[float] = []

    def f(t: Tensor, u: Tensor) -> Tensor:
        seen.append(t.item())
        return -u

    solve(problem(f, tspan=(t0, stop + 1)), RK4(), dt=9.0, tstops=[stop])
    before, after = seen[:5], seen[5:]  # the start, and four evaluations of the step
    assert all(t < stop for t in before) and all(t > stop for t in after), (before, after)


# -- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"alg": Tsit5()}, {"alg": RK4(), "dt": 0.1}], ids=str)
def test_maxiters_keeps_the_partial_solution(options: dict[str, Any]) -> None:
    prob = problem(tspan=(0.0, 1000.0))
    with pytest.raises(SolveError, match=r"10 steps were not enough.*maxiters") as caught:
        solve(prob, maxiters=10, **options)
    error = caught.value
    assert error.retcode is ReturnCode.MAX_ITERS
    partial = error.solution
    assert partial is not None
    assert partial.t[-1].item() == error.t < 1000
    assert partial.stats.naccept + partial.stats.nreject == 10
    assert len(partial.steps) == partial.stats.naccept
    assert partial.message == str(error) and partial.message in repr(partial)


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_fixed_steps_that_are_too_many_name_dt(engine: str) -> None:
    prob, options = problem(tspan=(0.0, 1000.0)), {"maxiters": 10, "dt": 0.1, "engine": engine}
    for alg, more in ((RK4(), {}), (Tsit5(), {"adaptive": False})):
        with pytest.raises(SolveError, match=r"9,990 more.*maxiters.*larger dt") as caught:
            solve(prob, alg, **options, **more)
        assert "rtol" not in str(caught.value)
    with pytest.raises(SolveError, match="loosen rtol and atol"):
        solve(prob, Tsit5(), maxiters=10, engine=engine)


def test_throw_false_returns_the_partial_solution() -> None:
    sol = solve(problem(tspan=(0.0, 1000.0)), Tsit5(), maxiters=10, throw=False, saveat=1.0)
    assert sol.retcode is ReturnCode.MAX_ITERS and not sol.success
    assert 0 < len(sol) < 1000
    assert sol.t.tolist() == list(range(len(sol)))


def test_stiffness_is_named_as_the_cause() -> None:
    prob = problem(lambda t, u: -1e6 * (u - torch.cos(t)), tspan=(0.0, 10.0))
    with pytest.raises(SolveError, match=r"stability.*stiff method"):
        solve(prob, Tsit5(), maxiters=300)
