"""Gradients of solves: every sensealg against references that do not come from this package."""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from diffsolve import (
    BS3,
    DP5,
    DP8,
    RK4,
    BacksolveAdjoint,
    BacksolveWarning,
    DiscreteAdjoint,
    Euler,
    Heun,
    InterpolatingAdjoint,
    Midpoint,
    ODEProblem,
    Ralston,
    SolveError,
    Tsit5,
    Vern6,
    Vern7,
    Vern9,
    solve,
)
from diffsolve.problems import library

DOUBLE = torch.float64
CONTINUOUS = [BacksolveAdjoint(), InterpolatingAdjoint(), InterpolatingAdjoint(checkpoints=5)]
STEPWISE = [DiscreteAdjoint(), DiscreteAdjoint(checkpoints=5)]
TAPE = DiscreteAdjoint(tape=True)
THROUGH = DiscreteAdjoint(through_step_size=True)
SENSEALGS = [*STEPWISE, TAPE, *CONTINUOUS]


def label(x):
    if isinstance(x, DiscreteAdjoint):
        if x.through_step_size:
            return "discrete-through-step-size"
        kind = "tape" if x.tape else f"checkpoints{x.checkpoints}" if x.checkpoints else "steps"
        return f"discrete-{kind}"
    if isinstance(x, InterpolatingAdjoint):
        return f"interpolating-checkpoints{x.checkpoints}" if x.checkpoints else "interpolating"
    return type(x).__name__


def each(values=SENSEALGS):
    return pytest.mark.parametrize("sensealg", values, ids=label)


def leaf(values, dtype=DOUBLE):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def assert_near(got, expected, rtol=1e-7):
    """Equal up to ``rtol`` of the largest entry."""
    expected = torch.as_tensor(expected, dtype=got.dtype)
    assert got.shape == expected.shape
    assert float((got - expected).detach().abs().max()) <= rtol * float(expected.abs().max())


# -- the linear problem, whose gradients are those of a matrix exponential -----------------------

MATRIX = [[-0.3, 1.1], [-0.9, 0.2]]
START = [1.0, -0.5]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def linear(t, u, p):
    return p @ u


def linear_reference(u0, p, times, weigh):
    """Gradients by ``u0`` and ``p`` of ``weigh(u)`` at ``times`` after the start."""
    u0, p = (x.detach().clone().requires_grad_() for x in (u0, p))
    u = torch.stack([torch.linalg.matrix_exp(p * t) @ u0 for t in times.detach()])
    return torch.autograd.grad(weigh(u), (u0, p))


def check_linear(sensealg, tspan=(0.0, 1.5), weigh=lambda u: (u**2).sum(), rtol=1e-7, **options):
    u0, p = leaf(START), leaf(MATRIX)
    options = {"alg": Vern7(), **TIGHT, **options}
    sol = solve(ODEProblem(linear, u0, tspan, p), sensealg=sensealg, **options)
    weigh(sol.u).backward()
    expected = linear_reference(u0, p, sol.t - tspan[0], weigh)
    for x, reference in zip((u0, p), expected, strict=True):
        # plain autograd knows nothing of what a value does not depend on
        got = torch.zeros_like(x) if x.grad is None and sensealg is TAPE else x.grad
        assert_near(got, reference, rtol)
    return sol


# -- published problems -------------------------------------------------------------------------

# Values computed with SciPy at rtol 1e-13; problems of SciMLSensitivity's tests
# (Core3/adjoint.jl, Core7/mixed_costs.jl) and of its benchmarks.
VALUES = {
    "time_discrete": (
        64.91208950465,
        [0.2119656698, -17.1910050707],
        [13.1567195268, -16.8105140435, 7.7027081314, -25.6394758597],
    ),
    "time_continuous": (
        28.8216993456,
        [14.5400723777, -7.4573207488],
        [30.7223826067, -27.0561525847, 9.6398562071, -23.5044944777],
    ),
    "classic_continuous": (
        144.2765956615,
        [-71.9557083409, -18.0156188762],
        [-19.8123472389, -18.0156188762, 91.5000931854, -330.5088996640],
    ),
    "classic_discrete": (
        102.0421086212,
        [-87.9487749499, -22.4884143605],
        [25.5006372318, -77.2550774153, 93.5321275643, -286.9940868664],
    ),
}


def with_cost(f, cost):
    """The running cost as one more state."""

    def g(t, u, p):
        return torch.cat([f(t, u[:2], p), cost(u[:2], p).reshape(1)])

    return g


