"""Gradients of explicit steps at the limit of stability, against matrix exponentials."""

import math

import pytest
import torch

import diffsolve
from diffsolve import DiscreteAdjoint, ODEProblem, Tsit5, solve
from diffsolve.solvers.explicit_rk.stability import stability_polynomial, stable_sizes
from diffsolve.solvers.stable_steps import GROWTHS, eigenvalues

DOUBLE = torch.float64
METHODS = ("Heun", "BS3", "Tsit5", "DP5", "DP8", "Vern7", "AutoTsit5")
ENGINES = ("torch", "native")


def leaf(values):
    return torch.tensor(values, dtype=DOUBLE, requires_grad=True)


def hidden_decay(t, u, p):
    """The second component is fast, and zero."""
    return torch.stack([-u[0], -p * u[1]])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", METHODS)
def test_a_fast_component_that_is_zero(name, engine):
    u0, p = leaf([1.0, 0.0]), leaf(300.0)
    prob = ODEProblem(hidden_decay, u0, (0.0, 0.5), p)
    sol = solve(prob, getattr(diffsolve, name)(), saveat=[0.5], engine=engine)
    by_u0, by_p = torch.autograd.grad(sol.u[-1].sum(), (u0, p))
    assert abs(by_u0[0].item() - math.exp(-0.5)) < 1e-3
    assert abs(by_u0[1].item()) < 1e-3
    assert abs(by_p.item()) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_solve_that_is_not_differentiated_takes_the_steps_that_it_took(engine):
    prob = ODEProblem(hidden_decay, torch.tensor([1.0, 0.0], dtype=DOUBLE), (0.0, 0.5), leaf(300.0))
    with torch.no_grad():
        sol = solve(prob, Tsit5(), saveat=[0.5], engine=engine)
    assert sol.stats.naccept < 10


def diffusion(t, u, k):
    up = torch.nn.functional.pad(u, (1, 1))
    flux = k * (up[1:] - up[:-1])
    return 1000.0 * (flux[1:] - flux[:-1])


@pytest.mark.parametrize(
    ("engine", "sensealg"),
    [
        ("native", DiscreteAdjoint()),
        ("native", DiscreteAdjoint(checkpoints=4)),
        ("torch", DiscreteAdjoint()),
        ("torch", DiscreteAdjoint(tape=True)),
    ],
)
def test_diffusion_by_its_conductivity(engine, sensealg):
    n = 24
    x = torch.linspace(0, 1, n, dtype=DOUBLE)
    u0 = torch.exp(-100 * (x - 0.5) ** 2)
    k = (1 + 0.5 * torch.sin(5 * torch.linspace(0, 1, n + 1, dtype=DOUBLE))).requires_grad_()
    inner = torch.diag(k[1:-1], 1) + torch.diag(k[1:-1], -1)
    flow = torch.linalg.matrix_exp(20.0 * (inner - torch.diag(k[1:] + k[:-1])))
    expected = torch.autograd.grad((flow @ u0).square().sum(), k)[0]
    prob = ODEProblem(diffusion, u0, (0.0, 0.02), k)
    options = {"rtol": 1e-3, "atol": 1e-6, "saveat": [0.02], "engine": engine}
    sol = solve(prob, Tsit5(), sensealg=sensealg, **options)
    found = torch.autograd.grad(sol.u[-1].square().sum(), k)[0]
    assert (found - expected).norm() < 1e-4 * expected.norm()
    with torch.no_grad():
        free = solve(prob, Tsit5(), **options)
    assert sol.stats.nf < 1.5 * free.stats.nf


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["Tsit5", "Vern7", "Heun"])
def test_steps_backward_in_time(name, engine):
    """The mirror of a solve has its steps and its gradient."""
    found = []
    x = torch.linspace(0, 1, 24, dtype=DOUBLE)
    for sign, span in ((1.0, (0.0, 0.02)), (-1.0, (0.02, 0.0))):
        u0 = torch.exp(-100 * (x - 0.5) ** 2).requires_grad_()
        k = torch.ones(25, dtype=DOUBLE, requires_grad=True)

        def f(t, u, k, sign=sign):
            return sign * diffusion(t, u, k)

        alg = getattr(diffsolve, name)()
        sol = solve(ODEProblem(f, u0, span, k), alg, saveat=[span[1]], engine=engine)
        grads = torch.autograd.grad(sol.u[-1].square().sum(), (u0, k))
        found.append((sol.stats.naccept, *grads))
    (steps, *ahead), (mirrored, *back) = found
    assert abs(steps - mirrored) <= 1
    for got, expected in zip(back, ahead, strict=True):
        assert (got - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    ("name", "end", "cost"),
    [
        ("BS3", 5.0, 2),
        ("Tsit5", 5.0, 2),
        ("Tsit5", 50.0, 2.5),
        ("Vern7", 5.0, 1.5),
        ("DP8", 5.0, 1.5),
    ],
)
def test_waves_keep_their_size_in_gradients(name, end, cost):
    """Advection turns every mode and damps none: what a step adds to one stays to the end."""
    n = 50
    x = torch.arange(n, dtype=DOUBLE) / n

    def advection(t, u, speed):
        return speed * (u.roll(1) - u.roll(-1)) * (n / 2)

    u0 = torch.exp(-50 * (x - 0.5) ** 2).requires_grad_()
    prob = ODEProblem(advection, u0, (0.0, float(end)), leaf(1.0))
    options = {"saveat": [float(end)], "rtol": 1e-3, "atol": 1e-5, "engine": "native"}
    sol = solve(prob, getattr(diffsolve, name)(), **options)
    weights = torch.where(x < 0.5, 1.0, 0.0).double()  # has something of every mode
    (by_u0,) = torch.autograd.grad(weights @ sol.u[-1], u0)
    assert by_u0.norm() < 1.1 * weights.norm()  # the exact flow turns it
    with torch.no_grad():
        free = solve(prob, getattr(diffsolve, name)(), **options)
    assert sol.stats.nf < cost * free.stats.nf


