"""Implicit methods on the native engine do what they do on the torch engine.

Both take the same decisions: the same steps, Jacobians, factorisations and Newton iterations. What
Newton leaves differs by rounding alone, as the iterations are the same.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from gradients import DOUBLE, assert_near, label, leaf
from native_runs import both, off, piecewise, switching, tree_problem
from native_stiff import ROSENBROCK, forced_problem, weigh

from diffsolve import (
    SDIRK2,
    TRBDF2,
    AutoTsit5,
    AutoVern7,
    DiscreteAdjoint,
    ImplicitEuler,
    ImplicitMidpoint,
    InterpolatingAdjoint,
    KenCarp3,
    KenCarp4,
    KenCarp5,
    Kvaerno3,
    Kvaerno4,
    Kvaerno5,
    ODEProblem,
    Rodas4,
    Rodas5P,
    Rosenbrock23,
    Trapezoid,
    solve,
)
from diffsolve.engines.native.runtime.adjoint_solve import ForwardPath
from diffsolve.engines.native.runtime.switching import runs_of
from diffsolve.problems import library
from diffsolve.solvers.kernels import layout as L

NEWTON = [
    *(ImplicitEuler(), Trapezoid(), SDIRK2(), TRBDF2()),
    *(Kvaerno3(), Kvaerno4(), Kvaerno5(), KenCarp3(), KenCarp4(), KenCarp5()),
]
ADAPTIVE = [*ROSENBROCK, *NEWTON]
METHODS = [*ADAPTIVE, ImplicitMidpoint()]
COUNTS = ("naccept", "nreject", "nf", "njac", "nlu", "nsolve", "nnewton")
each_method = pytest.mark.parametrize("alg", METHODS, ids=label)


def assert_same_work(got, reference):
    for name in COUNTS:
        assert getattr(got.stats, name) == getattr(reference.stats, name), name
    assert got.retcode is reference.retcode
    assert got.t.shape == reference.t.shape


@each_method
def test_fixed_steps(alg):
    options = {"adaptive": False, "dt": 0.03, "rtol": 1e-6, "atol": 1e-6, "dense": True}
    reference, got = both(forced_problem(), alg, **options)
    assert_same_work(got, reference)
    assert off(got.u, reference.u) <= 1e-11
    for name in ("error", "error_norm", "stiffness"):
        assert off(getattr(got.steps, name), getattr(reference.steps, name)) <= 1e-7
    assert (got.steps.stiffness > 20).all()
    times = torch.linspace(0, 1, 43, dtype=DOUBLE)
    for derivative in range(3):
        assert off(got(times, derivative), reference(times, derivative)) <= 1e-8


SPANS = {"rober": (0.0, 10.0), "hires": (0.0, 5.0), "orego": (0.0, 2.0), "pollu": (0.0, 0.3)}
CASES = [
    *((alg, "rober") for alg in ADAPTIVE),
    *((alg, name) for alg in (Rodas5P(), KenCarp4()) for name in ("hires", "orego", "pollu")),
]


@pytest.mark.parametrize(("alg", "name"), CASES, ids=str)
def test_adaptive_steps(alg, name):
    prob = getattr(library, name)(tspan=SPANS[name])
    tol = 1e-2 if alg.order == 1 else 1e-3 if alg.order == 2 else 1e-4
    times = torch.linspace(*prob.tspan, 7, dtype=DOUBLE)
    options = {"rtol": tol, "atol": 1e-3 * tol, "saveat": times}
    reference, got = both(prob, alg, **options)
    assert_same_work(got, reference)
    # each step, in its own size: the first ones are a millionth of the last
    assert float(((got.steps.t - reference.steps.t) / reference.steps.h).abs().max()) <= 1e-3
    assert off(got.u, reference.u) <= 1e-6


@pytest.mark.parametrize("name", ["prothero_robinson", "stiff_linear"])
@pytest.mark.parametrize("alg", [Rodas5P(), Kvaerno5()], ids=label)
def test_where_rounding_is_magnified(alg, name):
    """Rates of 1e6 make of rounding what the error estimates see: the steps are only alike."""
    prob = getattr(library, name)()
    reference, got = both(prob, alg, rtol=1e-4, atol=1e-6, saveat=[float(prob.tspan[1])])
    assert got.stats.naccept == pytest.approx(reference.stats.naccept, rel=0.05, abs=2)
    assert off(got.u, reference.u) <= 1e-3


def test_van_der_pol_through_its_jumps():
    prob = library.van_der_pol(mu=20.0, tspan=(0.0, 40.0))
    for alg in (Rodas5P(), Kvaerno5()):
        reference, got = both(prob, alg, rtol=1e-4, atol=1e-6)
        assert_same_work(got, reference)
        assert off(got.u[-1], reference.u[-1]) <= 1e-6
    # at its limit of stability the explicit method magnifies rounding, and the steps part
    reference, got = both(prob, AutoTsit5(), rtol=1e-4, atol=1e-6)
    assert got.stats.naccept == pytest.approx(reference.stats.naccept, rel=0.05)
    assert 0 < got.stats.njac < got.stats.naccept
    assert off(got.u[-1], reference.u[-1]) <= 1e-3


@pytest.mark.parametrize("alg", [Rodas4(), KenCarp4()], ids=label)
def test_backward_in_time(alg):
    prob = forced_problem((0.2, 0.0))
    reference, got = both(prob, alg, rtol=1e-5, atol=1e-5, saveat=0.05)
    assert_same_work(got, reference)
    assert got.steps.h.max() < 0
    assert off(got.u, reference.u) <= 1e-9


both_directions = pytest.mark.parametrize(
    "span", [(0.0, 1.2), (1.2, 0.0)], ids=["forward", "backward"]
)


def solved_with_jumps(f, alg, span):
    prob = ODEProblem(f, leaf([1.0, 2.0]), span, leaf([-1.0, 0.7]))
    saveat = sorted([0.1, 0.5, 0.6, 1.2], reverse=span[1] < span[0])
    options = {"rtol": 1e-6, "atol": 1e-6, "tstops": [0.5, 0.8, 7.0], "saveat": saveat}
    reference, got = both(prob, alg, **options)
    assert_same_work(got, reference)
    assert off(got.u, reference.u) <= 1e-9
    return prob, saveat, got


@both_directions
@pytest.mark.parametrize("alg", [Rodas5P(), Rosenbrock23()], ids=label)
def test_jumps_at_tstops(alg, span):
    prob, saveat, got = solved_with_jumps(switching, alg, span)
    assert off(got.u, piecewise(prob.u0.detach(), prob.p.detach(), span, saveat)) <= 1e-4


# Not linear: where f is, Newton's rate is rounding, which decides whether one iteration is enough
# and is not the same on every processor.
@both_directions
@pytest.mark.parametrize("alg", [TRBDF2(), KenCarp4()], ids=label)
def test_jumps_at_tstops_with_newton(alg, span):
    prob, saveat, got = solved_with_jumps(bent, alg, span)
    options = {"rtol": 1e-10, "atol": 1e-10, "tstops": [0.5, 0.8], "saveat": saveat}
    assert off(got.u, solve(prob, Rodas5P(), **options).u) <= 1e-4


def bent(t, u, p):
    return switching(t, u, p) + 0.3 * torch.sin(u)


@pytest.mark.parametrize("alg", [Rodas5P(), KenCarp4(), AutoTsit5()], ids=label)
def test_single_precision(alg):
    prob = forced_problem(dtype=torch.float32)
    reference, got = both(prob, alg, rtol=1e-3, atol=1e-4, saveat=0.25)
    assert got.u.dtype == torch.float32
    assert got.stats.naccept == pytest.approx(reference.stats.naccept, abs=2)
    assert off(got.u, reference.u) <= 1e-3
    exact = solve(forced_problem(), Rodas5P(), rtol=1e-10, atol=1e-10, saveat=0.25)
    assert off(got.u, exact.u) <= 5e-3


def test_states_of_any_structure():
    prob, _ = tree_problem()
    for alg in (Rodas5P(), Kvaerno5()):
        reference, got = both(prob, alg, rtol=1e-6, atol=1e-8)
        assert_same_work(got, reference)
        assert off(got.u["x"], reference.u["x"]) <= 1e-8
        assert off(got.u["yz"][1], reference.u["yz"][1]) <= 1e-8


@pytest.mark.slow
def test_components_that_nothing_depends_on():
    """Integrals of the others: their columns are zero, and no matrix holds them."""

    def f(t, u, p):
        x, _, y = u.unbind(-1)
        return torch.stack([-p[0] * (x - torch.cos(t)), p[1] * x - y, p[0] * x * x], -1)

    def columns_first(t, u, p):
        x, _ = u.unbind(-1)
        return torch.stack([-p[0] * (x - torch.cos(t)), p[1] * x * x], -1)

    for function, u0 in ((f, [1.0, 0.0, 0.2]), (columns_first, [1.0, 0.0])):
        for alg in (Rodas5P(), TRBDF2(), KenCarp4()):
            grads = []
            for engine in ("torch", "native"):
                u, p = leaf(u0), leaf([50.0, 2.0])
                prob = ODEProblem(function, u, (0.0, 1.0), p)
                sol = solve(prob, alg, rtol=1e-7, atol=1e-9, engine=engine)
                (sol.u[-1].square().sum() + sol.steps.stiffness.sum()).backward()
                grads.append(torch.cat([sol.u[-1].detach(), u.grad, p.grad]))
            assert off(grads[1], grads[0]) <= 1e-7


def test_a_zero_jacobian():
    def f(t, u):
        return torch.cos(t) + 0 * u

    for alg in (Rodas4(), Kvaerno3(), ImplicitEuler()):
        prob = ODEProblem(f, torch.zeros(2, dtype=DOUBLE), (0.0, 1.0))
        reference, got = both(prob, alg, rtol=1e-4, atol=1e-6)
        assert got.stats.naccept == pytest.approx(reference.stats.naccept, abs=2)
        assert off(got.u[-1], torch.sin(torch.ones(2, dtype=DOUBLE))) <= 3e-3
        assert not got.steps.stiffness.any()


@pytest.mark.parametrize("name", ["u", "error", "error_norm", "stiffness"])
@each_method
def test_gradients(alg, name):
    if name.startswith("error") and not alg.adaptive:
        pytest.skip("there is no estimate")
    grads = []
    for engine in ("torch", "native"):
        prob = forced_problem(requires_grad=True)
        options = {"adaptive": False, "dt": 0.07, "saveat": 0.05, "engine": engine}
        # Newton's tolerance goes by these; what it leaves is in the estimates
        sol = solve(prob, alg, sensealg=DiscreteAdjoint(), rtol=1e-11, atol=1e-12, **options)
        loss = weigh(sol, name)
        grads.append(torch.cat(torch.autograd.grad(loss, [prob.u0, prob.p])))
    assert_near(grads[1], grads[0], 1e-6)


@pytest.mark.parametrize("alg", [AutoTsit5(), AutoVern7(KenCarp4()), Rodas5P()], ids=label)
def test_gradients_of_adaptive_solves(alg):
    grads = []
    for engine in ("torch", "native"):
        prob = library.rober(tspan=(0.0, 50.0))
        p = prob.p.log().requires_grad_()
        prob = prob.remake(p=p.exp())
        sol = solve(prob, alg, rtol=1e-6, atol=1e-10, saveat=10.0, engine=engine)
        (grad,) = torch.autograd.grad(sol.u[:, 0].sum(), p)
        grads.append(grad)
    assert_near(grads[1], grads[0], 1e-5)


@pytest.mark.parametrize("alg", [Rodas5P(), Rosenbrock23(), KenCarp4(), TRBDF2()], ids=label)
def test_checkpoints(alg):
    grads = []
    for checkpoints in (None, 4):
        prob = forced_problem(requires_grad=True)
        sensealg = DiscreteAdjoint(checkpoints=checkpoints)
        sol = solve(prob, alg, sensealg=sensealg, rtol=1e-7, atol=1e-9, saveat=0.1, engine="native")
        grads.append(torch.cat(torch.autograd.grad(weigh(sol, "u"), [prob.u0, prob.p])))
    assert_near(grads[1], grads[0], 1e-6)


# -- two methods by turns ------------------------------------------------------------------------


def turns(t, u, p):
    """Stiff, then not, then stiff again."""
    x, y = u.unbind(-1)
    rate = 1 + p[0] * torch.sigmoid(40 * (torch.cos(3 * t) - 0.2))
    return torch.stack([rate * (torch.cos(p[1] * t) - x) + y, x - p[2] * y * y], -1)


def turns_problem():
    return ODEProblem(turns, leaf([1.0, 0.5]), (0.0, 3.0), leaf([3000.0, 2.0, 1.5]))


@pytest.mark.parametrize("stiff", [Rodas4(), KenCarp4()], ids=label)
def test_two_methods_by_turns(stiff):
    prob, alg = turns_problem(), AutoTsit5(stiff)
    options = {"rtol": 1e-5, "atol": 1e-7, "dense": True, "saveat": 0.1}
    reference, got = both(prob, alg, **options)
    assert got.stats.naccept == pytest.approx(reference.stats.naccept, rel=0.05)
    assert 0 < got.stats.nlu < got.stats.naccept
    exact = solve(prob, Rodas5P(), rtol=1e-11, atol=1e-12, saveat=0.1, dense=True)
    times = torch.linspace(0, 3, 77, dtype=DOUBLE)
    for sol in (got, reference):
        assert off(sol.u, exact.u) <= 1e-4
        assert off(sol(times), exact(times)) <= 1e-3
        assert off(sol(times, 1), exact(times, 1)) <= 0.1


@pytest.mark.parametrize(
    "sensealg",
    [
        DiscreteAdjoint(),
        DiscreteAdjoint(checkpoints=7),
        InterpolatingAdjoint(),
        InterpolatingAdjoint(checkpoints=7),
    ],
    ids=label,
)
def test_gradients_of_two_methods_by_turns(sensealg):
    def gradient(alg, sensealg, tol, **options):
        prob = turns_problem()
        options = {"rtol": tol, "atol": tol, "saveat": 0.5, "engine": "native", **options}
        sol = solve(prob, alg, sensealg=sensealg, **options)
        return torch.cat(torch.autograd.grad(weigh(sol, "u"), [prob.u0, prob.p])), sol

    exact, _ = gradient(Rodas5P(), DiscreteAdjoint(), 1e-11)
    got, sol = gradient(AutoTsit5(KenCarp4()), sensealg, 1e-6)
    assert 0 < sol.stats.nlu < sol.stats.naccept
    assert_near(got, exact, 1e-4)


def relaxation(alg, checkpoints, tol):
    """A solve that magnifies what Newton leaves from step to step, and its parameter."""
    prob = library.van_der_pol(mu=100.0, tspan=(0.0, 180.0))
    p = prob.p.clone().requires_grad_()
    sensealg = DiscreteAdjoint(checkpoints=checkpoints)
    options = {"rtol": tol, "atol": tol, "engine": "native"}
    return solve(prob.remake(p=p), alg, sensealg=sensealg, **options), p


@pytest.mark.parametrize("alg", [KenCarp4(), AutoTsit5(Kvaerno5())], ids=label)
@pytest.mark.parametrize("tol", [1e-5, 1e-6])
def test_checkpoints_repeat_what_newton_did(alg, tol):
    """A repeated step leaves what the step left, to the last bit."""
    sol, _ = relaxation(alg, 3, tol)
    node, count = sol.u.grad_fn, sol.stats.naccept
    path = ForwardPath(node.records, node.saved_tensors[-1], whole=False)
    repeated = path._remade(0, count)[:, 0]
    assert path.forward.integers[L.STRIDE] > 8  # few states are kept
    assert torch.equal(repeated, sol.u.detach()[:count])
    for run in runs_of(node.records):  # the reverse pass then forgets, too
        if run.template.method.is_implicit:
            place = path.forward.integers[L.MARKS] + 8 * (run.begin * L.N_MARKS + L.MARK_FORGOT)
            assert ctypes.c_int64.from_address(place).value == 1


@pytest.mark.parametrize("alg", [KenCarp4(), AutoTsit5(Kvaerno5())], ids=label)
def test_gradients_with_checkpoints_are_those_without(alg):
    found = []
    for checkpoints in (2, 10_000):
        sol, p = relaxation(alg, checkpoints, 1e-7)
        found.append(torch.autograd.grad(sol.u[-1, 0], p)[0])
    assert_near(found[0], found[1], 1e-3)
    assert_near(found[0], torch.tensor([0.01321428]), 2e-3)  # Rodas5P at a tolerance of 1e-11


def test_a_step_that_cannot_be_repeated():
    """The reverse pass says so, rather than to go on with what Newton's iteration left."""
    found = []
    for sign in (1.0, -1.0):  # nothing is below a negative tolerance
        prob = forced_problem(requires_grad=True)
        sensealg = DiscreteAdjoint(checkpoints=3)
        sol = solve(prob, KenCarp4(), sensealg=sensealg, rtol=1e-5, atol=1e-7, engine="native")
        node = sol.u.grad_fn
        node.records.reals[L.KAPPA] *= sign
        found.append(sol)
    found[0].u.sum().backward()
    with pytest.raises(RuntimeError, match="could not repeat a step"):
        found[1].u.sum().backward()