@pytest.mark.parametrize("case", VALUES)
@each()
def test_published_gradients(sensealg, case):
    timed, discrete = case.startswith("time"), case.endswith("discrete")
    prob = library.lotka_volterra_time() if timed else library.lotka_volterra()
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    options = {"sensealg": sensealg, "rtol": 1e-11, "atol": 1e-11}
    if discrete:
        sol = solve(prob.remake(u0=u0, p=p), Vern9(), saveat=0.5, **options)
        loss = ((sol.u - (2 if timed else 1)) ** 2).sum() / 2
    else:
        cost = (lambda u, p: u.sum() ** 2 / 2) if timed else (lambda u, p: u[0] ** 2 + p[0])
        start = torch.cat([u0, torch.zeros(1, dtype=DOUBLE)])
        # backsolve loses digits where it has no states to start again from
        prob = prob.remake(f=with_cost(prob.f, cost), u0=start, p=p)
        sol = solve(prob, Vern9(), saveat=[2.5, 5.0, 7.5, 10.0], **options)
        loss = sol.u[-1, 2]
    loss.backward()
    value, du0, dp = VALUES[case]
    assert float(loss.detach()) == pytest.approx(value, rel=1e-10)
    np.testing.assert_allclose(u0.grad, du0, rtol=1e-8)
    np.testing.assert_allclose(p.grad, dp, rtol=1e-8)


def forward_sensitivities(times):
    """Loss ``sum (u-1)**2/2`` of Lotka-Volterra and its gradient, by the variational equations."""

    def rhs(t, z):
        (x, y), s = z[:2], z[2:].reshape(2, 6)
        a, b, c, d = 1.5, 1.0, 3.0, 1.0
        jac = np.array([[a - b * y, -b * x], [d * y, d * x - c]])
        by_p = np.array([[0, 0, x, -x * y, 0, 0], [0, 0, 0, 0, -y, x * y]])
        return np.concatenate([[a * x - b * x * y, d * x * y - c * y], (jac @ s + by_p).ravel()])

    z0 = np.concatenate([[1.0, 1.0], np.eye(2, 6).ravel()])
    ends = (0.0, times[-1])
    z = solve_ivp(rhs, ends, z0, "DOP853", times, rtol=1e-12, atol=1e-12).y.T
    off = z[:, :2] - 1
    return (off**2).sum() / 2, np.einsum("ti,tij->j", off, z[:, 2:].reshape(-1, 2, 6))


@pytest.mark.parametrize(
    "alg", [Heun(), Ralston(), BS3(), DP5(), Tsit5(), DP8(), Vern6(), Vern7(), Vern9()], ids=label
)
@each()
def test_methods_against_forward_sensitivities(alg, sensealg):
    times = [0.4, 1.0, 1.7, 2.0]
    tol = {2: 1e-5, 3: 1e-6}.get(alg.order, 1e-8)
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    prob = library.lotka_volterra(tspan=(0.0, 2.0)).remake(u0=u0, p=p)
    sol = solve(prob, alg, sensealg=sensealg, saveat=times, rtol=tol, atol=tol)
    loss = ((sol.u - 1) ** 2).sum() / 2
    loss.backward()
    value, expected = forward_sensitivities(times)
    assert float(loss.detach()) == pytest.approx(value, rel=300 * tol)
    assert_near(torch.cat([u0.grad, p.grad]), torch.from_numpy(expected), 300 * tol)


@pytest.mark.parametrize("alg", [Euler(), Midpoint(), RK4()], ids=label)
@each([*STEPWISE, TAPE])
def test_fixed_steps_against_central_differences(alg, sensealg):
    prob = library.lotka_volterra(tspan=(0.0, 1.0))

    def loss(u0, p, sensealg=None):
        sol = solve(
            prob.remake(u0=u0, p=p),
            alg,
            sensealg=sensealg,
            saveat=[0.33, 1.0],
            dt=0.1,
            adaptive=False,
        )
        return (sol.u**3).sum()

    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    loss(u0, p, sensealg).backward()
    expected = differences(lambda z: loss(z[:2], z[2:]), torch.cat([u0, p]))
    assert_near(torch.cat([u0.grad, p.grad]), expected, 1e-8)


@each(CONTINUOUS)
def test_fixed_steps_of_continuous_adjoints_converge(sensealg):
    check_linear(sensealg, alg=RK4(), adaptive=False, dt=0.01, saveat=[0.333, 1.5])


