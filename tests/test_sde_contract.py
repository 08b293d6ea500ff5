"""What every registered method for SDEs must do, whatever its formulas."""

from __future__ import annotations

import pytest
import torch
from gradients import assert_near
from sdes import DOUBLE, solve
from torch import Tensor

import diffsolve.engines.torch.parallel as parallel
from diffsolve import DiscreteAdjoint, ODEProblem, SDEProblem, Vern7
from diffsolve.problems.sde_field import SDEField
from diffsolve.solvers.stochastic.method import check_method, fits, registered
from diffsolve.solvers.stochastic.setup import brownian_path

KINDS = ("diagonal", "scalar", "additive", "general")
METHODS = registered()
CASES = [
    pytest.param(alg, kind, integral, id=f"{alg!r}-{kind}-{integral}")
    for alg in METHODS
    for kind in KINDS
    for integral in ("ito", "stratonovich")
    if fits(alg, kind, integral)
]
every_case = pytest.mark.parametrize(("alg", "kind", "integral"), CASES)
SHAPES = {
    "diagonal": ["vector"],
    "scalar": ["vector", "matrix"],
    "additive": ["vector", "matrix"],
    "general": ["matrix"],
}


def diffusion(kind: str, shape: str):
    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        if kind == "additive":
            vector = p[1] * torch.cos(t) * torch.ones_like(u)
        else:
            vector = p[1] * torch.sin(u)
        if shape == "vector":
            return vector
        if kind == "scalar":
            return vector[..., None]
        return torch.stack([vector, 0.5 * vector, 0 * vector + 0.1], -1)

    return g


def problem(kind: str, integral: str, shape: str | None = None, **changes) -> SDEProblem:
    g = diffusion(kind, shape or SHAPES[kind][0])

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return p[0] * torch.cos(u) - t * u

    u0 = torch.linspace(0.4, 1.2, 6, dtype=DOUBLE).reshape(3, 2)
    p = torch.tensor([0.8, 0.4], dtype=DOUBLE)
    prob = SDEProblem(f, g, u0, (0.0, 1.0), p, noise=kind, interpretation=integral)
    return prob.remake(**changes)


def test_the_table_holds_every_method() -> None:
    names = {alg.name for alg in METHODS}
    assert {"EM", "EulerHeun", "LambaEM", "LambaEulerHeun", "RKMil", "RKMilCommute"} <= names
    assert {"RKMilGeneral", "SRA1", "SOSRA", "SRIW1", "SOSRI", "ReversibleHeun"} <= names
    assert {"ImplicitEM", "ImplicitRKMil"} <= names
    for kind in KINDS:
        for integral in ("ito", "stratonovich"):
            assert any(fits(alg, kind, integral) for alg in METHODS)


@every_case
def test_declarations(alg, kind, integral) -> None:
    assert check_method(alg, kind, integral) is alg
    assert alg.strong_order in (0.5, 1.0, 1.5) and alg.weak_order >= 0.5
    assert alg.order > 0 and alg.default_controller().factor_max == pytest.approx(1.125)
    assert eval(repr(alg), {type(alg).__name__: type(alg)}).name == alg.name


