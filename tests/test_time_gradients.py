"""Gradients by the times of a solve: both ends of the span, and the times to save."""

from __future__ import annotations

import math

import pytest
import torch

from diffsolve import (
    RK4,
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    Tsit5,
    Vern7,
    solve,
)

DOUBLE = torch.float64
THROUGH = DiscreteAdjoint(through_step_size=True)
SENSEALGS = [
    DiscreteAdjoint(),
    DiscreteAdjoint(checkpoints=3),
    DiscreteAdjoint(tape=True),
    THROUGH,
    BacksolveAdjoint(),
    InterpolatingAdjoint(),
    InterpolatingAdjoint(checkpoints=3),
]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
each = pytest.mark.parametrize("sensealg", SENSEALGS, ids=repr)


def time(value):
    return torch.tensor(value, dtype=DOUBLE, requires_grad=True)


def forced(t, u, p):
    """``u' = p cos(t) u``: not autonomous, so that a shift of all times matters."""
    return p * torch.cos(t) * u


def exact(t, t0, p):
    return torch.exp(p * (torch.sin(t) - torch.sin(t0)))


def weigh(u):
    """A loss that weighs every saved value differently."""
    weights = torch.linspace(1, 2, len(u), dtype=u.dtype)
    return (weights * u.reshape(-1) ** 2).sum()


def solved(t0, t1, sensealg, saveat, p=None, alg=None, **options):
    p = torch.tensor(0.8, dtype=DOUBLE) if p is None else p
    prob = ODEProblem(forced, torch.ones(1, dtype=DOUBLE), (t0, t1), p)
    options = {**TIGHT, **options}
    return solve(prob, alg or Vern7(), sensealg=sensealg, saveat=saveat, **options)


def assert_gradients(loss, reference, inputs):
    expected = torch.autograd.grad(reference, inputs, retain_graph=True, allow_unused=True)
    got = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours is not None, "silently without gradient"
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


P = torch.tensor(0.8, dtype=DOUBLE)


@pytest.mark.parametrize("span", [(0.2, 1.7), (1.7, 0.2)], ids=["forward", "backward"])
@each
def test_both_ends(sensealg, span):
    t0, t1 = time(span[0]), time(span[1])
    sol = solved(t0, t1, sensealg, None, save_everystep=False)
    u = torch.stack([exact(t0, t0, P), exact(t1, t0, P)])
    assert_gradients(weigh(sol.u), weigh(u), (t0, t1))


@each
def test_ends_and_saved_times(sensealg):
    # fixed times to save: only the start moves the values, and t1 none
    t0, t1 = time(0.2), time(1.7)
    saveat = torch.tensor([0.5, 0.9, 1.3], dtype=DOUBLE, requires_grad=True)
    sol = solved(t0, t1, sensealg, saveat)
    assert_gradients(weigh(sol.u), weigh(exact(saveat, t0, P)), (t0, saveat))


@each
def test_saved_times_alone(sensealg):
    saveat = torch.tensor([0.2, 0.5, 1.7], dtype=DOUBLE, requires_grad=True)
    sol = solved(0.2, 1.7, sensealg, saveat)
    reference = exact(saveat, torch.tensor(0.2, dtype=DOUBLE), P)
    assert_gradients(weigh(sol.u), weigh(reference), (saveat,))


@each
def test_saved_times_that_are_the_ends(sensealg):
    # a saved time at t1 is a time of its own: t1 then has no influence
    t0 = time(0.2)
    saveat = torch.tensor([0.5, 1.7], dtype=DOUBLE, requires_grad=True)
    sol = solved(t0, 1.7, sensealg, saveat)
    assert_gradients(weigh(sol.u), weigh(exact(saveat, t0, P)), (t0, saveat))


@each
def test_computed_times(sensealg):
    a = time(0.3)
    saveat = a * torch.tensor([1.0, 2.0, 3.5], dtype=DOUBLE)
    sol = solved(0.0, 1.7, sensealg, saveat)
    reference = exact(saveat, torch.zeros((), dtype=DOUBLE), P)
    assert_gradients(weigh(sol.u), weigh(reference), (a,))


