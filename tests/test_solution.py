"""What solve gives back, and what goes in besides plain functions."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffsolve import (
    DP5,
    RK4,
    ExplicitRK,
    ODEProblem,
    ReturnCode,
    Solution,
    Tableau,
    TableauError,
    Tsit5,
    Vern7,
    solve,
)

F64 = torch.float64


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


def solved(tspan: tuple[float, float] = (0.0, 1.0), alg: Any = None, **options: Any) -> Solution:
    prob = ODEProblem(decay, torch.tensor([1.0, 2.0], dtype=F64), tspan)
    return solve(prob, alg or Tsit5(), **{"rtol": 1e-7, "atol": 1e-7, **options})


# -- Solution ----------------------------------------------------------------------------------


def test_repr_tells_the_outcome() -> None:
    sol = solved()
    text = repr(sol)
    for word in ("SUCCESS", f"{len(sol)} saved times", "[0, 1]", "Tsit5", f"nf={sol.stats.nf}"):
        assert word in text
    assert "njac" not in text  # an explicit method has none
    assert "Solution" in repr(solved(saveat=[0.5]))


def test_len_is_the_number_of_saved_times() -> None:
    assert len(solved(saveat=[0.1, 0.2])) == 2
    sol = solved()
    assert len(sol) == len(sol.t) == len(sol.u) == sol.stats.naccept + 1


def test_stats_print_on_one_line() -> None:
    text = str(solved().stats)
    assert "\n" not in text
    assert "steps" in text and "rejected" in text and "ms (native)" in text


def test_stats_name_what_was_chosen() -> None:
    prob = ODEProblem(decay, torch.ones(1, dtype=F64), (0.0, 1.0))
    assert solve(prob).stats.alg == "AutoTsit5(Rodas5P)"
    assert solve(prob, rtol=1e-8).stats.alg == "AutoVern7(Rodas5P)"
    single = prob.remake(u0=torch.ones(1))
    assert solve(single, rtol=1e-8).stats.alg == "AutoTsit5(Rodas5P)"
    assert solve(prob).stats.sensealg == "none"
    on_tape = prob.remake(u0=torch.ones(1, dtype=F64, requires_grad=True))
    assert "DiscreteAdjoint" in solve(on_tape).stats.sensealg


def test_stats_count_evaluations() -> None:
    calls = 0

    def f(t: Tensor, u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -u

    sol = solve(ODEProblem(f, torch.ones(1), (0.0, 1.0)), Tsit5(), saveat=0.1, engine="torch")
    assert sol.stats.nf == calls
    assert sol.stats.wall_s > 0


@pytest.mark.parametrize("tspan", [(0.0, 1.0), (1.0, 0.0)])
def test_steps_fit_together(tspan: tuple[float, float]) -> None:
    sol = solved(tspan, tstops=[0.3])
    steps = sol.steps
    n = sol.stats.naccept
    assert len(steps) == n
    for values in (steps.t, steps.h, steps.error, steps.error_norm, steps.stiffness):
        assert values.shape == (n,)
        assert bool(torch.isfinite(values).all())
    assert steps.t.dtype == steps.h.dtype == F64
    assert steps.h.sum().item() == pytest.approx(tspan[1] - tspan[0], abs=1e-14)
    assert bool((steps.h.sign() == math.copysign(1, tspan[1] - tspan[0])).all())
    torch.testing.assert_close(steps.t[1:], (steps.t + steps.h)[:-1], rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(steps.t, sol.t[:-1], rtol=0, atol=0)
    assert bool((steps.error <= 1).all()) and bool((steps.error >= 0).all())
    assert f"{n}" in repr(steps)


def test_stiffness_estimates_the_eigenvalue() -> None:
    prob = ODEProblem(lambda t, u: -7 * u, torch.ones(2, dtype=F64), (0.0, 1.0))
    for alg in (Tsit5(), DP5(), Vern7()):
        stiffness = solve(prob, alg, rtol=1e-5).steps.stiffness
        torch.testing.assert_close(stiffness, torch.full_like(stiffness, 7.0), rtol=0.2, atol=0)


# -- dense output ------------------------------------------------------------------------------

TIMES: list[tuple[Any, tuple[int, ...]]] = [
    (0.3, ()),
    (1, ()),
    (torch.tensor(0.3), ()),
    ([0.9, 0.1], (2,)),
    (np.linspace(0, 1, 5), (5,)),
    (torch.linspace(0.9, 0.1, 6, dtype=F64).reshape(2, 3), (2, 3)),
    ([0.0, 1.0], (2,)),
    ([], (0,)),
    (torch.empty(0), (0,)),
]


@pytest.mark.parametrize("tspan", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize(("t", "shape"), TIMES, ids=lambda x: str(x)[:20].replace("\n", ""))
def test_dense_output_takes_times_of_any_shape(
    t: Any, shape: tuple[int, ...], tspan: tuple[float, float]
) -> None:
    value = solved(tspan)(t)
    assert value.shape == (*shape, 2)
    at = torch.as_tensor(t, dtype=F64)[..., None]
    expected = torch.tensor([1.0, 2.0], dtype=F64) * torch.exp(tspan[0] - at)
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)


def test_dense_output_has_derivatives() -> None:
    sol = solved(alg=Vern7())
    t = torch.linspace(0, 1, 9, dtype=F64)
    for order in (1, 2):
        torch.testing.assert_close(
            sol(t, derivative=order), (-1) ** order * sol(t), rtol=1e-3, atol=1e-3
        )


def test_negative_derivative_is_refused() -> None:
    with pytest.raises(ValueError, match="derivative"):
        solved()(0.5, derivative=-1)


def test_dense_output_meets_the_steps() -> None:
    sol = solved()
    torch.testing.assert_close(sol(sol.t), sol.u, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("t", [-0.1, 1.1, [0.5, 2.0], math.nan])
def test_time_outside_is_refused(t: Any) -> None:
    with pytest.raises(ValueError, match=r"outside .*\[0\.0, 1\.0\]"):
        solved()(t)


def test_end_in_single_precision_is_inside() -> None:
    # float32 rounds 0.1 up, past the end of the span: saveat allows for that, and so must sol(t)
    assert torch.isfinite(solved((0.0, 0.1))(torch.tensor(0.1))).all()


def test_partial_solution_has_dense_output_up_to_its_end() -> None:
    sol = solved((0.0, 100.0), maxiters=5, throw=False)
    end = sol.t[-1].item()
    assert 0 < end < 100
    assert torch.isfinite(sol(end)).all()
    with pytest.raises(ValueError, match="outside"):
        sol(100.0)


def test_no_dense_output_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="dense=True"):
        solved(saveat=[0.5])(0.5)
    assert solved(saveat=[0.5], dense=True)(0.25).shape == (2,)
    with pytest.raises(ValueError, match="dense=True"):
        solved(dense=False)(0.5)


def test_pytree_solution_keeps_its_structure() -> None:
    u0 = {"x": torch.ones(2, 3, dtype=F64), "y": (torch.ones((), dtype=F64),)}
    prob = ODEProblem(lambda t, u: {"x": -u["x"], "y": (-2 * u["y"][0],)}, u0, (0.0, 1.0))
    sol = solve(prob, Tsit5())
    assert sol.u["x"].shape == (len(sol), 2, 3) and sol.u["y"][0].shape == (len(sol),)
    value = sol([0.1, 0.2])
    assert value["x"].shape == (2, 2, 3) and value["y"][0].shape == (2,)


def test_saving_the_ends_only() -> None:
    sol = solved(save_everystep=False)
    assert sol.t.tolist() == [0.0, 1.0]
    assert sol.stats.naccept > 1


# -- plot, progress ----------------------------------------------------------------------------


def test_plot_draws_the_components() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    sol = solved()
    assert sol.plot(ax=ax) is ax
    assert len(ax.lines) == 2
    np.testing.assert_allclose(ax.lines[1].get_ydata(), sol.u[:, 1])
    sol.plot(ax=ax, components=[0], color="k", label="one")
    assert len(ax.lines) == 3 and ax.lines[2].get_label() == "one"
    plt.close(figure)
    assert solved().plot().get_xlabel() == "t"  # on the current axes
    plt.close("all")


def test_progress_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    sol = solved(progress=True)
    out, err = capfd.readouterr()
    assert sol.success
    assert out == ""
    assert "100%" in err


def test_progress_bar_closes_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    sol = solved((0.0, 100.0), progress=True, maxiters=3, throw=False)
    assert sol.retcode is ReturnCode.MAX_ITERS
    assert capfd.readouterr().err.endswith("\n")


def test_import_needs_no_optional_package() -> None:
    code = "import sys, diffsolve; print([m for m in ('matplotlib', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- the problem -------------------------------------------------------------------------------


def test_remake_changes_a_copy() -> None:
    prob = ODEProblem(decay, torch.ones(2, dtype=F64), (0.0, 1.0))
    longer = prob.remake(tspan=(0.0, 2.0))
    assert (prob.tspan, longer.tspan) == ((0.0, 1.0), (0.0, 2.0))
    assert longer.f is prob.f and longer.u0 is prob.u0
    with pytest.raises(ValueError, match="tspan"):
        prob.remake(tspan=(0.0, math.nan))
    with pytest.raises(TypeError):
        prob.remake(typo=1)
    with pytest.raises(AttributeError):  # frozen
        prob.p = 1  # type: ignore[misc]


def test_tspan_of_integers_and_tensors() -> None:
    for tspan in ((0, 1), (torch.tensor(0.0), torch.tensor(1.0)), [0.0, 1.0], np.array([0.0, 1.0])):
        sol = solve(ODEProblem(decay, torch.ones(1), tspan), Tsit5())  # type: ignore[arg-type]
        assert sol.t[-1].item() == 1.0


@pytest.mark.parametrize(
    "saveat",
    [
        [0.1, 0.3],
        (0.1, 0.3),
        np.array([0.1, 0.3]),
        torch.tensor([0.1, 0.3], dtype=F64),
    ],
    ids=["list", "tuple", "array", "tensor"],
)
def test_saved_times_are_exactly_those_given(saveat: Any) -> None:
    assert solved(saveat=saveat).t.tolist() == [0.1, 0.3]


@pytest.mark.parametrize("spacing", [0.25, np.float64(0.25), np.float32(0.25), torch.tensor(0.25)])
def test_spacing_of_any_number(spacing: Any) -> None:
    assert solved(saveat=spacing).t.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("tspan", "expected"),
    [((0.0, 1.0), [0.0, 0.3, 0.6, 0.9, 1.0]), ((1.0, 0.0), [1.0, 0.7, 0.4, 0.1, 0.0])],
)
def test_spacing_that_does_not_divide(tspan: tuple[float, float], expected: list[float]) -> None:
    assert solved(tspan, saveat=0.3).t.tolist() == pytest.approx(expected, abs=1e-15)


class Net(nn.Module):
    """A module that works as ``f(t, u)`` and as ``f(t, u, p)``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=F64)

    def forward(self, t: Tensor, u: Tensor, p: Any = None) -> Tensor:
        return torch.tanh(self.linear(u))


