"""What is said of failures, and unusual input that works."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from failing_problems import F64, decay, problem, said
from torch import Tensor

from diffsolve import (
    DP8,
    KenCarp4,
    ReturnCode,
    Solution,
    SolveError,
    Tsit5,
    Vern7,
    Vern9,
    solve,
)

# -- diagnoses: the same sentences on both engines -----------------------------------------------

ENGINES = pytest.mark.parametrize("engine", ["torch", "native"])


@ENGINES
def test_a_long_span_is_not_called_stiff(engine: str) -> None:
    # h times the stiffness is 0.9, and 0.15 for Vern9 at a tight tolerance
    prob = problem(lambda t, u: torch.stack([u[1], -u[0]]), tspan=(0.0, 1e5))
    for alg, tol in ((Tsit5(), 1e-3), (Vern9(), 1e-12)):
        message = said(prob, engine, alg, maxiters=200, rtol=tol, atol=tol)
        assert "stiff method" not in message and "stability, not" not in message
        assert re.search(r"% of it took 200 steps.*Raise maxiters, loosen rtol and atol", message)
    # nor is an implicit method told to take one
    prob = problem(lambda t, u: -1e6 * (u - torch.cos(1e3 * t)), tspan=(0.0, 1e3))
    assert "stiff method" not in said(prob, engine, KenCarp4(), maxiters=200)


@ENGINES
def test_nan_that_makes_steps_be_rejected_is_named(engine: str) -> None:
    prob = problem(
        lambda t, u: torch.where(u > 5, math.nan, u * u), torch.tensor([0.1, 2.0], dtype=F64)
    )  # u = 1 / (1 / 2 - t) is 5 at t = 0.3
    message = said(prob, engine, maxiters=2000)
    assert re.search(r"f gives NaN.*t = 0\.300.*u\[1\].*check f", message)
    if engine == "torch":  # whose steps become too small for u to tell, in single precision
        message = said(prob.remake(u0=prob.u0.float()), engine, maxiters=1000)
        assert re.search(r"steps were rejected, and f gives NaN.*u\[1\].*check f", message)


@ENGINES
def test_nan_inputs_are_named(engine: str) -> None:
    bad = torch.tensor([1.0, math.nan], dtype=F64)
    net = torch.nn.Sequential(torch.nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].bias[1] = math.nan
    cases = [
        (problem(lambda t, u, p: -p * u, p=bad), "p"),
        (problem(lambda t, u, p: -p["a"][1] * u, p={"a": [bad[:1], bad]}), "p['a'][1]"),
        (problem(lambda t, u: net(u)), "net.0.bias"),
        (problem(lambda t, u: -bad * u), "bad"),
    ]
    for prob, name in cases:
        assert f"NaN in {name}, which f uses" in said(prob, engine)


@ENGINES
def test_where_f_gives_nan_is_named(engine: str) -> None:
    weights = torch.tensor([[0.0], [1.0]], dtype=F64)
    one_row = problem(
        lambda t, u: u * torch.where(weights > 0, torch.log(1 - t), 1.0),
        torch.ones(2, 3, dtype=F64),
        tspan=(0.0, 3.0),
    )
    message = said(one_row, engine, dt=0.3, adaptive=False)
    assert re.search(r"f gives NaN or Inf .*t = 1.*in the component of u\[1, 0\]", message)
    tree = {"a": torch.ones(2, dtype=F64), "b": torch.tensor(1.0, dtype=F64)}
    prob = problem(lambda t, u: {"a": -u["a"], "b": torch.sqrt(0.5 - t)}, tree)
    assert "in the component of u['b']" in said(prob, engine)


@ENGINES
def test_jumps_are_told_from_stiffness_and_singularities(engine: str) -> None:
    # by time: where, to nine digits
    prob = problem(lambda t, u: torch.where(t < 0.51234567, -u, 1e9))
    message = said(prob, engine, dtmin=1e-6)
    assert "f jumps at t = 0.51234567, in the component of u[0]" in message and "tstops" in message
    # by the state: a friction that holds it at zero
    message = said(problem(lambda t, u: 0.3 - u.sign(), tspan=(0.0, 9.0)), engine, maxiters=1000)
    assert (
        "steps were rejected, and f jumps as the state changes" in message
        and "stiff method" not in message
    )
    # a steep but continuous f, and one that grows beyond all bounds, do not jump
    for f in (lambda t, u: -1e6 * (u - torch.cos(t)), lambda t, u: (1 - t) ** -3 * u):
        message = said(problem(f, tspan=(0.0, 2.0)), engine, maxiters=300)
        assert "jumps" not in message


@ENGINES
def test_the_row_of_a_batch_that_needs_the_steps_is_named(engine: str) -> None:
    rates = torch.tensor([[1.0], [2.0], [1e7], [3.0]], dtype=F64)
    prob = problem(lambda t, u: -rates * (u - torch.cos(t)), torch.ones(4, 2, dtype=F64))
    assert "row 2 of the batch, u[2]" in said(prob, engine, maxiters=300)
    same = problem(lambda t, u: -1e7 * (u - torch.cos(t)), torch.ones(4, 2, dtype=F64))
    assert "of the batch" not in said(same, engine, maxiters=300)


@ENGINES
def test_looking_around_does_not_count_as_evaluations(engine: str) -> None:
    sol = solve(
        problem(lambda t, u: -1e6 * u), Tsit5(), engine=engine, maxiters=50, throw=False, dt=1e-6
    )
    assert sol.stats.nf <= 50 * 6 + 3


def test_an_error_of_f_beside_the_point_does_not_hide_the_failure() -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        if float(t) > 0.1:
            raise ZeroDivisionError
        return -u

    with pytest.raises(SolveError, match="10 steps were not enough"):
        solve(problem(f), Tsit5(), engine="torch", maxiters=10, dtmax=9e-3)


def test_dtmin_names_itself() -> None:
    with pytest.raises(SolveError, match=r"dtmin = 0\.01") as caught:
        solve(problem(lambda t, u: -1e4 * u), Tsit5(), dt=0.1, dtmin=0.01)
    assert caught.value.retcode is ReturnCode.DT_LESS_THAN_MIN


def test_dtmin_that_is_not_needed_does_no_harm() -> None:
    # from u = 0 the guess of the first step is 1e-4 at most
    prob = problem(lambda t, u: torch.cos(t).expand(2), torch.zeros(2, dtype=F64))
    assert solve(prob, Tsit5(), dtmin=1e-3).success


# -- unusual input that works ------------------------------------------------------------------


@pytest.mark.parametrize("saveat", [None, 0.1, [1.0]], ids=str)
def test_span_of_zero_length_gives_u0_back(saveat: Any) -> None:
    sol = solve(problem(tspan=(1.0, 1.0)), Tsit5(), saveat=saveat)
    assert sol.success and sol.t.tolist() == [1.0]
    torch.testing.assert_close(sol.u, torch.ones(1, 2, dtype=F64), rtol=0, atol=0)


def test_dense_output_of_zero_length_gives_u0_back() -> None:
    sol = solve(problem(tspan=(1.0, 1.0)), Tsit5())
    torch.testing.assert_close(sol(1.0), torch.ones(2, dtype=F64), rtol=0, atol=0)


def test_reversed_span() -> None:
    sol = solve(problem(tspan=(1.0, 0.0)), Tsit5(), rtol=1e-8, atol=1e-8, saveat=[1.0, 0.5, 0.0])
    assert sol.t.tolist() == [1.0, 0.5, 0.0]
    torch.testing.assert_close(sol.u[:, 0], torch.exp(1 - sol.t), rtol=1e-6, atol=0)


def test_scalar_state() -> None:
    sol = solve(problem(u0=torch.tensor(2.0, dtype=F64)), Tsit5(), saveat=[0.0, 1.0])
    assert sol.u.shape == (2,)
    assert sol.u[-1].item() == pytest.approx(2 / math.e, rel=1e-3)


def test_scalar_state_has_dense_output_and_norms() -> None:
    prob = problem(u0=torch.tensor(2.0, dtype=F64))
    sol = solve(prob, Tsit5(), norm=lambda error: error.abs())
    assert sol(1.0).shape == ()
    assert sol(1.0).item() == pytest.approx(2 / math.e, rel=1e-3)


def test_scalar_leaf_of_a_pytree() -> None:
    u0 = {"x": torch.ones(3, dtype=F64), "y": torch.tensor(2.0, dtype=F64)}
    sol = solve(problem(lambda t, u: {"x": -u["x"], "y": -u["y"]}, u0), Tsit5())
    assert sol.u["y"].shape == (len(sol),)


def test_parameters_without_gradient() -> None:
    prob = problem(lambda t, u, p: -p * u, p=torch.tensor(2.0, dtype=F64))
    sol = solve(prob, Tsit5(), rtol=1e-8, atol=1e-8)
    assert not sol.u.requires_grad
    assert sol.u[-1, 0].item() == pytest.approx(math.exp(-2), rel=1e-6)


def test_complex_state() -> None:
    prob = problem(lambda t, u: 1j * u, torch.ones(2, dtype=torch.complex128))
    sol = solve(prob, Tsit5(), rtol=1e-8, atol=1e-8)
    assert sol.u.dtype == torch.complex128
    assert abs(sol.u[-1, 0].item() - complex(math.cos(1), math.sin(1))) < 1e-7


@pytest.mark.parametrize(
    "f",
    [lambda t, u: u, lambda t, u: u[...], lambda t, u: u.view_as(u), lambda t, u: u.mT.mT],
    ids=["input", "slice", "view", "transposed twice"],
)
@pytest.mark.parametrize("shape", [(2,), (2, 2), ()])
def test_f_that_returns_its_input(f: Callable, shape: tuple[int, ...]) -> None:
    if len(shape) < 2 and "mT" in f.__code__.co_names:
        pytest.skip("only matrices are transposed")
    u0 = torch.ones(shape, dtype=F64)
    sol = solve(problem(f, u0), Tsit5(), rtol=1e-9, atol=1e-9, tstops=[0.3])
    torch.testing.assert_close(sol.u[-1], torch.full(shape, math.e, dtype=F64), rtol=1e-7, atol=0)
    assert bool((u0 == 1).all())


@pytest.mark.parametrize("grad", [True, False])
def test_f_that_overwrites_its_state_is_refused(grad: bool) -> None:
    # the state belongs to the solver: what f writes into it would become the solution
    u0 = torch.ones(2, dtype=F64)
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError), match=r"in.place"):
        solve(problem(lambda t, u: u.mul_(-1.0), u0), Tsit5())


@pytest.mark.parametrize("method", [Tsit5, DP8, Vern7])
def test_f_that_fills_one_buffer_again_and_again(method: type) -> None:
    buffer = torch.empty(2, dtype=F64)

    def into_buffer(t: Tensor, u: Tensor) -> Tensor:
        return buffer.copy_(fresh(t, u))

    def fresh(t: Tensor, u: Tensor) -> Tensor:
        return -50 * torch.cos(40 * t) * u

    options: dict[str, Any] = {"tstops": [0.2, 0.4, 0.6], "rtol": 1e-6, "atol": 1e-9}
    options["engine"] = "torch"  # native would decline the one, and round the other differently
    with torch.no_grad():
        reused = solve(problem(into_buffer), method(), **options)
        expected = solve(problem(fresh), method(), **options)
    assert expected.stats.nreject  # a rejected step uses the first derivative again
    torch.testing.assert_close(reused.u, expected.u, rtol=0, atol=0)


@pytest.mark.parametrize(
    "f",
    [torch.no_grad()(decay), lambda t, u: torch.from_numpy(-u.numpy())],
    ids=["no_grad", "numpy"],
)
def test_f_need_not_be_differentiable_where_no_gradient_is_wanted(f: Callable) -> None:
    assert solve(problem(f), Tsit5()).success


def test_f_that_hides_gradients_is_refused_where_they_are_wanted() -> None:
    u0 = torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"gradients are wanted.*no_grad"):
        solve(problem(torch.no_grad()(decay), u0), Tsit5())


def test_dict_in_another_order_is_not_mixed_up() -> None:
    u0 = {"a": torch.ones(1, dtype=F64), "b": torch.full((1,), 2.0, dtype=F64)}

    def run(f: Callable, **options: Any) -> Solution:
        return solve(problem(f, u0), Tsit5(), **options)

    def ordered(t: Tensor, u: dict) -> dict:
        return {"a": -u["a"], "b": torch.sin(30 * t) * u["b"]}

    loose, tight = torch.tensor(1.0), torch.tensor(1e-9)
    one = run(ordered, rtol=0, atol={"a": loose, "b": tight})
    other = run(ordered, rtol=0, atol={"b": tight, "a": loose})
    assert one.t.tolist() == other.t.tolist()
    try:
        sol = run(lambda t, u: {"b": 0 * u["b"], "a": -u["a"]})
    except ValueError:
        return  # refusing is fine too
    assert sol.u["b"][-1].item() == 2.0