def differences(f, x, step=1e-3):
    """Central differences of fourth order of a scalar function."""
    x = x.detach()
    columns = []
    for i in range(x.numel()):
        d = torch.zeros_like(x)
        d.view(-1)[i] = step
        near, far = (float(f(x + k * d)) - float(f(x - k * d)) for k in (1, 2))
        columns.append((8 * near - far) / (12 * step))
    return torch.tensor(columns, dtype=DOUBLE).reshape(x.shape)


# -- exactness of the discrete adjoint ----------------------------------------------------------


def replayed(alg, f, u, t, h, saveat):
    """The solver's steps at given sizes, written from the tableau with NumPy."""
    s, dense, saved = alg.tableau.stages, alg.tableau.stages.interpolant, []
    for t_i, h_i in zip(t, h, strict=True):
        k = []
        for row, c in zip(s.a, s.c, strict=True):
            g = u + h_i * sum((w * k_j for w, k_j in zip(row, k, strict=False)), np.zeros_like(u))
            k.append(f(t_i + c * h_i, g))
        for row, c in zip(dense.a_extra, dense.c_extra, strict=True):
            k.append(f(t_i + c * h_i, u + h_i * row @ np.array(k[: len(row)])))
        theta = [(x - t_i) / h_i for x in saveat if t_i < x <= t_i + h_i * (1 + 1e-14)]
        saved += [g if x > 1 - 1e-12 else u + h_i * dense.weights(x) @ np.array(k) for x in theta]
        u = g
    return np.array(saved)


@pytest.mark.parametrize("alg", [BS3(), Tsit5(), DP8(), Vern6()], ids=label)
@each([*STEPWISE, TAPE])
def test_discrete_gradient_is_that_of_the_steps_taken(sensealg, alg):
    # at loose tolerance, so that a continuous gradient would be far off
    saveat = [0.2, 0.25, 1.1, 3.0]
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    prob = library.lotka_volterra(tspan=(0.0, 3.0)).remake(u0=u0, p=p)
    sol = solve(prob, alg, sensealg=sensealg, saveat=saveat, rtol=1e-2, atol=1e-2)
    (sol.u**2).sum().backward()

    def loss(z):
        z = z.numpy()

        def f(t, u):
            x, y = u
            return np.array([z[2] * x - z[3] * x * y, -z[4] * y + z[5] * x * y])

        return (replayed(alg, f, z[:2], *sol_steps, saveat) ** 2).sum()

    sol_steps = sol.steps.t.numpy(), sol.steps.h.numpy()
    z = torch.cat([u0, p])
    assert loss(z.detach()) == pytest.approx(float((sol.u**2).sum().detach()), rel=1e-10)
    # Vern6's continuous extension has coefficients of 1e5, which costs digits
    assert_near(torch.cat([u0.grad, p.grad]), differences(loss, z), 1e-7)


def test_through_step_size_is_the_gradient_of_the_adaptive_program():
    prob = library.lotka_volterra(tspan=(0.0, 2.0))
    options = {"rtol": 1e-2, "atol": 1e-2, "saveat": [0.7, 2.0]}

    def run(z, **sensealg):
        return solve(prob.remake(u0=z[:2], p=z[2:]), Tsit5(), **options, **sensealg)

    z = leaf([1.0, 1.0, 1.5, 1.0, 3.0, 1.0])
    sol = run(z, sensealg=DiscreteAdjoint(through_step_size=True))
    (sol.u**2).sum().backward()

    def loss(z):
        near = run(z)
        assert len(near.steps) == len(sol.steps)  # or the program jumps here
        assert near.stats.nreject == sol.stats.nreject
        return (near.u**2).sum()

    expected = differences(loss, z, 1e-5)
    assert_near(z.grad, expected, 1e-7)
    (frozen,) = torch.autograd.grad((run(z, sensealg=DiscreteAdjoint()).u ** 2).sum(), z)
    assert float((frozen - expected).abs().max()) > 1e-5  # the two notions do differ here


@each([DiscreteAdjoint(checkpoints=n) for n in (1, 2, 3, 100)])
def test_checkpoints_change_nothing(sensealg):
    def gradient(sensealg):
        u0, p = leaf(START), leaf(MATRIX)
        sol = solve(ODEProblem(linear, u0, (0.0, 9.0), p), Tsit5(), sensealg=sensealg, tstops=[4.0])
        ((sol.u**2).sum() + sol.steps.error.sum()).backward()
        return torch.cat([u0.grad, p.grad.reshape(-1)])

    torch.testing.assert_close(gradient(sensealg), gradient(DiscreteAdjoint()), rtol=1e-13, atol=0)


def batch_of_rows(t, u, p):
    return torch.tanh(u @ p["w"]) - p["b"] * u


def coupled_rows(t, u, p):
    return torch.tanh(u @ p["w"]) - p["b"] * u * u.mean(0)


