"""Tableaus of stochastic Runge-Kutta methods: their conditions, what is refused, their programs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sdes import DOUBLE

from diffsolve import SDEProblem, SRATableau, SRITableau
from diffsolve.problems.sde_field import GivenNoise, SDEField
from diffsolve.solvers.order_conditions import TableauError
from diffsolve.solvers.stochastic import tableaus
from diffsolve.solvers.stochastic.srk import SOSRA, SOSRI, SRA, SRA1, SRI, SRIW1

NAMES = tableaus.__all__
DIAGONAL = [name for name in NAMES if isinstance(getattr(tableaus, name), SRITableau)]
ADDITIVE = [name for name in NAMES if name not in DIAGONAL]

# of the same papers, for what users build: Rößler (2010); SRA3 by StochasticDiffEq.jl's numbers
SRIW2: dict[str, Any] = {
    "name": "SRIW2",
    "source": "Rößler (2010)",
    "alpha": (1 / 6, 1 / 6, 2 / 3, 0),
    "beta1": (-1, 4 / 3, 2 / 3, 0),
    "beta2": (1, -4 / 3, 1 / 3, 0),
    "beta3": (2, -4 / 3, -2 / 3, 0),
    "beta4": (-2, 5 / 3, -2 / 3, 1),
    "a0": ((), (1,), (1 / 4, 1 / 4)),
    "a1": ((), (1 / 4,), (1,), (0, 0, 1 / 4)),
    "b0": ((), (0,), (1, 1 / 2)),
    "b1": ((), (-1 / 2,), (1,), (2, -1, 1 / 2)),
}
SRA3: dict[str, Any] = {
    "name": "SRA3",
    "source": "Rößler (2010)",
    "alpha": (1 / 6, 1 / 6, 2 / 3),
    "beta1": (1, 0, 0),
    "beta2": (-1, 1, 0),
    "a0": ((), (1,), (1 / 4, 1 / 4)),
    "b0": ((), (0,), (1, 1 / 2)),
    "c1": (1, 0, 0),
}


def of(name: str) -> Any:
    return getattr(tableaus, name)


def arguments(tableau: Any) -> dict[str, Any]:
    """What a tableau was made of."""
    given = {
        "name": tableau.name,
        "source": tableau.source,
        "alpha": tableau.alpha,
        "a0": tableau.a0,
        "b0": tableau.b0,
        **{f"beta{i}": b for i, b in enumerate(tableau.beta, 1)},
    }
    if isinstance(tableau, SRATableau):
        return {**given, "c1": tableau.c1}
    return {**given, "a1": tableau.a1, "b1": tableau.b1}


def shifted(values: Any, index: Any, by: float = 1e-7) -> np.ndarray:
    copy = np.array(values, dtype=np.float64)
    copy[index] += by
    return copy


# -- conditions --------------------------------------------------------------------------------


def defects(tableau: Any) -> list[float]:
    """Conditions of strong order 1.5, written out once more, relative to their terms."""
    a, e = tableau.alpha, np.ones(len(tableau.alpha))
    B0 = tableau.b0 @ e
    sums = [(a, 1), (a * (tableau.a0 @ e), 0.5), (a * B0, 1), (a * B0**2, 1.5)]
    if isinstance(tableau, SRATableau):
        b1, b2 = tableau.beta
        sums += [(b1, 1), (b2, 0), (b1 * tableau.c1, 1), (b2 * tableau.c1, -1)]
    else:
        b1, b2, b3, b4 = tableau.beta
        A1, B1 = tableau.a1 @ e, tableau.b1 @ e
        BB = tableau.b1 @ B1
        sums += [(b1, 1), (b2, 0), (b3, 0), (b4, 0)]
        sums += [(b1 * B1, 0), (b2 * B1, 1), (b3 * B1, 0), (b4 * B1, 0)]
        sums += [(b1 * A1, 1), (b2 * A1, 0), (b3 * A1, -1), (b4 * A1, 0)]
        sums += [(b1 * B1**2, 1), (b2 * B1**2, 0), (b3 * B1**2, -1), (b4 * B1**2, 2)]
        sums += [(b1 * BB, 0), (b2 * BB, 0), (b3 * BB, 0), (b4 * BB, 1)]
        sums += [((b1 / 2 + b3 / 3) * (tableau.a1 @ B0), 0)]
    return [abs(x.sum() - target) / max(1.0, np.abs(x).sum()) for x, target in sums]


@pytest.mark.parametrize("name", NAMES)
def test_conditions_hold_to_the_last_digit(name: str) -> None:
    of(name).check()  # those of the library are not checked when they are imported
    found = defects(of(name))
    assert len(found) == (8 if name in ADDITIVE else 25)
    assert max(found) < 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_nodes_are_row_sums(name: str) -> None:
    tableau = of(name)
    np.testing.assert_array_equal(tableau.c0, tableau.a0.sum(1))
    if name in DIAGONAL:
        np.testing.assert_array_equal(tableau.c1, tableau.a1.sum(1))


@pytest.mark.parametrize("name", NAMES)
def test_corrupted_coefficients_are_refused(name: str) -> None:
    tableau = of(name)
    given, last = arguments(tableau), len(tableau.alpha) - 1
    kind = type(tableau)
    kind(**given)  # unchanged, it passes
    changes = {key: shifted(given[key], 0) for key in given if key.startswith(("alpha", "beta"))}
    changes |= {"a0": shifted(tableau.a0, (1, 0)), "b0": shifted(tableau.b0, (1, 0))}
    if name in ADDITIVE:
        changes["c1"] = shifted(tableau.c1, int(np.argmax(np.abs(tableau.beta[0]))))
    else:
        changes["a1"] = shifted(tableau.a1, (1, 0))
        changes["b1"] = shifted(tableau.b1, (last, 0))
    for key, value in changes.items():
        with pytest.raises(TableauError, match=r"the condition .* fails"):
            kind(**given | {key: value})


def test_the_sign_of_beta2_belongs_to_that_of_b1() -> None:
    given = arguments(tableaus.SRIW1)
    with pytest.raises(TableauError, match="beta2 B1 e = 1"):
        SRITableau(**given | {"beta2": -given["beta2"]})


@pytest.mark.parametrize(
    ("kind", "given", "changes", "message"),
    [
        (SRATableau, SRA3, {"beta1": (1, 0)}, r"beta1 has shape \(2,\), alpha has 3"),
        (SRATableau, SRA3, {"c1": (1, 0)}, r"c1 has shape \(2,\), alpha has 3"),
        (SRATableau, SRA3, {"a0": ((1,),)}, "row 0 of a does not fit 3 explicit stages"),
        (SRATableau, SRA3, {"alpha_embedded": (1, 0)}, "alpha_embedded has shape"),
        (SRATableau, SRA3, {"alpha_embedded": (1, 1, 0)}, "alpha_embedded e = 1"),
        (SRITableau, SRIW2, {"beta4": (1,)}, r"beta4 has shape \(1,\), alpha has 4"),
        (SRITableau, SRIW2, {"b1": ((), (1, 1))}, "row 1 of a does not fit 4 explicit stages"),
    ],
)
def test_wrong_shapes_are_refused(kind: Any, given: Any, changes: Any, message: str) -> None:
    with pytest.raises(TableauError, match=message):
        kind(**given | changes)


def test_methods_of_any_tableau() -> None:
    assert repr(SRI(SRITableau(**SRIW2))) == "SRI(SRIW2)" and SRI(tableaus.SOSRI).name == "SOSRI"
    assert repr(SRA(SRATableau(**SRA3))) == "SRA(SRA3)"
    assert repr(SOSRI()) == "SOSRI()"
    with pytest.raises(TypeError, match="SRI needs a SRITableau, got SRATableau"):
        SRI(tableaus.SRA1)
    with pytest.raises(TypeError, match="SRA needs a SRATableau, got str"):
        SRA("SRA1")


# -- programs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tableau", "drift", "diffusion"),
    [
        (tableaus.SRA1, 2, 2),
        (tableaus.SOSRA, 3, 3),
        (SRATableau(**SRA3), 3, 2),  # the last weights of the noise are zero
        (tableaus.SRIW1, 2, 4),  # its third stage of the drift is the first
        (SRITableau(**SRIW2), 3, 4),
        (tableaus.SOSRI, 4, 4),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_nothing_is_evaluated_twice_or_in_vain(tableau: Any, drift: int, diffusion: int) -> None:
    assert tableau.program.count("drift") == drift
    assert tableau.program.count("diffusion") == diffusion


def f(t: Any, u: Any) -> Any:
    return torch.sin(2 * t) - u * torch.cos(u)


def g(t: Any, u: Any) -> Any:
    return (1 + t) * (0.5 + 0.2 * torch.sin(u))


def g_additive(t: Any, u: Any) -> Any:
    return (1 + torch.sin(t)) * torch.ones_like(u)


def literal(tableau: Any, t: float, h: float, u: torch.Tensor, W: Any, H: Any) -> Any:
    """A step as Rößler writes it, stage by stage, and the two parts of its error."""
    s, size = len(tableau.alpha), abs(h)
    J10 = W / 2 + H
    time = torch.as_tensor(t, dtype=DOUBLE)
    F: list[Any] = []
    G: list[Any] = []
    additive = isinstance(tableau, SRATableau)
    if additive:
        J = [W, J10]
    else:
        root = math.sqrt(size)
        J = [W, (W**2 - size) / (2 * root), J10, (W**3 - 3 * size * W) / (6 * size)]
    for i in range(s):
        H0, H1 = u, u
        for j in range(i):
            H0 = H0 + tableau.a0[i, j] * h * F[j] + tableau.b0[i, j] * J10 * G[j]
            if not additive:
                H1 = H1 + tableau.a1[i, j] * h * F[j] + tableau.b1[i, j] * math.sqrt(size) * G[j]
        F.append(f(time + tableau.c0[i] * h, H0))
        G.append((g_additive if additive else g)(time + tableau.c1[i] * h, H1))
    drift = sum(tableau.alpha[i] * h * F[i] for i in range(s))
    terms = [sum(b[i] * x * G[i] for i in range(s)) for b, x in zip(tableau.beta, J, strict=True)]
    half = len(terms) // 2
    return u + drift + sum(terms), (drift - h * F[0]).abs() + sum(terms[half:]).abs()


@pytest.mark.parametrize("h", [0.1, -0.1])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("alg", [SRA1(), SOSRA(), SRIW1(), SOSRI(), SRI(SRITableau(**SRIW2))])
def test_steps_are_the_formulas(alg: Any, recorded: bool, h: float) -> None:
    additive = isinstance(alg, SRA)
    u = torch.linspace(-1, 2, 6, dtype=DOUBLE).reshape(3, 2)
    noise = "additive" if additive else "diagonal"
    prob = SDEProblem(f, g_additive if additive else g, u, (0.0, 1.0), noise=noise)
    field = SDEField.of(prob)
    field.discover(0.0, u.reshape(-1), 1.0, False)
    W, H = torch.randn(2, 3, 2, dtype=DOUBLE) * math.sqrt(abs(h)) / torch.tensor([[[1]], [[3.5]]])
    field.given = GivenNoise(torch.empty(0, 3, 2), W, H)
    for _ in range(2):  # the second time in buffers that were used
        with torch.set_grad_enabled(recorded):
            step = alg.step(field, 0.3, h, (u.reshape(-1),))
        new, error = literal(alg.tableau, 0.3, h, u, W, H)
        torch.testing.assert_close(step.state[0].reshape(3, 2), new, rtol=1e-13, atol=1e-13)
        assert step.error is not None
        torch.testing.assert_close(step.error.reshape(3, 2), error, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("recorded", [False, True])
def test_matrices_of_diffusion_give_what_their_entries_give(recorded: bool) -> None:
    """Additive noise ``(..., d, m)``: with a diagonal matrix it is diagonal noise."""
    u = torch.linspace(-1, 2, 6, dtype=DOUBLE).reshape(3, 2)
    W, H = 0.2 * torch.randn(2, 3, 2, dtype=DOUBLE)
    found = []
    for of_g in (g_additive, lambda t, u: torch.diag_embed(g_additive(t, u))):
        prob = SDEProblem(f, of_g, u, (0.0, 1.0), noise="additive")
        field = SDEField.of(prob)
        field.discover(0.0, u.reshape(-1), 1.0, False)
        field.given = GivenNoise(torch.empty(0, 3, 2), W, H)
        with torch.set_grad_enabled(recorded):
            found.append(SOSRA().step(field, 0.3, 0.1, (u.reshape(-1),)))
    diagonal, matrix = found
    torch.testing.assert_close(matrix.state[0], diagonal.state[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(matrix.error, diagonal.error, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("recorded", [False, True])
def test_one_motion_of_additive_noise_is_a_column_of_many(recorded: bool) -> None:
    u = torch.linspace(-1, 2, 6, dtype=DOUBLE).reshape(3, 2)
    W, H = 0.2 * torch.randn(2, 3, 2, dtype=DOUBLE)
    found = []
    for columns in (1, 2):
        weights = torch.tensor([1.0, 0.0], dtype=DOUBLE)[:columns]
        prob = SDEProblem(
            f,
            lambda t, u: g_additive(t, u)[..., None] * weights,  # noqa: B023
            u,
            (0.0, 1.0),
            noise="additive",
        )
        field = SDEField.of(prob)
        field.discover(0.0, u.reshape(-1), 1.0, False)
        field.given = GivenNoise(torch.empty(0, 3, columns), W[:, :columns], H[:, :columns])
        with torch.set_grad_enabled(recorded):
            found.append(SRA1().step(field, 0.3, 0.1, (u.reshape(-1),)))
    torch.testing.assert_close(found[0].state[0], found[1].state[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found[0].error, found[1].error, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "expected"), [("SRIW1", -0.25), ("SOSRI", 2.84)])
def test_what_keeps_the_weak_order_at_three_halves(name: str, expected: float) -> None:
    """See the notes of ``SRI``; the order itself is measured elsewhere."""
    tableau = of(name)
    weights = tableau.beta[0] + tableau.beta[2] / 2
    assert weights @ tableau.b1.sum(1) ** 3 == pytest.approx(expected, abs=0.005)


def test_a_step_that_is_not_finite_leaves_nothing_behind() -> None:
    """Buffers are used again: NaN in one step must not reach the next."""
    bad = [False]

    def drift(t: Any, u: Any) -> Any:
        return u * (math.nan if bad[0] else 1.0)

    u = torch.ones(3, 1, dtype=DOUBLE)
    prob = SDEProblem(drift, lambda t, u: 0.1 * u, u, (0.0, 1.0))
    field = SDEField.of(prob)
    field.discover(0.0, u.reshape(-1), 1.0, False)
    W, H = 0.1 * torch.randn(2, 3, 1, dtype=DOUBLE)
    field.given = GivenNoise(torch.empty(0, 3, 1), W, H)
    with torch.no_grad():
        before = SOSRI().step(field, 0.0, 0.1, (u.reshape(-1),)).state[0].clone()
        bad[0] = True
        assert not SOSRI().step(field, 0.0, 0.1, (u.reshape(-1),)).state[0].isfinite().any()
        bad[0] = False
        assert torch.equal(SOSRI().step(field, 0.0, 0.1, (u.reshape(-1),)).state[0], before)
