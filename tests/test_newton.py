"""Newton's iteration, its matrices, and what happens when they fail."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsolve as ds
from diffsolve import ODEProblem, ReturnCode, SolveError, check_jacobian, solve
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch_engine import integrate
from diffsolve.engines.trajectory import Saving
from diffsolve.problems import library
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm, Step, Trouble
from diffsolve.solvers.controllers import PIController
from diffsolve.solvers.linear import factored_step_matrix
from diffsolve.solvers.newton import Newton
from diffsolve.solvers.norms import Tolerance

F64 = torch.float64
ENGINE: dict[str, Any] = {"engine": "torch"}
BOTH = [ds.Rodas4(), ds.Kvaerno3()]
each = pytest.mark.parametrize("alg", BOTH, ids=repr)


def tolerance(rtol: float = 1e-3, atol: float = 1e-6) -> Tolerance:
    return Tolerance(torch.tensor(rtol, dtype=F64), torch.tensor(atol, dtype=F64))


def field_of(f: Any, n: int = 1, **options: Any) -> VectorField:
    field = VectorField.of(ODEProblem(f, torch.ones(n, dtype=F64), (0.0, 1.0), **options))
    field.accuracy = tolerance()
    return field


# -- the iteration -----------------------------------------------------------------------------


def started(f: Any, h: float = 0.1, n: int = 1, **options: Any) -> tuple[Any, Newton, Tensor]:
    field = field_of(f, n, **options)
    newton = Newton(field, 0.5)  # which does not keep the field
    u = torch.ones(n, dtype=F64)
    with torch.no_grad():
        assert newton.begin(0.0, h, u, smoothed=False)
    return field, newton, u


@torch.no_grad()
def test_solves_the_equation_of_a_stage() -> None:
    field, newton, u = started(lambda t, u: -20 * u**3, h=0.01)
    found = newton.solve(partial(field, torch.tensor(0.0)), u, 0.01, -20 * u)
    assert found is not None
    k, g = found
    torch.testing.assert_close(g, u + 0.005 * k)
    assert abs(float(k + 20 * g**3)) * 0.005 < 0.01 * 1e-3  # a hundredth of the tolerance
    assert field.nnewton == field.nsolve >= 2


@torch.no_grad()
def test_linear_equation_takes_two_iterations_or_one() -> None:
    field, newton, u = started(lambda t, u: -1e3 * u)
    for expected in (2, 4):  # a first increment has nothing to compare with, ...
        found = newton.solve(partial(field, torch.tensor(0.0)), u, 0.1, 0 * u)
        assert found is not None and field.nnewton == expected
    assert newton.solve(partial(field, torch.tensor(0.0)), u, 0.1, found[0]) is not None
    assert field.nnewton == 5  # ... unless it is no error itself


@torch.no_grad()
def test_diverges_without_waiting_for_the_last_iteration() -> None:
    # the Jacobian at u = 1 tells nothing of what comes beyond
    field, newton, u = started(lambda t, u: torch.where(u < 1.01, 0 * u, 1e5 * (u - 1.01)))
    assert newton.solve(partial(field, torch.tensor(0.0)), u, 0.1, 10 + 0 * u) is None
    assert newton.trouble is Trouble.DIVERGED
    assert field.nnewton <= 4


@torch.no_grad()
def test_too_slow_is_given_up_early() -> None:
    def wrong(t: Tensor, u: Tensor) -> Tensor:
        return torch.full((1, 1), -100.0, dtype=F64)

    field, newton, u = started(lambda t, u: -10 * u, h=1.0, jac=wrong)
    assert newton.solve(partial(field, torch.tensor(0.0)), u, 1.0, 0 * u) is None
    assert field.nnewton < 10


@torch.no_grad()
def test_values_that_are_not_finite_are_told_apart() -> None:
    field, newton, u = started(lambda t, u: torch.sqrt(1.1 - u), n=2)
    assert newton.solve(partial(field, torch.tensor(0.0)), u, 1.0, 10 + 0 * u) is None
    assert newton.trouble is Trouble.NOT_FINITE


@torch.no_grad()
def test_when_the_matrix_is_made_anew() -> None:
    field, newton, u = started(lambda t, u: -20 * u)

    def work() -> tuple[int, int]:
        return field.njac, field.nlu

    assert work() == (1, 1)
    later = u + 0.1
    for h, expected in ((0.11, (1, 1)), (0.12, (1, 1)), (0.13, (1, 2)), (0.1, (1, 3))):
        assert newton.begin(0.5, h, later, smoothed=False)
        assert work() == expected
    assert newton.begin(0.5, 0.1, later, smoothed=True)  # needs the Jacobian of just this step
    assert work() == (2, 4) and newton.is_here(0.5, later)
    assert newton.begin(0.5, 0.1, later, smoothed=True)
    assert work() == (2, 4)
    assert newton.begin(0.5, 0.099, later, smoothed=True)
    assert work() == (2, 5)
    newton.slowest = 0.6
    newton.end()
    assert newton.begin(0.5, 0.099, later, smoothed=False)  # a new one would be the same
    assert work() == (2, 5)
    assert newton.begin(0.6, 0.099, u, smoothed=False)
    assert work() == (3, 6)


@torch.no_grad()
def test_failure_with_an_old_jacobian_is_tried_again_with_a_new_one() -> None:
    alg, field = ds.ImplicitMidpoint(), field_of(lambda t, u: -(u**3))
    u = torch.full((1,), 0.01, dtype=F64)
    assert alg.step(field, 0.0, 0.02, alg.init(field, 0.0, u)).converged
    far = torch.full((1,), 5.0, dtype=F64)
    step = alg.step(field, 0.02, 0.02, alg.init(field, 0.02, far))
    assert step.converged and field.njac == 2


@torch.no_grad()
def test_work_is_kept_for_one_solve() -> None:
    prob = library.rober(tspan=(0.0, 1.0))
    first, again = (solve(prob, ds.Kvaerno3(), rtol=1e-4, atol=1e-8, **ENGINE) for _ in range(2))
    assert torch.equal(first.u, again.u)
    assert first.stats.njac == again.stats.njac > 0


# -- the loop ----------------------------------------------------------------------------------


class Failing(Algorithm):
    """Solves ``u' = 1``; says of some attempts that their equations were not solved."""

    order = 4
    adaptive = True

    def __init__(self, failures: int, trouble: Trouble = Trouble.DIVERGED):
        self.failures, self.trouble = failures, trouble
        self.sizes: list[float] = []

    def init(self, field: Any, t: Any, u: Tensor, du: Tensor | None = None) -> tuple[Tensor]:
        return (u,)

    def step(self, field: Any, t: Any, h: Any, state: tuple[Tensor, ...]) -> Step:
        self.sizes.append(h)
        zero: Any = torch.zeros((), dtype=F64)
        if len(self.sizes) <= self.failures:
            return Step(state, None, zero, zero, converged=False, trouble=self.trouble)
        return Step((state[0] + h,), torch.full_like(state[0], 1e-7), zero, zero)