@pytest.mark.parametrize("name", METHODS)
def test_a_decay_at_the_limit_costs_few_more_steps(name):
    prob = ODEProblem(lambda t, u, p: -p * u, leaf([1.0]), (0.0, 10.0), leaf(100.0))
    options = {"saveat": [10.0], "rtol": 1e-2, "atol": 1e-2, "engine": "native"}
    watched = solve(prob, getattr(diffsolve, name)(), **options)
    with torch.no_grad():
        free = solve(prob, getattr(diffsolve, name)(), **options)
    assert watched.stats.nf < 1.5 * free.stats.nf


def turning(t, u, p):
    """The last two components turn quickly and decay slowly, and are zero."""
    return torch.stack([-u[0], -5 * u[1] + p * u[2], -p * u[1] - 5 * u[2]])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fast_rotation_that_is_zero(engine):
    u0 = leaf([1.0, 0.0, 0.0])
    sol = solve(ODEProblem(turning, u0, (0.0, 1.0), leaf(200.0)), Tsit5(), engine=engine)
    (by_u0,) = torch.autograd.grad(sol.u[-1].sum(), u0)
    assert abs(by_u0[0].item() - math.exp(-1)) < 1e-3
    assert by_u0[1:].abs().max() < 2 * math.exp(-5)


def stiff_later(t, u, p):
    """The first component is a clock; the second, which is zero, is fast from half past on."""
    rate = p * torch.sigmoid(50 * (u[0] - 0.5))
    return torch.stack([torch.ones_like(u[0]), -rate * u[1]])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_component_that_becomes_fast(engine):
    u0 = leaf([0.0, 0.0])
    sol = solve(ODEProblem(stiff_later, u0, (0.0, 1.0), leaf(1000.0)), Tsit5(), engine=engine)
    (by_u0,) = torch.autograd.grad(sol.u[-1].sum(), u0)
    assert abs(by_u0[0].item() - 1) < 1e-6
    assert abs(by_u0[1].item()) < 1e-3


def lotka_volterra(t, u, p):
    x, y = u
    return torch.stack([p[0] * x - p[1] * x * y, -p[2] * y + p[3] * x * y])


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_that_accuracy_limits_stay_as_they_are(engine):
    prob = ODEProblem(
        lotka_volterra, torch.ones(2, dtype=DOUBLE), (0.0, 10.0), leaf([1.5, 1, 3, 1])
    )
    options = {"rtol": 1e-6, "atol": 1e-9, "engine": engine}
    watched = solve(prob, Tsit5(), **options)
    with torch.no_grad():
        free = solve(prob, Tsit5(), **options)
    assert torch.equal(watched.t, free.t)
    assert free.stats.nf < watched.stats.nf < 1.06 * free.stats.nf


def test_the_engines_take_the_same_steps():
    prob = ODEProblem(turning, leaf([1.0, 0.0, 0.0]), (0.0, 1.0), leaf(200.0))
    torchs, native = (solve(prob, Tsit5(), engine=engine) for engine in ENGINES)
    assert (torchs.stats.naccept, torchs.stats.nf) == (native.stats.naccept, native.stats.nf)
    assert torch.allclose(torchs.t, native.t, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "AutoTsit5"])
def test_stable_sizes_lie_within_the_region_of_stability(name):
    tableau = getattr(diffsolve, name)().tableau
    coefficients = stability_polynomial(tableau.stages)
    table = stable_sizes(tableau.stages)
    assert table[0, -1] < tableau.stability_interval
    for growth, sizes in zip(GROWTHS, table, strict=True):
        for i, size in enumerate(sizes):
            cosine = i / (len(sizes) - 1)
            for part in (0.5, 1.0, 1.09):  # also where an eigenvalue is found too small
                z = part * size * complex(-cosine, math.sqrt(1 - cosine**2))
                r = abs(sum(c * z**k for k, c in enumerate(coefficients)))
                decay = (1 - cosine / 2) * z.real
                assert r <= max(0.9, math.exp(decay + 1.01 * growth * abs(z)))


def test_eigenvalues_on_a_plane():
    a = torch.tensor([[-3.0, 20.0], [-20.0, -3.0]], dtype=DOUBLE)
    w = torch.tensor([0.6, 0.8], dtype=DOUBLE)
    v = a @ w
    b = a @ (v / v.norm())
    numbers = (float(x) for x in (v @ v, w @ v, w @ b, v @ b))
    ((real, imaginary),) = eigenvalues(*numbers, 1e-16)
    assert real == pytest.approx(-3) and imaginary == pytest.approx(20)