def late_coupled_rows(t, u, p):
    return batch_of_rows(t, u, p) + torch.relu(t - 0.5) * u.flip(0)


def branching(t, u, p):
    return batch_of_rows(t, u, p) * (1.0 if u.sum() > 0.7 else 0.9)


def stateless_in_u(t, u, p):
    return torch.sin(t) * p["b"].expand_as(u)


KINDS = [batch_of_rows, coupled_rows, late_coupled_rows, branching, stateless_in_u]


@pytest.mark.parametrize("f", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dt", [None, 0.005], ids=["adaptive", "many-steps"])
@each(STEPWISE)
def test_discrete_adjoint_equals_plain_autograd(sensealg, dt, f):
    # steps may be differentiated together, or one by one, as f allows
    def gradient(sensealg):
        u0, w = leaf([[1.0, 0.3], [-0.2, 0.5], [0.1, -0.4]]), leaf([[0.1, -1.0], [0.8, 0.2]])
        b = leaf([0.3, 0.6])
        prob = ODEProblem(f, u0, (0.0, 1.5), {"w": w, "b": b})
        saveat = [0.01, 0.02, 0.6, 1.1, 1.3]
        options = {"saveat": saveat, "adaptive": dt is None, "dt": dt, "sensealg": sensealg}
        sol = solve(prob, BS3(), rtol=1e-4, atol=1e-4, **options)
        steps = sol.steps
        loss = (sol.u**2).sum() + steps.error.sum() + (steps.error_norm**2).sum()
        (loss + 0.1 * steps.stiffness.mean()).backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (u0, w, b)]
        return torch.cat([g.reshape(-1) for g in grads])

    torch.testing.assert_close(gradient(sensealg), gradient(TAPE), rtol=1e-9, atol=1e-11)


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


# -- captured tensors ---------------------------------------------------------------------------


class Decay(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, t, u):
        return -self.a * u

    def rate(self, t, u):
        return self.forward(t, u)


class Method:
    def __init__(self, module):
        self.module = module

    def __call__(self, t, u):
        return self.module(t, u)


class Twice(torch.autograd.Function):
    """A custom function, inside of which no mode of PyTorch looks."""

    @staticmethod
    def forward(ctx, a, u):
        ctx.save_for_backward(a, u)
        return -2 * a * u

    @staticmethod
    def backward(ctx, g):
        a, u = ctx.saved_tensors
        return -2 * g * u, -2 * g * a


def decay(t, u, w):
    return -w * u


def from_closure(a):
    return lambda t, u: -a * u, None


def from_what_was_computed(a):
    w = 2 * a
    return lambda t, u: -w * u, None


def from_a_view(a):
    w = a[:2]
    return lambda t, u: -w * u, None


def from_both(a):
    w = 2 * a
    return lambda t, u: -(a + w) * u, None


def from_p(a):
    return decay, a


def from_p_and_closure(a):
    return lambda t, u, p: -(a + p) * u, a


def from_computed_p(a):
    return decay, 2 * a


def from_computed_p_and_closure(a):
    w = 2 * a
    return lambda t, u, p: -(w + p) * u, w


def from_p_and_what_was_computed(a):
    w = 2 * a
    return lambda t, u, p: -(w + p) * u, a


def from_p_twice(a):
    return lambda t, u, p: -(p[0] + p[1] + p[2]) * u, (a, a, 2 * a)


def from_module(a):
    return Decay(a), None


def from_parameters_of_module(a):
    module = Decay(a)
    return lambda t, u, p: module(t, u), module.parameters()


def from_bound_method(a):
    return Decay(a).rate, None


def from_object(a):
    return Method(Decay(a)), None


def from_partial(a):
    return functools.partial(decay, w=a), None


def from_partial_of_computed(a):
    return functools.partial(decay, w=2 * a), None


def from_functional_call(a):
    module = Decay(nn.Parameter(torch.zeros_like(a)))
    return lambda t, u, p: torch.func.functional_call(module, p, (t, u)), {"a": 2 * a}


def from_functional_call_of_captured(a):
    module, state = Decay(nn.Parameter(torch.zeros_like(a))), {"a": 2 * a}
    return lambda t, u: torch.func.functional_call(module, state, (t, u)), None


def from_custom_function(a):
    return lambda t, u: Twice.apply(a, u), None


def from_custom_function_of_computed(a):
    w = 2 * a
    return lambda t, u: Twice.apply(w, u), None