def looped(alg: Failing, **settings: Any) -> Any:
    field = field_of(lambda t, u: torch.ones_like(u))
    made = Settings(tolerance(), PIController(), dt=0.25, **settings)
    with torch.no_grad():
        return integrate(field, alg, torch.zeros(1, dtype=F64), 0.0, 1.0, made, Saving())


def test_failed_step_is_halved_and_counted() -> None:
    alg = Failing(3)
    result = looped(alg)
    assert alg.sizes[:4] == [0.25, 0.125, 0.0625, 0.03125]
    assert result.nreject == 3 and result.retcode is ReturnCode.SUCCESS
    # the step after a failure does not grow, those after it do
    assert alg.sizes[4] <= alg.sizes[3] < alg.sizes[5]


CODES = {
    Trouble.DIVERGED: ReturnCode.NEWTON_FAILED,
    Trouble.SINGULAR: ReturnCode.NEWTON_FAILED,
    Trouble.NOT_FINITE: ReturnCode.UNSTABLE,
    Trouble.JACOBIAN: ReturnCode.UNSTABLE,
}


@pytest.mark.parametrize("trouble", CODES)
@pytest.mark.parametrize("adaptive", [True, False])
def test_endless_failures_end(trouble: Trouble, adaptive: bool) -> None:
    alg = Failing(10_000, trouble)
    result = looped(alg, adaptive=adaptive)
    assert result.retcode is CODES[trouble]
    assert len(alg.sizes) == 1 if not adaptive else len(alg.sizes) < 1100


# -- failures in words -------------------------------------------------------------------------


def failure(prob: ODEProblem, alg: Any, **options: Any) -> SolveError:
    with pytest.raises(SolveError) as caught:
        solve(prob, alg, **{"rtol": 1e-6, "atol": 1e-8, **ENGINE, **options})
    return caught.value


