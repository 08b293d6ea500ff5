"""Gradients of SDEs by what f and g depend on, backward in time, of replays and by the tape."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradients import assert_near, leaf
from sde_gradients import (
    SAVES,
    SENSEALGS,
    differences,
    each_sensealg,
    gradients,
    nonlinear,
    weighted,
)
from sdes import DOUBLE, linear, solve, two_noises
from torch import Tensor, nn

from diffsolve import (
    EM,
    SOSRI,
    DiscreteAdjoint,
    EulerHeun,
    LambaEM,
    SDEProblem,
    VirtualBrownianTree,
)

# -- what f and g depend on ----------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(2, 8, dtype=DOUBLE)
        self.outer = nn.Linear(8, 2, dtype=DOUBLE)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(u)))


@pytest.mark.parametrize("alg", [EM(), LambaEM(), SOSRI()], ids=repr)
def test_modules_of_drift_and_diffusion(alg) -> None:
    drift, noise = Net(1), Net(2)
    prob = SDEProblem(drift, noise, torch.ones(4, 2, dtype=DOUBLE), (0.0, 1.0))
    found = []
    for sensealg in SENSEALGS:
        sol = solve(prob, alg, sensealg=sensealg, seed=1, dt=0.1, adaptive=False)
        parameters = [*drift.parameters(), *noise.parameters()]
        found.append(torch.autograd.grad(weighted(sol.u), parameters))
    for grads in found:
        assert all(float(g.abs().max()) > 0 for g in grads)
        for got, expected in zip(grads, found[-1], strict=True):
            assert_near(got, expected, 1e-11)


@each_sensealg
def test_tensors_that_only_g_captures(sensealg) -> None:
    a, b, c = leaf(0.3), leaf(0.5), leaf([0.2, 0.4])
    computed = b * 2  # no leaf: its gradient goes on to b
    prob = SDEProblem(
        lambda t, u, p: a * u,
        lambda t, u, p: computed * u * p["c"],
        torch.ones(3, 2, dtype=DOUBLE),
        (0.0, 1.0),
        {"c": c},
    )
    sol = solve(prob, EM(), sensealg=sensealg, seed=1, dt=0.1)
    got = torch.autograd.grad(weighted(sol.u), [a, b, c])

    def value(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        moved = SDEProblem(lambda t, u: x * u, lambda t, u: 2 * y * u * z, prob.u0, (0.0, 1.0))
        return weighted(solve(moved, EM(), seed=1, dt=0.1).u)

    inputs = [x.detach() for x in (a, b, c)]
    for i, g in enumerate(got):
        flat = torch.zeros_like(inputs[i]).reshape(-1)
        for j in range(len(flat)):
            values = []
            for sign in (1, -1):
                moved = [x.clone() for x in inputs]
                moved[i].view(-1)[j] += sign * 1e-6
                values.append(float(value(*moved)))
            flat[j] = (values[0] - values[1]) / 2e-6
        assert_near(g, flat.reshape(g.shape), 1e-7)


def test_a_parameter_that_is_used_late() -> None:
    late = leaf(0.5)

    def g(t: Tensor, u: Tensor) -> Tensor:
        return u * (late if t > 0.5 else 0.1)

    prob = SDEProblem(lambda t, u: u, g, torch.ones(1, 1, dtype=DOUBLE), (0.0, 1.0))
    values = []
    for sensealg in SENSEALGS:
        sol = solve(prob, EM(), sensealg=sensealg, seed=1, dt=0.1)
        values.append(float(torch.autograd.grad(sol.u[-1].sum(), late)[0]))
    assert values[0] == pytest.approx(values[2], rel=1e-12) and values[0] != 0
    assert values[1] == pytest.approx(values[2], rel=1e-12)


def test_unused_parameters_get_zeros() -> None:
    p = leaf([0.1, 0.2, 0.3])
    sol = solve(linear(p=p), EM(), dt=0.1, seed=0)
    sol.u.sum().backward()
    assert p.grad is not None and float(p.grad[2]) == 0 and bool((p.grad[:2] != 0).all())


def test_random_diffusion_is_told_of() -> None:
    p = leaf([0.1, 0.2])
    prob = linear(p=p, g=lambda t, u, p: p[1] * u * torch.rand_like(u))
    sol = solve(prob, EM(), dt=0.1, seed=0)
    with pytest.raises(RuntimeError, match="draws random numbers"):
        sol.u.sum().backward()


def test_a_pytree_and_general_noise() -> None:
    a = leaf(0.4)

    def f(t: Tensor, u: dict) -> dict:
        return {"x": -a * u["x"], "y": u["x"].sum() - u["y"]}

    def g(t: Tensor, u: dict) -> dict:
        column = torch.tensor([0.3, 0.1], dtype=DOUBLE)
        return {"x": a * u["x"][..., None] * column, "y": u["y"][..., None] * column.flip(0)}

    u0 = {"x": leaf([1.0, 2.0]), "y": leaf([[0.5]])}
    prob = SDEProblem(f, g, u0, (0.0, 1.0), noise="general")
    found = []
    for sensealg in SENSEALGS:
        sol = solve(prob, LambaEM(), sensealg=sensealg, seed=2, rtol=1e-1, atol=1e-1)
        loss = weighted(sol.u["x"]) + sol.u["y"][-1].sum()
        found.append(torch.autograd.grad(loss, [a, *u0.values()]))
    for grads in found[:2]:
        for got, expected in zip(grads, found[2], strict=True):
            assert_near(got, expected, 1e-12)


# -- backward in time, replays, the tape ---------------------------------------------------------


def test_backward_in_time() -> None:
    prob = nonlinear("diagonal").remake(tspan=(1.0, 0.0))
    options = {"seed": 3, "dt": 0.05, "saveat": SAVES[::-1]}
    expected = differences(prob, EM(), **options)
    for sensealg in SENSEALGS:
        assert_near(gradients(prob, EM(), sensealg, **options)[1], expected, 1e-7)


def test_gradients_along_a_path_that_is_given() -> None:
    prob = nonlinear("diagonal")
    path = solve(prob, SOSRI(), rtol=1e-1, atol=1e-1, seed=5).noise
    options = {"noise": path, "dt": 0.05, "adaptive": False, "saveat": SAVES}
    expected = differences(prob, SOSRI(), **options)
    for sensealg in SENSEALGS:
        assert_near(gradients(prob, SOSRI(), sensealg, **options)[1], expected, 1e-7)


@pytest.mark.parametrize("alg", [LambaEM(), SOSRI()], ids=repr)
def test_gradients_along_a_virtual_tree(alg) -> None:
    tree = VirtualBrownianTree(5, 0.0, 1.0, rows=3, m=2)
    options = {"noise": tree, "dt": 0.05, "adaptive": False, "saveat": SAVES}
    expected = differences(nonlinear("diagonal"), alg, **options)
    for sensealg in SENSEALGS:
        assert_near(gradients(nonlinear("diagonal"), alg, sensealg, **options)[1], expected, 1e-7)


@pytest.mark.parametrize("alg", [EM(), SOSRI()], ids=repr)
def test_reading_the_path_between_forward_and_backward_changes_nothing(alg) -> None:
    prob = nonlinear("diagonal")
    options = {"seed": 3, "dt": 0.05, "adaptive": False, "saveat": SAVES}
    _, expected, _ = gradients(prob, alg, None, **options)
    p = prob.p.clone().requires_grad_()
    sol = solve(prob.remake(p=p), alg, **options)
    sol.noise.at(torch.rand(40, dtype=DOUBLE).sort().values.tolist())
    sol.noise.increment(0.0, 0.025)
    weighted(sol.u).backward()
    assert_near(p.grad, expected, 1e-13)


def test_second_derivatives_on_the_tape() -> None:
    def value(p: Tensor) -> Tensor:
        tape = DiscreteAdjoint(tape=True)
        sol = solve(linear(p=p), EM(), dt=0.125, seed=3, sensealg=tape)
        return sol.u[-1].sum()

    p = torch.tensor([0.4, 0.7], dtype=DOUBLE)
    hessian: Tensor = torch.autograd.functional.hessian(value, p)  # type: ignore[assignment]
    W = solve(linear(p=p), EM(), dt=0.125, seed=3).noise
    increments = torch.stack([W.increment(i / 8, (i + 1) / 8).W[0, 0] for i in range(8)])

    def closed(p: Tensor) -> Tensor:
        return torch.prod(1 + p[0] / 8 + p[1] * increments)

    expected: Tensor = torch.autograd.functional.hessian(closed, p)  # type: ignore[assignment]
    assert_near(hessian, expected, 1e-12)


def test_transforms_and_forward_mode() -> None:
    prob = nonlinear("diagonal")
    options = {"seed": 3, "dt": 0.05, "adaptive": False, "saveat": SAVES}

    def value(p: Tensor, alg) -> Tensor:
        return weighted(solve(prob.remake(p=p), alg, **options).u)

    for alg in (EM(), LambaEM(), SOSRI()):
        _, expected, _ = gradients(prob, alg, None, **options)
        assert_near(torch.func.grad(lambda p, alg=alg: value(p, alg))(prob.p), expected, 1e-11)
        for i in range(2):
            tangent = torch.eye(2, dtype=DOUBLE)[i]
            _, by = torch.func.jvp(lambda p, alg=alg: value(p, alg), (prob.p,), (tangent,))
            assert float(by) == pytest.approx(float(expected[i]), rel=1e-10)


def test_dense_output_on_the_tape() -> None:
    prob = nonlinear("diagonal")
    p = prob.p.clone().requires_grad_()
    times = torch.tensor(SAVES, dtype=DOUBLE)
    options = {"seed": 3, "dt": 0.05, "sensealg": DiscreteAdjoint(tape=True)}
    sol = solve(prob.remake(p=p), EM(), **options)
    (got,) = torch.autograd.grad(weighted(sol(times)), p)
    _, expected, _ = gradients(prob, EM(), None, seed=3, dt=0.05, saveat=SAVES)
    assert_near(got, expected, 1e-12)
    plain = solve(prob.remake(p=p), EM(), seed=3, dt=0.05)
    with pytest.raises(RuntimeError, match="list the times in saveat"):
        plain(times).sum().backward()


def test_gradients_of_a_solve_that_failed() -> None:
    p = leaf([0.1, 0.2])
    sol = solve(linear(p=p), EM(), dt=0.1, seed=0, maxiters=5, throw=False)
    (got,) = torch.autograd.grad(sol.u[-1].sum(), p)
    shorter = solve(linear(p=p, tspan=(0.0, 0.5)), EM(), dt=0.1, noise=sol.noise)
    (expected,) = torch.autograd.grad(shorter.u[-1].sum(), p)
    assert_near(got, expected, 1e-12)


def test_memory_of_checkpoints() -> None:
    """With a few checkpoints the tape holds a few states, whatever the number of steps."""
    p = leaf([0.1, 0.2])
    sol = solve(linear(p=p), EM(), dt=1e-3, seed=0, sensealg=DiscreteAdjoint(checkpoints=8),
                save_everystep=False)  # fmt: skip
    node: Any = sol.u.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    assert sum(x.shape == (1,) for x in node.saved_tensors) <= 10
    sol.u[-1].sum().backward()
    assert math.isfinite(float(p.grad.sum()))


def test_two_noises_that_commute() -> None:
    prob = linear(8, g=two_noises, noise="general", interpretation="stratonovich")
    options = {"seed": 3, "dt": 1 / 512, "saveat": [1.0]}
    _, got, sol = gradients(prob, EulerHeun(), None, **options)
    p = prob.p.clone().requires_grad_()
    W = sol.noise.at([1.0])[0]
    weighted(torch.exp(p[0] + p[1] * W[:, :1] + 0.3 * W[:, 1:])[None]).backward()
    assert_near(got, p.grad, 0.02)
