"""Properties that hold for any linear system, and invariances of the solver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsolve import (
    BS3,
    DP5,
    DP8,
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    Tsit5,
    Vern6,
    Vern7,
    Vern9,
    solve,
)

F64 = torch.float64
METHODS = [BS3(), DP5(), Tsit5(), Vern6(), Vern7(), DP8(), Vern9()]
SENSEALGS = [
    DiscreteAdjoint(),
    DiscreteAdjoint(tape=True),
    DiscreteAdjoint(checkpoints=2),
    BacksolveAdjoint(),
    InterpolatingAdjoint(),
]
few = settings(max_examples=15)
methods = st.sampled_from(METHODS)
seeds = st.integers(0, 2**31)
dimensions = st.integers(1, 4)


def system(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """A matrix of moderate norm and a start."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=generator, dtype=F64)
    a = a / torch.linalg.matrix_norm(a, 2).clamp(min=0.1)
    return 1.5 * a, torch.randn(n, generator=generator, dtype=F64)


def linear(t: Tensor, u: Tensor, a: Tensor) -> Tensor:
    return u @ a.mT


def units(u: Tensor, exact: Tensor, tol: float) -> float:
    """RMS error in units of the tolerance."""
    return ((u - exact) / (tol + tol * exact.abs())).square().mean().sqrt().item()


# -- linear systems ----------------------------------------------------------------------------


@few
@given(alg=methods, seed=seeds, n=dimensions, digits=st.integers(3, 8), t=st.floats(-2, 2))
def test_matrix_exponential(alg: Any, seed: int, n: int, digits: int, t: float) -> None:
    if alg.order < 5:
        digits = min(digits, 5)
    tol = 10.0**-digits
    a, u0 = system(seed, n)
    u = solve(ODEProblem(linear, u0, (0.0, t), a), alg, rtol=tol, atol=tol).u[-1]
    # the flow multiplies errors by at most exp(1.5 * 2)
    assert units(u, torch.linalg.matrix_exp(a * t) @ u0, tol) < 30


@few
@given(alg=methods, seed=seeds, n=dimensions)
def test_time_reversal_returns(alg: Any, seed: int, n: int) -> None:
    tol = 1e-5 if alg.order < 5 else 1e-8
    a, u0 = system(seed, n)
    prob = ODEProblem(linear, u0, (0.3, 1.7), a)
    end = solve(prob, alg, rtol=tol, atol=tol).u[-1]
    back = solve(prob.remake(u0=end, tspan=(1.7, 0.3)), alg, rtol=tol, atol=tol).u[-1]
    assert units(back, u0, tol) < 60


@few
@given(alg=methods, seed=seeds, n=dimensions)
def test_backward_is_forward_of_the_negated_field(alg: Any, seed: int, n: int) -> None:
    a, u0 = system(seed, n)
    backward = solve(ODEProblem(linear, u0, (0.0, -1.0), a), alg)
    negated = solve(ODEProblem(linear, u0, (0.0, 1.0), -a), alg)
    torch.testing.assert_close(backward.t, -negated.t, rtol=1e-12, atol=0)
    torch.testing.assert_close(backward.u, negated.u, rtol=1e-11, atol=1e-13)


@few
@given(alg=methods, seed=seeds, power=st.integers(-6, 6))
def test_unit_of_time_does_not_matter(alg: Any, seed: int, power: int) -> None:
    # powers of two scale without rounding
    unit = 2.0**power
    a, u0 = system(seed, 3)
    first = {"dt": 0.1}  # Hairer's guess holds absolute constants
    one = solve(ODEProblem(linear, u0, (0.0, 1.0), a), alg, **first)  # type: ignore[arg-type]
    other = solve(ODEProblem(linear, u0, (0.0, unit), a / unit), alg, dt=0.1 * unit)
    torch.testing.assert_close(other.t / unit, one.t, rtol=1e-13, atol=0)
    torch.testing.assert_close(other.u, one.u, rtol=1e-12, atol=1e-14)