@each
def test_single_precision_times_of_a_double_state(sensealg):
    saveat = torch.tensor([0.5, 0.9], requires_grad=True)
    sol = solved(0.2, 1.7, sensealg, saveat)
    weigh(sol.u).backward()
    assert saveat.grad.dtype == torch.float32
    values = saveat.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        weigh(exact(values, torch.tensor(0.2, dtype=DOUBLE), P)), values
    )
    torch.testing.assert_close(saveat.grad.double(), expected, rtol=1e-5, atol=1e-6)


@each
def test_spacing_moves_with_the_start(sensealg):
    t0, t1 = time(0.2), time(1.7)
    sol = solved(t0, t1, sensealg, 0.4)
    times = torch.stack([t0, t0 + 0.4, t0 + 0.8, t0 + 1.2, t1])
    torch.testing.assert_close(sol.t, times)
    assert_gradients(sol.t.square().sum(), times.square().sum(), (t0, t1))
    assert_gradients(weigh(sol.u), weigh(exact(times, t0, P)), (t0, t1))


@each
def test_every_step_saved(sensealg):
    # the last value is at t1, whatever the steps
    t0, t1 = time(0.2), time(1.7)
    sol = solved(t0, t1, sensealg, None)
    assert len(sol.t) > 4
    loss = sol.u[-1].sum() + 3 * sol.u[0].sum() + sol.t[-1] ** 2 + sol.t[0] ** 2
    assert_gradients(loss, exact(t1, t0, P) + t1**2 + t0**2, (t0, t1))


@each
def test_times_beside_state_and_parameters(sensealg):
    t1, p, u0 = time(1.2), time(0.8), torch.tensor([1.5], dtype=DOUBLE, requires_grad=True)
    prob = ODEProblem(forced, u0, (0.0, t1), p)
    sol = solve(prob, Vern7(), sensealg=sensealg, saveat=[0.5, 1.2], **TIGHT)
    # an end given twice: saveat holds numbers, which do not move
    loss = weigh(sol.u)
    reference = weigh(u0 * torch.exp(p * torch.sin(torch.tensor([0.5, 1.2], dtype=DOUBLE))))
    assert_gradients(loss, reference, (p, u0))


@pytest.mark.parametrize("alg", [RK4(), Tsit5()], ids=repr)
@pytest.mark.parametrize(
    "sensealg", [DiscreteAdjoint(), BacksolveAdjoint(), InterpolatingAdjoint()], ids=repr
)
def test_fixed_steps(sensealg, alg):
    t0, t1 = time(0.2), time(1.7)
    sol = solved(t0, t1, sensealg, 0.5, alg=alg, adaptive=False, dt=0.01)
    times = torch.stack([t0, t0 + 0.5, t0 + 1.0, t1])
    assert_gradients(weigh(sol.u), weigh(exact(times, t0, P)), (t0, t1))


@each
def test_logistic_growth_against_central_differences(sensealg):
    def f(t, u, p):
        return p[0] * u * (1 - u / p[1])

    u0 = torch.tensor([0.1, 0.4], dtype=DOUBLE)
    p = torch.tensor([2.0, 1.5], dtype=DOUBLE)

    def loss(t0, t1, middle, **options):
        saveat = (
            torch.stack([middle, t1 - 0.1]) if isinstance(t1, torch.Tensor) else [middle, t1 - 0.1]
        )
        sol = solve(ODEProblem(f, u0, (t0, t1), p), Vern7(), saveat=saveat, **TIGHT, **options)
        return (sol.u**2).sum()

    inputs = [time(0.0), time(2.0), time(0.7)]
    grads = torch.autograd.grad(loss(*inputs, sensealg=sensealg), inputs, allow_unused=True)
    values = [float(x.detach()) for x in inputs]
    for i, g in enumerate(grads):
        up, down = ([v + s * 1e-4 * (i == j) for j, v in enumerate(values)] for s in (1, -1))
        assert float(g) == pytest.approx(float(loss(*up) - loss(*down)) / 2e-4, abs=1e-6)


