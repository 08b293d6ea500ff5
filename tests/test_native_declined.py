"""What a trace declines, and where expressions would give another gradient."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from native_graphs import F64, entries, traced, value
from torch import Tensor, nn
from traced_functions import U, hamiltonian

from diffsolve import ODEProblem, Tsit5, solve
from diffsolve.engines.declined import Declined


def reason(f: Any, u: Any = U, p: Any = None) -> str:
    with pytest.raises(Declined) as caught:
        traced(f, u, p)
    return str(caught.value)


def lotka_volterra(t: Tensor, u: Tensor, p: Any) -> Tensor:
    x, y = u[..., 0], u[..., 1]
    a, b, c, d = p
    return torch.stack([a * x - b * x * y, -c * y + d * x * y], -1)


# -- what is declined --------------------------------------------------------------------------


def branching(t: Tensor, u: Tensor) -> Tensor:
    if u[0] > 0:  # a branch
        return u
    return -u


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("total", torch.zeros(3, dtype=F64))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        self.calls += 1
        return u


class Summing(Counter):
    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        self.total.add_(u)
        return u


def changes_the_state(t: Tensor, u: Tensor) -> Tensor:
    u.mul_(2)
    return u


def changes_a_view_of_the_state(t: Tensor, u: Tensor) -> Tensor:
    u[0] = 1.0
    return u


def swallows(t: Tensor, u: Tensor) -> Tensor:
    try:
        return u * u[0].item()
    except Exception:
        return u


def raw(name: str) -> Any:
    return lambda t, u: u if getattr(u, name)() is None else u * 2


SINGLE = torch.ones(3, requires_grad=True)
WIDE = torch.ones(3, dtype=F64, requires_grad=True)


@pytest.mark.parametrize(
    "f, words",
    [
        (lambda t, u: u if str(u) else -u, ["Tensor.__repr__"]),
        (lambda t, u: torch.zeros(3, dtype=int).copy_(u) * u, ["torch.int64"]),
        (branching, ["Tensor.item", "only while solving", 'if u[0] > 0:  # a branch"']),
        (lambda t, u: u * float(u[0]), ["Tensor.item"]),
        (lambda t, u: u * u.tolist()[0], ["Tensor.tolist"]),
        (lambda t, u: torch.from_numpy(np.sin(u.numpy())), ["Tensor.numpy"]),
        (lambda t, u: torch.as_tensor(np.sin(u)), ["Tensor.__array__"]),
        (raw("data_ptr"), ["Tensor.data_ptr"]),
        (raw("untyped_storage"), ["Tensor.untyped_storage"]),
        (lambda t, u: u[u > 0], ["torch.index", "only while solving"]),
        (lambda t, u: u[torch.nonzero(u)[:, 0]], ["torch.nonzero", "only while solving"]),
        (lambda t, u: u * torch.rand(3, dtype=F64), ["torch.rand", "random numbers"]),
        (lambda t, u: nn.functional.dropout(u), ["bernoulli", "random numbers"]),
        (lambda t, u: torch.sort(u)[0], ["torch.sort is not among", "test_native_declined.py:"]),
        (lambda t, u: torch.linalg.eigvals(torch.outer(u, u)).real, ["eig"]),
        (lambda t, u: torch.fft.rfft(u).abs(), ["torch.fft.rfft"]),
        (lambda t, u: u * u.max(0)[1], ["a result of torch.max"]),
        (lambda t, u: u.float().double(), ["torch.float32", "torch.float64"]),
        (lambda t, u: torch.complex(u, u).abs(), ["torch.complex"]),
        (lambda t, u: u * SINGLE, ["torch.float32"]),
        (Counter(), ["changes a tensor in place", 'self.calls += 1"']),
        (Summing(), ["changes a tensor in place", 'self.total.add_(u)"']),
        (changes_the_state, ["changes a tensor in place", 'u.mul_(2)"']),
        (changes_a_view_of_the_state, ["changes a tensor in place", 'u[0] = 1.0"']),
        (swallows, ["Tensor.item"]),
        (lambda t, u: torch.empty(3, dtype=F64) + u, ["memory that no operation wrote"]),
        (lambda t, u: u[:2], ["shape (2,)"]),
        (lambda t, u: 1.0, ["float"]),
        (lambda t, u: u > 0, ["torch.bool"]),
        (lambda t, u: (torch.ones(200, 200, dtype=F64) * u[0]).sum(), ["too large", "40,000"]),
        (lambda t, u: u.repeat(200, 1) @ u.repeat(100, 1).T, ["too large", "product of matrices"]),
        (lambda t, u: torch.sparse.mm(torch.eye(3).to_sparse(), u[:, None]), ["sparse"]),
        (lambda t, u: set_data(u), ["sets the data"]),
    ],
)  # fmt: skip
def test_declined_with_a_reason(f, words):
    message = reason(f)
    for word in words:
        assert word in message, message


def set_data(u: Tensor) -> Tensor:
    x = torch.zeros(3, dtype=F64)
    x.data = u
    return x


def test_the_line_is_that_of_the_user():
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.median(x) * x

    message = reason(lambda t, u: nn.Sequential(Inner())(u))
    assert "test_native_declined.py:" in message and '"return torch.median(x) * x")' in message


def test_tensors_that_share_memory_are_declined():
    w = torch.ones(3, 3, dtype=F64, requires_grad=True)
    turned = w.t()
    assert "share memory" in reason(lambda t, u: w @ u + turned @ u)


def test_states_that_are_declined():
    assert "torch.complex128" in reason(lambda t, u: u, torch.ones(2, dtype=torch.complex128))
    assert "torch.float16" in reason(lambda t, u: u, torch.ones(2, dtype=torch.float16))
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in reason(lambda t, u: u)


def test_autocast_inside_is_declined():
    def f(t, u):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.mm(u[None], torch.ones(3, 3))[0].float()

    assert "torch.bfloat16" in reason(f, U.float())


def test_errors_of_f_come_through():
    def f(t, u):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        traced(f, U)
    with pytest.raises(RuntimeError, match="size"):
        traced(lambda t, u: u + torch.ones(2, dtype=F64), U)


def test_large_networks_are_declined_at_once():
    net = nn.Sequential(
        nn.Linear(3, 500), nn.Tanh(), nn.Linear(500, 500), nn.Linear(500, 3)
    ).double()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        assert "it uses a tensor of 250,000 numbers" in reason(lambda t, u: net(u))
        times.append(time.perf_counter() - started)
    assert min(times) < 0.2


# -- where the expressions would give another gradient -----------------------------------------


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def without_grad(t: Tensor, u: Tensor) -> Tensor:
    with torch.no_grad():
        scale = u.sum()
    return u * scale


def with_grad(t: Tensor, u: Tensor) -> Tensor:
    with torch.enable_grad():
        return u * u.sum()


@torch.no_grad()
def decorated(t: Tensor, u: Tensor) -> Tensor:
    return u * 2


def within(t: Tensor, u: Tensor) -> Tensor:
    with torch.enable_grad(), torch.set_grad_enabled(False):
        return u * 2


def inference(t: Tensor, u: Tensor) -> Tensor:
    with torch.inference_mode():
        return u * 2


@pytest.mark.parametrize(
    "f, word",
    [
        (lambda t, u: u * u.detach(), "Tensor.detach"),
        (lambda t, u: u * u.data, "Tensor.detach"),
        (lambda t, u: u * WIDE.detach(), "Tensor.detach"),
        (without_grad, "torch.no_grad"),
        (decorated, "torch.no_grad"),
        (within, "torch.no_grad"),
        (inference, "inference_mode"),
        (lambda t, u: Straight.apply(u), "autograd.Function"),
        (with_grad, None),
        (hamiltonian, None),
        (lambda t, u: torch.softmax(u, 0), None),
    ],
)
def test_gradients_switched_off_are_noticed(f, word):
    found = traced(f, U).detached
    assert (found is None) if word is None else word in found


def test_speed():
    u, p = torch.tensor([1.0, 2.0], dtype=F64), torch.rand(4, dtype=F64)
    net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2)).double()

    def best(f: Any, p: Any = None) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            traced(f, u, p)
            times.append(time.perf_counter() - started)
        return min(times)

    assert best(lotka_volterra, p) < 0.005
    assert best(lambda t, u: net(u)) < 0.05
    tr = traced(lotka_volterra, u, p)
    np.testing.assert_allclose(value(tr, u, p), lotka_volterra(None, u, p).numpy())
    assert entries(tr, p).tolist() == p.tolist()


def test_switch_between_numbers_is_exact_in_the_default_type() -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return -torch.where(t < 0.5, 0.25, 2.0) * u

    prob = ODEProblem(f, torch.ones(2, dtype=torch.float64), (0.0, 1.0))
    ours = solve(prob, Tsit5(), tstops=[0.5], engine="native")
    torch.testing.assert_close(ours.u, solve(prob, Tsit5(), tstops=[0.5], engine="torch").u)

    def rounded(t: Tensor, u: Tensor) -> Tensor:
        return -torch.where(t < 0.5, 0.1, 2.0) * u  # 0.1 in single precision, in both engines

    ours = solve(prob.remake(f=rounded), Tsit5(), engine="native")
    theirs = solve(prob.remake(f=rounded), Tsit5(), engine="torch")
    torch.testing.assert_close(ours.u, theirs.u, rtol=1e-12, atol=0)

    def in_single(t: Tensor, u: Tensor) -> Tensor:
        return -(torch.where(t < 0.5, 0.25, 2.0) / 3) * u

    with pytest.raises(ValueError, match=r"gives torch\.float32"):
        solve(prob.remake(f=in_single), Tsit5(), engine="native")
