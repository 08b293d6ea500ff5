"""Regularizers made of the solver's estimates."""

from __future__ import annotations

import math

import pytest
import torch

from diffsolve import (
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    Tsit5,
    solve,
)
from diffsolve.problems import library
from diffsolve.regularization import (
    ExponentialAnnealing,
    error_estimate,
    local_error_estimate,
    local_stiffness_estimate,
    stiffness_estimate,
)

DOUBLE = torch.float64
SENSEALGS = [
    DiscreteAdjoint(),
    DiscreteAdjoint(checkpoints=3),
    DiscreteAdjoint(tape=True),
    BacksolveAdjoint(),
    InterpolatingAdjoint(),
]
each = pytest.mark.parametrize("sensealg", SENSEALGS, ids=repr)
GLOBAL = {"error": error_estimate, "stiffness": stiffness_estimate}
LOCAL = {"error": local_error_estimate, "stiffness": local_stiffness_estimate}


def solved(sensealg=None, p=None, tspan=(0.0, 3.0), **options):
    p = torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=DOUBLE) if p is None else p
    options = {"rtol": 1e-4, "atol": 1e-4, "dense": True, **options}
    return solve(
        library.lotka_volterra(tspan=tspan).remake(p=p), Tsit5(), sensealg=sensealg, **options
    )


def parameters():
    return torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=DOUBLE, requires_grad=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- over all steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", GLOBAL)
def test_formula(name, reduction, power, weigh):
    # backward in time, so that sizes are negative
    sol = solved(tspan=(2.0, 0.0))
    values = getattr(sol.steps, name).numpy() ** power
    if weigh:
        values = values * abs(sol.steps.h.numpy())
    expected = getattr(values, reduction)()
    got = GLOBAL[name](sol, reduction, power, weigh)
    assert got.shape == ()
    assert float(got) == pytest.approx(expected, rel=1e-14)


def test_defaults_are_the_formulas_of_the_paper():
    sol = solved()
    steps = sol.steps
    assert float(error_estimate(sol)) == pytest.approx(float((steps.error * steps.h).sum()))
    assert float(stiffness_estimate(sol)) == pytest.approx(float(steps.stiffness.sum()))


@pytest.mark.parametrize("name", GLOBAL)
def test_gradient_is_that_of_the_estimates(name):
    p = parameters()
    sol = solved(DiscreteAdjoint(), p)
    (got,) = torch.autograd.grad(GLOBAL[name](sol, "max", 2, True), p, retain_graph=True)
    values = getattr(sol.steps, name) ** 2 * sol.steps.h
    (expected,) = torch.autograd.grad(values[values.argmax()], p)
    torch.testing.assert_close(got, expected)
    assert expected.any()


@pytest.mark.parametrize("sensealg", [BacksolveAdjoint(), InterpolatingAdjoint()], ids=repr)
@pytest.mark.parametrize("name", GLOBAL)
def test_continuous_adjoints_refuse(name, sensealg):
    loss = GLOBAL[name](solved(sensealg, parameters()))
    with pytest.raises(RuntimeError, match="local_error_estimate"):
        loss.backward()


@pytest.mark.parametrize("name", GLOBAL)
def test_wrong_arguments(name):
    sol = solved()
    with pytest.raises(ValueError, match="median"):
        GLOBAL[name](sol, reduction="median")
    with pytest.raises(ValueError, match="power"):
        GLOBAL[name](sol, power=3)
    with pytest.raises(ValueError, match="power"):
        LOCAL[name](sol, power=3)
    with pytest.raises(ValueError, match="random"):
        LOCAL[name](sol, sampling="random")


def test_solution_without_steps():
    sol = solved(tspan=(1.0, 1.0))
    assert float(error_estimate(sol)) == 0
    assert float(stiffness_estimate(sol)) == 0


@each
def test_single_precision_stays_single(sensealg):
    p = torch.tensor(2.0, requires_grad=True)
    prob = ODEProblem(lambda t, u, p: -p * u, torch.ones(2), (0.0, 1.0), p)
    sol = solve(prob, Tsit5(), sensealg=sensealg, dense=True)
    assert local_error_estimate(sol).dtype == torch.float32
    assert error_estimate(sol).dtype == torch.float32


def test_regularized_training_lowers_the_stiffness():
    rate = torch.tensor(20.0, dtype=DOUBLE, requires_grad=True)
    prob = ODEProblem(lambda t, u, p: -p * (u - 1), torch.zeros(1, dtype=DOUBLE), (0.0, 1.0), rate)
    optimizer = torch.optim.Adam([rate], 0.5)
    nf = []
    for _ in range(15):
        optimizer.zero_grad()
        sol = solve(prob, Tsit5())
        stiffness_estimate(sol, "mean").backward()
        optimizer.step()
        nf.append(sol.stats.nf)
    assert nf[-1] < nf[0]


# -- one step from a random time ----------------------------------------------------------------


