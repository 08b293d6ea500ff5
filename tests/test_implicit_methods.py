"""Rosenbrock and SDIRK methods: orders, stiff problems, costs, kinds of states."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

import diffsolve as ds
from diffsolve import ODEProblem, Solution, solve
from diffsolve.problems import library
from diffsolve.solvers.jacobian_layout import checked_pattern

F64 = torch.float64
ROSENBROCK = (
    *("Rosenbrock23", "Rosenbrock32", "ROS3P", "Rodas3"),
    *("Rodas4", "Rodas4P", "Rodas5", "Rodas5P"),
)
SDIRK = (
    *("ImplicitEuler", "ImplicitMidpoint", "Trapezoid", "SDIRK2", "TRBDF2"),
    *("Kvaerno3", "Kvaerno4", "Kvaerno5", "KenCarp3", "KenCarp4", "KenCarp5"),
)
METHODS = ROSENBROCK + SDIRK
ADAPTIVE = tuple(name for name in METHODS if name != "ImplicitMidpoint")
ENGINE: dict[str, Any] = {"engine": "torch"}
# Newton's iteration stops at a part of the tolerance, which must not be seen here
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12, **ENGINE}


def method(name: str) -> Any:
    return getattr(ds, name)()


# -- order of convergence ----------------------------------------------------------------------


def bent(t: Tensor, u: Tensor) -> Tensor:
    """Nonlinear and not autonomous, so that every kind of order condition counts."""
    return torch.stack((torch.cos(t) * u[..., 0] ** 2, u[..., 0] * u[..., 1] * torch.cos(t)), -1)


def bent_solution(t: Tensor) -> Tensor:
    return (1 / (2 - torch.sin(t)))[:, None].expand(-1, 2)


STEPS = {1: (64, 128), 2: (64, 128), 3: (48, 96), 4: (32, 64), 5: (24, 48)}


@pytest.mark.parametrize("name", METHODS)
def test_order_of_steps_and_dense_output(name: str) -> None:
    alg = method(name)
    of_dense = alg.tableau.stages.interpolant.order
    errors = []
    for n in STEPS[alg.order]:
        prob = ODEProblem(bent, torch.full((2,), 0.5, dtype=F64), (0.0, 4.0))
        sol = solve(prob, alg, adaptive=False, dt=4.0 / n, **TIGHT)
        t = torch.linspace(0, 4, 5 * n + 3, dtype=F64)
        errors.append(
            [
                (sol.u - bent_solution(sol.t)).abs().max().item(),
                (sol(t) - bent_solution(t)).abs().max().item(),
            ]
        )
    coarse, fine = STEPS[alg.order]
    measured = np.log(np.array(errors[0]) / errors[1]) / math.log(fine / coarse)
    assert measured[0] > alg.order - 0.5, measured
    assert measured[0] < alg.order + 1.2, measured
    assert measured[1] > min(alg.order, of_dense + 1) - 0.5, measured


# Prothero and Robinson's problem with lambda h from 1e3 to 1e5: the order that is left, of steps
# of constant size (Hairer, Wanner, Solving ODEs II, section IV.15, and the papers of the methods)
STIFF_ORDERS = {
    "Rosenbrock23": 1.0,
    "ROS3P": 1.5,
    "Rodas3": 1.0,
    "Rodas4": 1.0,
    "Rodas4P": 3.0,
    "Rodas5": 1.0,
    "Rodas5P": 3.0,
    "ImplicitEuler": 1.0,
    "ImplicitMidpoint": 1.0,
    "Trapezoid": 2.0,
    "SDIRK2": 1.0,
    "TRBDF2": 2.0,
    "Kvaerno3": 2.0,
    "Kvaerno4": 2.0,
    "Kvaerno5": 2.0,
    "KenCarp3": 2.0,
    "KenCarp4": 2.0,
    "KenCarp5": 2.0,
}


@pytest.mark.parametrize("name", STIFF_ORDERS)
def test_order_on_a_stiff_problem(name: str) -> None:
    prob = library.prothero_robinson(tspan=(0.0, 2.0))
    errors = []
    for n in (20, 80):
        sol = solve(prob, method(name), adaptive=False, dt=2.0 / n, **TIGHT)
        exact = torch.cos(sol.t)[:, None]
        errors.append((sol.u - exact)[1:].abs().max().item())
    if errors[1] < 1e-11:  # stiffly accurate methods divide the error by lambda h
        return
    assert math.log(errors[0] / errors[1], 4) > STIFF_ORDERS[name] - 0.35, errors


# -- problems ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name != "ROS3P"])
def test_stiff_linear_system_against_the_matrix_exponential(name: str) -> None:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    matrix = torch.from_numpy(basis @ np.diag([-1e4, -50.0, -1.0, -0.1]) @ basis.T)
    u0 = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=F64)
    tol = 1e-4 if method(name).order <= 2 else 1e-6
    sol = solve(
        ODEProblem(lambda t, u, p: p @ u, u0, (0.0, 2.0), matrix),
        method(name),
        saveat=[0.5, 2.0],
        rtol=tol,
        atol=tol,
        **ENGINE,
    )
    exact = torch.stack([torch.linalg.matrix_exp(matrix * t) @ u0 for t in (0.5, 2.0)])
    assert ((sol.u - exact).abs() / (tol + tol * exact.abs())).max() < 30
    assert sol.stats.nreject <= 0.2 * sol.stats.naccept + 3


def units(sol: Solution, exact: Any, tol: float, atol: float) -> float:
    """Largest over the times of the RMS error in units of the tolerance."""
    scaled = (sol.u - torch.as_tensor(exact)) / (atol + tol * torch.as_tensor(exact).abs())
    return float((scaled**2).mean(1).sqrt().max())


@pytest.mark.parametrize("problem", ["rober", "hires", "pollu"])
@pytest.mark.parametrize("name", ["Rodas4", "Rodas5P", "Kvaerno5", "KenCarp4"])
def test_error_in_units_of_the_tolerance_and_cost(name: str, problem: str) -> None:
    named, tol, atol = getattr(library, problem), 1e-5, 1e-10
    t, u = named.reference()
    sol = solve(named(), method(name), saveat=t, rtol=tol, atol=atol, **ENGINE)
    assert units(sol, u, tol, atol) < 100
    stats, attempts = sol.stats, sol.stats.naccept + sol.stats.nreject
    assert stats.nreject < 0.2 * stats.naccept
    stages = method(name).tableau.stages.n
    if name in ROSENBROCK:
        assert stats.njac == stats.naccept and stats.nlu == attempts
        assert stats.nf <= (stages - 1) * attempts + 3 and stats.nnewton == 0
    else:
        assert stats.njac <= 0.5 * attempts and stats.nlu <= 0.9 * attempts
        assert stats.nf <= 3.5 * (stages - 1) * attempts + 3


# -- kinds of states ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Rodas5P", "Kvaerno5", "TRBDF2", "Rosenbrock23"])
def test_single_precision(name: str) -> None:
    prob = library.hires(tspan=(0.0, 50.0), dtype=torch.float32)
    sol = solve(prob, method(name), save_everystep=False, rtol=1e-3, atol=1e-5, **ENGINE)
    double = library.hires(tspan=(0.0, 50.0))
    exact = solve(double, method("Rodas5P"), save_everystep=False, rtol=1e-9, atol=1e-11, **ENGINE)
    assert sol.u.dtype == torch.float32
    assert (sol.u[-1] - exact.u[-1]).abs().max() < 2e-3


@pytest.mark.parametrize("name", ["Rodas4", "KenCarp4"])
def test_tolerance_near_the_rounding_of_single_precision(name: str) -> None:
    prob = ODEProblem(lambda t, u: -100 * (u - torch.cos(t)), torch.ones(2), (0.0, 1.0))
    assert solve(prob, method(name), rtol=1e-5, atol=1e-6, **ENGINE).success


@pytest.mark.parametrize("name", ["Rodas4", "Kvaerno3", "SDIRK2"])
def test_structured_states(name: str) -> None:
    flat = library.rober(tspan=(0.0, 10.0))

    def f(t: Tensor, u: dict[str, Any], p: Tensor) -> dict[str, Any]:
        du = flat.f(t, torch.cat([u["a"], u["b"].reshape(-1)]), p)
        return {"a": du[:1], "b": du[1:].reshape(2, 1)}

    start = {"a": flat.u0[:1], "b": flat.u0[1:].reshape(2, 1)}
    options = {"rtol": 1e-5, "atol": 1e-9, "saveat": [5.0, 10.0], **ENGINE}
    plain = solve(flat, method(name), **options)
    sol = solve(flat.remake(f=f, u0=start), method(name), **options)
    again = torch.cat([sol.u["a"], sol.u["b"].reshape(2, 2)], 1)
    torch.testing.assert_close(again, plain.u, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["Rodas5P", "Kvaerno4"])
def test_backward_in_time(name: str) -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return 300 * (u - torch.sin(t)) + torch.cos(t)

    prob = ODEProblem(f, torch.zeros(1, dtype=F64), (0.0, -3.0))
    sol = solve(prob, method(name), saveat=[-1.0, -3.0], rtol=1e-7, atol=1e-8, **ENGINE)
    assert (sol.u[:, 0] - torch.sin(sol.t)).abs().max() < 1e-6


def batched_decay(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    rate = p[:, None]
    fast = rate * (u[:, :1] ** 2 - u[:, 1:])
    return torch.cat([-u[:, :1] * u[:, 1:] + torch.cos(t), fast], 1)


@pytest.mark.parametrize("name", ["Rodas4", "KenCarp3"])
def test_batch_of_rows_is_solved_by_blocks(name: str) -> None:
    rates = torch.logspace(0, 4, 5, dtype=F64)
    u0 = torch.tensor([1.0, 0.2], dtype=F64).expand(5, 2).clone()
    prob = ODEProblem(batched_decay, u0, (0.0, 2.0), rates)
    options = {"rtol": 1e-7, "atol": 1e-9, "save_everystep": False, **ENGINE}
    sol = solve(prob, method(name), **options)
    for i in (0, 4):
        alone = solve(prob.remake(u0=u0[i : i + 1], p=rates[i : i + 1]), method(name), **options)
        assert (alone.u[-1] - sol.u[-1, i]).abs().max() < 1e-6


def coupled(t: Tensor, u: Tensor) -> Tensor:
    return -100 * (u - u.mean(0)) - u


def late_coupled(t: Tensor, u: Tensor) -> Tensor:
    return -100 * u + torch.relu(t - 0.5) * 200 * u.flip(0) * torch.exp(-5 * t)


@pytest.mark.parametrize("f", [coupled, late_coupled], ids=["coupled", "late"])
@pytest.mark.parametrize("name", ["Rodas4", "KenCarp4"])
def test_coupled_rows_are_found_out(name: str, f: Any) -> None:
    u0 = torch.tensor([[1.0, 2.0], [-0.5, 0.3], [0.1, 0.7]], dtype=F64)
    options = {"rtol": 1e-7, "atol": 1e-9, "saveat": [0.3, 1.0], **ENGINE}
    sol = solve(ODEProblem(f, u0, (0.0, 1.0)), method(name), **options)
    flat = ODEProblem(lambda t, u: f(t, u.reshape(3, 2)).reshape(-1), u0.reshape(-1), (0.0, 1.0))
    dense = solve(flat, method(name), **options)
    torch.testing.assert_close(sol.u.reshape(2, 6), dense.u, rtol=1e-6, atol=1e-9)
    assert sol.stats.naccept <= 1.2 * dense.stats.naccept + 2


@pytest.mark.parametrize("name", ["Rodas5P", "Kvaerno5"])
def test_jumps_in_time_are_landed_on(name: str) -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return -200 * (u - (1.0 if t < 0.5 else 3.0))

    prob = ODEProblem(f, torch.zeros(1, dtype=F64), (0.0, 1.0))
    sol = solve(prob, method(name), tstops=[0.5], rtol=1e-7, atol=1e-9, saveat=[0.5, 1.0], **ENGINE)
    torch.testing.assert_close(sol.u[:, 0], torch.tensor([1.0, 3.0], dtype=F64), rtol=0, atol=1e-6)
    assert sol.stats.nreject < 0.2 * sol.stats.naccept


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", ["Rodas4", "Rosenbrock23", "TRBDF2"])
def test_time_that_autograd_does_not_see(name: str) -> None:
    # as where f looks a forcing up by float(t)
    def hidden(t: Tensor, u: Tensor) -> Tensor:
        return -50 * (u - math.cos(5 * float(t)))

    def seen(t: Tensor, u: Tensor) -> Tensor:
        return -50 * (u - torch.cos(5 * t))

    options = {"rtol": 1e-4, "atol": 1e-6, "save_everystep": False, **ENGINE}
    u0 = torch.ones(1, dtype=F64)
    one = solve(ODEProblem(hidden, u0, (0.0, 2.0)), method(name), **options)
    other = solve(ODEProblem(seen, u0, (0.0, 2.0)), method(name), **options)
    assert abs(one.stats.naccept - other.stats.naccept) <= 2
    torch.testing.assert_close(one.u, other.u, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Rodas4", "KenCarp4"])
def test_f_that_autograd_cannot_go_through(name: str) -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        x, y = u.detach().numpy()
        return torch.tensor([y, 50 * ((1 - x * x) * y) - x], dtype=F64)

    plain = library.van_der_pol(mu=50.0, tspan=(0.0, 60.0))
    options = {"rtol": 1e-4, "atol": 1e-6, "save_everystep": False, **ENGINE}
    expected = solve(plain, method(name), **options)
    prob = ODEProblem(f, plain.u0, plain.tspan)
    with torch.no_grad():
        sol = solve(prob, method(name), **options)
    torch.testing.assert_close(sol.u, expected.u, rtol=1e-3, atol=1e-4)
    assert sol.stats.naccept <= 1.1 * expected.stats.naccept + 3


class OnceDifferentiable(torch.autograd.Function):
    """A sine whose derivative has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * torch.cos(*ctx.saved_tensors)


