"""Continuous adjoints of SDEs: closed forms, the discrete adjoint, Ito against Stratonovich."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from gradients import assert_near, leaf
from sdes import heisenberg, slope
from torch import Tensor, nn

import diffsolve
from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    SRIW1,
    BacksolveAdjoint,
    DiscreteAdjoint,
    EulerHeun,
    InterpolatingAdjoint,
    LambaEM,
    LambaEulerHeun,
    RKMil,
    RKMilCommute,
    SDEProblem,
)
from diffsolve.solvers.stochastic.noise import VirtualBrownianTree

solve = functools.partial(diffsolve.solve, engine="torch")
DOUBLE = torch.float64
CONTINUOUS = [BacksolveAdjoint(), InterpolatingAdjoint()]
each = pytest.mark.parametrize("sensealg", CONTINUOUS, ids=lambda x: type(x).__name__)
STRATONOVICH = "stratonovich"


# -- the linear equation, in closed form ----------------------------------------------------------


def drift(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[0] * u


def as_shape_of_u(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[1] * u


def as_column(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return (p[1] * u)[..., None]


def two_motions(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return torch.stack([p[1] * u, 0.5 * u], -1)


LINEAR = {
    "diagonal": (as_shape_of_u, "diagonal"),
    "scalar": (as_shape_of_u, "scalar"),
    "scalar column": (as_column, "scalar"),
    "general": (two_motions, "general"),
}
METHODS: dict[tuple[str, bool], Any] = {
    ("ito", True): RKMil(),
    ("ito", False): RKMilCommute(),
    (STRATONOVICH, True): EulerHeun(),
    (STRATONOVICH, False): EulerHeun(),
}


def linear(kind: str, interpretation: str, d: int = 2, rows: int = 64) -> SDEProblem:
    """Each path with parameters of its own: the gradient then tells of all paths one by one."""
    g, noise = LINEAR[kind]
    u0 = torch.linspace(0.5, 1.5, rows * d, dtype=DOUBLE).reshape(rows, d).requires_grad_()
    p = torch.tensor([0.4, 0.5], dtype=DOUBLE).repeat_interleave(rows).reshape(2, rows, 1)
    p.requires_grad_()
    return SDEProblem(drift, g, u0, (0.0, 1.0), p, noise=noise, interpretation=interpretation)


def closed_form(prob: SDEProblem, W: Tensor, times: Tensor) -> Tensor:
    """States ``(T, rows, d)`` where the path is ``W`` ``(T, rows, m)``."""
    a, b = prob.p
    noise = b * W
    if prob.noise == "general":
        b = torch.cat([b, torch.full_like(b, 0.5)], -1)
        noise = (b * W).sum(-1, keepdim=True)
    rate = a - (b * b).sum(-1, keepdim=True) / 2 if prob.interpretation == "ito" else a
    return prob.u0 * torch.exp(rate * times[:, None, None] + noise)


def gradients(prob: SDEProblem, u: Tensor) -> Tensor:
    """Of half the sum of squares, by the initial state and the parameters, in one vector."""
    grads = torch.autograd.grad((u**2).sum() / 2, [prob.u0, prob.p])
    return torch.cat([g.reshape(-1) for g in grads])


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def error_of_linear(prob: SDEProblem, alg: Any, sensealg: Any, **options: Any) -> float:
    """Distance of the gradient from that of the closed form on the same path."""
    sol = solve(prob, alg, sensealg=sensealg, saveat=[0.5, 1.0], **options)
    got = gradients(prob, sol.u)
    W = sol.noise.at([0.5, 1.0])
    return distance(got, gradients(prob, closed_form(prob, W, sol.t)))


@each
@pytest.mark.parametrize("interpretation", ["ito", STRATONOVICH])
@pytest.mark.parametrize("kind", LINEAR)
def test_order_of_the_gradient_of_linear_equations(kind, interpretation, sensealg):
    prob = linear(kind, interpretation)
    alg = METHODS[interpretation, kind != "general"]
    steps = [12, 36, 108]
    path = solve(prob, alg, dt=1 / steps[-1], adaptive=False, seed=3).noise
    errors = [
        error_of_linear(prob, alg, sensealg, dt=1 / n, adaptive=False, noise=path) for n in steps
    ]
    assert errors[-1] < 1.2e-2
    assert slope(steps, errors) > 0.8  # one, and less where steps are long


@each
def test_published_form_of_the_gradient(sensealg):
    # of SciMLSensitivity's tests: dL/dp1 = sum of t u0^2 e^(2 p1 t + 2 p2 W), dL/dp2 the same of W
    prob = linear("diagonal", STRATONOVICH, d=1, rows=4).remake(p=leaf([0.4, 0.5]))
    times = torch.linspace(0.1, 1.0, 10, dtype=DOUBLE)
    sol = solve(prob, EulerHeun(), sensealg=sensealg, dt=1 / 400, saveat=times, seed=1)
    (sol.u**2).sum().div(2).backward()
    W, t = sol.noise.at(times.tolist())[..., 0], times[:, None]
    with torch.no_grad():
        squares = prob.u0[:, 0] ** 2 * torch.exp(2 * prob.p[0] * t + 2 * prob.p[1] * W)
    by_p = torch.stack([(t * squares).sum(), (W * squares).sum()])
    assert_near(prob.p.grad, by_p, 2e-3)
    assert_near(prob.u0.grad[:, 0], (squares / prob.u0.detach()[:, 0]).sum(0), 2e-3)


ADAPTIVE = [
    ("ito", SOSRI()),
    ("ito", RKMil()),
    (STRATONOVICH, LambaEulerHeun()),
    (STRATONOVICH, RKMil(STRATONOVICH)),
]


@each
@pytest.mark.parametrize("interpretation, alg", ADAPTIVE, ids=lambda x: repr(x))
def test_adaptive_steps_follow_the_tolerance(interpretation, alg, sensealg):
    prob = linear("diagonal", interpretation, rows=8)
    tolerances = [1e-1, 2e-3]
    coarse, fine = (
        error_of_linear(prob, alg, sensealg, rtol=x, atol=x, seed=4) for x in tolerances
    )
    assert coarse < 5 * tolerances[0]
    assert fine < 5 * tolerances[1]
    assert fine < coarse / 5


# -- other equations, against the discrete adjoint ------------------------------------------------

MIX = torch.tensor([[0.3, -0.5, 0.2], [0.6, 0.1, -0.4], [-0.2, 0.5, 0.4]], dtype=DOUBLE)


def mixed_drift(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return torch.sin(u @ MIX) - p[0] * u


NOISE = {
    "elementwise": ("diagonal", lambda t, u, p: p[1] * torch.cos(u) + p[2]),
    # component i of the noise depends on all components of the state
    "coupled": ("diagonal", lambda t, u, p: p[1] * torch.cos(u @ MIX) + p[2] * u.flip(-1)),
    "scalar": ("scalar", lambda t, u, p: p[1] * torch.cos(u @ MIX) + p[2]),
    "additive": ("additive", lambda t, u, p: (p[1] * torch.cos(t) + p[2]) * torch.ones_like(u)),
    "additive matrix": (
        "additive",
        lambda t, u, p: torch.stack([p[1] * torch.cos(t) * (1 + 0 * u), p[2] * (1 + 0 * u)], -1),
    ),
    "general": (
        "general",
        lambda t, u, p: torch.stack([p[1] * torch.cos(u @ MIX), p[2] * torch.sin(u.flip(-1))], -1),
    ),
}
ORDERS: dict[tuple[str, str], tuple[Any, float]] = {
    ("elementwise", "ito"): (RKMil(), 0.9),
    ("coupled", "ito"): (EM(), 0.45),
    ("scalar", "ito"): (RKMil(), 0.9),
    ("additive", "ito"): (EM(), 0.9),
    ("additive matrix", "ito"): (EM(), 0.9),
    ("general", "ito"): (EM(), 0.45),
    ("coupled", STRATONOVICH): (EulerHeun(), 0.4),
    ("general", STRATONOVICH): (EulerHeun(), 0.4),
}


def mixed(kind: str, interpretation: str, rows: int = 64) -> SDEProblem:
    noise, g = NOISE[kind]
    u0 = torch.linspace(0.5, 1.5, rows * 3, dtype=DOUBLE).reshape(rows, 3).requires_grad_()
    p = torch.tensor([0.4, 0.5, 0.3], dtype=DOUBLE).repeat_interleave(rows).reshape(3, rows, 1)
    p.requires_grad_()
    return SDEProblem(mixed_drift, g, u0, (0.0, 1.0), p, noise=noise, interpretation=interpretation)


@each
@pytest.mark.parametrize("kind, interpretation", ORDERS)
def test_difference_from_the_discrete_adjoint_vanishes(kind, interpretation, sensealg):
    prob = mixed(kind, interpretation)
    alg, order = ORDERS[kind, interpretation]
    steps = [12, 36, 108]
    path = solve(prob, alg, dt=1 / steps[-1], adaptive=False, seed=5).noise
    differences = []
    for n in steps:
        options = {"dt": 1 / n, "adaptive": False, "saveat": [0.5, 1.0], "noise": path}
        ours, exact = (
            gradients(prob, solve(prob, alg, sensealg=x, **options).u)
            for x in (sensealg, DiscreteAdjoint())
        )
        differences.append(distance(ours, exact))
    assert differences[-1] < (4e-3 if order > 0.5 else 3e-2)
    assert slope(steps, differences) > order


# -- the drift correction -------------------------------------------------------------------------


def corrected(prob: SDEProblem) -> SDEProblem:
    """The Stratonovich problem of an Ito one, ``f - 1/2 g_j' g_j``, by Jacobians of each path."""
    f, g = prob.f, prob.g

    def columns(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        G = g(t, u[None], p)[0]
        if prob.noise == "diagonal":
            return torch.diag(G)
        return G[:, None] if G.shape == u.shape else G

    def correction(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        jacobian = torch.func.jacrev(columns, argnums=1)(t, u, p)  # (d, m, d)
        return torch.einsum("ijk,kj->i", jacobian, columns(t, u, p)) / 2

    def drift(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        rows = [correction(t, x, p[:, i : i + 1]) for i, x in enumerate(u)]
        return f(t, u, p) - torch.stack(rows)

    return prob.remake(f=drift, interpretation=STRATONOVICH)


class StepsOf(EulerHeun):
    """Euler-Maruyama steps of another equation, in the guise of a Stratonovich method."""

    def __init__(self, prob: SDEProblem):
        self.field = solve(prob, EM(), dt=1.0, seed=1)._context.field

    def step(self, field: Any, t: Any, h: Any, state: Any) -> Any:
        self.field.path = field.path
        return EM().step(self.field, t, h, state)


@each
@pytest.mark.parametrize("kind", ["elementwise", "coupled", "scalar", "general"])
def test_ito_correction_is_that_of_jacobians(kind, sensealg):
    ito = mixed(kind, "ito", rows=3)
    other = corrected(ito)
    got, expected = (
        gradients(prob, solve(prob, alg, sensealg=sensealg, dt=0.1, seed=1).u)
        for prob, alg in ((ito, EM()), (other, StepsOf(ito)))
    )
    assert_near(got, expected, 1e-10)


# -- the path, saves, stops -----------------------------------------------------------------------


@each
def test_the_noise_of_the_solution_stays_as_it_is(sensealg):
    prob = linear("diagonal", STRATONOVICH, rows=2)
    sol = solve(prob, LambaEulerHeun(), sensealg=sensealg, saveat=[0.3, 1.0], rtol=1e-2, seed=1)
    before = list(sol.noise.times), list(sol.noise.pieces), sol.noise.serial
    first, again = (
        torch.autograd.grad((sol.u**2).sum(), prob.p, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, again)
    assert sol.stats.adjoint.naccept != len(sol.steps)  # at other times than before
    assert before == (sol.noise.times, sol.noise.pieces, sol.noise.serial)


@pytest.mark.parametrize("noise", ["elementwise", "general"])
@pytest.mark.parametrize("options", [{"dt": 0.03}, {"rtol": 5e-2, "atol": 5e-2}], ids=repr)
def test_checkpoints_change_nothing(noise, options):
    prob = mixed(noise, "ito", rows=2)
    alg = EM() if "dt" in options else LambaEM()
    plain, few = (
        gradients(prob, solve(prob, alg, sensealg=x, saveat=[0.4, 1.0], seed=1, **options).u)
        for x in (InterpolatingAdjoint(), InterpolatingAdjoint(checkpoints=3))
    )
    assert torch.equal(plain, few)


@each
@pytest.mark.parametrize("alg", [EulerHeun(), LambaEulerHeun()], ids=repr)
def test_saved_times_inside_of_steps_and_backward_in_time(alg, sensealg):
    prob = linear("diagonal", STRATONOVICH, rows=8).remake(tspan=(1.0, -0.5))
    times = [0.77, 0.331, -0.2]
    options = {"dt": 1 / 64} if not alg.adaptive else {"rtol": 5e-3, "atol": 5e-3}
    sol = solve(prob, alg, sensealg=sensealg, saveat=times, seed=2, **options)
    got = gradients(prob, sol.u)
    W = sol.noise.at(times, since=1.0)
    expected = gradients(prob, closed_form(prob, W, sol.t - 1.0))
    assert distance(got, expected) < 2e-2


@each
def test_a_loss_of_every_step(sensealg):
    prob = linear("diagonal", STRATONOVICH, rows=8)
    sol = solve(prob, EulerHeun(), sensealg=sensealg, dt=1 / 64, seed=2)
    assert len(sol.t) == 65
    got = gradients(prob, sol.u)
    W = sol.noise.at(sol.t.tolist())
    assert distance(got, gradients(prob, closed_form(prob, W, sol.t))) < 1e-2


@each
def test_a_drift_and_a_noise_that_jump(sensealg):
    # the gradient by u0 has no noise, and that by the second rate no drift
    a = leaf([0.4, 4.0])

    def rate(t):
        return torch.where(t < 0.3, a[0], a[1])

    u0 = torch.ones(4, 1, dtype=DOUBLE, requires_grad=True)
    prob = SDEProblem(
        lambda t, u: rate(t) * u,
        lambda t, u: rate(t).detach() * torch.ones_like(u),
        u0,
        (0.0, 1.0),
        noise="additive",
    )
    sol = solve(prob, EM(), sensealg=sensealg, dt=1 / 128, saveat=[1.0], tstops=[0.3], seed=2)
    (by_u0,) = torch.autograd.grad(sol.u.sum(), u0)
    exact = torch.exp(0.3 * a[0] + 0.7 * a[1]).detach().expand(4, 1)
    assert distance(by_u0, exact) < 1e-3  # of order 2; 1e-2 if one step saw the other side


@each
@pytest.mark.parametrize("tree", [False, True], ids=["path", "tree"])
def test_a_path_that_is_given(tree, sensealg):
    prob = linear("diagonal", "ito", rows=8)
    if tree:
        noise: Any = VirtualBrownianTree(6, 0.0, 1.0, rows=8, m=2)
    else:
        noise = solve(prob, SRIW1(), rtol=1e-2, atol=1e-2, seed=6).noise
    again = solve(prob, SOSRI(), sensealg=sensealg, saveat=[1.0], noise=noise, rtol=5e-3)
    W = noise.at([1.0])
    expected = gradients(prob, closed_form(prob, W, torch.ones(1, dtype=DOUBLE)))
    assert distance(gradients(prob, again.u), expected) < 1e-2


def test_levy_areas_are_seen_by_adaptive_reverse_steps():
    # of u3, the area of the first two, nothing shows in the change of the noise along itself
    u0 = torch.zeros(8, 3, dtype=DOUBLE, requires_grad=True)
    prob = heisenberg(8, interpretation=STRATONOVICH).remake(u0=u0)
    sol = solve(
        prob,
        LambaEulerHeun(),
        sensealg=BacksolveAdjoint(),
        saveat=[1.0],
        rtol=5e-2,
        atol=5e-2,
        seed=1,
    )
    (sol.u[-1, :, 2] ** 2).sum().backward()
    assert sol.stats.adjoint.naccept > 7


@pytest.mark.parametrize("alg", [SOSRA(), SOSRI(), RKMil()], ids=repr)
def test_memory_of_the_interpolating_adjoint_is_states_only(alg):
    prob = mixed("additive" if isinstance(alg, SOSRA) else "elementwise", "ito", rows=4)
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sol = solve(prob, alg, sensealg=InterpolatingAdjoint(), dt=0.02, adaptive=False, seed=1)
        del sizes[:]
        solve(prob, alg, sensealg=BacksolveAdjoint(), dt=0.02, adaptive=False, seed=1)
    assert len(sol.steps) == 50
    assert sum(sizes) < 10 * 12 + sol.u.numel() + prob.p.numel() + prob.u0.numel()


@each
def test_statistics_of_the_reverse_solve(sensealg):
    prob = linear("diagonal", "ito", rows=2)
    sol = solve(prob, EM(), sensealg=sensealg, dt=0.1, saveat=[1.0], seed=1)
    assert sol.stats.adjoint is None
    sol.u.sum().backward()
    reverse = sol.stats.adjoint
    assert (reverse.alg, reverse.naccept, reverse.nreject) == ("EulerHeun", 10, 0)
    assert (reverse.nf, reverse.ng) == (20, 20)
    assert reverse.wall_s > 0


# -- networks -------------------------------------------------------------------------------------


@each
def test_networks_with_shared_parameters(sensealg):
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(3, 8), nn.Tanh()).double()
    f, g = (nn.Linear(8, 3).double() for _ in range(2))
    u0 = torch.randn(16, 3, dtype=DOUBLE)
    prob = SDEProblem(lambda t, u: f(body(u)), lambda t, u: 0.4 * g(body(u)), u0, (0.0, 1.0))
    tensors = [*body.parameters(), *f.parameters(), *g.parameters()]
    found = []
    for x in (sensealg, DiscreteAdjoint()):
        sol = solve(prob, EM(), sensealg=x, dt=1 / 100, saveat=[0.5, 1.0], seed=1)
        found.append(torch.autograd.grad((sol.u**2).sum(), tensors))
    for got, expected in zip(*found, strict=True):
        assert distance(got, expected) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(LINEAR))
@each
def test_ito_gradients_backward_in_time(kind, sensealg):
    g, noise = LINEAR[kind]
    p, u0 = leaf([0.2, 0.8]), leaf([[1.0]])
    alg = RKMilCommute()

    def gradient(method):
        prob = SDEProblem(drift, g, u0, (1.0, 0.0), p, noise=noise)
        options = {"dt": 0.0025, "adaptive": False, "seed": 4, "saveat": [0.0]}
        sol = solve(prob, alg, sensealg=method, **options)
        return torch.cat([x.reshape(-1) for x in torch.autograd.grad(sol.u.sum(), [u0, p])])

    exact = gradient(DiscreteAdjoint())
    assert (gradient(sensealg) - exact).abs().max() <= 2e-2 * exact.abs().max()
