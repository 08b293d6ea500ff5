"""SRA, SRI and Milstein methods: strong orders, work, estimates, adaptive solves."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from sdes import DOUBLE, linear, linear_solution, rms, slope
from stochastic_runs import integral_of, observed, observed_against, one_step, same_path, solve
from torch import Tensor

from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    SRA1,
    SRIW1,
    EulerHeun,
    ImplicitEM,
    ImplicitRKMil,
    ReversibleHeun,
    RKMil,
    RKMilCommute,
    RKMilGeneral,
    SDEProblem,
    Tsit5,
)
from diffsolve.solvers.stochastic.method import registered

SRI_METHODS = [SOSRI(), SRIW1()]
SRA_METHODS = [SOSRA(), SRA1()]
RKMIL = [RKMil(), RKMil("stratonovich")]
MILSTEIN = [kind(x) for kind in (RKMil, RKMilCommute, RKMilGeneral) for x in
            ("ito", "stratonovich")]  # fmt: skip


# -- problems with closed forms ------------------------------------------------------------------


def sinh(rows: int, interpretation: str = "ito", **changes: Any) -> SDEProblem:
    """``u = sinh(asinh(u0) + 0.3 t + 0.5 W)``: nonlinear noise of any sign of curvature."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        along = 0.3 * torch.sqrt(1 + u * u)
        return along + 0.125 * u if interpretation == "ito" else along

    def g(t: Tensor, u: Tensor) -> Tensor:
        return 0.5 * torch.sqrt(1 + u * u)

    u0 = torch.full((rows, 1), 0.2, dtype=DOUBLE)
    return SDEProblem(f, g, u0, (0.0, 1.0), interpretation=interpretation).remake(**changes)


def sinh_solution(t: float, W: Tensor) -> Tensor:
    return torch.sinh(math.asinh(0.2) + 0.3 * t + 0.5 * W)


def rotation(rows: int, shape: int = 2, **changes: Any) -> SDEProblem:
    """``du = (a J - b^2/2) u dt + b J u dW`` with ``J`` a quarter turn and one Brownian motion.

    ``u`` turns by the angle ``a t + b W``, so that ``|u|`` stays as it is. Noise of both shapes.
    """

    def turned(u: Tensor) -> Tensor:
        return torch.stack([-u[..., 1], u[..., 0]], -1)

    def g(t: Tensor, u: Tensor) -> Tensor:
        return 0.8 * turned(u) if shape == 2 else 0.8 * turned(u)[..., None]

    u0 = torch.tensor([[1.0, 0.5]], dtype=DOUBLE).repeat(rows, 1)
    prob = SDEProblem(lambda t, u: 0.5 * turned(u) - 0.32 * u, g, u0, (0.0, 1.0), noise="scalar")
    return prob.remake(**changes)


def rotation_solution(t: float, W: Tensor) -> Tensor:
    angle = 0.5 * t + 0.8 * W[:, 0]
    c, s = angle.cos(), angle.sin()
    return torch.stack([c - 0.5 * s, s + 0.5 * c], -1)


def pendulum(rows: int, m: int = 0, **changes: Any) -> SDEProblem:
    """Nonlinear drift with additive noise that depends on time: ``m`` motions, 0: a diagonal."""
    matrix = torch.tensor([[0.3, 0.1, 0.2], [0.0, 0.4, 0.1]], dtype=DOUBLE)

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack([u[..., 1], -torch.sin(3 * u[..., 0]) - 0.2 * u[..., 1] + t], -1)

    def g(t: Tensor, u: Tensor) -> Tensor:
        size = 1 + torch.sin(3 * t)
        return 0.5 * size * torch.ones_like(u) if m == 0 else (size * matrix).expand(*u.shape, 3)

    u0 = torch.tensor([[1.0, 0.0]], dtype=DOUBLE).repeat(rows, 1)
    return SDEProblem(f, g, u0, (0.0, 1.0), noise="additive").remake(**changes)


# -- strong order --------------------------------------------------------------------------------

COARSE = [16, 32, 64, 128]


