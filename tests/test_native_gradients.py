"""Gradients of the native engine are those of the torch engine."""

from __future__ import annotations

import pytest
import torch
from gradients import DOUBLE, MATRIX, START, assert_near, label, leaf, linear, linear_reference
from native_runs import (
    EPS,
    SPANS,
    STEPS,
    each_method,
    find_program,
    fixed_options,
    named,
    off,
    piecewise,
    rounding_of,
    spread,
    switching,
    tree_problem,
)
from torch import nn

from diffsolve import (
    BS3,
    DP5,
    DP8,
    RK4,
    BacksolveAdjoint,
    BacksolveWarning,
    DiscreteAdjoint,
    Heun,
    InterpolatingAdjoint,
    ODEProblem,
    Tsit5,
    Vern7,
    solve,
)
from diffsolve.problems import library

# Steps of fixed size, also in the reverse solves: both engines then do the same arithmetic.
DISCRETE = [DiscreteAdjoint(), *(DiscreteAdjoint(checkpoints=n) for n in (1, 3, 1000))]
REVERSE = [
    InterpolatingAdjoint(),
    InterpolatingAdjoint(checkpoints=1),
    InterpolatingAdjoint(checkpoints=7),
    BacksolveAdjoint(),
    BacksolveAdjoint(checkpointing=False),
]


def sense_label(x):
    return f"{label(x)}{'' if getattr(x, 'checkpointing', True) else '-free'}"


def each_sensealg(values):
    return pytest.mark.parametrize("sensealg", values, ids=sense_label)


def weighed(x):
    """A sum with weights of both signs, all different."""
    return (x * torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)).sum()


def with_leaves(name):
    prob = named(name)
    u0 = prob.u0.detach().clone().requires_grad_()
    if prob.p is None:
        return prob.remake(u0=u0), [u0]
    p = torch.as_tensor(prob.p).detach().clone().requires_grad_()
    return prob.remake(u0=u0, p=p), [u0, p]


def gradients(prob, leaves, alg, sensealg, loss, **options):
    """Solutions and gradients of both engines."""
    found = []
    for engine in ("torch", "native"):
        sol = solve(prob, alg, sensealg=sensealg, engine=engine, **options)
        assert sol.stats.engine == engine
        value = loss(sol)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        pairs = zip(grads, leaves, strict=True)
        found.append((sol, [torch.zeros_like(x) if g is None else g for g, x in pairs]))
    return found


def of_states(sol):
    return weighed(sol.u)


def check_gradients(prob, leaves, alg, sensealg, loss=of_states, bound=1e-12, **options):
    (reference, expected), (sol, got) = gradients(prob, leaves, alg, sensealg, loss, **options)
    assert any(bool(g.any()) for g in expected)
    for a, b in zip(got, expected, strict=True):
        assert off(a, b) <= bound
    return reference, sol


@each_sensealg(DISCRETE)
@each_method
def test_discrete_adjoint_of_every_method(alg, sensealg):
    prob, leaves = with_leaves("lotka_volterra_time")
    saveat = [0.0, 0.1, 0.5, 0.77, 0.78, 2.0, 3.0]
    terms = EPS * float(abs(alg.tableau.stages.interpolant.polynomial).sum())
    bound = 1e-12 + terms + 10 * rounding_of(alg, alg.tableau.stages.a[-1])
    options = fixed_options(prob, alg)
    for saves in (saveat, None):
        reference, sol = check_gradients(
            prob, leaves, alg, sensealg, saveat=saves, bound=bound, **options
        )
        assert sol.stats.adjoint.naccept == reference.stats.adjoint.naccept == STEPS
        assert sol.stats.adjoint.engine == "native"


@pytest.mark.parametrize("name", SPANS)
def test_gradients_of_every_problem(name):
    prob, leaves = with_leaves(name)
    options = {"saveat": [prob.tspan[1] * x for x in (0.13, 0.5, 1.0)], "adaptive": False}
    for sensealg in (DISCRETE[0], DISCRETE[2], REVERSE[0], REVERSE[3]):
        _, sol = check_gradients(prob, leaves, DP5(), sensealg, dt=prob.tspan[1] / STEPS, **options)
        assert sol.stats.adjoint.nf > 0


