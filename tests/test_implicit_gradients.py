"""Gradients through implicit methods, against differences and forward sensitivities."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from gradients import assert_near, leaf
from scipy.integrate import solve_ivp
from torch import Tensor

import diffsolve as ds
from diffsolve import (
    BacksolveAdjoint,
    BacksolveWarning,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    SolveError,
    solve,
)
from diffsolve.problems import library

F64 = torch.float64
ENGINE: dict[str, Any] = {"engine": "torch"}
TAPE = DiscreteAdjoint(tape=True)
METHODS = (
    *("Rosenbrock23", "ROS3P", "Rodas3", "Rodas4", "Rodas4P", "Rodas5", "Rodas5P"),
    *("ImplicitEuler", "ImplicitMidpoint", "Trapezoid", "SDIRK2", "TRBDF2"),
    *("Kvaerno3", "Kvaerno5", "KenCarp4", "KenCarp5"),
)
FEW = ("Rodas4", "Rosenbrock23", "KenCarp4", "TRBDF2")


def method(name: str) -> Any:
    return getattr(ds, name)()


def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Not autonomous, stiff by ``p[1]``, with every derivative of second order in it."""
    x, y = u.unbind(-1)
    return torch.stack(
        [-p[0] * x * y + torch.cos(2 * t) * x, p[1] * (x**2 - y) * (1 + 0.3 * torch.sin(t))], -1
    )


START, RATES = [1.0, 0.2], [1.5, 40.0]


def differences(function: Any, z: Tensor, step: float = 1e-4) -> Tensor:
    """Central differences of fourth order, one column for each entry of ``z``."""
    z = z.detach()
    columns = []
    for i in range(z.numel()):
        d = torch.zeros_like(z)
        d[i] = step * max(1.0, abs(float(z[i])))
        near, far = (function(z + k * d) - function(z - k * d) for k in (1, 2))
        columns.append((8 * near - far) / (12 * float(d[i])))
    return torch.stack(columns, -1).detach()


# -- exactness of the discrete adjoint ---------------------------------------------------------

FIXED: dict[str, Any] = {"adaptive": False, "dt": 0.05, "rtol": 1e-10, "atol": 1e-10, **ENGINE}
WEIGHTS = torch.linspace(1, 2, 6, dtype=F64)


def read(sol: Any) -> dict[str, Tensor]:
    steps = sol.steps
    found = {"u": (sol.u**2).sum()}
    for name in ("error", "error_norm", "stiffness"):
        found[name] = (WEIGHTS * getattr(steps, name)).sum()
    return found


@pytest.mark.parametrize("sensealg", [DiscreteAdjoint(), TAPE], ids=["sweep", "tape"])
@pytest.mark.parametrize("name", METHODS)
def test_states_and_estimates_against_differences(name: str, sensealg: Any) -> None:
    # with fixed steps, and Newton's iteration to rounding, differences see the same program
    def run(z: Tensor, **options: Any) -> dict[str, Tensor]:
        prob = ODEProblem(f, z[:2], (0.0, 0.3), z[2:])
        return read(solve(prob, method(name), saveat=[0.12, 0.3], **FIXED, **options))

    z = leaf([*START, *RATES])
    got = run(z, sensealg=sensealg)
    expected = differences(lambda z: torch.stack(list(run(z).values())), z)
    for i, (key, value) in enumerate(got.items()):
        if not value.requires_grad:
            assert not expected[i].any()
            continue
        (g,) = torch.autograd.grad(value, z, retain_graph=True, allow_unused=True)
        g = torch.zeros_like(z) if g is None else g
        assert_near(g, expected[i], 1e-5 if key.startswith("error") else 1e-7)


@pytest.mark.parametrize("name", FEW)
def test_second_derivatives_on_tape(name: str) -> None:
    options = {**FIXED, "saveat": [0.15], "sensealg": TAPE}

    def loss(z: Tensor) -> Tensor:
        prob = ODEProblem(f, z[:2], (0.0, 0.15), z[2:])
        return (solve(prob, method(name), **options).u ** 2).sum()

    def gradient(z: Tensor) -> Tensor:
        z = z.clone().requires_grad_()
        return torch.autograd.grad(loss(z), z)[0]

    z = torch.tensor([*START, *RATES], dtype=F64)
    hessian = torch.autograd.functional.hessian(loss, z)
    assert_near(hessian, differences(gradient, z), 1e-7)