@pytest.mark.parametrize("alg", SRI_METHODS, ids=repr)
def test_strong_order_of_sri(alg: Any) -> None:
    prob = linear(rows=1500)
    order, errors = observed(prob, alg, lambda W: linear_solution(prob, 1.0, W), COARSE)
    assert order == pytest.approx(1.5, abs=0.15)
    assert errors[-1] < 8e-4
    order, errors = observed(sinh(1500), alg, lambda W: sinh_solution(1.0, W), COARSE)
    assert order == pytest.approx(1.5, abs=0.1)
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("alg", SRI_METHODS, ids=repr)
@pytest.mark.parametrize("shape", [2, 3])
def test_strong_order_of_sri_with_scalar_noise(alg: Any, shape: int) -> None:
    prob = rotation(800, shape)
    order, errors = observed(prob, alg, lambda W: rotation_solution(1.0, W), COARSE)
    assert order == pytest.approx(1.5, abs=0.15)
    assert errors[-1] < 8e-4


def test_sri_needs_noise_that_is_diagonal() -> None:
    """As the docstring says: a component whose noise depends on another one costs the order."""

    def g(t: Tensor, u: Tensor) -> Tensor:
        return 0.5 * u.flip(-1)

    prob = linear(rows=800, d=2, g=lambda t, u, p: g(t, u))
    *sols, fine = same_path(prob, SOSRI(), [*COARSE, 1024])
    errors = [rms(sol.u[-1] - fine.u[-1]) for sol in sols]
    assert slope(COARSE, errors) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("alg", SRA_METHODS, ids=repr)
@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("interpretation", ["ito", "stratonovich"])
def test_strong_order_of_sra(alg: Any, m: int, interpretation: str) -> None:
    prob = pendulum(200, m, interpretation=interpretation)
    other = SRA1() if isinstance(alg, SOSRA) else SOSRA()
    order, errors = observed_against(prob, alg, [8, 16, 32, 64], other, 512)
    # 1.5 in the end; before, the part of order 2 that comes from linear drift adds to it
    assert 1.45 < order < 1.85
    assert errors[-1] < 8e-4


@pytest.mark.slow
def test_the_strong_order_of_sra_is_not_two() -> None:
    """Where the drift is curved and steps are short enough to see it."""
    u0 = torch.ones(200, 1, dtype=DOUBLE)
    prob = SDEProblem(
        lambda t, u: torch.sin(4 * u),
        lambda t, u: torch.ones_like(u),
        u0,
        (0.0, 1.0),
        noise="additive",
    )
    order, _ = observed_against(prob, SRA1(), [64, 128, 256, 512], SOSRA(), 4096)
    assert order == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("alg", MILSTEIN, ids=repr)
def test_strong_order_of_milstein(alg: Any) -> None:
    prob = linear(rows=1500, interpretation=integral_of(alg))
    order, errors = observed(prob, alg, lambda W: linear_solution(prob, 1.0, W), COARSE)
    assert order == pytest.approx(1.0, abs=0.12)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("alg", RKMIL, ids=repr)
def test_strong_order_of_milstein_with_nonlinear_and_scalar_noise(alg: Any) -> None:
    prob = sinh(1500, integral_of(alg))
    order, errors = observed(prob, alg, lambda W: sinh_solution(1.0, W), COARSE)
    assert order == pytest.approx(1.0, abs=0.08)
    assert errors[-1] < 2.5e-3
    prob = rotation(800)
    if integral_of(alg) == "stratonovich":  # which turns without a drift inward
        turning = rotation(800).f
        prob = prob.remake(f=lambda t, u: turning(t, u) + 0.32 * u, interpretation="stratonovich")
    order, errors = observed(prob, alg, lambda W: rotation_solution(1.0, W), COARSE)
    assert order == pytest.approx(1.0, abs=0.12)
    assert errors[-1] < 0.01


def test_the_usual_correction_of_stratonovich_noise_loses_the_order() -> None:
    """Why ``RKMil`` has another one; see its notes."""

    class Usual(RKMil):
        def correction(self, field, t, h, times, u, K, G, W):
            root = math.sqrt(h)
            beside = field.diffusion(times[0], u + root * G)
            return field.product(beside - G, W * W / (2 * root))

    counts = [32, 128, 512]
    found = {}
    for alg in (Usual("stratonovich"), RKMil("stratonovich")):
        prob = sinh(1000, "stratonovich")
        found[type(alg)], _ = observed(prob, alg, lambda W: sinh_solution(1.0, W), counts)
    assert found[Usual] < 0.7
    assert found[RKMil] == pytest.approx(1.0, abs=0.08)


