"""The native engine does what the torch engine does: the same steps and values.

Where both take the very same steps (of fixed size) they agree to 1e-12. An error estimate is a
difference that cancels, and keeps fewer digits, so that adaptive steps agree to those; what
follows from them is bounded by how far the steps are apart, times the tolerance.
"""

from __future__ import annotations

import pytest
import torch
from gradients import DOUBLE, label, leaf
from native_runs import (
    ADAPTIVE,
    EPS,
    SPANS,
    STEPS,
    assert_same_counts,
    both,
    each_method,
    find_program,
    fixed_options,
    largest_slope,
    named,
    off,
    piecewise,
    rounding_of,
    spread,
    switching,
    tree_problem,
)

from diffsolve import (
    BS3,
    DP8,
    RK4,
    IController,
    ODEProblem,
    PIController,
    PIDController,
    Tsit5,
    Vern6,
    Vern7,
    Vern9,
    solve,
)
from diffsolve.engines.native.programs import explicit_rk, traces
from diffsolve.problems import library
from diffsolve.problems.vector_field import VectorField


def test_every_nonstiff_problem_of_the_library_is_here():
    problems = (getattr(library, name) for name in library.__all__)
    found = [x for x in problems if isinstance(x, library.LibraryProblem)]
    assert {x.name for x in found if not x.stiff} == set(SPANS)


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


@pytest.mark.parametrize("alg", [RK4(), Tsit5()], ids=label)
@pytest.mark.parametrize(
    ("span", "dt", "steps"),
    [
        ((1.7e9, 1.7e9 + 1), 0.2, 5),
        ((1.7e9 + 1, 1.7e9), 0.2, 5),
        ((1e4, 1e4 + 0.1), 1e-4, 1000),
        ((2.0**32, 2.0**32 + 16 * 2.0**-20), 8 * 2.0**-20, 2),
    ],
)
def test_fixed_steps_at_large_times(alg, span, dt, steps):
    prob = ODEProblem(lambda t, u: -u, torch.ones(1, dtype=DOUBLE), span)
    reference, got = both(prob, alg, adaptive=False, dt=dt)
    assert got.stats.naccept == reference.stats.naccept == steps
    assert torch.equal(got.steps.h, reference.steps.h)
    assert bool((got.steps.h != 0).all())


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
    # compiled, the derivative at the end comes with the other stages
    assert got.stats.nf == reference.stats.nf + alg.may_end_open
    assert got.stats.naccept == reference.stats.naccept
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
    program = find_program(prob)
    assert program.address("step", Tsit5().tableau.stages) == 0
    assert find_program(named("lotka_volterra")).address("step", Tsit5().tableau.stages) != 0


@pytest.mark.parametrize("alg", [RK4(), BS3(), Tsit5(), Vern6(), DP8(), Vern9()], ids=label)
def test_generic_step_is_the_fused_one(alg, monkeypatch):
    """The same solve and gradient by the kernels' own step, which large states need."""
    found = []
    for most in (explicit_rk.MOST_IN_STEP, 0):
        monkeypatch.setattr(explicit_rk, "MOST_IN_STEP", most)
        traces.clear_caches()
        rate = leaf(0.3)
        u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
        base = library.lotka_volterra_time()

        def f(t, u, p, rate=rate, base=base):
            return base.f(t, u, p) - rate * u

        prob = ODEProblem(f, u0, (0.0, 1.0), p)
        sol = solve(prob, alg, engine="native", adaptive=False, dt=0.06, saveat=0.05, dense=True)
        assert bool(find_program(prob).address("step", alg.tableau.stages)) == bool(most)
        weights = torch.linspace(-1, 1, sol.u.numel(), dtype=DOUBLE).reshape(sol.u.shape)
        found.append((sol.u.detach(), *torch.autograd.grad((weights * sol.u).sum(), (u0, p, rate))))
    terms = EPS * float(abs(alg.tableau.stages.interpolant.polynomial).sum())
    for a, b in zip(*found, strict=True):
        assert off(a, b) <= 1e-12 + terms + rounding_of(alg, alg.tableau.stages.a[-1])
