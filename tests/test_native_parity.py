"""The native engine does what the torch engine does: the same steps, values and gradients.

Where both take the very same steps (of fixed size) they agree to 1e-12. An error estimate is a
difference that cancels, and keeps fewer digits, so that adaptive steps agree to those; what
follows from them is bounded by how far the steps are apart, times the tolerance.
"""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from gradients import DOUBLE, MATRIX, START, assert_near, label, leaf, linear, linear_reference
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
    IController,
    InterpolatingAdjoint,
    Midpoint,
    ODEProblem,
    PIController,
    PIDController,
    Ralston,
    Tsit5,
    Vern6,
    Vern7,
    Vern9,
    solve,
)
from diffsolve.engines.native import compiled as compiled_module
from diffsolve.engines.native import field as field_module
from diffsolve.engines.native.field import find
from diffsolve.problems import library
from diffsolve.problems.vector_field import VectorField

EPS = 2.0**-52
FIXED = [Euler(), Midpoint(), RK4()]
ADAPTIVE = [Heun(), Ralston(), BS3(), DP5(), Tsit5(), Vern6(), Vern7(), DP8(), Vern9()]
METHODS = [*FIXED, *ADAPTIVE]
# shorter than the problems' own, so that rounding is not magnified by what they are
SPANS = {
    "arenstorf": (0.0, 0.4),
    "fitzhugh_nagumo": (0.0, 4.0),
    "henon_heiles": (0.0, 6.0),
    "linear": (0.0, 3.0),
    "lorenz": (0.0, 1.0),
    "lotka_volterra": (0.0, 3.0),
    "lotka_volterra_time": (0.0, 3.0),
    "pleiades": (0.0, 0.6),
    "rigid_body": (0.0, 4.0),
    "spiral": (0.0, 0.6),
}
STEPS = 40

each_method = pytest.mark.parametrize("alg", METHODS, ids=label)


def named(name, span=None, **changes):
    """A problem of the library over a short span."""
    prob = getattr(library, name)(tspan=span or SPANS[name])
    return prob.remake(**changes) if changes else prob


def both(prob, alg, **options):
    """The solutions of the torch engine and of the native one."""
    reference, got = (solve(prob, alg, engine=e, **options) for e in ("torch", "native"))
    assert got.stats.engine == "native"
    return reference, got


def assert_same_counts(got, reference):
    for name in ("naccept", "nreject", "nf"):
        assert getattr(got.stats, name) == getattr(reference.stats, name), name
    assert got.retcode is reference.retcode
    assert got.t.shape == reference.t.shape
    assert len(got.steps.t) == len(reference.steps.t) == got.stats.naccept


def off(got, reference):
    """Largest difference, relative to the largest entry."""
    got, reference = (x.detach().double() for x in (got, reference))
    assert got.shape == reference.shape
    size = float(reference.abs().max())
    return float((got - reference).abs().max()) / (size or 1.0)


def spread(got, reference):
    """How far apart the steps of two solves are, in step sizes."""
    moved = (got.steps.t - reference.steps.t).abs().max()
    return float(moved / reference.steps.h.abs().min())


def fixed_options(prob, alg, steps=STEPS):
    t0, t1 = (float(t) for t in prob.tspan)
    return {"adaptive": False, "dt": abs(t1 - t0) / steps}


def largest_slope(prob, sol):
    """Largest entry of ``f`` on the way."""
    with torch.no_grad():
        args = () if prob.p is None else (prob.p,)
        return max(
            float(prob.f(t, u, *args).abs().max()) for t, u in zip(sol.t, sol.u, strict=True)
        )


def test_every_problem_of_the_library_is_here():
    names = {n for n in library.__all__ if n.islower() and n != "library_problem"}
    assert names == set(SPANS)


# -- values --------------------------------------------------------------------------------------


def rounding_of(alg, weights):
    """What rounding of the stages does to a sum with these weights, per unit of ``h f``.

    A stage is a sum with the coefficients of its row, 429 of them in Vern6: ``f`` sees the
    rounding of that (times ``h`` and its slope, together about one), and the weights magnify it.
    """
    rows = abs(alg.tableau.stages.a).sum(1)
    weights = abs(weights)
    return EPS * float(weights.sum() + (weights * (1 + rows)).sum())