# how the rate follows from ``a``
SOURCES = {
    from_closure: 1,
    from_what_was_computed: 2,
    from_a_view: 1,
    from_both: 3,
    from_p: 1,
    from_p_and_closure: 2,
    from_computed_p: 2,
    from_computed_p_and_closure: 4,
    from_p_and_what_was_computed: 3,
    from_p_twice: 4,
    from_module: 1,
    from_parameters_of_module: 1,
    from_bound_method: 1,
    from_object: 1,
    from_partial: 1,
    from_partial_of_computed: 2,
    from_functional_call: 2,
    from_functional_call_of_captured: 2,
    from_custom_function: 2,
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda f: f.__name__)
@each()
def test_parameters_are_found_wherever_they_come_from(sensealg, source):
    a = nn.Parameter(torch.tensor([0.3, 0.5], dtype=DOUBLE))
    f, p = source(a)
    u0 = leaf([1.0, 2.0])
    sol = solve(ODEProblem(f, u0, (0.0, 1.0), p), Vern7(), sensealg=sensealg, saveat=[1.0], **TIGHT)
    sol.u.sum().backward()
    k = SOURCES[source]
    end = u0.detach() * torch.exp(-k * a.detach())
    assert_near(a.grad, -k * end)
    assert_near(u0.grad, end / u0.detach())


@each()
def test_custom_function_of_a_computed_tensor_is_right_or_refused(sensealg):
    # what it is given cannot be replaced from outside; its gradient must not vanish silently
    a = nn.Parameter(torch.tensor([0.3, 0.5], dtype=DOUBLE))
    f, _ = from_custom_function_of_computed(a)
    u0 = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    try:
        sol = solve(ODEProblem(f, u0, (0.0, 1.0)), Vern7(), sensealg=sensealg, **TIGHT)
        sol.u[-1].sum().backward()
    except RuntimeError:
        return
    assert_near(a.grad, -4 * u0 * torch.exp(-4 * a.detach()))


@each()
def test_start_captured_by_f(sensealg):
    u0 = leaf([1.0])
    prob = ODEProblem(lambda t, u: u0 - 2 * u, u0, (0.0, 1.0))
    solve(prob, Vern7(), sensealg=sensealg, saveat=[1.0], **TIGHT).u.sum().backward()
    assert float(u0.grad) == pytest.approx(0.5 + 0.5 * math.exp(-2), rel=1e-8)


@each()
def test_start_computed_from_p(sensealg):
    a = leaf([0.4])
    prob = ODEProblem(lambda t, u, p: p * u, 3 * a, (0.0, 1.0), a)
    solve(prob, Vern7(), sensealg=sensealg, saveat=[1.0], **TIGHT).u.sum().backward()
    assert float(a.grad) == pytest.approx(3 * math.exp(0.4) * 1.4, rel=1e-8)


W_GLOBAL = nn.Parameter(torch.tensor([0.7], dtype=DOUBLE))


def late(t, u, w):
    return -w * u if t > 0.5 else -u


class Late(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, t, u):
        return late(t, u, self.a)


class Slots:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a

    def __call__(self, t, u):
        return late(t, u, self.a)


def late_closure(a):
    return lambda t, u: late(t, u, a)


def late_default(a):
    return lambda t, u, w=a: late(t, u, w)


def late_keyword_default(a):
    def f(t, u, *, w=a):
        return late(t, u, w)

    return f


def late_partial(a):
    return functools.partial(late, w=a)


def late_module(a):
    return Late(a)


def late_submodule(a):
    inner, outer = Late(a), nn.Module()
    outer.inner = inner
    return lambda t, u: outer.inner(t, u)


def late_plain_attribute_of_submodule(a):
    inner = nn.Identity()
    inner.rates = [a]
    model = nn.Sequential(nn.Sequential(inner))
    return lambda t, u: late(t, u, model[0][0].rates[0])


def late_closure_of_forward(a):
    class Net(nn.Module):
        def forward(self, t, u):
            return late(t, u, a)

    return Net()


def late_helper(a):
    def helper(t, u):
        return late(t, u, a)

    def f(t, u):
        return helper(t, u)

    return f


def late_nested_container(a):
    box = {"one": [{"two": ({"three": a},)}]}
    return lambda t, u: late(t, u, box["one"][0]["two"][0]["three"])


def late_slots(a):
    return Slots(a)


def late_global(a):
    return lambda t, u: late(t, u, W_GLOBAL)


def late_global_in_inner_function(a):
    def f(t, u):
        def inner():
            return -W_GLOBAL * u

        return inner() if t > 0.5 else -u

    return f