def test_methods_agree_across_integrals() -> None:
    """A Stratonovich equation and the Ito equation that means the same, along one path."""
    ito = solve(sinh(50), SOSRI(), dt=1 / 512, adaptive=False, seed=3)
    for alg in (RKMil("stratonovich"), EulerHeun(), ReversibleHeun()):
        prob = sinh(50, "stratonovich")
        sol = solve(prob, alg, dt=1 / 512, adaptive=False, noise=ito.noise)
        assert rms(sol.u[-1] - ito.u[-1]) < 2e-3


# -- backward in time ----------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [*SRI_METHODS, RKMil()], ids=repr)
def test_backward_in_time_an_ito_equation_is_one_of_the_reversed_path(alg: Any) -> None:
    """Its noise is evaluated at the start of each step, which is then the later time."""
    forward = linear(rows=400)
    sol = solve(forward, alg, dt=1 / 64, adaptive=False, seed=1)
    backward = forward.remake(tspan=(1.0, 0.0))
    counts = [16, 32, 64]
    errors = []
    for n in counts:
        back = solve(backward, alg, dt=1 / n, adaptive=False, noise=sol.noise)
        W = sol.noise.at([1.0])[0]
        a, b = forward.p
        exact = torch.exp(-(a + b * b / 2) - b * W)
        errors.append(rms(back.u[-1] - exact))
    assert slope(counts, errors) == pytest.approx(alg.strong_order, abs=0.2)


@pytest.mark.parametrize("alg", [RKMil("stratonovich"), RKMilCommute("stratonovich")], ids=repr)
def test_a_stratonovich_equation_goes_back_where_it_came_from(alg: Any) -> None:
    prob = sinh(400, "stratonovich")
    sol = solve(prob, alg, dt=1 / 256, adaptive=False, seed=1)
    errors, counts = [], [32, 64, 128, 256]
    for n in counts:
        back = prob.remake(u0=sinh_solution(1.0, sol.noise.at([1.0])[0]), tspan=(1.0, 0.0))
        end = solve(back, alg, dt=1 / n, adaptive=False, noise=sol.noise)
        errors.append(rms(end.u[-1] - prob.u0))
    assert slope(counts, errors) == pytest.approx(1.0, abs=0.15)
    assert errors[-1] < 2e-3


# -- work, and what is declared ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alg", "nf", "ng"),
    [
        (SOSRI(), 4, 4), (SRIW1(), 2, 4), (RKMil(), 1, 3), (RKMil("stratonovich"), 1, 2),
        (RKMilCommute(), 1, 3), (RKMilGeneral(), 1, 3), (ReversibleHeun(), 1, 1),
    ],
    ids=repr,
)  # fmt: skip
def test_evaluations_a_step(alg: Any, nf: int, ng: int) -> None:
    prob = linear(rows=3, interpretation=integral_of(alg))
    few, many = (solve(prob, alg, dt=1 / n, adaptive=False, seed=0).stats for n in (10, 30))
    assert (many.nf - few.nf, many.ng - few.ng) == (20 * nf, 20 * ng)
    assert few.nf <= 10 * nf + 1 and few.ng <= 10 * ng + 2


@pytest.mark.parametrize(
    ("alg", "nf", "ng"),
    [(SOSRA(), 3, 3), (SRA1(), 2, 2), (RKMilCommute(), 1, 2), (RKMilGeneral(), 1, 2)],
    ids=repr,
)
def test_evaluations_a_step_with_additive_noise(alg: Any, nf: int, ng: int) -> None:
    for m in (0, 3):
        few, many = (
            solve(pendulum(3, m), alg, dt=1 / n, adaptive=False, seed=0).stats for n in (10, 30)
        )
        assert (many.nf - few.nf, many.ng - few.ng) == (20 * nf, 20 * ng)


def test_what_is_declared() -> None:
    for alg in (*SRI_METHODS, *SRA_METHODS):
        assert (alg.strong_order, alg.adaptive, alg.needs_levy_area) == (1.5, True, True)
        assert alg.default_controller().beta1 == pytest.approx(7 / 15)  # an estimate of order 1.5
    for alg in MILSTEIN:
        assert (alg.strong_order, alg.weak_order, alg.adaptive) == (1.0, 1.0, True)
        assert alg.needs_levy_area == isinstance(alg, RKMilGeneral)
    assert [x.interpretation for x in RKMIL] == [{"ito"}, {"stratonovich"}]
    assert repr(RKMil("stratonovich")) == "RKMil('stratonovich')"
    assert SOSRA().interpretation == {"ito", "stratonovich"}