def stiff(**options: Any) -> ODEProblem:
    return ODEProblem(
        lambda t, u: -1e4 * (u - torch.cos(t)), torch.ones(2, dtype=F64), (0.0, 10.0), **options
    )


def test_wrong_jac_is_named_as_the_cause() -> None:
    prob = stiff(jac=lambda t, u: 1e4 * torch.eye(2, dtype=F64))
    error = failure(prob, ds.Kvaerno3(), dtmin=1e-3)
    assert error.retcode is ReturnCode.NEWTON_FAILED
    assert "check_jacobian(prob)" in str(error)
    assert "check_jacobian(prob)" in str(failure(prob, ds.Rodas4(), maxiters=300))


def test_without_jac_nothing_is_said_of_it() -> None:
    prob = ODEProblem(
        lambda t, u: torch.where(t > 0.5, torch.nan * u, -u), torch.ones(1, dtype=F64), (0.0, 1.0)
    )
    for alg in BOTH:
        error = failure(prob, alg)
        assert error.retcode is ReturnCode.UNSTABLE
        assert "check_jacobian" not in str(error)


@each
def test_nan_in_the_jacobian(alg: Any) -> None:
    # the derivative of a root at zero
    prob = ODEProblem(lambda t, u: -torch.sqrt(u), torch.zeros(2, dtype=F64), (0.0, 1.0))
    error = failure(prob, alg)
    assert error.retcode is ReturnCode.UNSTABLE
    assert "Jacobian" in str(error) and "NaN" in str(error)
    given = stiff(jac=lambda t, u: torch.full((2, 2), math.nan, dtype=F64))
    assert failure(given, alg).retcode is ReturnCode.UNSTABLE


@each
def test_singular_matrix_with_fixed_steps(alg: Any) -> None:
    gamma = alg.tableau.stages.gamma
    prob = ODEProblem(lambda t, u: u / gamma, torch.ones(1, dtype=F64), (0.0, 1.0))
    error = failure(prob, alg, adaptive=False, dt=1.0)
    assert error.retcode is ReturnCode.NEWTON_FAILED and "singular" in str(error)
    # an adaptive solve tries another size
    assert solve(prob, alg, dt=1.0, rtol=1e-5, atol=1e-5, **ENGINE).success


@torch.no_grad()
def test_singular_and_infinite_matrices_are_found() -> None:
    field = field_of(lambda t, u: u)
    one = torch.ones(1, 1, 1, dtype=F64)
    assert factored_step_matrix(field, one, 2.0, 0.5) is None
    assert factored_step_matrix(field, one * math.inf, 2.0, 0.5) is None
    assert factored_step_matrix(field, one * math.nan, 2.0, 0.5) is None
    lu = factored_step_matrix(field, one, 1.0, 0.5)
    assert lu is not None and float(lu.solve(torch.ones(1, dtype=F64))) == 1.0
    assert (field.nlu, field.nsolve) == (4, 1)


SHAPES = [
    (lambda t, u: torch.eye(3, dtype=F64), r"jac\(t, u\).*\(3, 3\).*\(2, 2\)"),
    (lambda t, u: torch.zeros(2, dtype=F64), r"jac.*\(2,\).*\(2, 2\)"),
    (lambda t, u: torch.eye(2), r"jac.*float32.*float64"),
    (lambda t, u: [[1.0, 0.0], [0.0, 1.0]], r"jac.*list.*tensor"),
]


@pytest.mark.parametrize("jac, words", SHAPES)
@each
def test_wrong_shape_is_refused_before_any_work(alg: Any, jac: Any, words: str) -> None:
    calls = []

    def f(t: Tensor, u: Tensor) -> Tensor:
        calls.append(t)
        return -u

    prob = ODEProblem(f, torch.ones(2, dtype=F64), (0.0, 1.0), jac=jac)
    with pytest.raises(ValueError, match=words):
        solve(prob, alg, **ENGINE)
    assert not calls
    assert solve(prob, ds.Tsit5(), **ENGINE).success  # which has no use for it


@each
def test_complex_state_is_refused(alg: Any) -> None:
    prob = ODEProblem(lambda t, u: 1j * u, torch.ones(1, dtype=torch.complex128), (0.0, 1.0))
    with pytest.raises(ValueError, match=r"real state.*view_as_real"):
        solve(prob, alg, **ENGINE)


@each
def test_too_large_a_matrix_is_refused(alg: Any) -> None:
    prob = ODEProblem(lambda t, u: -u, torch.ones(5001, dtype=F64), (0.0, 1.0))
    with pytest.raises(ValueError, match=r"5001 x 5001.*explicit"):
        solve(prob, alg, **ENGINE)