LATE = [
    late_closure,
    late_default,
    late_keyword_default,
    late_partial,
    late_module,
    late_submodule,
    late_plain_attribute_of_submodule,
    late_closure_of_forward,
    late_helper,
    late_nested_container,
    late_slots,
    late_global,
    late_global_in_inner_function,
]


@pytest.mark.parametrize("source", LATE, ids=lambda f: f.__name__)
@each([DiscreteAdjoint(), InterpolatingAdjoint()])
def test_parameter_used_only_in_a_later_branch(sensealg, source):
    W_GLOBAL.grad = None
    a = nn.Parameter(torch.tensor([0.7], dtype=DOUBLE))
    f = source(a)
    if "global" in source.__name__:
        a = W_GLOBAL
    prob = ODEProblem(f, leaf([1.0]), (0.0, 1.0))
    sol = solve(prob, Vern7(), sensealg=sensealg, saveat=[1.0], tstops=[0.5], **TIGHT)
    sol.u.sum().backward()
    assert a.grad is not None, "silently without gradient"
    assert float(a.grad) == pytest.approx(-0.5 * math.exp(-0.5 - 0.35), rel=1e-8)


@each()
def test_hook_of_a_parameter_runs_once(sensealg):
    calls = []
    module, p = Decay(nn.Parameter(torch.tensor([0.3], dtype=DOUBLE))), leaf([0.2])
    module.a.register_hook(lambda g: calls.append("module") or 10 * g)
    p.register_hook(lambda g: calls.append("p") or 10 * g)
    prob = ODEProblem(lambda t, u, p: module(t, u) - p * u, leaf([1.0]), (0.0, 1.0), p)
    solve(prob, Vern7(), sensealg=sensealg, saveat=[1.0], **TIGHT).u.sum().backward()
    assert sorted(calls) == ["module", "p"]
    for x in (module.a, p):
        assert float(x.grad) == pytest.approx(-10 * math.exp(-0.5), rel=1e-8)


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
    options = {"tstops": [1.0], "rtol": 1e-6, "atol": 1e-6, "saveat": 0.3}
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


# -- autograd's own rules -----------------------------------------------------------------------


def short_solve(u0, p, **options):
    prob = library.lotka_volterra(tspan=(0.0, 1.0)).remake(u0=u0, p=p)
    return solve(prob, saveat=[0.4, 1.0], **options).u


@each()
def test_gradcheck(sensealg):
    # tolerances tight enough that differences of 1e-6 do not see the change of steps
    options = {"alg": Vern9(), "rtol": 1e-12, "atol": 1e-12, "sensealg": sensealg}
    inputs = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    assert torch.autograd.gradcheck(functools.partial(short_solve, **options), inputs)


def test_gradgradcheck_on_tape():
    options = {"alg": RK4(), "adaptive": False, "dt": 0.25, "sensealg": TAPE}
    inputs = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    assert torch.autograd.gradgradcheck(functools.partial(short_solve, **options), inputs)


@pytest.mark.filterwarnings("ignore:Using backward.*create_graph")
@each([*STEPWISE, *CONTINUOUS])
def test_double_backward_is_refused(sensealg):
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    loss = (short_solve(u0, p, sensealg=sensealg) ** 2).sum()
    (g,) = torch.autograd.grad(loss, p, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


class TestTransforms:
    u0 = torch.tensor([1.0, 1.0], dtype=DOUBLE)
    p = torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=DOUBLE)

    def jacobian(self):
        p = self.p.clone().requires_grad_()
        u = short_solve(self.u0, p, sensealg=DiscreteAdjoint())
        rows = [torch.autograd.grad(x, p, retain_graph=True)[0] for x in u.reshape(-1)]
        return torch.stack(rows).reshape(2, 2, 4)

    def test_grad(self):
        g = torch.func.grad(lambda p: short_solve(self.u0, p).sum())(self.p)
        assert_near(g, self.jacobian().sum((0, 1)), 1e-12)

    def test_grad_by_a_captured_tensor(self):
        g = torch.func.grad(
            lambda a: solve(
                ODEProblem(lambda t, u: -a * u, self.u0, (0.0, 1.0)), saveat=[1.0]
            ).u.sum()
        )(torch.tensor(0.5, dtype=DOUBLE))
        assert float(g) == pytest.approx(-2 * math.exp(-0.5), rel=1e-3)

    def test_jacrev(self):
        jac = torch.func.jacrev(lambda p: short_solve(self.u0, p))(self.p)
        assert_near(jac, self.jacobian(), 1e-12)

    def test_jvp(self):
        v = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=DOUBLE)
        _, out = torch.func.jvp(lambda p: short_solve(self.u0, p), (self.p,), (v,))
        assert_near(out, self.jacobian() @ v, 1e-12)

    def test_jacfwd(self):
        jac = torch.func.jacfwd(lambda p: short_solve(self.u0, p))(self.p)
        assert_near(jac, self.jacobian(), 1e-12)

    def test_forward_mode(self):
        v = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=DOUBLE)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(self.p, v)
            out = torch.autograd.forward_ad.unpack_dual(short_solve(self.u0, dual)).tangent
        assert_near(out, self.jacobian() @ v, 1e-12)

    def test_hessian(self):
        def loss(p):
            options = {"alg": RK4(), "adaptive": False, "dt": 0.25}
            return (short_solve(self.u0, p, **options) ** 2).sum()

        hessian = torch.func.jacfwd(torch.func.grad(loss))(self.p)
        assert_near(
            hessian,
            torch.autograd.functional.hessian(
                lambda p: (
                    short_solve(self.u0, p, alg=RK4(), adaptive=False, dt=0.25, sensealg=TAPE) ** 2
                ).sum(),
                self.p,
            ),
            1e-12,
        )

    @pytest.mark.parametrize("sensealg", [*STEPWISE, *CONTINUOUS], ids=label)
    def test_other_sensealgs_are_refused(self, sensealg):
        with pytest.raises(TypeError, match="tape=True"):
            torch.func.grad(lambda p: short_solve(self.u0, p, sensealg=sensealg).sum())(self.p)