@few
@given(alg=methods, seed=seeds, power=st.integers(-20, 20))
def test_unit_of_state_does_not_matter(alg: Any, seed: int, power: int) -> None:
    unit = 2.0**power
    a, u0 = system(seed, 3)
    one = solve(ODEProblem(linear, u0, (0.0, 1.0), a), alg, dt=0.1)
    other = solve(ODEProblem(linear, u0 * unit, (0.0, 1.0), a), alg, dt=0.1, atol=1e-6 * unit)
    torch.testing.assert_close(other.t, one.t, rtol=1e-13, atol=0)
    torch.testing.assert_close(other.u / unit, one.u, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sensealg", SENSEALGS, ids=repr)
@settings(max_examples=3)
@given(seed=seeds, n=dimensions, t=st.floats(-1.5, 1.5).filter(lambda t: abs(t) > 0.1))
def test_gradient_by_the_start_is_the_transposed_flow(
    sensealg: Any, seed: int, n: int, t: float
) -> None:
    a, u0 = system(seed, n)
    g = torch.linspace(-1, 2, n, dtype=F64)
    u0.requires_grad_()
    prob = ODEProblem(linear, u0, (0.0, t), a)
    u = solve(prob, Vern7(), sensealg=sensealg, rtol=1e-9, atol=1e-9, saveat=[t]).u[-1]
    (gradient,) = torch.autograd.grad(u, u0, g)
    exact = torch.linalg.matrix_exp(a * t).mT @ g
    torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sensealg", SENSEALGS, ids=repr)
@settings(max_examples=3)
@given(seed=seeds, n=dimensions)
def test_gradient_by_the_matrix(sensealg: Any, seed: int, n: int) -> None:
    a, u0 = system(seed, n)
    a.requires_grad_()
    u = solve(
        ODEProblem(linear, u0, (0.0, 1.0), a), Vern7(), sensealg=sensealg, rtol=1e-9, atol=1e-9,
        saveat=[0.5, 1.0],
    ).u  # fmt: skip
    (gradient,) = torch.autograd.grad(u.sum(), a)
    exact = sum((torch.linalg.matrix_exp(a * t) @ u0).sum() for t in (0.5, 1.0))
    (expected,) = torch.autograd.grad(exact, a)  # type: ignore[arg-type]
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


# -- invariances -------------------------------------------------------------------------------


@few
@given(alg=methods, seed=seeds)
def test_structure_of_the_state_does_not_matter(alg: Any, seed: int) -> None:
    a, u0 = system(seed, 4)
    flat = solve(ODEProblem(linear, u0, (0.0, 1.0), a), alg)

    def of_dict(t: Tensor, u: dict, a: Tensor) -> dict:
        du = linear(t, torch.cat([u["x"], u["y"]]), a)
        return {"x": du[:1], "y": du[1:]}

    def of_tuple(t: Tensor, u: tuple, a: Tensor) -> tuple:
        du = linear(t, torch.cat([u[0], u[1][0]]), a)
        return du[:3], [du[3:]]

    as_dict = solve(ODEProblem(of_dict, {"x": u0[:1], "y": u0[1:]}, (0.0, 1.0), a), alg)
    as_tuple = solve(ODEProblem(of_tuple, (u0[:3], [u0[3:]]), (0.0, 1.0), a), alg)
    for other, joined in (
        (as_dict, torch.cat([as_dict.u["x"], as_dict.u["y"]], 1)),
        (as_tuple, torch.cat([as_tuple.u[0], as_tuple.u[1][0]], 1)),
    ):
        assert other.t.tolist() == flat.t.tolist()
        assert joined.tolist() == flat.u.tolist()
        assert other.stats.nf == flat.stats.nf


@few
@given(alg=methods, seed=seeds, shape=st.sampled_from([(4, 1), (2, 2), (1, 2, 2), (4, 1, 1)]))
def test_shape_of_the_state_does_not_matter(alg: Any, seed: int, shape: tuple[int, ...]) -> None:
    a, u0 = system(seed, 4)
    flat = solve(ODEProblem(linear, u0, (0.0, 1.0), a), alg)

    def shaped(t: Tensor, u: Tensor, a: Tensor) -> Tensor:
        assert u.shape == shape
        return linear(t, u.flatten(), a).reshape(shape)

    sol = solve(ODEProblem(shaped, u0.reshape(shape), (0.0, 1.0), a), alg)
    assert sol.u.shape[1:] == shape
    assert sol.t.tolist() == flat.t.tolist()
    assert sol.u.flatten(1).tolist() == flat.u.tolist()


@few
@given(alg=methods, seed=seeds)
def test_strides_of_the_start_do_not_matter(alg: Any, seed: int) -> None:
    a, u0 = system(seed, 4)
    matrix = torch.outer(u0, u0)
    sols = [
        solve(ODEProblem(linear, start, (0.0, 1.0), a), alg)
        for start in (matrix, matrix.mT.contiguous().mT)
    ]
    assert sols[0].u.tolist() == sols[1].u.tolist()


@few
@given(
    alg=methods,
    seed=seeds,
    times=st.lists(st.floats(0, 1), min_size=2, max_size=8, unique=True).map(sorted),
    data=st.data(),
)
def test_values_do_not_depend_on_the_other_times(
    alg: Any, seed: int, times: list[float], data: Any
) -> None:
    chosen = sorted(data.draw(st.sets(st.sampled_from(times), min_size=1)))
    a, u0 = system(seed, 3)
    prob = ODEProblem(linear, u0, (0.0, 1.0), a)
    every, some = (
        solve(prob, alg, saveat=torch.tensor(saveat, dtype=F64)) for saveat in (times, chosen)
    )
    assert some.t.tolist() == chosen
    torch.testing.assert_close(
        some.u, every.u[[times.index(t) for t in chosen]], rtol=1e-14, atol=1e-15
    )


@few
@given(alg=methods, seed=seeds, copies=st.integers(2, 5))
def test_copies_of_a_system_take_the_steps_of_one(alg: Any, seed: int, copies: int) -> None:
    # the RMS norm does not see how often a system is there
    a, u0 = system(seed, 3)
    one = solve(ODEProblem(linear, u0, (0.0, 1.0), a), alg)
    batch = solve(ODEProblem(linear, u0.expand(copies, 3).clone(), (0.0, 1.0), a), alg)
    assert len(batch) == len(one)
    torch.testing.assert_close(batch.t, one.t, rtol=1e-8, atol=0)
    torch.testing.assert_close(batch.u[:, -1], one.u, rtol=1e-8, atol=1e-10)


@few
@given(alg=methods, seed=seeds)
def test_solving_again_gives_the_same_bits(alg: Any, seed: int) -> None:
    a, u0 = system(seed, 3)
    prob = ODEProblem(linear, u0, (0.0, 1.0), a)
    one, two = solve(prob, alg), solve(prob, alg)
    assert one.u.tolist() == two.u.tolist() and one.steps.h.tolist() == two.steps.h.tolist()


@few
@given(alg=methods, seed=seeds)
def test_recording_changes_no_number(alg: Any, seed: int) -> None:
    # with a gradient wanted the steps run by other code: pure operations instead of buffers
    a, u0 = system(seed, 3)
    tape = DiscreteAdjoint(tape=True)
    plain = ODEProblem(linear, u0, (0.0, 1.0), a)
    wanted = plain.remake(u0=u0.clone().requires_grad_())
    one, two = (solve(prob, alg, sensealg=tape, adaptive=False, dt=0.1) for prob in (plain, wanted))
    torch.testing.assert_close(two.u.detach(), one.u, rtol=1e-12, atol=1e-13)
    # estimates are small differences, so their rounding shows more
    one, two = (solve(prob, alg, sensealg=tape) for prob in (plain, wanted))
    torch.testing.assert_close(two.steps.h, one.steps.h, rtol=1e-4, atol=0)
    torch.testing.assert_close(two.u.detach(), one.u, rtol=1e-6, atol=1e-8)