@each_sensealg(REVERSE)
@pytest.mark.parametrize("alg", [RK4(), BS3(), Vern7(), DP8()], ids=label)
@pytest.mark.parametrize("span", [(0.0, 2.0), (2.0, 0.0)], ids=["forward", "backward"])
def test_continuous_adjoints(alg, sensealg, span):
    prob, leaves = with_leaves("lotka_volterra_time")
    prob = prob.remake(tspan=span)
    options = {"adaptive": False, "dt": 0.1}
    # the path is read from the interpolant
    terms = EPS * float(abs(alg.tableau.stages.interpolant.polynomial).sum())
    # and backward in time rounding grows in a state that is solved for again
    bound = 1e-12 + terms * sensealg.along_path + 1e-11 * (not sensealg.along_path)
    saveat = sorted([0.0, 0.31, 0.32, 1.0, 1.7], reverse=span[1] == 0)
    for saves in (saveat, None, [1.1]):
        reference, sol = check_gradients(
            prob, leaves, alg, sensealg, saveat=saves, bound=bound, **options
        )
        ours, theirs = sol.stats.adjoint, reference.stats.adjoint
        assert (ours.naccept, ours.nreject) == (theirs.naccept, theirs.nreject)
        assert ours.alg == theirs.alg


@each_sensealg([*DISCRETE[:3], *REVERSE])
@pytest.mark.parametrize("alg", [BS3(), DP5(), Tsit5()], ids=label)
def test_adaptive_gradients(alg, sensealg):
    prob, leaves = with_leaves("lotka_volterra")
    tol = 1e-5
    for saveat in ([0.3, 1.7, 2.6], None):
        options = {"saveat": saveat, "rtol": tol, "atol": tol}
        (reference, expected), (sol, got) = gradients(
            prob, leaves, alg, sensealg, lambda sol: weighed(sol.u), **options
        )
        apart = spread(sol, reference)
        assert apart <= 1e-6
        ours, theirs = sol.stats.adjoint, reference.stats.adjoint
        assert (ours.naccept, ours.nreject) == (theirs.naccept, theirs.nreject)
        # where every step is saved, the times of the values move with the steps
        factor = 10 if saveat is None else 30 * tol
        for a, b in zip(got, expected, strict=True):
            assert off(a, b) <= 1e-11 + factor * apart


@each_sensealg([*DISCRETE[:3], *REVERSE])
def test_against_the_matrix_exponential(sensealg):
    times = torch.tensor([0.2, 0.75, 1.5], dtype=DOUBLE)
    u0, p = leaf(START), leaf(MATRIX)
    sol = solve(
        ODEProblem(linear, u0, (0.0, 1.5), p), Vern7(), sensealg=sensealg, saveat=times,
        rtol=1e-10, atol=1e-10, engine="native",
    )  # fmt: skip
    weighed(sol.u).backward()
    for x, expected in zip((u0, p), linear_reference(u0, p, times, weighed), strict=True):
        assert_near(x.grad, expected, 1e-8)


@each_sensealg([DISCRETE[0], DISCRETE[2], REVERSE[0], REVERSE[2], REVERSE[3]])
def test_gradients_at_jumps(sensealg):
    for span in ((0.0, 1.2), (1.2, 0.0)):
        u0, p = leaf([1.0, 2.0]), leaf([-1.0, 0.7])
        prob = ODEProblem(switching, u0, span, p)
        saveat = sorted([0.1, 0.5, 0.6, 1.2], reverse=span[1] < span[0])
        check_gradients(
            prob, [u0, p], Tsit5(), sensealg, tstops=[0.5, 0.8], saveat=saveat, adaptive=False,
            dt=0.05,
        )  # fmt: skip
        expected = torch.autograd.grad(weighed(piecewise(u0, p, span, saveat)), (u0, p))
        sol = solve(
            prob, Vern7(), tstops=[0.5, 0.8], saveat=saveat, rtol=1e-9, atol=1e-9,
            sensealg=sensealg, engine="native",
        )  # fmt: skip
        for a, b in zip(torch.autograd.grad(weighed(sol.u), (u0, p)), expected, strict=True):
            assert off(a, b) <= 1e-7