# -- the user's jac ----------------------------------------------------------------------------


def rows(t: Tensor, u: Tensor) -> Tensor:
    return torch.stack([-50 * u[..., 0] * u[..., 1], u[..., 0] - u[..., 1]], -1)


def rows_jac(t: Tensor, u: Tensor) -> Tensor:
    x, y = u.unbind(-1)
    one = torch.ones_like(x)
    return torch.stack([torch.stack([-50 * y, -50 * x], -1), torch.stack([one, -one], -1)], -2)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 2, 2)])
@each
def test_jac_of_the_user_gives_the_same_solution(alg: Any, shape: tuple[int, ...]) -> None:
    u0 = 0.5 + torch.arange(math.prod(shape), dtype=F64).reshape(shape) / 10
    prob = ODEProblem(rows, u0, (0.0, 2.0))
    given = prob.remake(jac=rows_jac)
    options = {"rtol": 1e-4, "atol": 1e-6, "save_everystep": False, **ENGINE}
    torch.testing.assert_close(
        solve(given, alg, **options).u, solve(prob, alg, **options).u, rtol=1e-10, atol=1e-12
    )
    assert check_jacobian(given) < 1e-12


def test_check_jacobian_names_the_worst_entries() -> None:
    def wrong(t: Tensor, u: Tensor) -> Tensor:
        j = rows_jac(t, u).clone()
        j[0, 1] *= 1.5
        j[1, 0] = 0.0
        return j

    prob = ODEProblem(rows, torch.tensor([1.0, 2.0], dtype=F64), (0.0, 1.0), jac=wrong)
    with pytest.raises(ValueError, match=r"J\[0, 1\]: given -75, exact -50\n  J\[1, 0\]: given 0"):
        check_jacobian(prob)
    states = [torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([0.0, 2.0], dtype=F64)]
    with pytest.raises(ValueError, match=r"J\[1, 0\]"):
        check_jacobian(prob, t=0.5, u=states)
    with pytest.raises(ValueError, match="no jac"):
        check_jacobian(prob.remake(jac=None))


def test_check_jacobian_looks_beside_an_initial_state_of_zeros() -> None:
    prob = ODEProblem(
        lambda t, u: -(u**2), torch.zeros(2, dtype=F64), (0.0, 1.0),
        jac=lambda t, u: torch.zeros(2, 2, dtype=F64),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"given 0, exact -0\.00"):
        check_jacobian(prob)


# -- fixed steps -------------------------------------------------------------------------------

ENGINES = pytest.mark.parametrize("engine", ["native", "torch"])
SDIRKS = [ds.ImplicitEuler(), ds.ImplicitMidpoint(), ds.Trapezoid(), ds.Kvaerno3(), ds.KenCarp4()]


def squared(t: Tensor, u: Tensor) -> Tensor:
    return -u + 2 * torch.cos(3 * t) * u * u / (1 + t)


@ENGINES
@pytest.mark.parametrize("alg", SDIRKS, ids=repr)
def test_fixed_steps_where_the_matrix_of_the_start_is_too_far(alg: Any, engine: str) -> None:
    u0 = torch.tensor([0.7, -0.3], dtype=F64)
    prob = ODEProblem(squared, u0, (0.0, 2.0))
    choices: list[dict[str, Any]] = [{}, {"rtol": 1e-8, "atol": 1e-9}]
    for tolerances in choices:
        sol = solve(prob, alg, dt=0.25, adaptive=False, engine=engine, **tolerances)
        assert sol.success and len(sol.t) == 9


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fixed_steps_solve_their_equations_to_rounding(engine: str, dtype: torch.dtype) -> None:
    u0, dt = torch.tensor([0.7, -0.3, 1e-9], dtype=dtype), 0.25
    prob = ODEProblem(squared, u0, (0.0, 2.0))
    sol = solve(prob, ds.ImplicitEuler(), dt=dt, adaptive=False, engine=engine)
    t = sol.t[1:, None].to(dtype)
    residual = sol.u[1:] - sol.u[:-1] - dt * squared(t, sol.u[1:])
    assert float((residual / sol.u[1:]).abs().max()) < 50 * torch.finfo(dtype).eps
    # a tolerance that was given is what they are solved to
    rough = solve(prob, ds.ImplicitEuler(), dt=dt, adaptive=False, rtol=1e-3, engine=engine)
    assert rough.stats.nnewton < sol.stats.nnewton