def cancelling(prob, alg, sol):
    """Norm of the difference of states that the stiffness estimate divides by, at each step."""
    field = VectorField.of(prob)
    found = []
    with torch.no_grad():
        for t, h, u in zip(sol.steps.t.tolist(), sol.steps.h.tolist(), sol.u, strict=False):
            du = field(field.after(t, h), u)
            step = alg.step(field, t, h, alg.init(field, t, u, du))
            found.append(float(step.stiffness[1].norm()))
    return torch.tensor(found, dtype=DOUBLE)


@each_method
@pytest.mark.parametrize("name", SPANS)
def test_fixed_steps(alg, name):
    prob = named(name)
    options = fixed_options(prob, alg)
    reference, got = both(prob, alg, rtol=1e-3, atol=1e-3, **options)
    assert_same_counts(got, reference)
    assert torch.equal(got.t, reference.t)
    assert torch.equal(got.steps.t, reference.steps.t)
    assert torch.equal(got.steps.h, reference.steps.h)
    stages, h = alg.tableau.stages, options["dt"]
    slope, size = largest_slope(prob, reference), float(reference.u.abs().max())
    rounding = 1e-12 * size + STEPS * h * slope * rounding_of(alg, stages.a[-1])
    assert float((got.u - reference.u).abs().max()) <= rounding

    # the interpolant is a sum of terms as large as its coefficients, and rounds as those do
    times = torch.linspace(*prob.tspan, 43, dtype=DOUBLE)
    polynomial = abs(torch.as_tensor(stages.interpolant.polynomial)).sum(0)
    for derivative in range(3):
        value = reference(times, derivative)
        powers = torch.arange(1, len(polynomial) + 1, dtype=DOUBLE)
        for i in range(derivative):
            polynomial = polynomial * (powers - i).clamp(min=0)
        terms = 16 * EPS * float(polynomial.sum()) * slope * h ** (1 - derivative)
        polynomial = abs(torch.as_tensor(stages.interpolant.polynomial)).sum(0)
        difference = float((got(times, derivative) - value).abs().max())
        assert difference <= 1e-12 * float(value.abs().max()) + rounding + terms

    if stages.b_error is None:
        assert not got.steps.error.any()
        assert not got.steps.error_norm.any()
    else:
        of_error = 4 * h * slope * rounding_of(alg, stages.b_error) + EPS * size
        difference = (got.steps.error_norm - reference.steps.error_norm).abs()
        assert float(difference.max()) <= of_error
        difference = (got.steps.error - reference.steps.error).abs()
        assert float(difference.max()) <= of_error / 1e-3
    below = cancelling(prob, alg, reference)
    rows = max(rounding_of(alg, row) for row in stages.a) / EPS
    stiffness = reference.steps.stiffness
    of_ratio = 16 * EPS * (slope * (1 + rows) + stiffness * (size + rows * h * slope)) / below
    assert bool(((got.steps.stiffness - stiffness).abs() <= of_ratio).all())


ORDER_TOLERANCE = {2: 1e-3, 3: 1e-4}


@pytest.mark.parametrize("alg", ADAPTIVE, ids=label)
@pytest.mark.parametrize("name", SPANS)
def test_adaptive_steps(alg, name):
    prob = named(name)
    tol = ORDER_TOLERANCE.get(alg.order, 1e-6)
    times = torch.linspace(*prob.tspan, 11, dtype=DOUBLE)
    reference, got = both(prob, alg, rtol=tol, atol=tol)
    assert_same_counts(got, reference)
    apart = spread(got, reference)
    # rounding of each estimate, relative to its size, goes into the step sizes after it
    h, slope, size = reference.steps.h, largest_slope(prob, reference), reference.u.abs().max()
    rounding = 4 * h * slope * rounding_of(alg, alg.tableau.stages.b_error) + EPS * size
    moved = float((rounding / reference.steps.error_norm).sum() * h.max() / h.min())
    assert apart <= moved
    span = float(h.sum())
    rounding = 1e-12 + span * slope * rounding_of(alg, alg.tableau.stages.a[-1]) / float(size)
    assert off(got(times), reference(times)) <= rounding + 10 * tol * apart
    saved_reference, saved = both(prob, alg, rtol=tol, atol=tol, saveat=times)
    assert_same_counts(saved, saved_reference)
    assert torch.equal(saved.t, times)
    assert off(saved.u, saved_reference.u) <= rounding + 10 * tol * apart
    # the values saved inside of steps are those of the interpolant, but for theta's rounding
    terms = EPS * float(abs(alg.tableau.stages.interpolant.polynomial).sum())
    assert off(saved.u, got(times)) <= 1e-12 + terms