@pytest.mark.parametrize("name", ["Rodas4", "Kvaerno3"])
def test_transforms_of_independent_rows(name: str) -> None:
    """What finds out whether rows are independent must not be seen by a transform."""
    u0 = torch.tensor([START, START[::-1]], dtype=F64)

    def loss(p: Tensor, **options: Any) -> Tensor:
        prob = ODEProblem(lambda t, u, p: p[0] * u.sin() - p[1] * u, u0, (0.0, 0.1), p)
        return (solve(prob, method(name), saveat=[0.1], **{**FIXED, **options}).u[-1] ** 2).sum()

    p = torch.tensor(RATES, dtype=F64)
    on_tape = functools.partial(loss, sensealg=TAPE)
    assert_near(torch.func.jacfwd(loss)(p), torch.func.grad(loss)(p), 1e-9)
    expected = torch.autograd.functional.hessian(on_tape, p)
    assert_near(torch.func.jacfwd(torch.func.grad(loss))(p), expected, 1e-7)
    assert_near(torch.func.hessian(loss)(p), expected, 1e-7)


@pytest.mark.parametrize("name", ["Rodas4", "Kvaerno3", "TRBDF2"])
def test_transforms_and_forward_mode(name: str) -> None:
    def run(p: Tensor, **options: Any) -> Tensor:
        prob = ODEProblem(f, torch.tensor(START, dtype=F64), (0.0, 0.1), p)
        return solve(prob, method(name), saveat=[0.1], **{**FIXED, **options}).u[-1]

    p, v = torch.tensor(RATES, dtype=F64), torch.tensor([1.0, -2.0], dtype=F64)
    expected = torch.autograd.functional.jacobian(
        functools.partial(run, sensealg=DiscreteAdjoint()), p
    )
    assert_near(torch.func.jacrev(run)(p), expected, 1e-9)
    assert_near(torch.func.jvp(run, (p,), (v,))[1], expected @ v, 1e-9)
    assert_near(torch.func.jacfwd(run)(p), expected, 1e-9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p, v)
        tangent = torch.autograd.forward_ad.unpack_dual(run(dual)).tangent
    assert_near(tangent, expected @ v, 1e-9)


@pytest.mark.parametrize("name", ["Rodas4", "KenCarp4"])
def test_through_step_size_is_the_gradient_of_the_adaptive_program(name: str) -> None:
    def run(z: Tensor, **options: Any) -> Any:
        prob = ODEProblem(f, z[:2], (0.0, 0.5), z[2:])
        return solve(prob, method(name), saveat=[0.5], rtol=1e-5, atol=1e-5, **options, **ENGINE)

    z = leaf([*START, *RATES])
    sol = run(z, sensealg=DiscreteAdjoint(through_step_size=True))
    (got,) = torch.autograd.grad((sol.u**2).sum(), z)
    # where an iteration ends is not smooth in z, so differences of the program show little
    exact = run(z, sensealg=DiscreteAdjoint())
    (frozen,) = torch.autograd.grad((exact.u**2).sum(), z)
    assert_near(got, frozen, 1e-3)


# -- against forward sensitivities -------------------------------------------------------------


@functools.cache
def sensitivities() -> tuple[np.ndarray, np.ndarray]:
    """States at 0.2 and 0.5, and their derivatives by ``u0`` and ``p``."""

    def rhs(t: float, z: np.ndarray) -> np.ndarray:
        (x, y), s = z[:2], z[2:].reshape(2, 4)
        a, b = RATES
        c, w = np.cos(2 * t), 1 + 0.3 * np.sin(t)
        jac = np.array([[-a * y + c, -a * x], [2 * b * x * w, -b * w]])
        by_p = np.array([[0, 0, -x * y, 0], [0, 0, 0, (x * x - y) * w]])
        du = [-a * x * y + c * x, b * (x * x - y) * w]
        return np.concatenate([du, (jac @ s + by_p).ravel()])

    z0 = np.concatenate([START, np.eye(2, 4).ravel()])
    z = solve_ivp(rhs, (0.0, 0.5), z0, "DOP853", [0.2, 0.5], rtol=1e-12, atol=1e-13).y.T
    return z[:, :2], z[:, 2:].reshape(-1, 2, 4)


CONTINUOUS = [InterpolatingAdjoint(), InterpolatingAdjoint(checkpoints=4), BacksolveAdjoint()]
ALL = [DiscreteAdjoint(), DiscreteAdjoint(checkpoints=4), TAPE, *CONTINUOUS]


