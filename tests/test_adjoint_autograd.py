"""Autograd's own rules, torch.func transforms, and the reverse solve."""

from __future__ import annotations

import functools
import gc
import math
import warnings

import pytest
import torch
from gradients import (
    CONTINUOUS,
    DOUBLE,
    MATRIX,
    START,
    STEPWISE,
    TAPE,
    assert_near,
    check_linear,
    each,
    label,
    leaf,
    linear,
)

from diffsolve import (
    RK4,
    BacksolveAdjoint,
    BacksolveWarning,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    SolveError,
    Tsit5,
    Vern7,
    Vern9,
    solve,
)
from diffsolve.problems import library

# -- autograd's own rules -----------------------------------------------------------------------


def short_solve(u0, p, **options):
    prob = library.lotka_volterra(tspan=(0.0, 1.0)).remake(u0=u0, p=p)
    return solve(prob, saveat=[0.4, 1.0], **options).u


@each()
def test_gradcheck(sensealg):
    # tolerances tight enough that differences of 1e-6 do not see the change of steps
    options = {"alg": Vern9(), "rtol": 1e-12, "atol": 1e-12, "sensealg": sensealg}
    inputs = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    assert torch.autograd.gradcheck(functools.partial(short_solve, **options), inputs)


def test_gradgradcheck_on_tape():
    options = {"alg": RK4(), "adaptive": False, "dt": 0.25, "sensealg": TAPE}
    inputs = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    assert torch.autograd.gradgradcheck(functools.partial(short_solve, **options), inputs)


@pytest.mark.filterwarnings("ignore:Using backward.*create_graph")
@each([*STEPWISE, *CONTINUOUS])
def test_double_backward_is_refused(sensealg):
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    loss = (short_solve(u0, p, sensealg=sensealg) ** 2).sum()
    (g,) = torch.autograd.grad(loss, p, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


class TestTransforms:
    u0 = torch.tensor([1.0, 1.0], dtype=DOUBLE)
    p = torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=DOUBLE)

    def jacobian(self):
        p = self.p.clone().requires_grad_()
        u = short_solve(self.u0, p, sensealg=DiscreteAdjoint())
        rows = [torch.autograd.grad(x, p, retain_graph=True)[0] for x in u.reshape(-1)]
        return torch.stack(rows).reshape(2, 2, 4)

    def test_grad(self):
        g = torch.func.grad(lambda p: short_solve(self.u0, p).sum())(self.p)
        assert_near(g, self.jacobian().sum((0, 1)), 1e-12)

    def test_grad_by_a_captured_tensor(self):
        g = torch.func.grad(
            lambda a: solve(
                ODEProblem(lambda t, u: -a * u, self.u0, (0.0, 1.0)), saveat=[1.0]
            ).u.sum()
        )(torch.tensor(0.5, dtype=DOUBLE))
        assert float(g) == pytest.approx(-2 * math.exp(-0.5), rel=1e-3)

    def test_jacrev(self):
        jac = torch.func.jacrev(lambda p: short_solve(self.u0, p))(self.p)
        assert_near(jac, self.jacobian(), 1e-12)

    def test_jvp(self):
        v = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=DOUBLE)
        _, out = torch.func.jvp(lambda p: short_solve(self.u0, p), (self.p,), (v,))
        assert_near(out, self.jacobian() @ v, 1e-12)

    def test_jacfwd(self):
        jac = torch.func.jacfwd(lambda p: short_solve(self.u0, p))(self.p)
        assert_near(jac, self.jacobian(), 1e-12)

    def test_forward_mode(self):
        v = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=DOUBLE)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(self.p, v)
            out = torch.autograd.forward_ad.unpack_dual(short_solve(self.u0, dual)).tangent
        assert_near(out, self.jacobian() @ v, 1e-12)

    def test_hessian(self):
        def loss(p):
            options = {"alg": RK4(), "adaptive": False, "dt": 0.25}
            return (short_solve(self.u0, p, **options) ** 2).sum()

        hessian = torch.func.jacfwd(torch.func.grad(loss))(self.p)
        assert_near(
            hessian,
            torch.autograd.functional.hessian(
                lambda p: (
                    short_solve(self.u0, p, alg=RK4(), adaptive=False, dt=0.25, sensealg=TAPE) ** 2
                ).sum(),
                self.p,
            ),
            1e-12,
        )

    @pytest.mark.parametrize("sensealg", [*STEPWISE, *CONTINUOUS], ids=label)
    def test_other_sensealgs_are_refused(self, sensealg):
        with pytest.raises(TypeError, match="tape=True"):
            torch.func.grad(lambda p: short_solve(self.u0, p, sensealg=sensealg).sum())(self.p)