def test_what_the_table_in_the_docs_declares() -> None:
    text = (Path(__file__).parents[1] / "docs" / "sde.md").read_text()
    by_name = {alg.name: alg for alg in registered()}
    for row in text.splitlines():
        cells = [cell.strip() for cell in row.split("|")]
        names = re.findall(r"`(\w+)\(", cells[1]) if len(cells) == 8 else []
        for alg in map(by_name.pop, dict.fromkeys(names)):
            assert (cells[5] == "adaptive") == alg.adaptive, row
            assert str(alg.strong_order).removesuffix(".0") in re.split("[,; ]+", cells[4]), row
    assert not by_name  # all of them are there


@pytest.mark.parametrize("kind", [RKMil, RKMilCommute, RKMilGeneral, ImplicitRKMil])
def test_an_unknown_integral_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=f'{kind.__name__}: interpretation must be "ito" or'):
        kind("itô")


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_time_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="time_scale must be positive and finite"):
        RKMilGeneral(time_scale=scale)


@pytest.mark.parametrize(
    ("alg", "changes", "named"),
    [
        (SOSRI(), {"noise": "general"}, "RKMilGeneral()"),
        (SOSRI(), {"noise": "additive"}, "SOSRA()"),
        (SOSRI(), {"interpretation": "stratonovich"}, "RKMil('stratonovich')"),
        (SRIW1(), {"interpretation": "stratonovich"}, "ReversibleHeun()"),
        (SOSRA(), {"noise": "diagonal"}, "SOSRI()"),
        (RKMil(), {"interpretation": "stratonovich"}, "RKMil('stratonovich')"),
        (RKMil("stratonovich"), {}, "RKMil()"),
        (ReversibleHeun(), {}, "SRIW1()"),
        (ImplicitEM(), {"interpretation": "stratonovich"}, "ImplicitRKMil('stratonovich')"),
        (Tsit5(), {}, "SOSRI()"),
    ],
    ids=repr,
)
def test_wrong_combinations_are_refused_with_those_that_fit(
    alg: Any, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match="equation") as error:
        solve(linear(**changes), alg, seed=0)
    assert named in str(error.value)


# -- error and stiffness estimates ---------------------------------------------------------------


@pytest.mark.parametrize(("alg", "order"), [(SOSRI(), 1.5), (SRIW1(), 1.5), (RKMil(), 1.0)])
def test_estimates_have_the_order_by_which_steps_are_chosen(alg: Any, order: float) -> None:
    sizes = [0.04, 0.02, 0.01]
    errors = [rms(one_step(linear(rows=3000), alg, h)[0].error) for h in sizes]
    # the part of the drift in that of Milstein's method is of order 1.5
    assert slope([1 / h for h in sizes], errors) == pytest.approx(order, abs=0.07)
    assert alg.order + 0.5 == order


@pytest.mark.parametrize("alg", SRA_METHODS, ids=repr)
def test_estimates_of_sra(alg: Any) -> None:
    sizes = [0.04, 0.02, 0.01]
    errors = [rms(one_step(pendulum(2000, 3), alg, h)[0].error) for h in sizes]
    assert slope([1 / h for h in sizes], errors) == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1()], ids=repr)
def test_the_estimate_of_sri_is_the_error_of_milsteins_method(alg: Any) -> None:
    """The embedded solution is a Milstein scheme with Euler's drift: the magnitudes add up."""
    prob, h = linear(rows=4000), 0.01
    step, noise = one_step(prob, alg, h)
    W = noise.increment(0.0, h).W
    a, b = prob.p
    milstein = prob.u0 * (1 + a * h + b * W + b * b * (W * W - h) / 2)
    off = rms(milstein - linear_solution(prob, h, W))
    assert off < rms(step.error) < 3 * off