def test_module_with_and_without_p() -> None:
    net, u0 = Net(), torch.ones(2, dtype=F64)
    grads = []
    # a generator of parameters can be read only once, by the problem
    for p in (None, net.parameters(), list(net.parameters())):
        prob = ODEProblem(net, u0, (0.0, 1.0), p)
        for _ in range(2):
            net.zero_grad()
            solve(prob, Tsit5()).u[-1].sum().backward()
        grads.append([x.grad.clone() for x in net.parameters()])  # type: ignore[union-attr]
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=0, atol=0)
    assert all(bool((g != 0).any()) for g in grads[0])


# -- a user's own tableau ----------------------------------------------------------------------

THREE_EIGHTHS = Tableau(
    "three-eighths",
    "Kutta (1901)",
    order=4,
    a=((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    c=(0, 1 / 3, 2 / 3, 1),
)
SSP3 = Tableau(
    "SSPRK3",
    "Shu, Osher (1988); with Heun's method embedded",
    order=3,
    a=((), (1,), (1 / 4, 1 / 4)),
    b=(1 / 6, 1 / 6, 2 / 3),
    c=(0, 1, 1 / 2),
    b_error=(1 / 6 - 1 / 2, 1 / 6 - 1 / 2, 2 / 3),
)


@pytest.mark.parametrize("tableau", [THREE_EIGHTHS, SSP3], ids=lambda t: t.name)
def test_tableau_of_ones_own_has_its_order(tableau: Tableau) -> None:
    alg = ExplicitRK(tableau)
    assert tableau.name in repr(alg) and alg.name == tableau.name
    errors = []
    for dt in (0.05, 0.025):
        sol = solved(alg=alg, adaptive=False, dt=dt)
        errors.append((sol.u[-1, 0] - math.exp(-1)).abs().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(tableau.order, abs=0.15)


def test_tableau_of_ones_own_is_adaptive_with_an_estimate() -> None:
    sol = solved(alg=ExplicitRK(SSP3))
    assert sol.u[-1, 0].item() == pytest.approx(math.exp(-1), rel=1e-5)
    with pytest.raises(ValueError, match="three-eighths has no error estimate"):
        solved(alg=ExplicitRK(THREE_EIGHTHS))


def test_same_tableau_gives_the_same_numbers() -> None:
    classical = Tableau(
        "classical", "Kutta (1901)", 4, ((), (0.5,), (0, 0.5), (0, 0, 1)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0, 0.5, 0.5, 1),
    )  # fmt: skip
    mine = solved(alg=ExplicitRK(classical), dt=0.1)
    torch.testing.assert_close(mine.u, solved(alg=RK4(), dt=0.1).u, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"c": (0, 0.4)}, "row"),
        ({"b": (0.5, 0.6)}, "order"),
        ({"b": (0.5, 0.5)}, "order"),
        ({"b": (0, 1, 0)}, "shape"),
        ({"a": ((), (0.5, 0.5))}, "explicit"),
        ({"b_error": (0.5, 0.6)}, "embedded"),
        ({"c": (0.1, 0.5)}, "node"),
    ],
    ids=str,
)
def test_wrong_tableau_is_refused(changes: dict[str, Any], words: str) -> None:
    midpoint = {"order": 2, "a": ((), (0.5,)), "b": (0, 1), "c": (0, 0.5)}
    Tableau("midpoint", "Runge (1895)", **midpoint)  # type: ignore[arg-type]
    with pytest.raises(TableauError, match=words) as caught:
        Tableau("my method", "me", **{**midpoint, **changes})  # type: ignore[arg-type]
    assert "my method" in str(caught.value)


def test_method_needs_a_tableau() -> None:
    with pytest.raises(TypeError, match="Tableau"):
        ExplicitRK("RK4")  # type: ignore[arg-type]