@each()
@pytest.mark.parametrize("alg", [Tsit5(), Vern7()], ids=repr)  # Vern7's dense output adds stages
def test_backward_twice_gives_the_same(sensealg, alg):
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    loss = (short_solve(u0, p, alg=alg, sensealg=sensealg) ** 2).sum()
    first = torch.autograd.grad(loss, (u0, p), retain_graph=True)
    second = torch.autograd.grad(loss, (u0, p))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each()
def test_loss_of_some_outputs(sensealg):
    check_linear(sensealg, saveat=[0.2, 0.5, 1.5], weigh=lambda u: u[1, 0])
    check_linear(sensealg, saveat=[0.2, 0.5, 1.5], weigh=lambda u: u[0, 1] * 3)


@each()
def test_loss_that_uses_nothing(sensealg):
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    (0 * short_solve(u0, p, sensealg=sensealg).sum()).backward()
    assert not u0.grad.any()
    assert not p.grad.any()


@each()
def test_nan_loss_raises_or_shows(sensealg):
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    loss = (short_solve(u0, p, sensealg=sensealg) * math.nan).sum()
    if sensealg in CONTINUOUS:
        with pytest.raises(RuntimeError, match="NaN"):
            loss.backward()
    else:
        loss.backward()
        assert p.grad.isnan().any()


@each(CONTINUOUS)
def test_gradient_is_linear_in_the_loss(sensealg):
    def gradient(scale):
        u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
        u = short_solve(u0, p, sensealg=sensealg)
        return torch.cat(torch.autograd.grad(scale * (u**2).sum(), (u0, p)))

    # a power of two: then every operation rounds alike
    torch.testing.assert_close(gradient(2.0**-30) * 2**30, gradient(1.0), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(1e-8) * 1e8, gradient(1.0), rtol=1e-7, atol=0)


# -- what a graph keeps ---------------------------------------------------------------------------


def states_alive(n):
    """Memory of all tensors that are alive, in states of ``n`` numbers."""
    gc.collect()
    found = (x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor)
    return sum({x.data_ptr(): x.nbytes() for x in found}.values()) / (8 * n)


@each([*STEPWISE, *CONTINUOUS])
def test_backward_frees_what_it_needed(sensealg):
    n, steps, kept = 5000, 40, 20  # kept: the problem, gradients, work space
    before = states_alive(n)
    u0 = torch.ones(n, dtype=DOUBLE, requires_grad=True)

    def solved(dense):
        prob = ODEProblem(lambda t, u: -u, u0, (0.0, 1.0))
        options = {"dt": 1 / steps, "adaptive": False, "saveat": [1.0], "dense": dense}
        return solve(prob, Vern7(), sensealg=sensealg, **options)  # adds stages in backward

    u = solved(False).u
    if sensealg == InterpolatingAdjoint():
        assert states_alive(n) - before > 7 * steps
    u.sum().backward()
    assert states_alive(n) - before < kept
    del u

    sol = solved(True)
    expected = sol(0.51)
    sol.u.sum().backward()
    assert torch.equal(sol(0.51), expected)  # what the user asked for stays
    assert states_alive(n) - before > 7 * steps
    u = sol.u
    del sol
    assert u.requires_grad
    assert states_alive(n) - before < kept


@each()
def test_second_backward_without_retain_graph_is_refused(sensealg):
    u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
    loss = (short_solve(u0, p, sensealg=sensealg) ** 2).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# -- the reverse solve --------------------------------------------------------------------------


@each(CONTINUOUS)
def test_one_reverse_solve_whatever_is_saved(sensealg):
    def reverse(saves):
        u0, p = leaf([1.0, 1.0]), leaf([1.5, 1.0, 3.0, 1.0])
        prob = library.lotka_volterra().remake(u0=u0, p=p)
        saveat = torch.linspace(0, 10, saves, dtype=DOUBLE)
        sol = solve(prob, Tsit5(), sensealg=sensealg, saveat=saveat, rtol=1e-7, atol=1e-7)
        sol.u.sum().backward()
        return sol.stats.adjoint

    few, many = reverse(2), reverse(200)
    # cutting a step at a save costs up to two more
    assert many.naccept <= few.naccept + 400
    # six stages a step and one evaluation where a step begins at a save
    assert many.nf <= 6 * (many.naccept + many.nreject) + 200 + 3


@each([*STEPWISE, *CONTINUOUS])
def test_statistics_of_the_reverse_pass(sensealg):
    p = leaf(MATRIX)
    prob = ODEProblem(linear, leaf(START), (0.0, 3.0), p)
    sol = solve(prob, Tsit5(), sensealg=sensealg, saveat=[1.0, 3.0])
    nf = sol.stats.nf
    assert sol.stats.adjoint is None
    assert sol.stats.sensealg == repr(sensealg)
    sol.u.sum().backward()
    adjoint = sol.stats.adjoint
    assert adjoint.nf >= 6 * adjoint.naccept > 0
    assert adjoint.wall_s > 0
    assert adjoint.alg == "Tsit5"
    assert sol.stats.nf == nf