@each()
def test_backward_twice_gives_the_same(sensealg):
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    loss = (short_solve(u0, p, sensealg=sensealg) ** 2).sum()
    first = torch.autograd.grad(loss, (u0, p), retain_graph=True)
    second = torch.autograd.grad(loss, (u0, p))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each()
def test_loss_of_some_outputs(sensealg):
    check_linear(sensealg, saveat=[0.2, 0.5, 1.5], weigh=lambda u: u[1, 0])
    check_linear(sensealg, saveat=[0.2, 0.5, 1.5], weigh=lambda u: u[0, 1] * 3)


@each()
def test_loss_that_uses_nothing(sensealg):
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    (0 * short_solve(u0, p, sensealg=sensealg).sum()).backward()
    assert not u0.grad.any()
    assert not p.grad.any()


@each()
def test_nan_loss_raises_or_shows(sensealg):
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    loss = (short_solve(u0, p, sensealg=sensealg) * math.nan).sum()
    if sensealg in CONTINUOUS:
        with pytest.raises(RuntimeError, match="NaN"):
            loss.backward()
    else:
        loss.backward()
        assert p.grad.isnan().any()


@each(CONTINUOUS)
def test_gradient_is_linear_in_the_loss(sensealg):
    def gradient(scale):
        u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
        u = short_solve(u0, p, sensealg=sensealg)
        return torch.cat(torch.autograd.grad(scale * (u**2).sum(), (u0, p)))

    # a power of two: then every operation rounds alike
    torch.testing.assert_close(gradient(2.0**-30) * 2**30, gradient(1.0), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(1e-8) * 1e8, gradient(1.0), rtol=1e-7, atol=0)


# -- the reverse solve --------------------------------------------------------------------------


@each(CONTINUOUS)
def test_one_reverse_solve_whatever_is_saved(sensealg):
    def reverse(saves):
        u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
        prob = library.lotka_volterra().remake(u0=u0, p=p)
        saveat = torch.linspace(0, 10, saves, dtype=DOUBLE)
        sol = solve(prob, Tsit5(), sensealg=sensealg, saveat=saveat, rtol=1e-7, atol=1e-7)
        sol.u.sum().backward()
        return sol.stats.adjoint

    few, many = reverse(2), reverse(200)
    # cutting a step at a save costs up to two more
    assert many.naccept <= few.naccept + 400
    # six stages a step and one evaluation where a step begins at a save
    assert many.nf <= 6 * (many.naccept + many.nreject) + 200 + 3


@each([*STEPWISE, *CONTINUOUS])
def test_statistics_of_the_reverse_pass(sensealg):
    p = leaf(MATRIX)
    prob = ODEProblem(linear, leaf(START), (0.0, 3.0), p)
    sol = solve(prob, Tsit5(), sensealg=sensealg, saveat=[1.0, 3.0])
    nf = sol.stats.nf
    assert sol.stats.adjoint is None
    assert sol.stats.sensealg == repr(sensealg)
    sol.u.sum().backward()
    adjoint = sol.stats.adjoint
    assert adjoint.nf >= 6 * adjoint.naccept > 0
    assert adjoint.wall_s > 0
    assert adjoint.alg == "Tsit5"
    assert sol.stats.nf == nf