@each
def test_jump_of_f_at_either_end(sensealg):
    # f counts on the solve's side of a stop only, for the gradient by the time as well
    t0, t1 = time(0.0), time(1.0)

    def f(t, u):
        return torch.where((t > 0) & (t < 1), 2.0, 50.0) * torch.ones_like(u)

    prob = ODEProblem(f, torch.zeros(1, dtype=DOUBLE), (t0, t1))
    sol = solve(prob, Tsit5(), sensealg=sensealg, tstops=[0.0, 1.0], save_everystep=False)
    grads = torch.autograd.grad(sol.u[-1].sum(), (t0, t1))
    assert [float(g) for g in grads] == pytest.approx([-2.0, 2.0])


@each
def test_pytree_state(sensealg):
    t1 = time(1.0)
    u0 = {"x": torch.ones(2, dtype=DOUBLE), "y": torch.ones(1, 1, dtype=DOUBLE)}
    prob = ODEProblem(lambda t, u: {"x": -u["x"], "y": 2 * u["y"]}, u0, (0.0, t1))
    sol = solve(prob, Vern7(), sensealg=sensealg, save_everystep=False, **TIGHT)
    (g,) = torch.autograd.grad(sol.u["x"][-1, 0] + sol.u["y"][-1].sum(), t1)
    assert float(g) == pytest.approx(-math.exp(-1) + 2 * math.exp(2), rel=1e-7)


@each
def test_complex_state(sensealg):
    t1 = time(1.0)
    u0 = torch.tensor([1 + 1j], dtype=torch.complex128)
    sol = solve(
        ODEProblem(lambda t, u: 1j * u, u0, (0.0, t1)),
        Vern7(),
        sensealg=sensealg,
        save_everystep=False,
        **TIGHT,
    )
    (g,) = torch.autograd.grad(sol.u[-1].real.sum() ** 2, t1)
    # real part: cos t - sin t
    expected = 2 * (math.cos(1) - math.sin(1)) * (-math.sin(1) - math.cos(1))
    assert float(g) == pytest.approx(expected, rel=1e-7)


def test_second_order_by_a_time_is_right_or_refused():
    t1, p = time(1.0), time(0.8)
    sol = solved(0.0, t1, DiscreteAdjoint(tape=True), None, p=p, save_everystep=False)
    (g,) = torch.autograd.grad(sol.u[-1].sum(), t1, create_graph=True)
    try:
        (second,) = torch.autograd.grad(g, p)
    except RuntimeError:
        return
    # g = p cos(t1) exp(p sin(t1))
    s, c = math.sin(1), math.cos(1)
    assert float(second) == pytest.approx(c * math.exp(0.8 * s) * (1 + 0.8 * s), rel=1e-6)


@pytest.mark.parametrize("saveat", [False, True], ids=["t1", "saveat"])
def test_forward_mode_by_a_time_is_right_or_refused(saveat):
    def end(t):
        if saveat:
            return solved(0.0, 2.0, None, t[None]).u[-1, 0]
        return solved(0.0, t, None, None, save_everystep=False).u[-1, 0]

    one = torch.ones((), dtype=DOUBLE)
    try:
        _, tangent = torch.func.jvp(end, (one,), (one,))
    except (RuntimeError, TypeError):
        return
    expected = 0.8 * math.cos(1) * math.exp(0.8 * math.sin(1))
    assert float(tangent) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("saveat", [False, True], ids=["t1", "saveat"])
def test_func_grad_by_a_time_is_right_or_refused(saveat):
    def end(t):
        if saveat:
            return solved(0.0, 2.0, None, t[None]).u[-1, 0]
        return solved(0.0, t, None, None, save_everystep=False).u[-1, 0]

    try:
        g = torch.func.grad(end)(torch.ones((), dtype=DOUBLE))
    except (RuntimeError, TypeError):
        return
    expected = 0.8 * math.cos(1) * math.exp(0.8 * math.sin(1))
    assert float(g) == pytest.approx(expected, rel=1e-6)