@pytest.mark.parametrize("kind", [BacksolveAdjoint, InterpolatingAdjoint])
def test_reverse_solve_has_its_own_method_and_tolerances(kind):
    def gradient(**options):
        p = leaf(MATRIX)
        sol = solve(
            ODEProblem(linear, leaf(START), (0.0, 3.0), p), Tsit5(), sensealg=kind(**options)
        )
        (sol.u[-1] ** 2).sum().backward()
        return sol.stats.adjoint

    adjoint = gradient(alg=Vern7(), rtol=1e-9, atol=1e-9)
    assert adjoint.alg == "Vern7"
    assert gradient(rtol=1e-10, atol=1e-10).naccept > 2 * gradient().naccept


def test_reverse_method_of_fixed_steps_needs_fixed_forward_steps():
    prob = ODEProblem(linear, leaf(START), (0.0, 1.0), leaf(MATRIX))
    with pytest.raises(ValueError, match="RK4"):  # up front, not in backward
        solve(prob, Tsit5(), sensealg=InterpolatingAdjoint(alg=RK4()))


def test_discrete_reverse_evaluates_no_more_than_the_steps():
    sol = check_linear(DiscreteAdjoint(), alg=Tsit5(), rtol=1e-2, saveat=[1.5])
    # seven stages a step, and the derivative at the start
    assert sol.stats.adjoint.nf <= 7 * len(sol.steps) + 1
    assert sol.stats.adjoint.naccept == len(sol.steps)


@pytest.mark.parametrize("kind", [BacksolveAdjoint, InterpolatingAdjoint])
def test_failing_reverse_solve_is_an_error(kind):
    prob = ODEProblem(linear, leaf(START), (0.0, 20.0), leaf(MATRIX))
    sol = solve(prob, Tsit5(), sensealg=kind(rtol=1e-13, atol=1e-13), maxiters=60)
    with pytest.raises(SolveError, match="reverse solve"):
        sol.u.sum().backward()


@each()
def test_partial_solution_of_a_failed_solve(sensealg):
    p = leaf(0.4)

    def f(t, u, p):
        return p * u * torch.where(t < 2, 1.0, math.nan)

    prob = ODEProblem(f, leaf([1.0]), (0.0, 9.0), p)
    sol = solve(prob, Tsit5(), sensealg=sensealg, throw=False, rtol=1e-8, atol=1e-8)
    assert not sol.success
    assert float(sol.t[-1]) > 1.9
    sol.u[-1].sum().backward()
    end = float(sol.t[-1])
    assert float(p.grad) == pytest.approx(end * math.exp(0.4 * end), rel=1e-6)


@each()
def test_failed_solve_that_saved_nothing(sensealg):
    u0, p = leaf(START), leaf(MATRIX)
    prob = ODEProblem(linear, u0, (0.0, 100.0), p)
    sol = solve(prob, sensealg=sensealg, saveat=[99.0], maxiters=5, throw=False)
    assert sol.u.shape == (0, 2)
    if sensealg is not TAPE:  # there, nothing depends on anything
        sol.u.sum().backward()
        assert not u0.grad.any()
        assert not p.grad.any()


def contracting(sensealg, rate):
    u0 = leaf([1.0])
    prob = ODEProblem(lambda t, u, p: -p * u, u0, (0.0, 1.0), leaf(rate))
    solve(prob, Tsit5(), sensealg=sensealg, saveat=[1.0]).u.sum().backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backsolve_warns_where_it_is_unstable(checkpointing):
    with pytest.warns(BacksolveWarning, match="DiscreteAdjoint"):
        contracting(BacksolveAdjoint(checkpointing=checkpointing), 50.0)


@each()
def test_no_warning_on_a_benign_problem(sensealg):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contracting(sensealg, 0.5)


def test_checkpointing_resets_the_reconstruction():
    # with a state every 0.05, backsolve survives what it cannot survive without
    def gradient(**options):
        u0 = leaf([1.0])
        prob = ODEProblem(lambda t, u, p: -p * u**2, u0, (0.0, 1.0), leaf(50.0))
        saveat = torch.linspace(0, 1, 41, dtype=DOUBLE)
        sol = solve(
            prob, Vern7(), sensealg=BacksolveAdjoint(**options), saveat=saveat, rtol=1e-9, atol=1e-9
        )
        sol.u[-1].sum().backward()
        return float(u0.grad)

    assert gradient() == pytest.approx(1 / 51**2, rel=1e-4)
