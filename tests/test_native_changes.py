"""What users change between solves, and what runs beside them: nothing stale, nothing hangs."""

from __future__ import annotations

import collections
import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from native_changes import ENGINES, F64, end, ones
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack

from diffsolve import EM, DiscreteAdjoint, ODEProblem, SDEProblem, Tsit5, solve


def same(prob: ODEProblem, engine: str) -> None:
    assert end(prob, engine) == pytest.approx(end(prob, "torch"), rel=1e-9)


# -- threads -------------------------------------------------------------------------------------


def test_f_may_wait_for_a_thread_that_solves() -> None:
    mine = threading.Lock()

    def f(t: Tensor, u: Tensor) -> Tensor:
        with mine:
            return -u

    def other(t: Tensor, u: Tensor) -> Tensor:
        return -2 * u

    def plain() -> None:
        for _ in range(60):
            solve(ODEProblem(f, ones(), (0.0, 1.0)), Tsit5())

    def locked() -> None:
        for _ in range(60):
            with mine:
                solve(ODEProblem(other, ones(), (0.0, 1.0)), Tsit5())

    solve(ODEProblem(other, ones(), (0.0, 1.0)), Tsit5())  # builds the kernels, if need be
    threads = [threading.Thread(target=run, daemon=True) for run in (plain, locked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.slow
def test_f_may_solve_in_other_threads() -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        found = []

        def inner() -> None:
            found.append(solve(ODEProblem(lambda t, v: -v, ones(1), (0.0, 0.1)), Tsit5()).u[-1])

        thread = threading.Thread(target=inner, daemon=True)
        thread.start()
        thread.join(20)
        assert found
        return -u * found[0]

    same(ODEProblem(f, ones(), (0.0, 1.0)), "auto")


# -- tensors that become others behind one name --------------------------------------------------


@ENGINES
def test_captured_tensor_of_another_shape(engine: str) -> None:
    w = torch.tensor([2.0], dtype=F64)
    prob = ODEProblem(lambda t, u: -w * u, ones(), (0.0, 1.0))
    same(prob, engine)
    w.data = torch.tensor([1.0, 3.0], dtype=F64)
    same(prob, engine)
    w.data = torch.tensor([0.5], dtype=F64)
    same(prob, engine)


@ENGINES
def test_captured_tensor_of_another_precision(engine: str) -> None:
    w = nn.ParameterList([nn.Parameter(torch.tensor([2.0], dtype=F64))])
    prob = ODEProblem(lambda t, u: -u * w[0].to(u.dtype), ones(), (0.0, 1.0))
    same(prob, engine)
    w.to(torch.float32)
    try:
        same(prob, engine)
    except ValueError as error:
        assert engine == "native" and "float32" in str(error)


@pytest.mark.parametrize("equal", [True, False])
def test_gradient_of_a_tensor_put_in_the_place_of_another(equal: bool) -> None:
    store = collections.OrderedDict(w=torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True))
    net = nn.Linear(2, 2, dtype=F64)

    def kept(t: Tensor, u: Tensor, p: Any) -> Tensor:
        return -store["w"] * u + 0.1 * p["net"](u)

    prob = ODEProblem(kept, ones(), (0.0, 1.0), {"net": net})
    solve(prob, Tsit5())
    store["w"] = (store["w"].detach() * (1 if equal else 2)).requires_grad_()
    net.weight = nn.Parameter(net.weight.detach().clone())
    got = torch.autograd.grad(solve(prob, Tsit5()).u[-1].sum(), [store["w"], net.weight])
    expected = torch.autograd.grad(
        solve(prob, Tsit5(), engine="torch").u[-1].sum(), [store["w"], net.weight]
    )
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-12)


class Slotted:
    __slots__ = ("rate",)

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.rate * u


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._rate = 1.0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self._rate * u


