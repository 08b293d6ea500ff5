"""Gradients for every kind of time, state, parameter and right-hand side."""

from __future__ import annotations

import math

import pytest
import torch
from gradients import (
    DOUBLE,
    MATRIX,
    SENSEALGS,
    START,
    TAPE,
    THROUGH,
    TIGHT,
    Decay,
    assert_near,
    check_linear,
    each,
    label,
    leaf,
    linear,
    linear_reference,
)
from torch import nn

from diffsolve import (
    BS3,
    ODEProblem,
    Tsit5,
    Vern7,
    solve,
)

# -- times, kinds of state and parameters -------------------------------------------------------


@pytest.mark.parametrize("saveat", [None, 0.4, [0.3, 0.31, 1.2], [0.0, 0.5], [0.0], [1.5], [0.7]])
@each()
def test_saved_times(sensealg, saveat):
    check_linear(sensealg, saveat=saveat)


@each()
def test_ends_only(sensealg):
    assert len(check_linear(sensealg, save_everystep=False).t) == 2


@pytest.mark.parametrize("saveat", [None, 0.4, [0.3, -0.4]])
@each()
def test_backward_in_time(sensealg, saveat):
    check_linear(sensealg, tspan=(0.5, -1.0), saveat=saveat)


@each()
def test_empty_span(sensealg):
    check_linear(sensealg, tspan=(0.5, 0.5))


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.0)])
@each([*SENSEALGS, THROUGH])
def test_jump_of_f_at_a_stop(sensealg, tspan):
    a, b = leaf([0.4]), leaf([-0.9])

    def f(t, u):
        return torch.where(t < 1, a, b) * u

    u0 = leaf([1.3])
    prob = ODEProblem(f, u0, tspan)
    sol = solve(prob, Vern7(), sensealg=sensealg, saveat=[tspan[1]], tstops=[1.0], **TIGHT)
    sol.u.sum().backward()
    sign = math.copysign(1.0, tspan[1] - tspan[0])
    end = 1.3 * math.exp(sign * (0.4 - 0.9))
    assert float(a.grad) == pytest.approx(sign * end, rel=1e-8)
    assert float(b.grad) == pytest.approx(sign * end, rel=1e-8)
    assert float(u0.grad) == pytest.approx(end / 1.3, rel=1e-8)


@each()
def test_single_precision(sensealg):
    u0, p = leaf(START, torch.float32), leaf(MATRIX, torch.float32)
    prob = ODEProblem(linear, u0, (0.0, 1.0), p)
    sol = solve(prob, Tsit5(), sensealg=sensealg, saveat=[0.3, 1.0], rtol=1e-5, atol=1e-5)
    (sol.u**2).sum().backward()
    expected = linear_reference(u0.double(), p.double(), sol.t, lambda u: (u**2).sum())
    assert u0.grad.dtype == p.grad.dtype == torch.float32
    assert_near(u0.grad.double(), expected[0], 1e-4)
    assert_near(p.grad.double(), expected[1], 1e-4)


@pytest.mark.parametrize("rate", [1.7, 1.7 + 0.4j], ids=["real-p", "complex-p"])
@each()
def test_complex_state(sensealg, rate):
    def gradients(solution):
        u0 = torch.tensor([1 + 2j, -0.5j], requires_grad=True, dtype=torch.complex128)
        w = torch.tensor(rate, requires_grad=True)
        u = solution(u0, w.to(torch.complex128))
        # not analytic, so that conjugates count
        loss = (u.real**2 * u.imag).sum() + (u * torch.tensor([2 - 1j, 1j])).imag.sum()
        return torch.autograd.grad(loss, (u0, w))

    def solved(u0, w):
        prob = ODEProblem(lambda t, u, p: 1j * p * u, u0, (0.0, 1.0), w)
        return solve(prob, Vern7(), sensealg=sensealg, saveat=[0.5, 1.0], **TIGHT).u

    torch.set_default_dtype(torch.float64)
    try:
        got = gradients(solved)
        expected = gradients(
            lambda u0, w: torch.stack([torch.exp(1j * w * t) * u0 for t in (0.5, 1.0)])
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).abs().max()) < 1e-8