def test_a_pivot_that_vanishes_where_nothing_moves_at_first():
    """The second block starts at rest: the first stage shows nothing of its pivots."""

    def f(t, u, p):
        x, y, z = u.unbind(-1)
        return torch.stack([-x, p[0] * y + p[1] * z + x - 1.0, p[2] * y - z], -1)

    dt, alg, grads = 0.05, Rodas5P(), []
    for engine in ("torch", "native"):
        growth = (1 - 1e-9) / (alg.tableau.stages.gamma * dt)
        p, u0 = leaf([growth, 100.0, -120.0]), leaf([1.0, 0.0, 0.0])
        sol = solve(ODEProblem(f, u0, (0.0, dt), p), alg, adaptive=False, dt=dt, engine=engine)
        grads.append((sol.u.detach(), *torch.autograd.grad(sol.u[-1].sum(), [u0, p])))
    for got, reference in zip(*grads[::-1], strict=True):
        assert off(got, reference) <= 1e-9


@pytest.mark.parametrize("alg", [Kvaerno4(), Kvaerno5()], ids=label)
def test_nodes_beyond_a_stop_stay_on_its_side(alg):
    """Their second stage lies behind the end of the step."""
    seen = []

    def f(t, u):
        seen.append(float(t))
        return -u * (1.0 if float(t) < 0.5 else 1e6)

    prob = ODEProblem(f, torch.ones(1, dtype=DOUBLE), (0.0, 0.6))
    sol = solve(
        prob, alg, dt=0.1, adaptive=False, tstops=[0.5], engine="torch", maxiters=5, throw=False
    )
    assert len(sol.steps) == 5
    assert max(seen) <= 0.5 + 1e-12  # the last is where the next step would begin
    smooth = torch.exp(torch.tensor([-0.5], dtype=DOUBLE))
    assert_near(sol.u[5], smooth, 1e-4)