@pytest.mark.parametrize("sensealg", ALL, ids=lambda s: repr(s)[:30])
@pytest.mark.parametrize("name", ["Rodas5P", "Kvaerno5"])
def test_sensealgs_against_forward_sensitivities(name: str, sensealg: Any) -> None:
    z = leaf([*START, *RATES])
    prob = ODEProblem(f, z[:2], (0.0, 0.5), z[2:])
    # a fast decay grows backward in time: backsolve has short ways between states that are known
    backsolve = isinstance(sensealg, BacksolveAdjoint)
    times, at = (
        (torch.linspace(0.1, 0.5, 5, dtype=F64), [1, 4]) if backsolve else ([0.2, 0.5], [0, 1])
    )
    sol = solve(prob, method(name), sensealg=sensealg, saveat=times, rtol=1e-7, atol=1e-7, **ENGINE)
    states, slopes = sensitivities()
    np.testing.assert_allclose(sol.u.detach()[at], states, rtol=1e-5, atol=1e-6)
    (sol.u[at] ** 2).sum().backward()
    expected = np.einsum("ti,tij->j", 2 * states, slopes)
    assert_near(z.grad, torch.from_numpy(expected), 1e-3 if backsolve else 1e-5)


# y1(t) of Robertson's problem, normalised derivatives by the logarithms of the rates
ROBER = {
    40.0: [-0.1699023509, -0.0686506527, 0.1373080797],
    400.0: [-0.2383349118, -0.1136901660, 0.2273815362],
    4e4: [-0.0629988643, -0.0314375296, 0.0628749408],
}
ROBER_CASES = [
    *(("Rodas5P", DiscreteAdjoint(), t) for t in ROBER),
    ("Kvaerno5", DiscreteAdjoint(), 4e4),
    ("AutoVern7", DiscreteAdjoint(checkpoints=9), 400.0),
    ("Rodas5P", InterpolatingAdjoint(), 4e4),
    ("KenCarp5", InterpolatingAdjoint(), 40.0),
]


@pytest.mark.parametrize("name, sensealg, t", ROBER_CASES, ids=str)
def test_gradients_of_robertsons_problem(name: str, sensealg: Any, t: float) -> None:
    p = leaf([0.04, 3e7, 1e4])
    prob = library.rober(tspan=(0.0, t)).remake(p=p)
    options = {"rtol": 1e-8, "atol": 1e-12, "saveat": [t], **ENGINE}
    sol = solve(prob, method(name), sensealg=sensealg, **options)
    sol.u[-1, 0].backward()
    np.testing.assert_allclose((p.grad * p).detach(), ROBER[t], rtol=1e-6)
    assert sol.stats.adjoint.nlu > 0


# -- what is checked ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Rodas5P", pytest.param("Kvaerno5", marks=pytest.mark.slow)])
def test_backsolve_on_a_stiff_problem_ends_and_says_why(name: str) -> None:
    p = leaf([0.04, 3e7, 1e4])
    prob = library.rober(tspan=(0.0, 40.0)).remake(p=p)
    options = {"rtol": 1e-5, "atol": 1e-9, "saveat": [20.0, 40.0], **ENGINE}
    sol = solve(prob, method(name), sensealg=BacksolveAdjoint(), **options)
    with pytest.raises(SolveError, match=r"BacksolveAdjoint failed.*Backward in time"):
        sol.u[-1, 0].backward()


def test_backsolve_warns_where_the_reconstruction_is_off() -> None:
    z = leaf([*START, *RATES])
    prob = ODEProblem(f, z[:2], (0.0, 0.6), z[2:])
    options = {"rtol": 1e-6, "atol": 1e-6, "saveat": [0.6], **ENGINE}
    sol = solve(prob, ds.Rodas4(), sensealg=BacksolveAdjoint(), **options)
    with pytest.warns(BacksolveWarning, match="reconstructed"):
        sol.u.sum().backward()