def kepler(t: Tensor, u: Tensor) -> Tensor:
    x, y, vx, vy = u
    r3 = (x * x + y * y) ** 1.5
    return torch.stack([vx, vy, -x / r3, -y / r3])


def test_the_midpoint_rule_keeps_the_energy_of_an_orbit() -> None:
    u0 = torch.tensor([0.7, 0, 0, (1.3 / 0.7) ** 0.5], dtype=F64)
    end = 2 * math.pi * 100
    options: dict[str, Any] = {"dt": 2 * math.pi / 200, "saveat": end / 100}
    sol = solve(ODEProblem(kepler, u0, (0.0, end)), ds.ImplicitMidpoint(), **options)
    x, y, vx, vy = sol.u.unbind(1)
    energy = (vx**2 + vy**2) / 2 - 1 / torch.sqrt(x**2 + y**2)
    assert float((energy / energy[0] - 1).abs().max()) < 1e-3


@ENGINES
@pytest.mark.parametrize("alg", [ds.ImplicitEuler(), ds.Trapezoid(), ds.KenCarp4()], ids=repr)
def test_gradient_of_fixed_steps_with_matrices_of_their_stages(alg: Any, engine: str) -> None:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return -u + p * torch.cos(3 * t) * u * u / (1 + t)

    def end(p: Tensor, sensealg: Any = None) -> Tensor:
        u0 = torch.tensor([0.7, -0.3], dtype=F64)
        options: dict[str, Any] = {"dt": 0.25, "adaptive": False, "engine": engine}
        return (
            solve(ODEProblem(f, u0, (0.0, 2.0), p), alg, sensealg=sensealg, **options).u[-1].sum()
        )

    with torch.no_grad():
        wanted = (
            end(torch.tensor(2.00001, dtype=F64)) - end(torch.tensor(1.99999, dtype=F64))
        ) / 2e-5
    for sensealg in (ds.DiscreteAdjoint(), ds.DiscreteAdjoint(checkpoints=2)):
        p = torch.tensor(2.0, dtype=F64, requires_grad=True)
        (found,) = torch.autograd.grad(end(p, sensealg), p)
        assert abs(float(found / wanted) - 1) < 1e-7


def test_the_message_of_a_fixed_step_tells_its_size() -> None:
    prob = ODEProblem(lambda t, u: 3 + u * u * torch.exp(u), torch.ones(1, dtype=F64), (0.0, 9.0))
    for engine in ("native", "torch"):
        with pytest.raises(SolveError, match=r"step size 3\."):
            solve(prob, ds.ImplicitEuler(), dt=3.0, adaptive=False, engine=engine)


@ENGINES
@pytest.mark.parametrize("alg", [ds.KenCarp4(), ds.Kvaerno5(), ds.ImplicitEuler()], ids=repr)
def test_continuous_adjoints_of_fixed_steps_in_single_precision(alg: Any, engine: str) -> None:
    u0 = torch.tensor([0.3, -0.7, 1.1, 0.5, -0.2, 0.9])
    for sensealg in (ds.InterpolatingAdjoint(), ds.BacksolveAdjoint()):
        p = torch.tensor(0.4, requires_grad=True)
        prob = ODEProblem(lambda t, u, p: -p * u, u0, (0.0, 1.0), p)
        options: dict[str, Any] = {"adaptive": False, "dt": 0.1, "saveat": [1.0], "engine": engine}
        sol = solve(prob, alg, sensealg=sensealg, **options)
        (found,) = torch.autograd.grad(sol.u.sum(), p)
        exact = -float(u0.sum()) * math.exp(-0.4)
        assert abs(float(found) / exact - 1) < (0.1 if alg.order == 1 else 1e-3)


@pytest.mark.parametrize("alg", [ds.Kvaerno5(), ds.KenCarp4(), ds.KenCarp5()], ids=repr)
def test_stages_are_as_accurate_as_the_steps(alg: Any) -> None:
    # the rate of one stage let the next end too early: Kvaerno5 was 1 tolerance off, KenCarp4 3
    prob = library.rober(tspan=(0.0, 1e4))
    exact = solve(prob, ds.Rodas5P(), rtol=1e-11, atol=1e-14, save_everystep=False).u[-1]
    sol = solve(prob, alg, rtol=1e-8, atol=1e-12, save_everystep=False)
    off = (sol.u[-1] - exact).abs() / (1e-12 + 1e-8 * exact.abs())
    assert float(off.max()) < 0.8