@each()
def test_complex_parameter_of_a_real_state(sensealg):
    w = torch.tensor(0.6 + 0.8j, dtype=torch.complex128, requires_grad=True)
    u0 = leaf([2.0])
    prob = ODEProblem(lambda t, u, p: -(p.real * p.imag**2) * u, u0, (0.0, 1.0), w)
    solve(prob, Vern7(), sensealg=sensealg, saveat=[1.0], **TIGHT).u.sum().backward()
    end = 2 * math.exp(-0.6 * 0.64)
    expected = torch.tensor(-end * (0.64 + 1j * 2 * 0.6 * 0.8), dtype=torch.complex128)
    assert_near(w.grad, expected, 1e-8)


@each()
def test_pytrees(sensealg):
    x0, y0 = leaf([[1.0], [0.5]]), leaf(0.3)
    a, b, fixed = leaf(0.7), leaf([0.2, -0.4]), torch.tensor(2.0, dtype=DOUBLE)

    def f(t, u, p):
        x, (y,) = u["x"], u["rest"]
        dx = p["a"] * x * p["scale"] + p["more"][0].reshape(2, 1) * y
        return {"x": dx, "rest": (-p["more"][1] * y,)}

    p = {"a": a, "more": (b, fixed), "scale": 0.5, "name": "any other value"}
    prob = ODEProblem(f, {"x": x0, "rest": (y0,)}, (0.0, 1.0), p)
    sol = solve(prob, Vern7(), sensealg=sensealg, saveat=[0.4, 1.0], **TIGHT)
    assert sol.u["x"].shape == (2, 2, 1)
    (sol.u["x"][0].sum() * 2 + sol.u["x"][1].sum() + sol.u["rest"][0].sum()).backward()
    got = [z.grad for z in (x0, y0, a, b)]
    leaves = [z.detach().requires_grad_() for z in (x0, y0, a, b)]
    c, y, r, s = leaves  # y = y0 exp(-2 t); x' = r/2 x + s y
    loss = 0
    for t, weight in ((0.4, 2.0), (1.0, 1.0)):
        rise = (torch.exp(r * t / 2) - math.exp(-2 * t)) / (r / 2 + 2)
        loss = loss + weight * (c.reshape(-1) * torch.exp(r * t / 2) + s * y * rise).sum()
        loss = loss + y * math.exp(-2 * t)
    for ours, theirs in zip(got, torch.autograd.grad(loss, leaves), strict=True):
        assert_near(ours, theirs)
    assert fixed.grad is None


@each()
def test_leaves_of_p_without_grad_are_left_alone(sensealg):
    a, b = leaf(0.5), torch.tensor(0.25, dtype=DOUBLE)
    prob = ODEProblem(lambda t, u, p: p[0] * p[1] * u, leaf([1.0]), (0.0, 1.0), (a, b))
    solve(prob, Vern7(), sensealg=sensealg, **TIGHT).u[-1].sum().backward()
    assert float(a.grad) == pytest.approx(0.25 * math.exp(0.125), rel=1e-8)
    assert b.grad is None


@each()
def test_only_the_parameters(sensealg):
    p, u0 = leaf(MATRIX), torch.tensor(START, dtype=DOUBLE)
    sol = solve(ODEProblem(linear, u0, (0.0, 1.0), p), Vern7(), sensealg=sensealg, **TIGHT)
    (sol.u**2).sum().backward()
    expected = linear_reference(u0, p, sol.t, lambda u: (u**2).sum())
    assert_near(p.grad, expected[1])


@each()
def test_only_the_start(sensealg):
    u0, p = leaf(START), torch.tensor(MATRIX, dtype=DOUBLE)
    sol = solve(ODEProblem(linear, u0, (0.0, 1.0), p), Vern7(), sensealg=sensealg, **TIGHT)
    (sol.u**2).sum().backward()
    assert_near(u0.grad, linear_reference(u0, p, sol.t, lambda u: (u**2).sum())[0])


@each()
def test_unused_parameter_has_zero_gradient(sensealg):
    used, unused = leaf(0.5), leaf([1.0, 2.0])
    prob = ODEProblem(
        lambda t, u, p: p["used"] * u, leaf([1.0]), (0.0, 1.0), {"used": used, "unused": unused}
    )
    solve(prob, sensealg=sensealg).u.sum().backward()
    if sensealg is not TAPE:  # plain autograd does not know of it
        assert torch.equal(unused.grad, torch.zeros_like(unused))
    assert float(used.grad) > 1