def test_reverse_work_does_not_grow_with_the_parameters() -> None:
    # the parameters' part of the reverse state is a quadrature: no matrix has its size
    weights = leaf(np.full((40, 50), 0.01))
    u0 = torch.ones(2, dtype=F64)

    def g(t: Tensor, u: Tensor) -> Tensor:
        return -200 * (u - torch.cos(t)) + torch.tanh(weights @ weights.T).mean() * u.flip(0)

    sol = solve(
        ODEProblem(g, u0, (0.0, 1.0)),
        ds.Rodas4(),
        sensealg=InterpolatingAdjoint(),
        saveat=[1.0],
        rtol=1e-5,
        atol=1e-6,
        **ENGINE,
    )
    (sol.u**2).sum().backward()
    (expected,) = torch.autograd.grad(
        (
            solve(
                ODEProblem(g, u0, (0.0, 1.0)), ds.Rodas4(), saveat=[1.0], rtol=1e-7, atol=1e-8,
                **ENGINE,
            ).u
            ** 2
        ).sum(),
        weights,
    )  # fmt: skip
    assert_near(weights.grad, expected, 1e-4)


@pytest.mark.parametrize("name", ["Rodas4", "KenCarp4"])
def test_batch_of_rows_has_the_gradients_of_its_rows(name: str) -> None:
    def gradient(start: Tensor, p: Tensor) -> Tensor:
        u0, p = (x.detach().clone().requires_grad_() for x in (start, p))

        def rows(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
            return f(t, u, p.unbind(-1))

        sol = solve(ODEProblem(rows, u0, (0.0, 0.2), p), method(name), saveat=[0.2], **FIXED)
        (sol.u**3).sum().backward()
        return torch.cat([u0.grad, p.grad], -1)

    u0 = torch.tensor([[1.0, 0.2], [0.5, 0.1], [0.3, 0.9]], dtype=F64)
    p = torch.tensor([[1.5, 40.0], [0.5, 80.0], [1.0, 4.0]], dtype=F64)
    whole = gradient(u0, p)
    for i in range(3):
        assert_near(whole[i], gradient(u0[i], p[i]), 1e-9)


@pytest.mark.parametrize("name", ["Rodas4", "KenCarp4"])
def test_jac_of_the_user_leaves_the_gradient_exact(name: str) -> None:
    def jac(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        (x, y), w = u, 1 + 0.3 * torch.sin(t)
        top = torch.stack([-p[0] * y + torch.cos(2 * t), -p[0] * x])
        return torch.stack([top, torch.stack([2 * p[1] * x * w, -p[1] * w])])

    def gradient(**options: Any) -> Tensor:
        p = leaf(RATES)
        prob = ODEProblem(f, torch.tensor(START, dtype=F64), (0.0, 0.2), p, **options)
        solve(prob, method(name), **FIXED).u.sum().backward()
        return p.grad

    assert_near(gradient(jac=jac), gradient(), 1e-9)


@pytest.mark.parametrize("name", ["Rodas4", "KenCarp4"])
def test_f_that_changed_is_refused(name: str) -> None:
    rate = [1.0]
    u0 = leaf([1.0])
    prob = ODEProblem(lambda t, u: -rate[0] * u, u0, (0.0, 1.0))
    sol = solve(prob, method(name), rtol=1e-3, atol=1e-6, **ENGINE)
    rate[0] = 1.0001
    with pytest.raises(RuntimeError, match="f gives other values now"):
        sol.u.sum().backward()


@pytest.mark.parametrize("name", ["Rodas4", "KenCarp4"])
def test_tensor_that_f_captures_has_its_gradient(name: str) -> None:
    a = leaf([3.0, 200.0])
    rate = a * 2  # computed from a leaf
    u0 = torch.ones(2, dtype=F64)
    prob = ODEProblem(lambda t, u: -rate * u, u0, (0.0, 0.01))
    sol = solve(prob, method(name), **{**FIXED, "dt": 0.001})
    sol.u[-1].sum().backward()
    exact = -2 * 0.01 * torch.exp(-2 * 0.01 * a.detach())
    assert_near(a.grad, exact, 1e-3)


@pytest.mark.parametrize("sensealg", [DiscreteAdjoint(), *CONTINUOUS], ids=lambda s: repr(s)[:30])
@pytest.mark.parametrize("name", ["Rodas4", "KenCarp4", "AutoTsit5"])
def test_memory_is_freed_without_the_garbage_collector(name: str, sensealg: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        weight = leaf([50.0])
        prob = ODEProblem(lambda t, u: -weight * (u - torch.cos(t)), leaf([1.0, 2.0]), (0.0, 0.2))
        sol = solve(prob, method(name), sensealg=sensealg, **ENGINE)
        job, field = weakref.ref(sol._context), weakref.ref(sol._context.field)
        sol.u.sum().backward()
        del sol
        assert job() is None and field() is None
    finally:
        gc.enable()
