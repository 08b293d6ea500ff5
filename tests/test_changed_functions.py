"""What must not pass in silence: an f that is another one in backward, hidden tensors, autocast.

All on the torch engine, whose reverse pass calls ``f`` again; the native engine goes back through
the ``f`` that was solved (``test_native_backward.py``).
"""

from __future__ import annotations

import functools
import gc
import math
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffsolve
from diffsolve import (
    RK4,
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    Tsit5,
    Vern7,
)
from diffsolve.engines.torch.reverse_field import ReverseODE
from diffsolve.problems.capture import Substitute
from diffsolve.problems.vector_field import VectorField

F64 = torch.float64
solve = functools.partial(diffsolve.solve, engine="torch")
STEPWISE = [DiscreteAdjoint(), DiscreteAdjoint(checkpoints=3)]
REVERSE = [*STEPWISE, BacksolveAdjoint(), InterpolatingAdjoint()]


def ones(n: int = 1) -> Tensor:
    return torch.ones(n, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("sensealg", REVERSE, ids=str)
@pytest.mark.parametrize("size", [1, 40])  # in batches of steps, and step by step
def test_variable_rebound_between_solve_and_backward_is_refused(sensealg: Any, size: int) -> None:
    u0, rate = ones(size), 1.0
    sol = solve(ODEProblem(lambda t, u: -rate * u, u0, (0.0, 1.0)), Tsit5(), sensealg=sensealg)
    rate = 3.0
    with pytest.raises(RuntimeError, match="other values now"):
        sol.u[-1].sum().backward()


@pytest.mark.parametrize("sensealg", REVERSE, ids=str)
def test_buffer_changed_between_solve_and_backward_is_refused(sensealg: Any) -> None:
    u0, rate = ones(), torch.ones((), dtype=F64)
    sol = solve(ODEProblem(lambda t, u: -rate * u, u0, (0.0, 1.0)), Tsit5(), sensealg=sensealg)
    rate.fill_(3.0)
    with pytest.raises(RuntimeError, match="other values now"):
        sol.u[-1].sum().backward()


@pytest.mark.parametrize("sensealg", REVERSE, ids=str)
def test_random_numbers_in_f_are_refused(sensealg: Any) -> None:
    prob = ODEProblem(lambda t, u: -u * torch.rand((), dtype=F64), ones(), (0.0, 1.0))
    sol = solve(prob, RK4(), dt=0.1, adaptive=False, sensealg=sensealg)
    with pytest.raises(RuntimeError, match="random numbers"):
        sol.u[-1].sum().backward()


def test_random_numbers_in_f_are_right_on_the_tape() -> None:
    u0 = ones()
    prob = ODEProblem(lambda t, u: -u * torch.rand((), dtype=F64), u0, (0.0, 1.0))
    sol = solve(prob, RK4(), dt=0.1, sensealg=DiscreteAdjoint(tape=True))
    sol.u[-1].sum().backward()
    assert u0.grad is not None  # u' = -r(t) u is linear: the gradient is u(1) / u(0)
    torch.testing.assert_close(u0.grad, sol.u[-1].detach())


settings = SimpleNamespace(rate=torch.ones((), dtype=F64, requires_grad=True))


@pytest.mark.parametrize("sensealg", REVERSE, ids=str)
def test_tensor_of_a_global_object_used_halfway_is_not_lost(sensealg: Any) -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return -settings.rate * u if 0.3 < float(t) < 0.6 else -u

    sol = solve(
        ODEProblem(f, ones(), (0.0, 1.0)), Tsit5(), tstops=[0.3, 0.6], sensealg=sensealg, rtol=1e-8
    )
    settings.rate.grad = None
    try:
        sol.u[-1].sum().backward()
    except RuntimeError as error:
        assert "lose its gradient" in str(error)
        return
    assert settings.rate.grad is not None
    assert settings.rate.grad.item() == pytest.approx(-0.3 * sol.u[-1].item(), rel=1e-5)


def test_module_as_p_with_a_parameter_used_halfway() -> None:
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.ones((), dtype=F64)))

    def f(t: Tensor, u: Tensor, p: nn.Module) -> Tensor:
        return -p.w * u if 0.3 < float(t) < 0.6 else -u

    sol = solve(ODEProblem(f, ones(), (0.0, 1.0), module), Tsit5(), tstops=[0.3, 0.6], rtol=1e-8)
    sol.u[-1].sum().backward()
    assert module.w.grad.item() == pytest.approx(-0.3 * sol.u[-1].item(), rel=1e-5)