@pytest.mark.parametrize("name", ["Rodas4", "KenCarp4"])
def test_f_that_can_be_differentiated_once_only(name: str) -> None:
    def custom(t: Tensor, u: Tensor) -> Tensor:
        return -100 * (u - OnceDifferentiable.apply(t + 0.1 * u))  # type: ignore[operator]

    def plain(t: Tensor, u: Tensor) -> Tensor:
        return -100 * (u - torch.sin(t + 0.1 * u))

    options = {"rtol": 1e-5, "atol": 1e-7, "save_everystep": False, **ENGINE}
    u0 = torch.ones(2, dtype=F64)
    one, other = (
        solve(ODEProblem(f, u0, (0.0, 1.0)), method(name), **options) for f in (custom, plain)
    )
    torch.testing.assert_close(one.u, other.u, rtol=1e-6, atol=1e-8)
    assert abs(one.stats.naccept - other.stats.naccept) <= 1


def test_sparsity_gives_the_same_jacobian_with_fewer_products() -> None:
    prob = library.brusselator_1d(n=15, tspan=(0.0, 1.0))
    pattern = ds.jacobian_sparsity(prob)
    options = {"rtol": 1e-6, "atol": 1e-8, "save_everystep": False, **ENGINE}
    plain = solve(prob, ds.Rodas4(), **options)
    coloured = solve(prob.remake(jac_sparsity=pattern), ds.Rodas4(), **options)
    torch.testing.assert_close(coloured.u, plain.u, rtol=1e-10, atol=1e-12)
    wrong = pattern.to_dense().clone()
    wrong[0, 1] = False
    with pytest.raises(ValueError, match="jac_sparsity is wrong"):
        solve(prob.remake(jac_sparsity=wrong), ds.Rodas4(), **options)