def test_backward_in_time():
    for alg in (BS3(), Tsit5(), Vern7(), DP8()):
        prob = named("lotka_volterra_time", (3.0, 0.0))
        reference, got = both(prob, alg, rtol=1e-5, atol=1e-5, saveat=0.5)
        assert_same_counts(got, reference)
        assert torch.equal(got.t, reference.t)
        assert got.steps.h.max() < 0
        assert off(got.u, reference.u) <= 1e-11
        reference, got = both(prob, alg, adaptive=False, dt=0.07)
        assert off(got.u, reference.u) <= 1e-12
        times = torch.linspace(0.0, 3.0, 33, dtype=DOUBLE)
        assert off(got(times), reference(times)) <= 1e-11
        assert off(got(times, 1), reference(times, 1)) <= 1e-10


def switching(t, u, p):
    return torch.where(t < 0.5, p[0] * u, p[1] * u.roll(1)) + torch.where(t < 0.8, 0 * u, 1.0)


@pytest.mark.parametrize("span", [(0.0, 1.2), (1.2, 0.0)], ids=["forward", "backward"])
@pytest.mark.parametrize("alg", [RK4(), BS3(), Tsit5(), Vern7()], ids=label)
def test_jumps_at_tstops(alg, span):
    prob = ODEProblem(switching, leaf([1.0, 2.0]), span, leaf([-1.0, 0.7]))
    saveat = sorted([0.1, 0.5, 0.6, 1.2], reverse=span[1] < span[0])
    options = {"tstops": [0.5, 0.8, 7.0], "saveat": saveat}
    if not alg.adaptive:
        options["dt"] = 0.07
    reference, got = both(prob, alg, rtol=1e-5, atol=1e-5, **options)
    assert_same_counts(got, reference)
    assert {0.5, 0.8} <= set(got.steps.t.tolist())
    assert off(got.u, reference.u) <= 1e-11
    # between the stops f is linear, so that every method gives what it gives on each side
    rtol = 1e-3 if not alg.adaptive else 1e-4
    exact = piecewise(prob.u0.detach(), prob.p.detach(), span, saveat)
    assert off(got.u, exact) <= rtol


def piecewise(u0, p, span, times):
    """The solution of the switching problem by matrix exponentials."""
    direction = 1.0 if span[1] > span[0] else -1.0
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE)

    def flow(u, start, end):
        middle = (start + end) / 2
        matrix = p[0] * torch.eye(2, dtype=DOUBLE) if middle < 0.5 else p[1] * swap
        full = torch.zeros(3, 3, dtype=DOUBLE)
        full[:2, :2] = matrix
        full[:2, 2] = 0.0 if middle < 0.8 else 1.0
        return (torch.linalg.matrix_exp(full * (end - start)) @ torch.cat([u, u.new_ones(1)]))[:2]

    found, at, u = [], span[0], u0
    for t in sorted({*times, 0.5, 0.8}, reverse=direction < 0):
        u = flow(u, at, t)
        at = t
        if t in times:
            found.append(u)
    return torch.stack(found)


SAVES = {
    "spacing": 0.25,
    "list": [0.3, 0.31, 1.0, 2.9],
    "tensor": torch.tensor([0.0, 0.1, 3.0], dtype=DOUBLE),
    "single precision": torch.tensor([0.1, 3.0], dtype=torch.float32),
    "dense": torch.linspace(0.0, 3.0, 500, dtype=DOUBLE),
    "the end": [3.0],
    "the start": [0.0],
}