@each_sensealg([DISCRETE[0], DISCRETE[2], REVERSE[0], REVERSE[2], REVERSE[3]])
def test_inputs_of_all_kinds(sensealg):
    """A pytree state and p; a module's parameters, tied and unused ones; captured tensors."""
    prob, leaves = tree_problem(requires_grad=True)

    def loss(sol):
        return weighed(sol.u["x"]) + weighed(sol.u["yz"][0]) + weighed(sol.u["yz"][1])

    check_gradients(prob, leaves, Tsit5(), sensealg, loss, saveat=0.3, adaptive=False, dt=0.05)

    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    spare, scale = nn.Linear(2, 2).double(), leaf([0.5, 2.0])
    shift = torch.sin(scale)  # no leaf
    u0 = leaf([1.0, -1.0])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare, self.again = net, spare, net[0]
            self.register_buffer("weight", torch.tensor([0.3, 0.4], dtype=DOUBLE))

        def forward(self, t, u):
            return self.net(u) * self.weight + scale * torch.sin(t) - shift * u

    leaves = [u0, *net.parameters(), scale]
    prob = ODEProblem(Model(), u0, (0.0, 1.0))
    found = []
    for engine in ("torch", "native"):
        shift = torch.sin(scale)
        sol = solve(prob, Tsit5(), sensealg=sensealg, engine=engine, adaptive=False, dt=0.05)
        for x in (*leaves, *spare.parameters()):
            x.grad = None
        weighed(sol.u).backward()
        found.append([x.grad for x in (*leaves, *spare.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or off(a, b) <= 1e-12
    assert all(g is not None and not g.any() for g in found[1][-2:])  # of what f never uses


@each_sensealg([DISCRETE[0], DISCRETE[2], *REVERSE])
def test_gradients_by_times(sensealg):
    prob, (u0, p) = with_leaves("lotka_volterra_time")
    t0, t1 = leaf(0.2), leaf(2.0)
    options = {"adaptive": False, "dt": 0.06}
    for saveat in ([0.5, 1.3], 0.4, None):
        found = gradients(
            prob.remake(tspan=(t0, t1)), [u0, p, t0, t1], Tsit5(), sensealg,
            lambda sol, last=saveat is None: weighed(sol.u[-1] if last else sol.u),
            saveat=saveat, **options,
        )  # fmt: skip
        (_, expected), (_, got) = found
        for a, b in zip(got, expected, strict=True):
            assert off(a, b) <= 1e-12
        assert bool(got[2].any())
    times = leaf([0.4, 1.0, 1.9])
    check_gradients(
        prob.remake(tspan=(0.2, 2.0)), [u0, p, times], Tsit5(), sensealg, saveat=times, **options
    )


ESTIMATES = {
    "error": lambda sol: weighed(sol.steps.error),
    "error_norm": lambda sol: weighed(sol.steps.error_norm),
    "stiffness": lambda sol: weighed(sol.steps.stiffness),
    "all": lambda sol: (
        weighed(sol.u) + weighed(sol.steps.error) + 30 * weighed(sol.steps.error_norm)
        + 0.1 * weighed(sol.steps.stiffness)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ESTIMATES)
@pytest.mark.parametrize("checkpoints", [None, 3])
@pytest.mark.parametrize("alg", [RK4(), Heun(), BS3(), DP5(), Tsit5(), Vern7(), DP8()], ids=label)
def test_gradients_of_estimates(alg, checkpoints, what):
    """On steps long enough for the estimates to be far from rounding."""
    prob, leaves = with_leaves("lotka_volterra_time")
    if not alg.adaptive and what.startswith("error"):
        sol = solve(prob, alg, dt=0.1, engine="native")
        assert not torch.autograd.grad(sol.steps.error.sum(), leaves[0])[0].any()
        return
    tol = torch.tensor([1e-3, 1e-2], dtype=DOUBLE)
    dt = {2: 0.05, 3: 0.1, 4: 0.2, 5: 0.2, 7: 0.3, 8: 0.3}[alg.order]
    reference, sol = check_gradients(
        prob, leaves, alg, DiscreteAdjoint(checkpoints=checkpoints), ESTIMATES[what],
        adaptive=False, dt=dt, rtol=tol, atol=tol / 10, saveat=[0.15, 1.0, 2.9], bound=1e-8,
    )  # fmt: skip
    if alg.adaptive:
        # the direction of the estimate is known to its rounding
        assert float(reference.steps.error_norm.min()) > 1e-7


@pytest.mark.parametrize("alg", [BS3(), DP8()], ids=label)
@pytest.mark.parametrize("name", ["error", "error_norm", "stiffness"])
def test_gradients_of_estimates_against_central_differences(alg, name):
    dt = 0.1 if alg.order == 3 else 0.3
    options = {"adaptive": False, "dt": dt, "rtol": 1e-3, "atol": 1e-3, "engine": "native"}

    def loss(p):
        prob = named("lotka_volterra_time", p=p)
        return weighed(getattr(solve(prob, alg, **options).steps, name))

    p = named("lotka_volterra_time").p.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss(p), p)
    for i in range(len(p)):
        step = torch.zeros_like(p)
        step[i] = 1e-5
        with torch.no_grad():
            slope = (loss(p + step) - loss(p - step)) / 2e-5
        assert abs(float(got[i] - slope)) <= 1e-5 * float(got.abs().max())


@pytest.mark.parametrize(
    "changes",
    [{"alg": Vern7()}, {"alg": BS3(), "rtol": 1e-4}, {"rtol": 1e-7}, {"atol": 1e-9, "rtol": 1e-5}],
    ids=str,
)
@pytest.mark.parametrize("kind", [InterpolatingAdjoint, BacksolveAdjoint])
def test_reverse_problem_of_its_own(kind, changes):
    prob, leaves = with_leaves("lotka_volterra")
    tol = torch.tensor([1e-5, 1e-6], dtype=DOUBLE)
    reference, sol = check_gradients(
        prob, leaves, DP5(), kind(**changes), saveat=0.5, rtol=tol, atol=tol, bound=1e-9
    )
    ours, theirs = sol.stats.adjoint, reference.stats.adjoint
    assert (ours.naccept, ours.nreject, ours.alg) == (theirs.naccept, theirs.nreject, theirs.alg)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_lost_reconstruction_is_warned_of(checkpointing):
    """Backward in time a strong decay blows up: by as many tolerances as on the torch engine."""
    said = []
    for engine in ("torch", "native"):
        u0 = leaf([1.0, 2.0])
        sol = solve(
            ODEProblem(lambda t, u: -8 * u, u0, (0.0, 3.0)), Tsit5(), saveat=[1.0, 3.0],
            sensealg=BacksolveAdjoint(checkpointing=checkpointing), engine=engine, rtol=1e-6,
            atol=1e-9,
        )  # fmt: skip
        with pytest.warns(BacksolveWarning) as caught:
            sol.u.sum().backward()
        (warning,) = caught
        said.append(float(str(warning.message).partition(" tolerances")[0].split()[-1]))
    assert said[0] > 1000
    assert said[1] == pytest.approx(said[0], rel=0.02)


@each_sensealg([DISCRETE[0], DISCRETE[2], REVERSE[0], REVERSE[3]])
def test_gradients_of_large_states(sensealg):
    """A state whose whole step is no single function: products with the Jacobian, by stages."""
    u0 = torch.sin(torch.linspace(0, 6, 300, dtype=DOUBLE)).requires_grad_()
    rate = leaf([3.0, 0.5])

    def f(t, u, p):
        return p[0] * (u.roll(1) + u.roll(-1) - 2 * u) + p[1] * torch.sin(u + t)

    prob = ODEProblem(f, u0, (0.0, 0.5), rate)
    check_gradients(
        prob, [u0, rate], Vern7(), sensealg, saveat=[0.1, 0.33, 0.5], adaptive=False, dt=0.05
    )
    assert find_program(prob).address("step_vjp", Vern7().tableau.stages, (True,)) == 0


@each_sensealg([DISCRETE[0], DISCRETE[2], *REVERSE])
def test_gradients_in_single_precision(sensealg):
    base = library.lotka_volterra_time(tspan=(0.0, 2.0), dtype=torch.float32)
    u0, p = base.u0.clone().requires_grad_(), base.p.clone().requires_grad_()
    prob = base.remake(u0=u0, p=p)
    check_gradients(
        prob, [u0, p], Tsit5(), sensealg, saveat=0.3, adaptive=False, dt=0.05, bound=1e-4
    )


@each_sensealg([DISCRETE[0], DISCRETE[2], *REVERSE])
def test_cotangents_of_some_values_only(sensealg):
    prob, leaves = with_leaves("lotka_volterra")
    options = {"adaptive": False, "dt": 0.1, "saveat": 0.25}
    for loss in (
        lambda sol: sol.u[0].sum(),
        lambda sol: sol.u[3, 1],
        lambda sol: sol.u[1:-2].square().mean(),
    ):
        check_gradients(prob, leaves, BS3(), sensealg, loss, **options)
    u0, p = leaves
    check_gradients(prob.remake(u0=u0.detach()), [p], BS3(), sensealg, **options)
    check_gradients(prob.remake(p=p.detach()), [u0], BS3(), sensealg, **options)


def test_many_steps_between_checkpoints():
    """More steps than there is room for at first, with every number of states kept."""
    prob, leaves = with_leaves("lotka_volterra")
    sols = {}
    for checkpoints in (None, 1, 2, 5, 64, 600):
        sol = solve(
            prob, BS3(), sensealg=DiscreteAdjoint(checkpoints=checkpoints), engine="native",
            adaptive=False, dt=0.003, saveat=[0.1, 1.0, 3.0],
        )  # fmt: skip
        assert sol.stats.naccept == 1000
        sols[checkpoints] = torch.autograd.grad(weighed(sol.u), leaves)
    for checkpoints, grads in sols.items():
        for a, b in zip(grads, sols[None], strict=True):
            assert torch.equal(a, b), checkpoints