def frozen(sol, t, u, h):
    """Scaled error and stiffness of Tsit5's step, as a function of ``p``."""
    s = Tsit5().tableau.stages
    a, b = torch.from_numpy(s.a), torch.from_numpy(s.b_error)

    def estimates(p):
        def f(u):
            x, y = u
            return torch.stack([p[0] * x - p[1] * x * y, -p[2] * y + p[3] * x * y])

        k, g = [], []
        for i in range(s.n):
            g.append(u + h * sum((a[i, j] * k[j] for j in range(i)), torch.zeros_like(u)))
            k.append(f(g[-1]))
        scale = 1e-4 + 1e-4 * torch.maximum(u.abs(), g[-1].abs())
        error = (h * b @ torch.stack(k) / scale).square().mean().sqrt()
        stiffness = (k[-1] - k[-2]).norm() / (g[-1] - g[-2]).norm()
        return {"error": error, "stiffness": stiffness}

    return estimates


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
@each
def test_local_gradient_with_the_step_frozen(sensealg, sampling, name):
    p = parameters()
    sol = solved(sensealg, p)
    steps = sol.steps.t.detach()
    r = float(torch.rand((), generator=seeded(), dtype=DOUBLE))
    t = float(steps[int(r * len(steps))]) if sampling == "biased" else 3.0 * r
    got = LOCAL[name](sol, sampling, weight_by_step=False, generator=seeded())
    # the size of the step, from the same estimate times the step
    weighted = LOCAL[name](sol, sampling, weight_by_step=True, generator=seeded())
    h = float((weighted / got).detach())
    estimates = frozen(sol, t, sol(t).detach(), h)
    assert float(got.detach()) == pytest.approx(float(estimates(p.detach())[name]), rel=1e-6)
    got.backward()
    columns = [
        (estimates(p.detach() + d)[name] - estimates(p.detach() - d)[name]) / 2e-5
        for d in 1e-5 * torch.eye(4, dtype=DOUBLE)
    ]
    torch.testing.assert_close(p.grad, torch.stack(columns), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_local_estimate_is_reproducible(sampling):
    sol = solved()
    values = [float(local_error_estimate(sol, sampling, generator=seeded(s))) for s in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    torch.manual_seed(3)
    first = local_error_estimate(sol, sampling)
    torch.manual_seed(3)
    assert torch.equal(first, local_error_estimate(sol, sampling))


@each
def test_local_estimate_beside_the_loss(sensealg):
    # the two parts of the loss share the parameters: their gradients add up
    def gradient(state, local):
        p = parameters()
        sol = solved(sensealg, p, saveat=[1.0, 3.0])
        loss = state * (sol.u**2).sum() + local * local_error_estimate(sol, generator=seeded())
        loss.backward()
        return p.grad

    torch.testing.assert_close(gradient(1, 1), gradient(1, 0) + gradient(0, 1))
    assert gradient(0, 1).any()


@pytest.mark.parametrize("tspan", [(0.0, 3.0), (3.0, 0.0)], ids=["forward", "backward"])
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_local_step_stays_in_the_span(sampling, tspan):
    # f is not finite outside of it
    def f(t, u):
        return -u * torch.sqrt(t * (3 - t) + 1e-12)

    sol = solve(ODEProblem(f, torch.ones(1, dtype=DOUBLE), tspan), Tsit5(), dense=True)
    for seed in range(20):
        value = local_error_estimate(sol, sampling, generator=seeded(seed))
        assert math.isfinite(float(value))
        assert float(value) >= 0


def test_local_estimate_without_dense_output():
    sol = solved(saveat=[1.0], dense=False)
    with pytest.raises(ValueError, match="dense=True"):
        local_error_estimate(sol)
    assert float(local_error_estimate(sol, at=(1.0, sol.u[0]))) > 0


@each
def test_local_estimate_at_a_saved_state_goes_through_it(sensealg):
    u0 = torch.tensor([1.0, 1.0], dtype=DOUBLE, requires_grad=True)
    prob = library.lotka_volterra(tspan=(0.0, 3.0)).remake(u0=u0)
    sol = solve(prob, Tsit5(), sensealg=sensealg, saveat=[1.0])
    local_stiffness_estimate(sol, at=(sol.t[0], sol.u[0])).backward()
    assert u0.grad.any()


def test_local_estimate_at_the_end_of_the_span():
    sol = solved(saveat=[3.0])
    try:
        value = local_error_estimate(sol, at=(3.0, sol.u[0]))
    except ValueError:  # there is no step to take
        return
    assert math.isfinite(float(value))


@each
def test_local_estimates_of_computed_parameters(sensealg):
    a = torch.tensor(0.75, dtype=DOUBLE, requires_grad=True)
    sol = solved(sensealg, torch.stack([2 * a, a / 0.75, 4 * a, a / 0.75]))
    local = local_error_estimate(sol, generator=seeded())
    (sol.u.sum() + local).backward()
    assert a.grad is not None
    assert float(a.grad) != 0


# -- annealing ----------------------------------------------------------------------------------


def test_annealing():
    coefficient = ExponentialAnnealing(100.0, 10.0, 75)
    assert coefficient(0) == 100
    assert coefficient(75) == coefficient(1000) == 10
    assert coefficient(-1) == 100
    # equal ratios from epoch to epoch
    ratios = [coefficient(i + 1) / coefficient(i) for i in range(75)]
    assert ratios == pytest.approx([0.1 ** (1 / 75)] * 75)


@pytest.mark.parametrize("arguments", [(0.0, 1.0, 5), (1.0, -1.0, 5), (1.0, 1.0, 0)])
def test_annealing_needs_positive_numbers(arguments):
    with pytest.raises(ValueError, match="positive"):
        ExponentialAnnealing(*arguments)