def test_changes_that_the_fingerprint_sees() -> None:
    ordered, queue = collections.OrderedDict(k=1.0), collections.deque([1.0])
    array, keyed = np.array([1.0]), {"x": 1.0}
    slotted, hidden = Slotted(), Hidden()
    slotted.rate = 1.0

    def with_attribute(t: Tensor, u: Tensor) -> Tensor:
        return -with_attribute.rate * u  # type: ignore[attr-defined]

    with_attribute.rate = 1.0  # type: ignore[attr-defined]

    def change(name: str) -> None:
        match name:
            case "ordered":
                ordered["k"] = 2.0
            case "queue":
                queue[0] = 2.0
            case "array":
                array[0] = 2.0
            case "key":
                keyed["y"] = keyed.pop("x")
            case "slotted":
                slotted.rate = 2.0
            case "hidden":
                hidden._rate = 2.0
            case "attribute":
                with_attribute.rate = 2.0  # type: ignore[attr-defined]

    cases = {
        "ordered": lambda t, u: -ordered["k"] * u,
        "queue": lambda t, u: -queue[0] * u,
        "array": lambda t, u: -float(array[0]) * u,
        "key": lambda t, u: -(1.0 if "x" in keyed else 2.0) * u,
        "slotted": slotted,
        "hidden": hidden,
        "attribute": with_attribute,
    }
    for name, f in cases.items():
        prob = ODEProblem(f, ones(), (0.0, 1.0))
        assert end(prob)[0] == pytest.approx(0.36788, abs=1e-4), name
        change(name)
        assert end(prob)[0] == pytest.approx(0.13534, abs=1e-4), name


def test_objects_in_p_are_looked_into() -> None:
    module = Hidden()
    prob = ODEProblem(lambda t, u, p: p["m"](t, u), ones(), (0.0, 1.0), {"m": module})
    assert end(prob)[0] == pytest.approx(0.36788, abs=1e-4)
    module._rate = 2.0
    assert end(prob)[0] == pytest.approx(0.13534, abs=1e-4)


def test_counter_of_calls_does_not_cost_a_trace_each_time() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nfe = 0

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            self.nfe += 1
            return -u

    f = Counting()
    prob = ODEProblem(f, ones(), (0.0, 1.0))
    solve(prob, Tsit5(), engine="native")
    called = f.nfe
    for _ in range(3):
        solve(prob, Tsit5(), engine="native")
    assert f.nfe == called


# -- numbers in p --------------------------------------------------------------------------------


def test_numbers_in_p_that_change_stay_native() -> None:
    def f(t: Tensor, u: Tensor, p: Any) -> Tensor:
        return -p[0] * u

    engines = []
    for i in range(12):
        prob = ODEProblem(f, ones(), (0.0, 1.0), (1.0 + i, 0.5))
        sol = solve(prob, Tsit5(), rtol=1e-8, atol=1e-8)
        engines.append(sol.stats.engine)
        assert float(sol.u[-1, 0].detach()) == pytest.approx(np.exp(-1.0 - i), rel=1e-4)
    assert set(engines) == {"native"}


# -- results, and what f hides -------------------------------------------------------------------


def test_results_may_be_overwritten() -> None:
    p = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    prob = ODEProblem(lambda t, u, p: -p * u, ones(), (0.0, 1.0), p)
    sol = solve(prob, Tsit5(), engine="native", sensealg=DiscreteAdjoint())
    middle = sol(0.5).detach()
    sol.steps.h.zero_()
    sol.steps.t.zero_()
    (got,) = torch.autograd.grad(sol.u[-1].sum(), p)
    torch.testing.assert_close(got, -torch.exp(-p).detach(), rtol=1e-3, atol=1e-4)
    assert torch.equal(sol(0.5).detach(), middle)