@pytest.mark.parametrize("saveat", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("alg", [BS3(), Vern7()], ids=label)
def test_saveat(alg, saveat):
    for options in ({"dense": False}, {"dense": True}):
        reference, got = both(named("lotka_volterra"), alg, saveat=saveat, **options)
        assert_same_counts(got, reference)
        assert torch.equal(got.t, reference.t)
        assert off(got.u, reference.u) <= 1e-11
        if options["dense"]:
            times = torch.linspace(0.0, 3.0, 7, dtype=DOUBLE)
            assert off(got(times), reference(times)) <= 1e-11


def test_ends_and_every_step():
    prob = named("lotka_volterra")
    reference, got = both(prob, BS3(), save_everystep=False)
    assert got.t.tolist() == [0.0, 3.0]
    assert_same_counts(got, reference)
    assert off(got.u, reference.u) <= 1e-12
    reference, got = both(prob, BS3())
    assert len(got.t) == got.stats.naccept + 1
    assert off(got.t, reference.t) <= 1e-12
    assert off(got.u, reference.u) <= 1e-12


OPTIONS = {
    "dt": {"dt": 0.01},
    "dtmax": {"dtmax": 0.05},
    "dtmax and stops": {"dtmax": 0.25, "tstops": [0.25, 0.5], "rtol": 1e-2},
    "dtmin": {"dtmin": 0.02, "rtol": 1e-2, "atol": 1e-2},
    "dtmin and stops": {"dtmin": 0.02, "rtol": 1e-2, "atol": 1e-2, "tstops": [0.5, 0.52, 2.0]},
    "no memory for errors": {"controller": IController.for_order(3)},
    "integral": {"controller": IController(exponent=0.3, safety=0.8, factor_max=2.0)},
    "proportional": {"controller": PIController(beta1=0.2, beta2=0.1, factor_min=0.5)},
    "dopri5": {"controller": PIController(beta1=0.17, beta2=0.04)},
    "three errors": {"controller": PIDController.for_order(3)},
    "other three errors": {"controller": PIDController(beta=(0.7, -0.4, 0.1), k=3, safety=0.85)},
    "a list of exponents": {"controller": PIDController(beta=[0.06, 0.11, 0.05])},
    "tolerances of components": {
        "rtol": torch.tensor([1e-3, 1e-6], dtype=DOUBLE),
        "atol": torch.tensor([1e-8, 1e-4], dtype=DOUBLE),
    },
    "one tolerance of components": {"rtol": torch.tensor([1e-3, 1e-6], dtype=DOUBLE)},
    "no rtol": {"rtol": 0.0, "atol": 1e-4},
    "no atol": {"rtol": 1e-4, "atol": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("alg", [BS3(), Tsit5()], ids=label)
def test_options(alg, options):
    options = {"rtol": 1e-5, "atol": 1e-6, **options}
    # the large first step is rejected
    prob = named("lotka_volterra_time")
    for more in ({}, {"dt": 2.5}):
        reference, got = both(prob, alg, **{**options, **more})
        assert_same_counts(got, reference)
        assert not more or got.stats.nreject > 0 or "dtmax" in options
        assert spread(got, reference) <= 1e-6
        assert off(got.u, reference.u) <= 1e-6 * 1e-3 + 10 * spread(got, reference)


def test_unscaled_error_limits_where_a_component_is_zero():
    def f(t, u):
        return torch.stack([u[1], -u[0] * u[1].abs(), u[2] * 0.0])

    prob = ODEProblem(f, torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE), (0.0, 3.0))
    reference, got = both(prob, BS3(), rtol=1e-6, atol=1e-9)
    assert_same_counts(got, reference)
    assert off(got.u, reference.u) <= 1e-9


class Tree(nn.Module):
    """A pair of coupled blocks of a dict state."""

    def forward(self, t, u, p):
        x, (y, z) = u["x"], u["yz"]
        return {
            "x": -p["a"] * x + y.sum() * torch.sin(t),
            "yz": (p["b"][0] * y - z * x[0, :2], -z * p["b"][1]),
        }


def tree_problem(span=(0.0, 1.0), requires_grad=False):
    state = {
        "x": torch.tensor([[1.0, 2.0, 3.0]], dtype=DOUBLE),
        "yz": (torch.tensor([0.5, -0.5], dtype=DOUBLE), torch.tensor(2.0, dtype=DOUBLE)),
    }
    p = {"a": torch.tensor(0.8, dtype=DOUBLE), "b": torch.tensor([0.3, 0.9], dtype=DOUBLE)}
    tensors = [state["x"], *state["yz"], p["a"], p["b"]]
    for x in tensors:
        x.requires_grad_(requires_grad)
    return ODEProblem(Tree(), state, span, p), tensors


def test_pytree_state():
    prob, _ = tree_problem()
    options = {
        "rtol": {"x": 1e-4, "yz": (1e-6, 1e-5)},
        "atol": {"x": torch.full((1, 3), 1e-6), "yz": (1e-8, 1e-7)},
        "saveat": 0.1,
        "dense": True,
    }
    reference, got = both(prob, Tsit5(), **options)
    assert_same_counts(got, reference)
    assert set(got.u) == {"x", "yz"}
    assert off(got.u["x"], reference.u["x"]) <= 1e-11
    for a, b in zip(got.u["yz"], reference.u["yz"], strict=True):
        assert off(a, b) <= 1e-11
    assert off(got(0.55)["yz"][0], reference(0.55)["yz"][0]) <= 1e-11


@each_method
def test_single_precision(alg):
    prob = library.lotka_volterra_time(tspan=(0.0, 2.0), dtype=torch.float32)
    reference, got = both(prob, alg, adaptive=False, dt=0.05, saveat=0.12)
    assert_same_counts(got, reference)
    assert got.u.dtype is torch.float32
    assert got.t.dtype is torch.float64
    for name in ("error", "error_norm", "stiffness"):
        assert getattr(got.steps, name).dtype is getattr(reference.steps, name).dtype
    terms = rounding_of(alg, alg.tableau.stages.a[-1])
    terms += EPS * float(abs(alg.tableau.stages.interpolant.polynomial).sum())
    assert off(got.u, reference.u) <= 2.0**-23 / EPS * (1e-14 + terms)
    if alg.name in ("Heun", "Ralston", "BS3"):  # the others' estimates are close to rounding
        reference, got = both(prob, alg, rtol=1e-3, atol=1e-3)
        assert_same_counts(got, reference)
        assert spread(got, reference) <= 1e-2
        assert off(got.u, reference.u) <= 1e-5 + 10 * spread(got, reference)


def test_sizes():
    """One number; and a state that is too large for one function of the whole step."""
    for u0 in (torch.tensor(0.5, dtype=DOUBLE), torch.tensor([0.5], dtype=DOUBLE)):
        reference, got = both(ODEProblem(lambda t, u: t - u * u, u0, (0.0, 2.0)), Tsit5())
        assert_same_counts(got, reference)
        assert got.u.shape == (got.stats.naccept + 1, *u0.shape)
        assert off(got.u, reference.u) <= 1e-11
    u0 = torch.sin(torch.linspace(0, 6, 1000, dtype=DOUBLE))

    def diffusion(t, u):
        return 3 * (u.roll(1) + u.roll(-1) - 2 * u) + torch.sin(u)

    prob = ODEProblem(diffusion, u0, (0.0, 1.0))
    for alg in (Tsit5(), Vern7()):
        reference, got = both(prob, alg, saveat=0.1, dense=True)
        assert_same_counts(got, reference)
        assert off(got.u, reference.u) <= 1e-11
        assert off(got(0.77), reference(0.77)) <= 1e-11
    compiled = find_compiled(prob)
    assert compiled.step(Tsit5().tableau.stages) == 0
    assert find_compiled(named("lotka_volterra")).step(Tsit5().tableau.stages) != 0


def find_compiled(prob):
    field = VectorField.of(prob)
    u0 = field.structure.ravel(prob.u0)
    return find(field, float(prob.tspan[0]), u0, 1.0, guard=False).compiled


@pytest.mark.parametrize("alg", [RK4(), BS3(), Tsit5(), Vern6(), DP8(), Vern9()], ids=label)
def test_generic_step_is_the_fused_one(alg, monkeypatch):
    """The same solve and gradient by the kernels' own step, which large states need."""
    found = []
    for most in (compiled_module._MOST_IN_STEP, 0):
        monkeypatch.setattr(compiled_module, "_MOST_IN_STEP", most)
        monkeypatch.setattr(field_module, "_by_content", OrderedDict())
        rate = leaf(0.3)
        u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
        base = library.lotka_volterra_time()

        def f(t, u, p, rate=rate, base=base):
            return base.f(t, u, p) - rate * u

        prob = ODEProblem(f, u0, (0.0, 1.0), p)
        sol = solve(prob, alg, engine="native", adaptive=False, dt=0.06, saveat=0.05, dense=True)
        assert bool(find_compiled(prob).step(alg.tableau.stages)) == bool(most)
        weights = torch.linspace(-1, 1, sol.u.numel(), dtype=DOUBLE).reshape(sol.u.shape)
        found.append((sol.u.detach(), *torch.autograd.grad((weights * sol.u).sum(), (u0, p, rate))))
    terms = EPS * float(abs(alg.tableau.stages.interpolant.polynomial).sum())
    for a, b in zip(*found, strict=True):
        assert off(a, b) <= 1e-12 + terms + rounding_of(alg, alg.tableau.stages.a[-1])


# -- gradients -----------------------------------------------------------------------------------

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
    assert find_compiled(prob).step_vjp(Vern7().tableau.stages, (True,)) == 0


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