@every_case
@pytest.mark.parametrize("h", [0.05, -0.05], ids=["forward", "backward"])
def test_a_step_is_a_pure_function(alg, kind, integral, h) -> None:
    prob = problem(kind, integral)
    field = SDEField.of(prob)
    u = field.structure.ravel(prob.u0)
    du = field.discover(0.0, u, h, False)
    field.path = brownian_path(field, alg, 3, None, (0.0, h))
    state = alg.init(field, 0.0, u, du if alg.carries_derivative else None)
    before = [x.clone() for x in state]
    with torch.no_grad():
        once, again = (alg.step(field, 0.0, h, state) for _ in range(2))
    recorded = alg.step(field, 0.0, h, state)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
    for step in (again, recorded):
        for x, y in zip(step.state, once.state, strict=True):
            torch.testing.assert_close(x.detach(), y, rtol=1e-10, atol=1e-10)
    assert (once.error is None) == (not alg.adaptive)
    assert (once.stiffness is None) == (not alg.estimates_stiffness)
    assert once.converged and len(once.state) == len(state)
    ends = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    found = once.interpolant.keep()(ends)
    torch.testing.assert_close(found, torch.stack([u, once.state[0]]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("alg", "kind", "integral"), [c for c in CASES if c.values[1] in ("scalar", "additive")]
)
def test_shapes_of_g_that_mean_the_same(alg, kind, integral) -> None:
    options = {"dt": 0.1, "adaptive": False, "seed": 2}
    if kind == "scalar":
        a, b = (solve(problem(kind, integral, x), alg, **options) for x in SHAPES[kind])
        torch.testing.assert_close(a.u, b.u, rtol=1e-10, atol=1e-10)
    vector = problem(kind, integral, "vector")
    matrix = vector.remake(g=lambda t, u, p: torch.diag_embed(vector.g(t, u, p)))
    if kind == "additive":
        a, b = (solve(x, alg, **options) for x in (vector, matrix))
        torch.testing.assert_close(a.u, b.u, rtol=1e-10, atol=1e-10)


@every_case
def test_every_shape_of_noise_solves(alg, kind, integral) -> None:
    for shape in SHAPES[kind]:
        prob = problem(kind, integral, shape)
        sol = solve(prob, alg, dt=0.1, rtol=0.1, atol=0.1, seed=1)
        assert sol.success and bool(torch.isfinite(sol.u).all())
        single = prob.remake(u0=prob.u0[0])
        assert solve(single, alg, dt=0.1, rtol=0.1, atol=0.1, seed=1).u.shape[1:] == (2,)


@every_case
def test_paths_are_independent(alg, kind, integral) -> None:
    prob = problem(kind, integral)
    # Newton stops at a part of the tolerance
    tight = {"rtol": 1e-11, "atol": 1e-11} if alg.is_implicit else {}
    options = {"dt": 0.05, "adaptive": False, **tight}
    seeds = torch.tensor([4, 8, 15])
    together = solve(prob, alg, seed=seeds, **options).u
    for i, seed in enumerate(seeds.tolist()):
        alone = solve(prob.remake(u0=prob.u0[i]), alg, seed=seed, **options).u
        torch.testing.assert_close(alone, together[:, i], rtol=1e-9, atol=1e-9)


@every_case
def test_without_noise_it_is_a_method_for_odes(alg, kind, integral) -> None:
    prob = problem(kind, integral)
    silent = prob.remake(g=lambda t, u, p: 0 * prob.g(t, u, p))
    errors = []
    ode = ODEProblem(prob.f, prob.u0, prob.tspan, prob.p)
    reference = solve(ode, Vern7(), rtol=1e-9, atol=1e-9, save_everystep=False).u[-1]
    for n in (16, 32):
        u = solve(silent, alg, dt=1 / n, adaptive=False, seed=0, save_everystep=False).u[-1]
        errors.append(float((u - reference).abs().max()))
    assert errors[1] < 0.6 * errors[0] < 0.06  # of order 1 at least


@every_case
def test_gradients_step_by_step_at_once_and_on_the_tape(alg, kind, integral, monkeypatch) -> None:
    prob = problem(kind, integral, SHAPES[kind][-1])
    times = [0.0, 0.11, 0.5, 0.52, 1.0]

    def gradient(sensealg, **options) -> list[Tensor]:
        u0, p = (x.clone().requires_grad_() for x in (prob.u0, prob.p))
        moved = prob.remake(u0=u0, p=p)
        sol = solve(moved, alg, sensealg=sensealg, saveat=times, seed=3, dt=0.06, **options)
        weights = torch.linspace(0.5, 2.0, sol.u.numel(), dtype=DOUBLE).reshape(sol.u.shape)
        loss = (weights * sol.u**2).sum()
        if alg.adaptive:
            loss = loss + sol.steps.error.sum() + sol.steps.error_norm.sum()
        if alg.estimates_stiffness:
            loss = loss + 0.1 * sol.steps.stiffness.sum()
        return list(torch.autograd.grad(loss, [u0, p]))

    for options in ({"adaptive": False}, {"rtol": 1e-2, "atol": 1e-2}):
        if alg.is_implicit:  # Newton stops at a part of the tolerance
            options = {**options, "rtol": 1e-9, "atol": 1e-9, "adaptive": False}
        tape = gradient(DiscreteAdjoint(tape=True), **options)
        found = [gradient(DiscreteAdjoint(), **options)]
        found.append(gradient(DiscreteAdjoint(checkpoints=3), **options))
        with monkeypatch.context() as patch:
            patch.setattr(parallel, "_WORK_WORTH_A_CALL", -1)
            found.append(gradient(DiscreteAdjoint(), **options))
        for grads in found:
            for got, expected in zip(grads, tape, strict=True):
                assert_near(got, expected, 1e-6 if alg.is_implicit else 1e-10)


@every_case
def test_float32(alg, kind, integral) -> None:
    prob = problem(kind, integral)
    small = prob.remake(u0=prob.u0.float(), p=prob.p.float())
    a, b = (solve(x, alg, dt=0.05, adaptive=False, seed=3) for x in (prob, small))
    assert b.u.dtype == torch.float32
    torch.testing.assert_close(b.u.double(), a.u, rtol=1e-3, atol=1e-3)
