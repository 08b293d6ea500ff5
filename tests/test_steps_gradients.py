"""Gradients of the steps' estimates, and of dense output."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffsolve import (
    BS3,
    DP5,
    DP8,
    RK4,
    BacksolveAdjoint,
    DiscreteAdjoint,
    Euler,
    InterpolatingAdjoint,
    ODEProblem,
    Tsit5,
    Vern7,
    solve,
)
from diffsolve.problems import library

DOUBLE = torch.float64
TAPE = DiscreteAdjoint(tape=True)
DISCRETE = [DiscreteAdjoint(), DiscreteAdjoint(checkpoints=3), TAPE]
CONTINUOUS = [BacksolveAdjoint(), InterpolatingAdjoint(), InterpolatingAdjoint(checkpoints=3)]
ESTIMATES = ["error", "error_norm", "stiffness"]
RTOL, ATOL = 1e-3, 1e-4


def each(sensealgs):
    return pytest.mark.parametrize("sensealg", sensealgs, ids=repr)


def leaf(values):
    return torch.tensor(values, dtype=DOUBLE, requires_grad=True)


def solved(z, alg, sensealg=None, **options):
    """Lotka-Volterra; ``z`` is the initial state and the parameters."""
    prob = library.lotka_volterra(tspan=(0.0, 2.5)).remake(u0=z[:2], p=z[2:])
    options = {"rtol": RTOL, "atol": ATOL, **options}
    return solve(prob, alg, sensealg=sensealg, **options)


def start():
    return leaf([1.0, 1.0, 1.5, 1.0, 3.0, 1.0])


def rms(x):
    return math.sqrt(np.mean(np.abs(x) ** 2))


def lotka_volterra(z):
    def f(t, u):
        return np.array([z[2] * u[0] - z[3] * u[0] * u[1], -z[4] * u[1] + z[5] * u[0] * u[1]])

    return f


def replayed(f, u, t, h, tableau):
    """Estimates of steps at given times and sizes, from a tableau, with NumPy.

    ``tableau`` is ``a, c, b_error, b_error_low, stage``; the stiffness estimate compares the last
    stage, at the new point, with number ``stage``.
    """
    a, c, b_error, b_low, stage = tableau
    found = []
    for t_i, h_i in zip(t, h, strict=True):
        k, g = [], []
        for row, c_j in zip(a, c, strict=True):
            g.append(u + h_i * sum((w * x for w, x in zip(row, k, strict=False)), 0 * u))
            k.append(f(t_i + c_j * h_i, g[-1]))
        new, k = g[-1], np.array(k)
        scale = ATOL + RTOL * np.maximum(np.abs(u), np.abs(new))
        e = h_i * b_error @ k
        error = rms(e / scale)
        if b_low is not None:  # Hairer, Norsett, Wanner, Solving ODEs I, section II.10
            error = error**2 / math.sqrt(error**2 + 0.01 * rms(h_i * b_low @ k / scale) ** 2)
        stiffness = np.linalg.norm(k[-1] - k[stage]) / np.linalg.norm(new - g[stage])
        found.append((error, rms(e), stiffness))
        u = new
    return dict(zip(ESTIMATES, np.array(found).T, strict=True))


def stages_of(alg, stage):
    s = alg.tableau.stages
    return s.a, s.c, s.b_error, s.b_error_low, stage


# Tsitouras (2011), table 1, typed in here once more.
TSIT5 = (
    [
        [],
        [0.161],
        [-0.008480655492356989, 0.335480655492357],
        [2.8971530571054935, -6.359448489975075, 4.3622954328695815],
        [5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525],
        [
            5.86145544294642,
            -12.92096931784711,
            8.159367898576159,
            -0.071584973281401,
            -0.028269050394068383,
        ],
        [
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ],
    ],
    [0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0],
    np.array(
        [
            -0.00178001105222577714,
            -0.0008164344596567469,
            0.007880878010261995,
            -0.1447110071732629,
            0.5823571654525552,
            -0.45808210592918697,
            1 / 66,
        ]
    ),
    None,
    5,
)


# the last number: the stage before the last at the same time (or, without one, the last but one)
CASES = {
    "Tsit5": (Tsit5(), TSIT5),
    "BS3": (BS3(), stages_of(BS3(), 2)),
    "DP5": (DP5(), stages_of(DP5(), 5)),
    "DP8": (DP8(), stages_of(DP8(), 11)),
}


def differences(f, z, step=3e-4):
    """Central differences of fourth order: ratios of small numbers allow no small step."""
    z = z.detach().numpy()
    columns = [
        (8 * (f(z + d) - f(z - d)) - f(z + 2 * d) + f(z - 2 * d)) / (12 * step)
        for d in step * np.eye(len(z))
    ]
    return np.array(columns)


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    alg, tableau = CASES[name]
    z = start().detach()
    steps = solved(z, alg).steps
    expected = replayed(
        lotka_volterra(z.numpy()), z[:2].numpy(), steps.t.numpy(), steps.h.numpy(), tableau
    )
    for estimate in ESTIMATES:
        np.testing.assert_allclose(getattr(steps, estimate), expected[estimate], rtol=1e-6)
    assert (steps.error <= 1).all()


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("name", CASES)
@each(DISCRETE)
def test_gradients_at_frozen_steps(sensealg, name, estimate):
    alg, tableau = CASES[name]
    z = start()
    sol = solved(z, alg, sensealg)
    t, h = sol.steps.t.detach().numpy(), sol.steps.h.detach().numpy()
    weights = np.linspace(1, 2, len(t))  # every step counts differently
    (torch.from_numpy(weights) * getattr(sol.steps, estimate)).sum().backward()

    def loss(z):
        return weights @ replayed(lotka_volterra(z), z[:2], t, h, tableau)[estimate]

    expected = differences(loss, z)
    np.testing.assert_allclose(z.grad, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@each(DISCRETE)
def test_estimates_and_states_in_one_loss(sensealg):
    def gradient(weigh):
        z = start()
        sol = solved(z, Tsit5(), sensealg, saveat=[0.3, 1.1, 2.5])
        return torch.autograd.grad(weigh(sol), z)[0]

    parts = [
        gradient(lambda sol: (sol.u**2).sum()),
        gradient(lambda sol: sol.steps.error.sum()),
        gradient(lambda sol: sol.steps.stiffness[2]),
    ]
    both = gradient(lambda sol: (sol.u**2).sum() + sol.steps.error.sum() + sol.steps.stiffness[2])
    torch.testing.assert_close(both, sum(parts), rtol=1e-10, atol=1e-12)


@each(DISCRETE)
def test_through_stops(sensealg):
    # a step begins anew at a stop: its first stage depends on the state there
    z = start()
    sol = solved(z, Tsit5(), sensealg, tstops=[0.5, 1.5], saveat=[2.5])
    t, h = sol.steps.t.detach().numpy(), sol.steps.h.detach().numpy()
    assert {0.5, 1.5} <= set(t.tolist())
    sol.steps.error.sum().backward()

    def loss(z):
        return replayed(lotka_volterra(z), z[:2], t, h, TSIT5)["error"].sum()

    np.testing.assert_allclose(z.grad, differences(loss, z), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alg", [RK4(), Euler()], ids=repr)
@each(DISCRETE)
def test_stiffness_of_methods_without_error_estimate(sensealg, alg):
    z = start()
    sol = solved(z, alg, sensealg, adaptive=False, dt=0.125)
    assert not sol.steps.error.any()
    (sol.steps.stiffness.sum() + 0 * sol.u.sum()).backward()
    s = alg.tableau.stages
    same_time = [i for i in range(s.n - 1) if s.c[i] == 1.0]
    stage = same_time[-1] if same_time else s.n - 2
    tableau = s.a, s.c, np.zeros(s.n), None, stage
    t, h = sol.steps.t.detach().numpy(), sol.steps.h.detach().numpy()

    def loss(z):
        return replayed(lotka_volterra(z), z[:2], t, h, tableau)["stiffness"].sum()

    expected = differences(loss, z)
    assert float(sol.steps.stiffness.sum().detach()) == pytest.approx(loss(z.detach().numpy()))
    np.testing.assert_allclose(z.grad, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@each(DISCRETE)
def test_zero_error_has_zero_gradient(sensealg):
    # a method is exact for a constant derivative: norms at the origin must not give NaN
    p = leaf([0.5, 2.0])
    prob = ODEProblem(lambda t, u, p: p + 0 * u, torch.zeros(2, dtype=DOUBLE), (0.0, 1.0), p)
    sol = solve(prob, RK4(), sensealg=sensealg, adaptive=False, dt=0.25)
    (sol.steps.error.sum() + sol.steps.stiffness.sum() + sol.u.sum()).backward()
    assert torch.isfinite(p.grad).all()
    prob = ODEProblem(lambda t, u: 0 * u, leaf([1.0, 2.0]), (0.0, 1.0))
    sol = solve(prob, DP8(), sensealg=sensealg)
    (sol.steps.error.sum() + sol.steps.error_norm.sum() + sol.steps.stiffness.sum()).backward()
    assert torch.equal(prob.u0.grad, torch.zeros(2, dtype=DOUBLE))


@each(DISCRETE)
def test_own_norm_and_tolerances_of_components(sensealg):
    atol = torch.tensor([1e-3, 1e-5], dtype=DOUBLE)

    def largest(scaled):
        return scaled.abs().max()

    z = start()
    sol = solved(z, Tsit5(), sensealg, atol=atol, norm=largest)
    t, h = sol.steps.t.detach(), sol.steps.h.detach()
    sol.steps.error.sum().backward()
    a, c, b, _, _ = TSIT5

    def loss(z):
        u, total = z[:2], 0.0
        for t_i, h_i in zip(t.numpy(), h.numpy(), strict=True):
            k = []
            for row, c_j in zip(a, c, strict=True):
                g = u + h_i * sum((w * x for w, x in zip(row, k, strict=False)), 0 * u)
                k.append(lotka_volterra(z)(t_i + c_j * h_i, g))
            scale = atol.numpy() + RTOL * np.maximum(np.abs(u), np.abs(g))
            total += np.abs(h_i * b @ np.array(k) / scale).max()
            u = g
        return total

    np.testing.assert_allclose(z.grad, differences(loss, z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimate", ESTIMATES)
@each(CONTINUOUS)
def test_continuous_adjoints_refuse_and_say_what_to_do(sensealg, estimate):
    sol = solved(start(), Tsit5(), sensealg)
    values = getattr(sol.steps, estimate)
    assert values.requires_grad  # else a loss would silently lose this term
    assert torch.isfinite(values).all()
    with pytest.raises(
        RuntimeError, match=rf"{estimate}.*DiscreteAdjoint\(\).*local_error_estimate"
    ):
        (sol.u.sum() + values.sum()).backward()


@each(CONTINUOUS)
def test_estimates_may_be_read_under_continuous_adjoints(sensealg):
    z = start()
    sol = solved(z, Tsit5(), sensealg)
    assert float(sol.steps.error.detach().max()) <= 1
    sol.u.sum().backward()
    assert z.grad.any()


def test_no_gradient_no_tape():
    steps = solved(start().detach(), Tsit5()).steps
    assert not any(getattr(steps, name).requires_grad for name in ESTIMATES)


# -- dense output -------------------------------------------------------------------------------


@each([DiscreteAdjoint(), DiscreteAdjoint(checkpoints=3), *CONTINUOUS])
def test_dense_output_refuses_and_says_what_to_do(sensealg):
    sol = solved(start(), Tsit5(), sensealg)
    value = sol(0.7)
    with pytest.raises(RuntimeError, match=r"saveat.*tape=True"):
        value.sum().backward()
    with torch.no_grad():
        assert not sol(0.7).requires_grad


@pytest.mark.parametrize("alg", [Tsit5(), Vern7()], ids=repr)
def test_dense_output_on_tape(alg):
    times = torch.tensor([0.0, 0.3, 1.7, 2.5], dtype=DOUBLE)
    z = start()
    (expected,) = torch.autograd.grad((solved(z, alg, TAPE, saveat=times).u ** 2).sum(), z)
    sol = solved(z, alg, TAPE)
    (got,) = torch.autograd.grad((sol(times) ** 2).sum(), z)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_derivative_of_dense_output_on_tape():
    z = start()
    sol = solved(z, Vern7(), TAPE, rtol=1e-9, atol=1e-9)
    (got,) = torch.autograd.grad(sol(1.3, derivative=1)[0], z, retain_graph=True)
    x, y = sol(1.3)
    (expected,) = torch.autograd.grad(z[2] * x - z[3] * x * y, z)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_time_of_dense_output_has_its_gradient_or_is_refused():
    t = leaf(1.3)
    sol = solved(start(), Vern7(), TAPE, rtol=1e-9, atol=1e-9)
    try:
        (got,) = torch.autograd.grad(sol(t)[0], t, allow_unused=True)
    except RuntimeError:
        return
    assert got is not None, "silently without gradient"
    assert float(got) == pytest.approx(float(sol(1.3, derivative=1)[0].detach()), rel=1e-6)