@pytest.mark.parametrize("alg", [RKMil(), RKMilCommute(), RKMilGeneral()], ids=repr)
def test_the_estimate_of_milstein_is_the_error_of_eulers_method(alg: Any) -> None:
    prob, h = linear(rows=4000), 0.01
    step, noise = one_step(prob, alg, h)
    W = noise.increment(0.0, h).W
    euler = 1 + prob.p[0] * h + prob.p[1] * W
    error = (euler - linear_solution(prob, h, W)).abs().reshape(-1)
    assert rms(step.error - error) < 0.25 * rms(error)


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1(), RKMil(), ImplicitRKMil()], ids=repr)
def test_stiffness_is_that_of_the_drift(alg: Any) -> None:
    prob = linear(rows=4, f=lambda t, u, p: -50 * u)
    sol = solve(prob, alg, rtol=1e-2, atol=1e-2, seed=0)
    torch.testing.assert_close(sol.steps.stiffness, torch.full_like(sol.steps.h, 50.0))


@pytest.mark.parametrize("alg", SRA_METHODS, ids=repr)
def test_stiffness_with_additive_noise(alg: Any) -> None:
    prob = pendulum(4, 3, f=lambda t, u: -50 * u)
    sol = solve(prob, alg, rtol=1e-2, atol=1e-2, seed=0)
    torch.testing.assert_close(sol.steps.stiffness, torch.full_like(sol.steps.h, 50.0))


# -- adaptive solves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alg", "limits"),
    [(SOSRI(), (30, 95, 275)), (SRIW1(), (16, 50, 145)), (RKMil(), (10, 50, 410))],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["linear", "sinh"])
def test_the_error_follows_the_tolerance(alg: Any, limits: tuple[int, ...], kind: str) -> None:
    prob = linear(rows=50) if kind == "linear" else sinh(50)
    errors = []
    for tol, most in zip((1e-1, 1e-2, 1e-3), limits, strict=True):
        sol = solve(prob, alg, rtol=tol, atol=tol, seed=2, save_everystep=False)
        W = sol.noise.at([1.0])[0]
        exact = linear_solution(prob, 1.0, W) if kind == "linear" else sinh_solution(1.0, W)
        errors.append(rms((sol.u[-1] - exact) / (tol + tol * exact.abs())))
        assert errors[-1] < 1.5
        assert sol.stats.nf < most and sol.stats.nreject <= 5
    assert min(errors) > 0.02  # and no work for nothing


@pytest.mark.slow
@pytest.mark.parametrize("alg", SRA_METHODS, ids=repr)
def test_the_error_follows_the_tolerance_with_additive_noise(alg: Any) -> None:
    prob = pendulum(50, 3)
    stages = 3 if isinstance(alg, SOSRA) else 2
    for tol, most in ((1e-1, 13), (1e-2, 40), (1e-3, 150)):
        sol = solve(prob, alg, rtol=tol, atol=tol, seed=2, save_everystep=False)
        fine = solve(prob, SRA1(), dt=1 / 512, adaptive=False, noise=sol.noise)
        error = rms((sol.u[-1] - fine.u[-1]) / (tol + tol * fine.u[-1].abs()))
        assert 0.02 < error < 1
        assert sol.stats.nf < stages * most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prob", "alg"),
    [(linear(rows=20), SOSRI()), (sinh(20), SRIW1()), (pendulum(20), SRA1())],
    ids=["linear", "sinh", "pendulum"],
)
def test_tighter_tolerances_on_the_same_path(prob: SDEProblem, alg: Any) -> None:
    """Replayed noise: the solutions converge to the one that knows most of the path."""
    fine = solve(prob, alg, rtol=2e-5, atol=2e-5, seed=7)
    errors = []
    for tol in (1e-2, 1e-3, 1e-4):
        sol = solve(prob, alg, rtol=tol, atol=tol, noise=fine.noise, save_everystep=False)
        errors.append(rms(sol.u[-1] - fine.u[-1]))
    assert errors[1] < 0.3 * errors[0] and errors[2] < 0.3 * errors[1]
    assert errors[2] < 2e-4


def test_burst_of_noise_is_resolved() -> None:
    """Steps are short where noise acts, and long where it does not."""

    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return 2 * torch.exp(-((t - 0.5) ** 2) / 0.002) * u

    sol = solve(linear(rows=20, g=g), SOSRI(), rtol=1e-2, atol=1e-2, seed=0, dtmax=0.05)
    t, h = sol.steps.t, sol.steps.h
    inside = (t - 0.5).abs() < 0.05
    assert sol.stats.nreject > 0
    assert float(h[inside].min()) < 0.2 * float(h[~inside].max())