def test_patterns_of_every_kind_are_read() -> None:
    """An entry that a sparse matrix stores may become other than zero, whatever it is now."""
    stored = ([0, 1, 2, 2], [0, 1, 0, 2])
    values = [1.0, -2.0, 0.0, 3.0]
    pattern = torch.zeros(3, 3, dtype=torch.bool)
    pattern[stored] = True
    kinds = {"csr_matrix", "csc_array", "coo_array", "csc_matrix", "bsr_array", "lil_array"}
    of_scipy = {k: getattr(sparse, k)(sparse.coo_array((values, stored))) for k in kinds}
    of_scipy["lil_array"][2, 0] = 0.5  # this kind keeps no zeros
    coo = torch.sparse_coo_tensor(torch.tensor(stored), torch.tensor(values), (3, 3))
    of_torch = [coo, coo.to_sparse_csr(), pattern, pattern.double(), pattern.to_sparse_csc()]
    others = [pattern.numpy(), pattern.tolist()]
    for given in (*of_scipy.values(), *of_torch, *others):
        assert torch.equal(checked_pattern(given, 3), pattern), given
    for wrong in (sparse.eye_array(2), "dense", object()):
        with pytest.raises(ValueError, match=r"jac_sparsity has shape .* expected \(3, 3\)"):
            checked_pattern(wrong, 3)


def test_pattern_of_scipy_in_a_solve() -> None:
    prob = library.brusselator_1d(n=15, tspan=(0.0, 1.0))
    pattern = ds.jacobian_sparsity(prob)
    options = {"rtol": 1e-6, "atol": 1e-8, "save_everystep": False, **ENGINE}
    matrix = sparse.csr_array(pattern.to_dense().numpy())
    one, other = (
        solve(prob.remake(jac_sparsity=x), ds.Rodas4(), **options) for x in (pattern, matrix)
    )
    assert torch.equal(one.u, other.u)


@pytest.mark.parametrize("name", ["Rodas5P", "KenCarp4", "TRBDF2"])
def test_stiffness_is_the_spectral_radius(name: str) -> None:
    matrix = torch.diag(torch.tensor([-1000.0, -1.0, -0.1], dtype=F64))
    prob = ODEProblem(lambda t, u: matrix @ u, torch.ones(3, dtype=F64), (0.0, 1.0))
    sol = solve(prob, method(name), rtol=1e-5, atol=1e-7, **ENGINE)
    torch.testing.assert_close(
        sol.steps.stiffness, torch.full_like(sol.steps.stiffness, 1000.0), rtol=1e-5, atol=0
    )