# -- what f may do ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "f",
    [lambda t, u: u, lambda t, u: u.view(2, 1).view(2), lambda t, u: u.flip(0)[[1, 0]]],
    ids=["itself", "view", "copy"],
)
@each()
def test_f_may_return_its_input(sensealg, f):
    u0 = leaf([1.0, 2.0])
    sol = solve(ODEProblem(f, u0, (0.0, 1.0)), Vern7(), sensealg=sensealg, tstops=[0.4], **TIGHT)
    sol.u[-1].sum().backward()
    assert_near(u0.grad, [math.e, math.e])
    assert_near(sol.u.detach()[-1], [math.e, 2 * math.e])


def reusing(buffer):
    def f(t, u, p):
        buffer[0] = p * u[1] * (1 + 5 * (t > 1))
        buffer[1] = -p * u[0]
        return buffer

    return f


def fresh(t, u, p):
    return torch.stack([p * u[1] * (1 + 5 * (t > 1)), -p * u[0]])


@pytest.mark.parametrize("alg", [Tsit5(), BS3(), Vern7()], ids=label)
def test_f_may_reuse_a_buffer(alg):
    # steps are rejected after the stop, and begin again from a derivative that was kept
    p, u0 = torch.tensor(3.0, dtype=DOUBLE), torch.tensor([1.0, 0.0], dtype=DOUBLE)
    options = {"tstops": [1.0], "rtol": 1e-6, "atol": 1e-6, "saveat": 0.3, "engine": "torch"}
    ours = solve(
        ODEProblem(reusing(torch.zeros(2, dtype=DOUBLE)), u0, (0.0, 2.0), p), alg, **options
    )
    expected = solve(ODEProblem(fresh, u0, (0.0, 2.0), p), alg, **options)
    assert expected.stats.nreject > 0
    assert torch.equal(ours.u, expected.u)


@each()
def test_reused_buffer_never_gives_a_wrong_gradient(sensealg):
    def gradient(f):
        p, u0 = leaf(3.0), leaf([1.0, 0.0])
        sol = solve(ODEProblem(f, u0, (0.0, 2.0), p), Tsit5(), sensealg=sensealg, tstops=[1.0])
        sol.u[-1].sum().backward()
        return torch.cat([u0.grad, p.grad[None]])

    expected = gradient(fresh)
    try:
        got = gradient(reusing(torch.zeros(2, dtype=DOUBLE)))
    except RuntimeError:
        return
    assert_near(got, expected)


@each()
def test_f_without_grad_is_refused(sensealg):
    @torch.no_grad()
    def f(t, u, p):
        return -p * u

    with pytest.raises(RuntimeError, match="no_grad"):
        solve(ODEProblem(f, leaf([1.0]), (0.0, 1.0), leaf(1.0)), sensealg=sensealg)


@each()
def test_f_without_grad_is_fine_where_none_is_wanted(sensealg):
    @torch.no_grad()
    def f(t, u):
        return -u

    u0 = torch.ones(1, dtype=DOUBLE)
    sol = solve(ODEProblem(f, u0, (0.0, 1.0)), sensealg=sensealg)
    assert not sol.u.requires_grad
    with torch.no_grad():
        sol = solve(ODEProblem(f, leaf([1.0]), (0.0, 1.0)), sensealg=sensealg)
    assert not sol.u.requires_grad


@each()
def test_constant_f(sensealg):
    u0 = leaf([1.0])
    sol = solve(ODEProblem(lambda t, u: torch.ones_like(u), u0, (0.0, 2.0)), sensealg=sensealg)
    sol.u[-1].sum().backward()
    assert float(u0.grad) == 1.0


@each()
def test_parameter_changed_before_backward_is_an_error(sensealg):
    u0, p = leaf([1.0]), leaf(0.5)
    loss = solve(ODEProblem(lambda t, u, p: p * u, u0, (0.0, 1.0), p), sensealg=sensealg).u.sum()
    with torch.no_grad():
        p.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@each()
def test_captured_parameter_changed_before_backward_is_an_error(sensealg):
    module = Decay(nn.Parameter(torch.tensor([0.3], dtype=DOUBLE)))
    prob = ODEProblem(lambda t, u: module.a * u, leaf([1.0]), (0.0, 1.0))
    loss = solve(prob, sensealg=sensealg).u.sum()
    with torch.no_grad():
        module.a.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