def test_rejections_leave_the_law_of_the_path_alone() -> None:
    prob = linear(p=torch.tensor([0.0, 2.0], dtype=DOUBLE))
    ends, rejected = [], 0
    for seed in range(300):
        sol = solve(prob, SRIW1(), rtol=0.1, atol=0.1, seed=seed, save_everystep=False, dt=0.5)
        ends.append(float(sol.noise.at([1.0])[0, 0, 0]))
        rejected += sol.stats.nreject
    assert rejected > 100
    assert stats.kstest(ends, "norm").pvalue > 0.01


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1(), RKMil()], ids=repr)
def test_small_noise_gives_what_an_ode_gives(alg: Any) -> None:
    prob = linear(p=torch.tensor([0.4, 1e-9], dtype=DOUBLE))
    sol = solve(prob, alg, rtol=1e-6, atol=1e-6, seed=0)
    off = abs(float(sol.u[-1]) - math.exp(0.4))
    # the drift has order 2 in SRI methods, order 1 in Milstein's, whose errors of n steps add up
    assert off < (1e-3 if isinstance(alg, RKMil) else 1e-6)
    assert len(sol.steps) < 700


# -- forms of problems ---------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1(), RKMil(), ImplicitRKMil()], ids=repr)
def test_both_shapes_of_scalar_noise_are_one(alg: Any) -> None:
    flat, matrix = (
        solve(rotation(3, shape), alg, rtol=1e-2, atol=1e-2, seed=4) for shape in (2, 3)
    )
    torch.testing.assert_close(flat.u, matrix.u)
    torch.testing.assert_close(flat.steps.error, matrix.steps.error)


@pytest.mark.parametrize("alg", [SOSRI(), RKMil()], ids=repr)
def test_states_of_other_forms(alg: Any) -> None:
    """A pytree and a flat state: the same numbers as a batch of one."""
    p = torch.tensor([0.4, 0.7], dtype=DOUBLE)
    batch = linear(d=3)
    flat = batch.remake(u0=torch.ones(3, dtype=DOUBLE))
    tree = SDEProblem(
        lambda t, u, p: {k: p[0] * x for k, x in u.items()},
        lambda t, u, p: {k: p[1] * x for k, x in u.items()},
        {"a": torch.ones(2, dtype=DOUBLE), "b": torch.ones((), dtype=DOUBLE)}, (0.0, 1.0), p,
    )  # fmt: skip
    ends = [solve(x, alg, seed=1, rtol=1e-2, atol=1e-2).u for x in (batch, flat, tree)]
    torch.testing.assert_close(ends[0][-1, 0], ends[1][-1])
    torch.testing.assert_close(torch.cat([ends[2]["a"][-1], ends[2]["b"][-1:]]), ends[1][-1])


@pytest.mark.parametrize("alg", [SOSRI(), SRIW1(), RKMil(), ImplicitRKMil()], ids=repr)
def test_single_precision(alg: Any) -> None:
    prob = linear(rows=20).remake(u0=torch.ones(20, 1), p=torch.tensor([0.4, 0.7]))
    sol = solve(prob, alg, dt=1 / 64, adaptive=False, seed=1)
    double = solve(linear(rows=20), alg, dt=1 / 64, adaptive=False, seed=1)
    assert sol.u.dtype == torch.float32 and sol.steps.error.dtype == torch.float32
    torch.testing.assert_close(sol.u.double(), double.u, rtol=1e-4, atol=1e-5)


def test_saved_values_follow_the_path() -> None:
    prob = linear(rows=200)
    times = torch.linspace(0, 1, 41, dtype=DOUBLE)
    sol = solve(prob, SOSRI(), rtol=1e-2, atol=1e-2, seed=5, saveat=times, dtmax=0.05)
    W = sol.noise.at(times.tolist())
    off = [
        rms(u - linear_solution(prob, float(t), w)) for t, u, w in zip(times, sol.u, W, strict=True)
    ]
    assert max(off) < 0.03
    # a straight line between the steps, without the path, would be far off
    euler = solve(prob, EM(), dt=0.025, adaptive=False, noise=sol.noise)
    assert max(off) < 0.5 * rms(euler.u[-1] - linear_solution(prob, 1.0, W[-1]))