@pytest.mark.parametrize("kind", [BacksolveAdjoint, InterpolatingAdjoint])
def test_reverse_solve_has_its_own_method_and_tolerances(kind):
    def gradient(**options):
        p = leaf(MATRIX)
        sol = solve(
            ODEProblem(linear, leaf(START), (0.0, 3.0), p), Tsit5(), sensealg=kind(**options)
        )
        (sol.u[-1] ** 2).sum().backward()
        return sol.stats.adjoint

    adjoint = gradient(alg=Vern7(), rtol=1e-9, atol=1e-9)
    assert adjoint.alg == "Vern7"
    assert gradient(rtol=1e-10, atol=1e-10).naccept > 2 * gradient().naccept


def test_reverse_method_of_fixed_steps_needs_fixed_forward_steps():
    prob = ODEProblem(linear, leaf(START), (0.0, 1.0), leaf(MATRIX))
    with pytest.raises(ValueError, match="RK4"):  # up front, not in backward
        solve(prob, Tsit5(), sensealg=InterpolatingAdjoint(alg=RK4()))


def test_discrete_reverse_evaluates_no_more_than_the_steps():
    sol = check_linear(DiscreteAdjoint(), alg=Tsit5(), rtol=1e-2, saveat=[1.5])
    # seven stages a step, and the derivative at the start
    assert sol.stats.adjoint.nf <= 7 * len(sol.steps) + 1
    assert sol.stats.adjoint.naccept == len(sol.steps)


@pytest.mark.parametrize("kind", [BacksolveAdjoint, InterpolatingAdjoint])
def test_failing_reverse_solve_is_an_error(kind):
    prob = ODEProblem(linear, leaf(START), (0.0, 20.0), leaf(MATRIX))
    sol = solve(prob, Tsit5(), sensealg=kind(rtol=1e-13, atol=1e-13), maxiters=60)
    with pytest.raises(SolveError, match="reverse solve"):
        sol.u.sum().backward()


@each()
def test_partial_solution_of_a_failed_solve(sensealg):
    p = leaf(0.4)

    def f(t, u, p):
        return p * u * torch.where(t < 2, 1.0, math.nan)

    prob = ODEProblem(f, leaf([1.0]), (0.0, 9.0), p)
    sol = solve(prob, Tsit5(), sensealg=sensealg, throw=False, rtol=1e-8, atol=1e-8)
    assert not sol.success
    assert float(sol.t[-1]) > 1.9
    sol.u[-1].sum().backward()
    end = float(sol.t[-1])
    assert float(p.grad) == pytest.approx(end * math.exp(0.4 * end), rel=1e-6)


@each()
def test_failed_solve_that_saved_nothing(sensealg):
    u0, p = leaf(START), leaf(MATRIX)
    prob = ODEProblem(linear, u0, (0.0, 100.0), p)
    sol = solve(prob, sensealg=sensealg, saveat=[99.0], maxiters=5, throw=False)
    assert sol.u.shape == (0, 2)
    if sensealg is not TAPE:  # there, nothing depends on anything
        sol.u.sum().backward()
        assert not u0.grad.any()
        assert not p.grad.any()


def contracting(sensealg, rate):
    u0 = leaf([1.0])
    prob = ODEProblem(lambda t, u, p: -p * u, u0, (0.0, 1.0), leaf(rate))
    solve(prob, Tsit5(), sensealg=sensealg, saveat=[1.0]).u.sum().backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backsolve_warns_where_it_is_unstable(checkpointing):
    with pytest.warns(BacksolveWarning, match="DiscreteAdjoint"):
        contracting(BacksolveAdjoint(checkpointing=checkpointing), 50.0)


@each()
def test_no_warning_on_a_benign_problem(sensealg):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contracting(sensealg, 0.5)


def test_checkpointing_resets_the_reconstruction():
    # with a state every 0.05, backsolve survives what it cannot survive without
    def gradient(**options):
        u0 = leaf([1.0])
        prob = ODEProblem(lambda t, u, p: -p * u**2, u0, (0.0, 1.0), leaf(50.0))
        saveat = torch.linspace(0, 1, 41, dtype=DOUBLE)
        sol = solve(
            prob, Vern7(), sensealg=BacksolveAdjoint(**options), saveat=saveat, rtol=1e-9, atol=1e-9
        )
        sol.u[-1].sum().backward()
        return float(u0.grad)

    assert gradient() == pytest.approx(1 / 51**2, rel=1e-4)