def test_stashed_result_of_an_iteration_does_not_break_the_next() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.penalty: Any = None

        def f(self, t: Tensor, u: Tensor) -> Tensor:
            return self.net(u)

        def forward(self, x: Tensor) -> Tensor:
            self.penalty = self.net(x).square().sum()
            return solve(ODEProblem(self.f, x, (0.0, 1.0)), Tsit5()).u[-1].sum() + self.penalty

    model = Model()
    for _ in range(3):
        model(torch.ones(2)).backward()


def test_autocast_holds_in_f_only() -> None:
    net = nn.Linear(3, 3)
    prob = ODEProblem(lambda t, u: net(u), torch.ones(3), (0.0, 1.0))
    plain = ODEProblem(lambda t, u: net(u.bfloat16()).float(), torch.ones(3), (0.0, 1.0))
    exact = ODEProblem(lambda t, u: -u, torch.ones(3), (0.0, 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        low = solve(prob, Tsit5(), saveat=[0.31, 1.0], dt=0.1, adaptive=False)
        sol = solve(exact, Tsit5(), saveat=[0.31, 1.0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sol.u[:, 0], torch.tensor([-0.31, -1.0]).exp(), rtol=1e-5, atol=0)
    assert low.u.dtype == torch.float32
    low.u[-1].sum().backward()  # outside: f still runs as it ran forward
    assert net.weight.grad is not None
    found = net.weight.grad.clone()
    net.weight.grad = None
    net.to(torch.bfloat16)
    by_hand = solve(plain, Tsit5(), saveat=[0.31, 1.0], dt=0.1, adaptive=False)
    torch.testing.assert_close(low.u, by_hand.u, rtol=1e-2, atol=1e-2)
    assert found.abs().max() > 0


def test_inference_mode() -> None:
    net = nn.Linear(2, 2)
    with torch.inference_mode():
        sol = solve(ODEProblem(lambda t, u: net(u), torch.ones(2), (0.0, 1.0)), Tsit5())
    assert sol.success


def test_lazy_dense_output_refuses_an_f_trained_since() -> None:
    p = torch.ones((), dtype=F64)
    sol = solve(ODEProblem(lambda t, u, p: -p * u, ones().detach(), (0.0, 1.0), p), Vern7())
    with torch.no_grad():
        p.fill_(5.0)
    with pytest.raises(RuntimeError, match="f has changed"):
        sol(0.51)


@pytest.mark.parametrize("sensealg", [DiscreteAdjoint(), InterpolatingAdjoint()], ids=str)
def test_second_derivative_says_what_to_use(sensealg: Any) -> None:
    u0 = ones()
    sol = solve(ODEProblem(lambda t, u: -u * u, u0, (0.0, 1.0)), Tsit5(), sensealg=sensealg)
    (g,) = torch.autograd.grad(sol.u[-1].sum(), u0, create_graph=True)
    with pytest.raises(RuntimeError, match="tape=True"):
        g.sum().backward()


def test_unused_parameters_get_zeros_on_the_tape_too() -> None:
    a, b = ones(), ones()
    prob = ODEProblem(lambda t, u, p: -p[0] * u, ones(), (0.0, 1.0), (a, b))
    solve(prob, Tsit5(), sensealg=DiscreteAdjoint(tape=True)).u[-1].sum().backward()
    assert b.grad is not None and b.grad.item() == 0


@pytest.mark.parametrize("sensealg", REVERSE, ids=str)
def test_memory_is_freed_without_the_garbage_collector(sensealg: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        weight = ones(3)
        prob = ODEProblem(lambda t, u: -weight * u, ones(3), (0.0, 1.0))
        sol = solve(prob, Tsit5(), sensealg=sensealg)
        job = weakref.ref(sol._context)
        sol.u.sum().backward()
        del sol
        assert job() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("sensealg", [BacksolveAdjoint(), InterpolatingAdjoint()], ids=str)
def test_parameters_that_f_never_calls_do_not_lengthen_the_reverse_state(
    sensealg: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.encoder = nn.Linear(2, 2), nn.Linear(100, 100)

        def f(self, t: Tensor, u: Tensor) -> Tensor:
            return self.net(u)

    sizes: list[int] = []
    original = ReverseODE.start

    def start(self: ReverseODE, bar: Tensor, u: Tensor) -> Tensor:
        z = original(self, bar, u)
        sizes.append(len(z))
        return z

    monkeypatch.setattr(ReverseODE, "start", start)
    model = Model()
    sol = solve(ODEProblem(model.f, torch.ones(2), (0.0, 1.0)), Tsit5(), sensealg=sensealg)
    sol.u[-1].sum().backward()
    assert max(sizes) <= 2 + 2 + 6
    assert model.net.weight.grad is not None and model.net.weight.grad.abs().max() > 0
    assert model.encoder.weight.grad is not None and not model.encoder.weight.grad.any()


# -- what is no change of f -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("sensealg", STEPWISE, ids=str)
@pytest.mark.parametrize("size", [1, 64])  # in batches of steps, and step by step
@pytest.mark.parametrize(
    ("slope", "start", "end", "gradient"),
    [
        (lambda t: -3 * t**2, 1.0, 1.0, -1.0),
        (lambda t: -torch.ones_like(t), 1.0, 1.0, -1.0),
        (lambda t: torch.cos(t), 0.0, math.pi, 0.0),
    ],
    ids=["cubic", "linear", "sine"],
)
def test_state_that_passes_through_zero_is_no_change(
    slope: Any, start: float, end: float, gradient: float, size: int, sensealg: Any, dtype: Any
) -> None:
    for alg, options in [(Tsit5(), {}), (Vern7(), {}), (RK4(), {"dt": end / 16})]:
        p = torch.ones((), dtype=dtype, requires_grad=True)
        u0 = torch.full((size,), start, dtype=dtype)
        prob = ODEProblem(lambda t, u, p: p * slope(t).expand_as(u), u0, (0.0, end), p)
        solve(prob, alg, sensealg=sensealg, **options).u[-1].mean().backward()
        assert p.grad is not None and p.grad.item() == pytest.approx(gradient, abs=1e-3)


def test_change_where_the_state_has_become_small_is_refused() -> None:
    late = 20.0

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -torch.where(t > 1.8, late, 20.0) * u

    sol = solve(ODEProblem(f, ones(), (0.0, 2.0)), RK4(), dt=0.02)  # 2e-16 at t = 1.8
    late = 30.0
    with pytest.raises(RuntimeError, match="other values now"):
        sol.u[-1].sum().backward()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sensealg", STEPWISE, ids=str)
def test_rounding_of_lower_precision_is_no_change(sensealg: Any, low: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        a = torch.randn(4, 4)
        layer.weight.copy_(-torch.eye(4) - 0.1 * a @ a.T)
        layer.bias.copy_(3 * torch.randn(4))
    # towards equilibrium the terms of f cancel, and what rounding leaves of them is all there is
    u0 = torch.randn(400, 4)
    with torch.autocast("cpu", low):
        prob = ODEProblem(lambda t, u: layer(u), u0, (0.0, 10.0))
        sol = solve(prob, Tsit5(), sensealg=sensealg, dt=0.1, adaptive=False)
    sol.u[-1].mean().backward()
    # u(10) = -W^-1 b, but for the rounding of f
    (expected,) = torch.autograd.grad(
        -torch.linalg.solve(layer.weight, layer.bias).mean(), layer.bias
    )
    torch.testing.assert_close(layer.bias.grad, expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_allowance_for_lower_precision_is_for_f_only(low: torch.dtype) -> None:
    prob = ODEProblem(lambda t, u: -u, torch.ones(3), (0.0, 1.0))
    with torch.autocast("cpu", low):
        lower = VectorField.of(prob)
    substituted = VectorField(Substitute(lower.f, {}), None, lower.structure)
    known = torch.ones(2, 3)
    computed = known * (1 + 4 * torch.finfo(low).eps)
    assert (VectorField.of(prob).rounding_error(computed, known) > 1).all()
    for field in (lower, substituted):
        assert (field.rounding_error(computed, known) < 1).all()
        summands = torch.ones(2), torch.tensor([1.0, 0.01])  # of the states, of h f
        assert (field.rounding_error(computed, known, summands) > 1).tolist() == [False, True]


@pytest.mark.parametrize("sensealg", STEPWISE, ids=str)
@pytest.mark.parametrize("size", [4, 64])
def test_dropout_is_refused_under_autocast(sensealg: Any, size: int) -> None:
    net = nn.Sequential(nn.Linear(size, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, size))
    prob = ODEProblem(lambda t, u: net(u), torch.randn(size), (0.0, 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        sol = solve(prob, Tsit5(), sensealg=sensealg, dt=0.02, adaptive=False)
    with pytest.raises(RuntimeError, match="random numbers"):
        sol.u[-1].sum().backward()


@pytest.mark.parametrize("sensealg", REVERSE, ids=str)
def test_layer_that_changes_itself_is_refused_until_eval(sensealg: Any) -> None:
    layer = nn.Linear(32, 32, dtype=F64)
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(layer), nn.Tanh())
    prob = ODEProblem(lambda t, u: net(u), torch.randn(32, dtype=F64), (0.0, 1.0))
    with pytest.raises(RuntimeError, match=r"call \.eval\(\)"):
        solve(prob, Tsit5(), sensealg=sensealg).u[-1].sum().backward()
    net.eval()
    solve(prob, Tsit5(), sensealg=sensealg).u[-1].sum().backward()


# -- functions with corners ------------------------------------------------------------------------


@pytest.mark.parametrize("alg", [diffsolve.KenCarp3(), diffsolve.KenCarp4()], ids=repr)
@pytest.mark.parametrize("seed", range(10))
def test_corners_are_no_change(alg: Any, seed: int) -> None:
    # Newton's iteration takes the matrix of one side, the implicit function theorem another one's
    found = []
    for engine in ("native", "torch"):
        g = torch.Generator().manual_seed(seed)
        first, second = (torch.randn(6, 6, generator=g, dtype=F64) for _ in range(2))
        u0 = torch.randn(6, generator=g, dtype=F64, requires_grad=True)

        def f(t: Tensor, u: Tensor, a: Tensor = first, b: Tensor = 0.7 * second) -> Tensor:
            return b @ torch.relu(a @ u) - 5 * u

        sol = solve(ODEProblem(f, u0, (0.0, 1.0)), alg, saveat=[1.0], engine=engine)
        found += torch.autograd.grad(sol.u.sum(), u0)
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)


def test_a_change_within_steps_of_newton_is_found() -> None:
    scale = torch.ones(1, dtype=F64)

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -torch.where(t > 0.5, scale, 1.0) * torch.relu(u)

    u0 = torch.ones(1, dtype=F64, requires_grad=True)
    sol = solve(ODEProblem(f, u0, (0.0, 1.0)), diffsolve.KenCarp4(), saveat=[1.0], engine="torch")
    scale.mul_(3.0)  # which f(t0, u0) does not show
    with pytest.raises(RuntimeError, match="f gives other values now"):
        sol.u.sum().backward()
