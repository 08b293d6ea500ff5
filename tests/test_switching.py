"""Switching between an explicit and an implicit method, and the choice of ``alg=None``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradients import assert_near, leaf
from torch import Tensor

import diffsolve as ds
from diffsolve import (
    AutoSwitch,
    AutoTsit5,
    AutoVern7,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    PIController,
    Rodas4,
    Rodas5P,
    Tsit5,
    Vern7,
    solve,
)
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch_engine import integrate
from diffsolve.engines.trajectory import Record, Saving
from diffsolve.problems import library
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.controllers import IController
from diffsolve.solvers.norms import Tolerance
from diffsolve.solvers.switching import FACTOR, LIMIT, NONSTIFF_STEPS, STIFF_STEPS, Switch

F64 = torch.float64
ENGINE: dict[str, Any] = {"engine": "torch"}

# -- the decision ------------------------------------------------------------------------------


def fed(switch: Switch, *used: float) -> list[bool]:
    """What it says to steps that use such parts of the interval of stability."""
    return [switch.changes(x * switch.stability_size / 0.5, -0.5) for x in used]


def test_ten_steps_at_the_limit_make_it_stiff() -> None:
    switch = Switch(3.0)
    assert not any(fed(switch, *[0.95] * (STIFF_STEPS - 1), 0.3, *[0.95] * (STIFF_STEPS - 1)))
    assert fed(switch, 0.95) == [True] and switch.stiff and switch.count == 0


def test_three_steps_inside_make_it_nonstiff() -> None:
    switch = Switch(3.0)
    switch.stiff = True
    assert not any(fed(switch, *[0.2] * (NONSTIFF_STEPS - 1), 5.0, *[0.2] * (NONSTIFF_STEPS - 1)))
    assert fed(switch, 0.2) == [True] and not switch.stiff


def test_nan_counts_as_stiff() -> None:
    switch = Switch(3.0)
    assert fed(switch, *[math.nan] * STIFF_STEPS)[-1] and switch.stiff
    assert not any(fed(switch, 0.1, 0.1, math.nan, 0.1, 0.1))


def test_the_limit_itself_is_neither() -> None:
    switch = Switch(1.0)
    assert not any(switch.changes(LIMIT, 1.0) for _ in range(2 * STIFF_STEPS))
    switch.stiff = True
    assert not any(switch.changes(LIMIT, 1.0) for _ in range(2 * NONSTIFF_STEPS))


# -- in the loop -------------------------------------------------------------------------------


def pulse(t: Tensor, u: Tensor) -> Tensor:
    """Stiff for t in [1, 2] only."""
    rate = 1 + 2000 * torch.sigmoid(40 * (t - 1)) * torch.sigmoid(40 * (2 - t))
    return -rate * (u - torch.cos(t))


def records(alg: AutoSwitch, f: Any, span: tuple[float, float], **settings: Any) -> list[Record]:
    u0 = torch.tensor([2.0, 0.5], dtype=F64)
    field = VectorField.of(ODEProblem(f, u0, span))
    tolerance = Tolerance(torch.tensor(1e-5, dtype=F64), torch.tensor(1e-7, dtype=F64))
    made = Settings(tolerance, alg.default_controller(), **settings)
    found: list[Record] = []
    with torch.no_grad():
        result = integrate(field, alg, u0, *span, made, Saving((), recorder=found))
    assert result.retcode.successful
    return found


def test_there_and_back() -> None:
    alg = AutoTsit5(Rodas4())
    taken = records(alg, pulse, (0.0, 4.0), controller_stiff=alg.stiff.default_controller())
    names = [r.alg.name for r in taken]
    runs = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    assert runs == ["Tsit5", "Rodas4", "Tsit5"]
    first = names.index("Rodas4")
    assert 0.7 < taken[first].t < 1.3
    # the step that it begins with is about twice the one before; no state is made anew
    assert 1.0 < taken[first].h / taken[first - 1].h <= FACTOR * 1.2
    assert not any(r.restart for r in taken[1:])


def test_controller_of_the_user_holds_for_both() -> None:
    sol = solve(
        ODEProblem(pulse, torch.tensor([2.0], dtype=F64), (0.0, 3.0)),
        AutoTsit5(),
        controller=IController(factor_max=1.05),
        rtol=1e-5,
        atol=1e-7,
        **ENGINE,
    )
    ratio = sol.steps.h[1:] / sol.steps.h[:-1]
    assert sol.stats.njac > 0 and ratio[:-3].max() < FACTOR * 1.06


def test_dense_output_and_stops_across_a_switch() -> None:
    prob = ODEProblem(pulse, torch.tensor([2.0], dtype=F64), (0.0, 4.0))
    options = {"rtol": 1e-7, "atol": 1e-9, **ENGINE}
    times = torch.linspace(0, 4, 23, dtype=F64)
    expected = solve(prob, Vern7(), saveat=times, **options).u
    sol = solve(prob, AutoTsit5(), **options)
    assert sol.stats.njac > 0
    assert (sol(times) - expected).abs().max() < 2e-6
    stopped = solve(prob, AutoVern7(), tstops=[1.5, 1.7], saveat=times, **options)
    assert (stopped.u - expected).abs().max() < 2e-6


def test_backward_in_time() -> None:
    prob = ODEProblem(lambda t, u: 2000 * (u - torch.cos(t)), torch.ones(1, dtype=F64), (0.0, -2.0))
    sol = solve(prob, AutoTsit5(), rtol=1e-6, atol=1e-8, save_everystep=False, **ENGINE)
    assert sol.stats.njac > 0 and sol.stats.naccept < 300
    assert abs(float(sol.u[-1] - math.cos(2.0))) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [None, 4])
def test_gradient_across_switches(checkpoints: int | None) -> None:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        rate = p[0] + p[1] * torch.sigmoid(40 * (t - 1)) * torch.sigmoid(40 * (2 - t))
        return -rate * (u - p[2] * torch.cos(t)) - 0.1 * u**3

    def gradient(alg: Any, sensealg: Any, tol: float) -> Tensor:
        u0, p = leaf([2.0, 0.5]), leaf([1.0, 2000.0, 1.5])
        prob = ODEProblem(f, u0, (0.0, 3.0), p)
        options = {"saveat": [0.5, 1.5, 3.0], "rtol": tol, "atol": tol, **ENGINE}
        sol = solve(prob, alg, sensealg=sensealg, **options)
        (sol.u**2).sum().backward()
        return torch.cat([u0.grad, p.grad * p.detach()])

    expected = gradient(Rodas5P(), DiscreteAdjoint(), 1e-8)
    for alg in (AutoTsit5(), AutoVern7(ds.Kvaerno5())):
        got = gradient(alg, DiscreteAdjoint(checkpoints=checkpoints), 1e-6)
        assert_near(got, expected, 1e-4)
        got = gradient(alg, InterpolatingAdjoint(checkpoints=checkpoints), 1e-6)
        assert_near(got, expected, 1e-4)


def test_sweep_equals_plain_autograd_across_switches() -> None:
    def gradient(sensealg: Any) -> Tensor:
        u0 = leaf([2.0, 0.5])
        sol = solve(
            ODEProblem(pulse, u0, (0.0, 2.5)), AutoTsit5(), sensealg=sensealg, rtol=1e-4,
            atol=1e-5, saveat=[1.2, 2.5], **ENGINE,
        )  # fmt: skip
        weights = torch.linspace(1, 2, len(sol.steps), dtype=F64)
        ((sol.u**2).sum() + (weights * sol.steps.error).sum()).backward()
        return u0.grad

    assert_near(gradient(DiscreteAdjoint()), gradient(DiscreteAdjoint(tape=True)), 1e-8)


# -- what is refused ---------------------------------------------------------------------------


def test_methods_that_cannot_be_switched_between_are_refused() -> None:
    with pytest.raises(TypeError, match=r"write Rodas4\(\)"):
        AutoSwitch(Tsit5(), Rodas4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stability_interval"):
        AutoSwitch(Rodas4(), Rodas4())
    with pytest.raises(ValueError, match="not implicit"):
        AutoSwitch(Tsit5(), Vern7())
    with pytest.raises(ValueError, match="error estimates"):
        AutoSwitch(Tsit5(), ds.ImplicitMidpoint())


# -- alg=None ----------------------------------------------------------------------------------


def chosen(u0: Tensor, **options: Any) -> str:
    rtol = options.pop("rtol", 1e-3)
    prob = ODEProblem(lambda t, u: -u, u0, (0.0, 0.1))
    return solve(prob, rtol=rtol, **options, **ENGINE).stats.alg


def test_the_choice_of_none() -> None:
    u0 = torch.ones(2, dtype=F64)
    assert chosen(u0) == "AutoTsit5(Rodas5P)"
    assert chosen(u0, rtol=1e-8) == "AutoVern7(Rodas5P)"
    assert chosen(u0.float(), rtol=1e-7) == "AutoTsit5(Rodas5P)"
    assert chosen(u0.to(torch.complex128)) == "Tsit5"
    assert chosen(torch.ones(501, dtype=F64), rtol=1e-8) == "Vern7"
    assert chosen(torch.ones(501, 2, dtype=F64)) == "AutoTsit5(Rodas5P)"
    assert chosen(u0, adaptive=False, dt=0.05) == "Tsit5"
    names = []

    def under_transform(u0: Tensor) -> Tensor:
        sol = solve(ODEProblem(lambda t, u: -u, u0, (0.0, 0.1)))
        names.append(sol.stats.alg)
        return sol.u.sum()

    torch.func.grad(under_transform)(u0)
    assert names == ["Tsit5"]


def test_large_coupled_rows_stay_explicit() -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return -400 * (u - u.mean(0)) - u

    u0 = torch.linspace(0, 1, 1200, dtype=F64).reshape(600, 2)
    sol = solve(ODEProblem(f, u0, (0.0, 0.5)), save_everystep=False, **ENGINE)
    assert sol.success and sol.stats.nlu == 0
    assert (sol.u[-1] - u0.mean(0) * math.exp(-0.5)).abs().max() < 1e-2


# Rates of growth of an error between the times of a reference, where that is large
SENSITIVE = {"lorenz", "pleiades", "arenstorf", "henon_heiles"}
ATOL = {"e5": 1e-18}  # of 1e-24 to 1e-3
NAMES = sorted(
    name
    for name in library.__all__
    if isinstance(getattr(library, name), library.LibraryProblem) and name not in SENSITIVE
)


@pytest.mark.parametrize("name", NAMES)
def test_none_solves_the_library(name: str) -> None:
    named = getattr(library, name)
    t, u = named.reference()
    rtol, atol = 1e-5, ATOL.get(name, 1e-9)
    # a solution that is smooth but for what is damped at once is solved in steps so large that
    # dense output, whose error nobody controls, is far off inside of them
    stops = t[1:-1].tolist() if name == "prothero_robinson" else ()
    sol = solve(named(), saveat=t, tstops=stops, rtol=rtol, atol=atol, **ENGINE)
    exact = torch.from_numpy(u)
    scaled = ((sol.u - exact) / (atol + rtol * exact.abs())).reshape(len(t), -1)
    assert float(scaled.pow(2).mean(1).sqrt().max()) < 300
    assert (sol.stats.njac > 0) == named.stiff
    assert sol.stats.naccept + sol.stats.nreject < 2500


def test_controllers_of_both() -> None:
    alg = AutoTsit5(ds.Kvaerno3())
    assert alg.default_controller() == Tsit5().default_controller()
    assert alg.stiff.default_controller() == PIController.for_order(3, steady=1.2)
