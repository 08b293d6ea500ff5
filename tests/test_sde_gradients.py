"""The discrete adjoint of SDEs: pathwise gradients, against closed forms and differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradients import assert_near, label, leaf
from sdes import DOUBLE, heisenberg, linear, linear_solution, solve, two_noises
from torch import Tensor, nn

import diffsolve.engines.torch.parallel as parallel
from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    DiscreteAdjoint,
    Euler,
    EulerHeun,
    LambaEM,
    LambaEulerHeun,
    ODEProblem,
    RKMil,
    SDEProblem,
    VirtualBrownianTree,
)

METHODS = [EM(), LambaEM(), SOSRI(), EulerHeun(), LambaEulerHeun(), RKMil("stratonovich")]
SENSEALGS = [DiscreteAdjoint(), DiscreteAdjoint(checkpoints=4), DiscreteAdjoint(tape=True)]
SAVES = [0.0, 0.13, 0.5, 0.51, 0.77, 1.0]

each_sensealg = pytest.mark.parametrize("sensealg", SENSEALGS, ids=label)


def of(alg) -> str:
    return next(iter(alg.interpretation))


def noise_of(kind: str):
    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        if kind == "general":
            return torch.stack([p[1] * u.sin(), 0.2 * u.flip(-1), 0.1 * torch.ones_like(u)], -1)
        if kind == "additive":
            return p[1] * torch.exp(-t) * torch.ones_like(u)
        return p[1] * u.sin() if kind == "diagonal" else (p[1] * u.cos())[..., None]

    return g


def nonlinear(kind: str = "diagonal", interpretation: str = "ito", d: int = 2) -> SDEProblem:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return p[0] * u - 0.3 * u**3 + torch.sin(3 * t)

    u0 = torch.linspace(0.8, 1.4, 3 * d, dtype=DOUBLE).reshape(3, d)
    p = torch.tensor([0.4, 0.6], dtype=DOUBLE)
    return SDEProblem(
        f, noise_of(kind), u0, (0.0, 1.0), p, noise=kind, interpretation=interpretation
    )


def weighted(u: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 2.0, u.numel(), dtype=u.dtype).reshape(u.shape)
    return (weights * u**2).sum()


def gradients(prob: SDEProblem, alg, sensealg, loss=weighted, **options):
    u0, p = (x.detach().clone().requires_grad_() for x in (prob.u0, prob.p))
    sol = solve(prob.remake(u0=u0, p=p), alg, sensealg=sensealg, **options)
    value = loss(sol if loss is not weighted else sol.u)
    value.backward()
    return u0.grad, p.grad, sol


def differences(prob: SDEProblem, alg, loss=weighted, eps=1e-6, **options) -> Tensor:
    """Central differences by the parameters, along one path and in the same steps."""
    found = []
    for i in range(len(prob.p)):
        values = []
        for sign in (1, -1):
            p = prob.p.clone()
            p[i] += sign * eps
            sol = solve(prob.remake(p=p), alg, **options)
            values.append(float(loss(sol if loss is not weighted else sol.u)))
        found.append((values[0] - values[1]) / (2 * eps))
    return torch.tensor(found, dtype=DOUBLE)


# -- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [SOSRI(), RKMil("stratonovich")], ids=repr)
@each_sensealg
def test_the_linear_equation(alg, sensealg) -> None:
    """``u = u0 exp((a - b**2/2) t + b W)``: gradients at saved times, by all three."""
    prob = linear(
        20, interpretation=of(alg), u0=torch.linspace(0.5, 1.5, 20, dtype=DOUBLE)[:, None]
    )
    times = [0.25, 0.5, 1.0]
    u0_grad, p_grad, sol = gradients(
        prob, alg, sensealg, saveat=times, seed=3, dt=1 / 1024, adaptive=False
    )
    u0, p = (x.detach().clone().requires_grad_() for x in (prob.u0, prob.p))
    exact = prob.remake(u0=u0, p=p)
    W = sol.noise.at(times)
    u = torch.stack([linear_solution(exact, t, w) for t, w in zip(times, W, strict=True)])
    weighted(u).backward()
    bound = 1e-3 if isinstance(alg, SOSRI) else 2e-3
    assert_near(sol.u, u.detach(), bound)
    assert_near(p_grad, p.grad, 5 * bound)
    assert_near(u0_grad, u0.grad, 5 * bound)


def test_gradients_converge_with_the_order_of_the_method() -> None:
    prob = linear(200)
    errors = []
    for n in (32, 128):
        _, p_grad, sol = gradients(
            prob, SOSRI(), DiscreteAdjoint(), saveat=[1.0], seed=3, dt=1 / n, adaptive=False
        )
        p = prob.p.clone().requires_grad_()
        W = sol.noise.at([1.0])[0]
        weighted(linear_solution(prob.remake(p=p), 1.0, W)[None]).backward()
        errors.append(float((p_grad - p.grad).abs().max()))
    assert errors[0] / errors[1] > 4  # of order 1 at least


def test_additive_noise_in_closed_form() -> None:
    """``du = a dt + b dW``: exact in every step, so the gradient is exact too."""
    prob = linear(
        4, 2, noise="additive", f=lambda t, u, p: p[0] * torch.ones_like(u),
        g=lambda t, u, p: p[1] * torch.ones_like(u),
    )  # fmt: skip
    for alg in (EM(), LambaEM(), SOSRA()):
        _, p_grad, sol = gradients(
            prob, alg, None, lambda s: s.u[-1].sum(), seed=1, dt=0.1, adaptive=False
        )
        expected = torch.stack([torch.tensor(8.0, dtype=DOUBLE), sol.noise.at([1.0]).sum()])
        assert_near(p_grad, expected, 1e-12)


# -- differences along the same path -------------------------------------------------------------


def for_kinds(methods, kinds):
    """Each method with each kind of noise that it takes."""
    cases = [(alg, kind) for alg in methods for kind in kinds if kind in alg.noise_types]
    return pytest.mark.parametrize(("alg", "kind"), cases, ids=[f"{a!r}-{k}" for a, k in cases])


@for_kinds(METHODS, ["diagonal", "scalar", "general", "additive"])
def test_central_differences(alg, kind) -> None:
    prob = nonlinear(kind, of(alg))
    options = {"seed": 3, "dt": 0.05, "adaptive": False, "saveat": SAVES}
    expected = differences(prob, alg, **options)
    for sensealg in SENSEALGS:
        u0_grad, p_grad, _ = gradients(prob, alg, sensealg, **options)
        assert_near(p_grad, expected, 1e-7)
        assert bool((u0_grad != 0).all())


@pytest.mark.parametrize("alg", METHODS, ids=repr)
@pytest.mark.parametrize("batched", [True, False], ids=["at once", "one by one"])
def test_sensealgs_agree_on_adaptive_steps(alg, batched, monkeypatch) -> None:
    """With values saved within steps and rejected steps; steps run again at once and one by one."""
    if not batched:
        monkeypatch.setattr(parallel, "_WORK_WORTH_A_CALL", -1)
    kind = "diagonal" if isinstance(alg, (SOSRI, RKMil)) else "general"
    options = {"seed": 3, "saveat": SAVES, "rtol": 1e-2, "atol": 1e-2}
    options["dt"] = 1.0 if alg.adaptive else 0.03
    prob = nonlinear(kind, of(alg))
    *expected, tape = gradients(prob, alg, DiscreteAdjoint(tape=True), **options)
    assert tape.stats.nreject or not alg.adaptive
    for sensealg in SENSEALGS[:2]:
        *found, sol = gradients(prob, alg, sensealg, **options)
        torch.testing.assert_close(sol.u, tape.u, rtol=1e-13, atol=1e-13)
        for got, wanted in zip(found, expected, strict=True):
            assert_near(got, wanted, 1e-12)


@pytest.mark.parametrize("noisy", [True, False], ids=["SDE", "ODE"])
def test_many_values_in_one_step_do_not_fill_the_memory(noisy, monkeypatch) -> None:
    """Steps that are run at once have as many values inside as the one that has the most."""
    prob: Any = nonlinear("diagonal")
    alg: Any = EM()
    if not noisy:
        prob, alg = ODEProblem(prob.f, prob.u0, prob.tspan, prob.p), Euler()
    # in the fifth of 64 steps, and one in every fourth
    many = [4 / 64 + (i + 0.5) / 64 / 101 for i in range(100)]
    options = {"dt": 1 / 64, "adaptive": False, "engine": "torch"} | ({"seed": 1} if noisy else {})
    options["saveat"] = sorted([*many, *((4 * i + 2.5) / 64 for i in range(16))])
    expected = gradients(prob, alg, DiscreteAdjoint(tape=True), **options)
    run_again, sizes = parallel.ParallelSweep._run_again, []

    def counted(self: Any, times: Tensor, *rest: Tensor) -> Any:
        found = run_again(self, times, *rest)
        if times.ndim == 2:  # not a step alone
            sizes.append((len(times), found[3].numel()))
        return found

    monkeypatch.setattr(parallel.ParallelSweep, "_run_again", counted)
    whole = gradients(prob, alg, DiscreteAdjoint(), **options)
    assert sizes == [(64, 64 * 100 * 6)]
    sizes.clear()
    monkeypatch.setattr(parallel, "_MOST_WORK", 8000)
    parts = gradients(prob, alg, DiscreteAdjoint(), **options)
    assert sum(steps for steps, _ in sizes) == 64
    assert max(entries for _, entries in sizes) <= 8000
    assert len(sizes) <= 4  # the other steps are run at once as ever
    for found in (whole, parts):
        for got, wanted in zip(found[:2], expected[:2], strict=True):
            assert_near(got, wanted, 1e-12)


@pytest.mark.parametrize("saveat", [None, [0.013, 0.5, 0.512, 0.515]], ids=["every", "some"])
@pytest.mark.parametrize("alg", METHODS, ids=repr)
def test_small_systems_are_swept_at_once(alg, saveat) -> None:
    """Evaluations of the reverse pass are counted for each step, its calls are few."""
    calls = [0, 0]
    prob = nonlinear("diagonal", of(alg))
    drift, noise = prob.f, prob.g

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        calls[0] += 1
        return drift(t, u, p)

    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        calls[1] += 1
        return noise(t, u, p)

    *_, sol = gradients(
        prob.remake(f=f, g=g), alg, None, seed=1, dt=0.01, adaptive=False, saveat=saveat
    )
    forward, reverse = sol.stats, sol.stats.adjoint
    assert reverse is not None and len(sol.steps) == 100
    anew = 100 if alg.carries_derivative else 0  # each step begins with its derivative
    assert (reverse.nf, reverse.ng) == (forward.nf - 1 + anew, forward.ng - 1)
    assert calls[0] < forward.nf + 10 and calls[1] < forward.ng + 10


def test_many_paths_are_swept_at_once_and_in_float32() -> None:
    prob = linear(500)
    small = prob.remake(u0=prob.u0.float(), p=prob.p.float())
    options = {"seed": 1, "dt": 0.01, "save_everystep": False}
    expected = gradients(prob, EM(), None, lambda s: s.u[-1].mean(), **options)
    found = gradients(small, EM(), None, lambda s: s.u[-1].mean(), **options)
    assert_near(found[1].double(), expected[1], 1e-4)


# -- estimates of the steps ----------------------------------------------------------------------


def estimates(sol) -> Tensor:
    steps = sol.steps
    return steps.error.sum() + 3 * steps.error_norm.sum() + 0.1 * steps.stiffness.sum()


@for_kinds([LambaEM(), LambaEulerHeun(), SOSRI(), RKMil("stratonovich")], ["diagonal", "general"])
def test_estimates_have_gradients(alg, kind) -> None:
    prob = nonlinear(kind, of(alg))
    options = {"seed": 3, "dt": 0.05, "adaptive": False, "rtol": 1e-2, "atol": 1e-2}

    expected = differences(prob, alg, estimates, **options)
    for sensealg in SENSEALGS:
        _, p_grad, _ = gradients(prob, alg, sensealg, estimates, **options)
        assert_near(p_grad, expected, 1e-6)


def test_estimates_of_noncommutative_noise_have_gradients_where_they_vanish() -> None:
    """Rows of the estimate are zero where ``g`` is constant: norms have no slope there."""
    scale = leaf(1.3)
    prob = heisenberg(5)
    g = prob.g
    prob = prob.remake(g=lambda t, u: scale * g(t, u))
    sol = solve(prob, LambaEM(), dt=0.1, adaptive=False, seed=1)
    sol.steps.error_norm.sum().backward()
    # u and M are proportional to the scale, and so is the estimate to its square
    expected = 2 * float(sol.steps.error_norm.detach().sum()) / 1.3
    assert float(scale.grad) == pytest.approx(expected, rel=1e-10)


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
