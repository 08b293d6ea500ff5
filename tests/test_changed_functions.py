"""What must not pass in silence: an f that is another one in backward, hidden tensors, autocast."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsolve import (
    RK4,
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    Tsit5,
    Vern7,
    solve,
)
from diffsolve.adjoints.continuous import Reverse

F64 = torch.float64
REVERSE = [
    DiscreteAdjoint(),
    DiscreteAdjoint(checkpoints=3),
    BacksolveAdjoint(),
    InterpolatingAdjoint(),
]


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
        job = weakref.ref(sol._job)
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
    original = Reverse.start

    def start(self: Reverse, bar: Tensor, u: Tensor) -> Tensor:
        z = original(self, bar, u)
        sizes.append(len(z))
        return z

    monkeypatch.setattr(Reverse, "start", start)
    model = Model()
    sol = solve(ODEProblem(model.f, torch.ones(2), (0.0, 1.0)), Tsit5(), sensealg=sensealg)
    sol.u[-1].sum().backward()
    assert max(sizes) <= 2 + 2 + 6
    assert model.net.weight.grad is not None and model.net.weight.grad.abs().max() > 0
    assert model.encoder.weight.grad is not None and not model.encoder.weight.grad.any()
