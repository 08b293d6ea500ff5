"""Gradients of the sensealgs: published values, forward sensitivities, the steps taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradients import (
    CONTINUOUS,
    DOUBLE,
    MATRIX,
    START,
    STEPWISE,
    TAPE,
    assert_near,
    check_linear,
    each,
    label,
    leaf,
    linear,
)
from scipy.integrate import solve_ivp

from diffsolve import (
    BS3,
    DP5,
    DP8,
    RK4,
    DiscreteAdjoint,
    Euler,
    Heun,
    Midpoint,
    ODEProblem,
    Ralston,
    Tsit5,
    Vern6,
    Vern7,
    Vern9,
    solve,
)
from diffsolve.problems import library

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
        options["engine"] = "torch"  # the first step's stiffness is mostly rounding: the same here
        sol = solve(prob, BS3(), rtol=1e-4, atol=1e-4, **options)
        steps = sol.steps
        loss = (sol.u**2).sum() + steps.error.sum() + (steps.error_norm**2).sum()
        (loss + 0.1 * steps.stiffness.mean()).backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (u0, w, b)]
        return torch.cat([g.reshape(-1) for g in grads])

    torch.testing.assert_close(gradient(sensealg), gradient(TAPE), rtol=1e-9, atol=1e-11)