def test_what_is_detached_in_words_is_detached_here_too() -> None:
    w = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)

    def f(t: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            x = u.detach().requires_grad_()
            (slope,) = torch.autograd.grad((w.detach() * x**2).sum(), x)
        return -slope + 0 * w.sum()

    def gradient(engine: str) -> Tensor:
        u0 = ones().requires_grad_()
        sol = solve(ODEProblem(f, u0, (0.0, 1.0)), Tsit5(), engine=engine)
        grads = torch.autograd.grad(sol.u[-1].sum(), [u0, w])
        return torch.cat(grads)

    torch.testing.assert_close(gradient("auto"), gradient("torch"), rtol=1e-9, atol=1e-12)


def test_values_that_go_around_torch_are_not_frozen() -> None:
    prob = ODEProblem(lambda t, u: -u * from_dlpack(to_dlpack(u)), ones(), (0.0, 1.0))
    same(prob, "auto")
    with pytest.raises(ValueError, match="engine="):
        solve(prob, Tsit5(), engine="native")


LEVELS = [1.0, 2.0]
LATE = torch.tensor([2.0, 3.0], dtype=F64)
MAKERS: dict[str, Any] = {
    "torch.tensor": lambda x: torch.tensor([x[0], x[1]], dtype=F64),
    "in a tuple": lambda x: torch.tensor(((x[0], 1.0), (1.0, x[1])), dtype=F64).diagonal(),
    "in a deque": lambda x: torch.tensor(collections.deque(x), dtype=F64),
    "torch.as_tensor": lambda x: torch.as_tensor([x[0], x[1]], dtype=F64),
    "torch.asarray": lambda x: torch.asarray([x[0], x[1]], dtype=F64),
    "Tensor.new_tensor": lambda x: x.new_tensor([x[0], x[1]]),
    "Tensor.new": lambda x: x.new([x[0], x[1]]),
    "torch.DoubleTensor": lambda x: torch.DoubleTensor([x[0], x[1]]),
    "torch.Tensor": lambda x: torch.Tensor([x[0], x[1]]).double(),
    "torch.to_dlpack": lambda x: from_dlpack(to_dlpack(x)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_tensors_of_lists_of_tensors_are_not_frozen(name: str) -> None:
    """They show only later, and torch reads their numbers around its dispatcher."""
    make = MAKERS[name]

    def later(t: Tensor, x: Tensor) -> Tensor:
        return 1 + torch.where(t > 0.2, 1.0, 0.0) * make(x)

    fs: list[Any] = [
        (lambda t, u: -u * later(t, u**2), None),
        (lambda t, u: -u * (1 + torch.where(u < 0.7, 1.0, 0.0) * make(torch.stack([t, t]))), None),
        (lambda t, u: -u * later(t, LATE), None),
        (lambda t, u, p: -u * later(t, p), LATE),
    ]
    for f, p in fs:
        prob = ODEProblem(f, ones(), (0.0, 1.0), p)
        assert "declined" in solve(prob, Tsit5()).stats.engine
        same(prob, "auto")
    for f, g in [(fs[0][0], lambda t, u: 0.1 * u), (lambda t, u: -u, fs[0][0])]:
        prob = SDEProblem(f, g, ones(), (0.0, 1.0))
        sol, by_torch = (
            solve(prob, EM(), dt=0.1, seed=0, engine=engine) for engine in ("auto", "torch")
        )
        assert "declined" in sol.stats.engine
        assert torch.equal(sol.u, by_torch.u)


@pytest.mark.parametrize(
    "make",
    [
        lambda u: torch.tensor([1.0, 2.0], dtype=F64),
        lambda u: torch.tensor([LEVELS[0], np.float64(2.0)], dtype=F64),
        lambda u: torch.tensor(LEVELS, dtype=F64),
        lambda u: torch.tensor(range(2), dtype=F64),
        lambda u: torch.DoubleTensor([1.0, 2.0]),
        lambda u: u.new_tensor(LEVELS),
        lambda u: u[[1, 0]],
        lambda u: u[torch.tensor([1, 0])],
    ],
)
def test_tensors_of_constants_are_compiled(make: Any) -> None:
    prob = ODEProblem(lambda t, u: -u * make(u), ones(), (0.0, 1.0))
    assert solve(prob, Tsit5(), engine="native").stats.engine == "native"
    same(prob, "native")


def test_method_of_a_module_that_is_p_is_not_kept_alive() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.0, dtype=F64))

        def rhs(self, t: Tensor, u: Tensor, p: Any) -> Tensor:
            return -self.rate * u

    model = Model()
    solve(ODEProblem(model.rhs, ones(), (0.0, 1.0), model), Tsit5(), engine="native")
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
