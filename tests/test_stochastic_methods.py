"""SRA, SRI and Milstein methods: strong orders, work, estimates, adaptive solves."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sdes import DOUBLE, linear, linear_solution, rms, slope
from stochastic_runs import integral_of, observed, observed_against, same_path, solve
from strong_problems import SRA_METHODS, pendulum, rotation, sinh, sinh_solution
from torch import Tensor

from diffsolve import (
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
RKMIL = [RKMil(), RKMil("stratonovich")]
MILSTEIN = [kind(x) for kind in (RKMil, RKMilCommute, RKMilGeneral) for x in
            ("ito", "stratonovich")]  # fmt: skip


def rotation_solution(t: float, W: Tensor) -> Tensor:
    angle = 0.5 * t + 0.8 * W[:, 0]
    c, s = angle.cos(), angle.sin()
    return torch.stack([c - 0.5 * s, s + 0.5 * c], -1)


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
        def correction(self, start, K):
            field, root = start.field, math.sqrt(start.h)
            beside = field.diffusion(start.now, start.u + root * start.G)
            return field.product(beside - start.G, start.W * start.W / (2 * root))

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
