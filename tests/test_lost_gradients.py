"""Gradients that would be lost without a word: hooks, numbers made of tensors, moving jumps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lossy_functions import F64, U0, each_sensealg, network
from torch import Tensor, nn

from diffsolve import (
    EM,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    KenCarp4,
    ODEProblem,
    Rodas5P,
    SDEProblem,
    Tsit5,
    solve,
)

# of torch, where float(p) is called
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
each_engine = pytest.mark.parametrize("engine", ["auto", "torch"])


def parameters() -> Tensor:
    return torch.tensor([0.7, 1.3], dtype=F64, requires_grad=True)


def tenth(gradient: Any) -> Tensor:
    return 0.1 * gradient


def hook_in_f(net: Callable, t: Tensor, u: Tensor) -> Tensor:
    du = net(u)
    if du.requires_grad:
        du.register_hook(tenth)
    return du


HOOKS: dict[str, Callable[[Any], Any]] = {
    "module": lambda net: net[1].register_full_backward_hook(lambda m, gi, go: (tenth(gi[0]),)),
    "module, before": lambda net: net.register_full_backward_pre_hook(
        lambda m, go: (tenth(go[0]),)
    ),
    "all modules": lambda net: nn.modules.module.register_module_full_backward_hook(
        lambda m, gi, go: (tenth(gi[0]),) if isinstance(m, nn.Tanh) else None
    ),
    "tensor": lambda net: None,
    "forward": lambda net: net[1].register_forward_hook(lambda m, args, out: 0.5 * out),
    "all modules, forward": lambda net: nn.modules.module.register_module_forward_hook(
        lambda m, args, out: 0.5 * out if isinstance(m, nn.Tanh) else None
    ),
    "parameter": lambda net: net[0].weight.register_hook(tenth),
}


def gradients(f: Callable, net: nn.Module, **options: Any) -> tuple[list[Tensor], Any]:
    u0 = U0.clone().requires_grad_()
    sol = solve(ODEProblem(f, u0, (0.0, 1.0)), rtol=1e-7, atol=1e-7, saveat=[1.0], **options)
    return list(torch.autograd.grad(sol.u.square().sum(), [u0, *net.parameters()])), sol


@pytest.mark.parametrize("alg", [Tsit5(), KenCarp4()], ids=repr)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_act_as_on_the_tape(kind: str, alg: Any) -> None:
    """The native engine, and steps that are reversed at once, pass over hooks on gradients.

    The hook is added between two solves of one function, the first of which is known then.
    """
    net = network()

    def f(t: Tensor, u: Tensor) -> Tensor:
        return hook_in_f(net, t, u) if kind == "tensor" else net(u)

    free, sol = gradients(f, net, alg=alg)
    assert sol.stats.engine == "native" or kind == "tensor"
    handle = HOOKS[kind](net)
    try:
        want, _ = gradients(f, net, alg=alg, sensealg=DiscreteAdjoint(tape=True))
        if kind != "tensor":
            assert float((want[1] - free[1]).norm()) > 0.1 * float(want[1].norm())
        for options in ({}, {"engine": "torch"}, {"sensealg": DiscreteAdjoint(checkpoints=3)}):
            got, sol = gradients(f, net, alg=alg, **options)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        by_state, _ = gradients(f, net, alg=alg, sensealg=InterpolatingAdjoint())
        torch.testing.assert_close(by_state[0], want[0], rtol=1e-3, atol=1e-5)
    finally:
        if handle is not None:
            handle.remove()
    if kind != "tensor":
        again, sol = gradients(f, net, alg=alg)
        assert sol.stats.engine == "native"
        torch.testing.assert_close(again[1], free[1])


def test_native_tells_of_hooks_where_a_gradient_is_wanted() -> None:
    net = network()
    net[1].register_full_backward_hook(lambda m, gi, go: None)
    prob = ODEProblem(lambda t, u: net(u), U0, (0.0, 1.0))
    assert "hooks on gradients" in solve(prob).stats.engine
    with torch.no_grad():
        assert solve(prob).stats.engine == "native"


# -- numbers made of tensors -------------------------------------------------------------------

CUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch.tensor": lambda t, u, p: torch.tensor([p[0] * u[1], -p[1] * u[0]], dtype=F64),
    "torch.as_tensor": lambda t, u, p: torch.as_tensor([p[0] * u[1], -p[1] * u[0]], dtype=F64),
    "Tensor.new_tensor": lambda t, u, p: u.new_tensor([p[0] * u[1], -p[1] * u[0]]),
    "float": lambda t, u, p: torch.stack([float(p[0]) * u[1], -p[1] * u[0]]),
    "int": lambda t, u, p: torch.stack([int(p[1]) * u[1], -p[1] * u[0]]),
    "Tensor.item": lambda t, u, p: -p * u * u[0].item(),
    "Tensor.tolist": lambda t, u, p: u * sum(p.tolist()),
    "float()": lambda t, u, p: -p * math.sin(u[0]),
    "torch.asarray": lambda t, u, p: torch.asarray([p[0] * u[1], -p[1] * u[0]], dtype=F64),
    "Tensor.new": lambda t, u, p: -u * p[1] * u.new([p[0], p[0]]),
    "float() ": lambda t, u, p: torch.DoubleTensor([p[0], 1.0]) * -u * p[1],
    "torch.linspace": lambda t, u, p: -u * p[1] * torch.linspace(p[0], 1.0, 2, dtype=F64),
    "torch.logspace": lambda t, u, p: -u * p[1] * torch.logspace(0.0, p[0], 2, dtype=F64),
    "of no value": lambda t, u, p: torch.stack([0 * p[0], float(p[0]) * 0 * u[1]]),
}


@each_sensealg
@pytest.mark.parametrize("name", CUTS)
def test_numbers_of_tensors_are_refused_with_their_line(name: str, sensealg: Any) -> None:
    f, how = CUTS[name], "by " + (name.strip() if "." in name or "(" in name else "")
    for engine in ("auto", "torch"):
        prob = ODEProblem(f, U0, (0.0, 1.0), parameters())
        with pytest.raises(RuntimeError, match="would stop there") as error:
            solve(prob, Tsit5(), sensealg=sensealg, engine=engine)
        assert how in str(error.value)
        assert f"{__file__.rsplit('/', 1)[-1]}:{f.__code__.co_firstlineno}" in str(error.value)


def _force(create_graph: bool = False, detached: bool = False) -> Any:
    """Force of a potential, by a derivative in ``f``."""

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        with torch.enable_grad():
            x = u if u.requires_grad else u.detach().requires_grad_()
            (slope,) = torch.autograd.grad((p * x**2).sum(), x, create_graph=create_graph)
        return -p * u - (slope.detach() if detached else slope)

    return f


def _written(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    rates = torch.ones(2, dtype=F64)
    rates.data[0] = p[0]
    return -rates * u * p[1]


def _written_in_a_view(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    rates = torch.ones(2, dtype=F64)
    rates.data[:1].copy_(p[:1])
    return -rates * u * p[1]


STOPPED: dict[str, tuple[Any, str]] = {
    "grad": (_force(), "torch.autograd.grad without create_graph"),
    "data": (_written, "writing into Tensor.data"),
    "data, in a view": (_written_in_a_view, "writing into Tensor.data"),
    "parameter": (lambda t, u, p: nn.Parameter(-p * u), "Parameter that it made"),
}


@each_sensealg
@pytest.mark.parametrize("name", STOPPED)
def test_gradients_that_stop_without_a_word_are_refused(name: str, sensealg: Any) -> None:
    f, how = STOPPED[name]
    with pytest.raises(RuntimeError, match=f"would stop there.*{how}|{how}.*would stop there"):
        prob = ODEProblem(f, U0, (0.0, 1.0), parameters())
        solve(prob, Tsit5(), sensealg=sensealg, engine="torch")
    sde = SDEProblem(f, lambda t, u, p: 0.1 * u, U0, (0.0, 1.0), parameters())
    with pytest.raises(RuntimeError, match=how):
        solve(sde, EM(), dt=0.1, engine="torch")
    with torch.no_grad():
        assert solve(ODEProblem(f, U0, (0.0, 1.0), parameters()), Tsit5()).success


def test_a_parameter_made_of_the_state_is_refused_in_any_shape() -> None:
    state, rate = torch.ones(2, 2, dtype=F64), parameters()
    prob = ODEProblem(lambda t, u: nn.Parameter(-rate * u), state, (0.0, 1.0))
    with pytest.raises(RuntimeError, match="Parameter that it made"):
        solve(prob, Tsit5(), engine="torch")


def _constant_field(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """The derivative of what is linear has no gradient to lose."""
    with torch.enable_grad():
        x = u.detach().requires_grad_()
        (slope,) = torch.autograd.grad((2.0 * x).sum(), x)
    return -slope * p * u


def _of_detached(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    with torch.enable_grad():
        x = u.detach().requires_grad_()
        (slope,) = torch.autograd.grad((p.detach() * x**2).sum(), x)
    return -2 * p * u + 0 * slope


def _of_another_solve(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """The solve differentiates without a graph where its steps take care of the gradient."""
    inner = ODEProblem(lambda t, v, q: -q * v, u, (0.0, 0.1), p)
    alg, tape = Rodas5P(), DiscreteAdjoint(tape=True)
    return -p * solve(inner, alg, sensealg=tape, dt=0.1, adaptive=False, engine="torch").u[-1]


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize(
    "f",
    [
        _of_another_solve,
        _constant_field,
        _of_detached,
        _force(create_graph=True),
        _force(detached=True),
        lambda t, u, p: -p * u * float(2 + 0 * p.numpy(force=True)[0]),
    ],
)
def test_gradients_that_are_whole_or_stopped_in_words_are_no_fault(f: Any, engine: str) -> None:
    p = parameters()
    prob = ODEProblem(f, U0, (0.0, 1.0), p)
    sol = solve(prob, Tsit5(), engine=engine, dt=0.5, adaptive=False)
    (got,) = torch.autograd.grad(sol.u[-1].sum(), p)
    assert bool((got < 0).all())


def test_numbers_of_the_state_are_refused_for_any_gradient() -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return -u * math.exp(u[0])

    with pytest.raises(RuntimeError, match=r"float\(\)"):
        solve(ODEProblem(f, U0.clone().requires_grad_(), (0.0, 1.0)), Tsit5())
    rate = parameters()
    with pytest.raises(RuntimeError, match=r"a function of NumPy|numpy\(\)"):
        solve(ODEProblem(lambda t, u: -rate * float(u.numpy()[0]), U0, (0.0, 1.0)), Tsit5())


@pytest.mark.parametrize("part", ["drift", "diffusion"])
def test_numbers_in_an_sde_are_refused(part: str) -> None:
    cut, whole = (lambda t, u, p: float(p[0]) * u), (lambda t, u, p: p[1] * u)
    f, g = (cut, whole) if part == "drift" else (whole, cut)
    prob = SDEProblem(f, g, U0, (0.0, 1.0), parameters())
    name = "f" if part == "drift" else "g"
    with pytest.raises(RuntimeError, match=f"^{name} makes a number"):
        solve(prob, EM(), dt=0.1, seed=0)
    alone = SDEProblem(cut, lambda t, u, p: 0.1 * u, U0, (0.0, 1.0), parameters().detach())
    assert solve(alone, EM(), dt=0.1, seed=0).success


@each_sensealg
def test_number_in_a_later_branch_is_refused(sensealg: Any) -> None:
    """The first evaluation does not show it, but shows that there are branches."""

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return -p * u if t < 0.5 else -float(p[0]) * u

    with pytest.raises(RuntimeError, match="would stop there"):
        sol = solve(ODEProblem(f, U0, (0.0, 1.0), parameters()), Tsit5(), sensealg=sensealg)
        sol.u[-1].sum().backward()


ALLOWED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "branch": lambda t, u, p: -p * u if u.max() > 3 else -2 * p * u,
    "branch of p": lambda t, u, p: -p * u if p[0] > 3 else -2 * p * u,
    "time": lambda t, u, p: -p * u * (2.0 + 0 * float(t) + 0 * t.item()),
    "detached": lambda t, u, p: -p * u * (2.0 + 0 * float(p[0].detach())),
    "index": lambda t, u, p: -p * u * [1.0, 2.0][int(u.argmax() < 5)],
    "constants": lambda t, u, p: -p * u * torch.tensor([2.0, 2.0], dtype=F64),
    "printed": lambda t, u, p: -p * u * (2.0 + 0 * len(f"{p[0]:.3f} {u}")),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_reading_without_a_loss_is_no_fault(name: str) -> None:
    p = parameters()
    sol = solve(ODEProblem(ALLOWED[name], U0, (0.0, 1.0), p), rtol=1e-8, atol=1e-9, saveat=[1.0])
    (got,) = torch.autograd.grad(sol.u.sum(), p)
    torch.testing.assert_close(got, -2 * U0 * torch.exp(-2 * p.detach()), rtol=1e-6, atol=1e-8)


@each_engine
def test_numbers_are_fine_where_no_gradient_is_wanted(engine: str) -> None:
    for f in CUTS.values():
        assert solve(ODEProblem(f, U0, (0.0, 0.5), parameters().detach()), engine=engine).success
        with torch.no_grad():
            assert solve(ODEProblem(f, U0, (0.0, 0.5), parameters()), engine=engine).success


# -- times of jumps ----------------------------------------------------------------------------


def infusion(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    on, off, k = p
    return torch.where((t >= on) & (t < off), 1.0, 0.0) - k * u


def clearance(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return -torch.where(t < p[0], 1.0, p[2]) * u  # no jump where u is zero


def in_python(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return 1.0 - p[2] * u if float(t) >= p[0] else -p[2] * u


@each_engine
@pytest.mark.parametrize("f", [infusion, clearance, in_python])
def test_gradient_by_the_time_of_a_jump_is_refused(f: Callable, engine: str) -> None:
    p = torch.tensor([2.0, 5.0, 0.3], dtype=F64, requires_grad=True)
    moving: Any = p[:2]
    prob = ODEProblem(f, torch.zeros(1, dtype=F64), (0.0, 10.0), p)
    with pytest.raises(ValueError, match=r"f jumps at t = 2, .* wanted \(test_lost_gradients.py:"):
        solve(prob, Tsit5(), tstops=p[:2].tolist(), engine=engine)
    with pytest.raises(ValueError, match="piece by piece"):
        solve(prob, Tsit5(), tstops=moving, engine=engine)
    with torch.no_grad():
        assert solve(prob, Tsit5(), tstops=moving, engine=engine).success


def test_a_jump_at_a_fixed_time_and_a_bend_at_a_moving_one_are_fine() -> None:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        dose = torch.where((t >= 2.0) & (t < 5.0), 1.0, 0.0)
        bend = torch.where(t > p[0], t - p[0], 0.0 * t)
        return dose + bend - p[1] * u

    def loss(p: Tensor) -> Tensor:
        prob = ODEProblem(f, torch.zeros(1, dtype=F64), (0.0, 10.0), p)
        options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9, "saveat": [10.0]}
        return solve(prob, Tsit5(), tstops=[2.0, 4.0, 5.0], **options).u[-1, 0]

    p = torch.tensor([4.0, 0.3], dtype=F64, requires_grad=True)
    (got,) = torch.autograd.grad(loss(p), p)
    # u(10) by p[0]: the integral of -exp(-k (10 - s)) from p[0] to 10
    assert float(got[0]) == pytest.approx(-(1 - math.exp(-0.3 * 6)) / 0.3, rel=1e-5)
    h = torch.tensor([0.0, 1e-5], dtype=F64)
    slope = (loss(p.detach() + h) - loss(p.detach() - h)) / 2e-5
    assert float(got[1]) == pytest.approx(float(slope), rel=1e-5)


def test_the_advice_for_a_moving_jump_gives_its_gradient() -> None:
    p = torch.tensor([2.0, 5.0, 0.3], dtype=F64, requires_grad=True)
    u: Tensor = torch.zeros(1, dtype=F64)
    options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9, "save_everystep": False}
    for t0, t1, dose in ((0.0, p[0], 0.0), (p[0], p[1], 1.0), (p[1], 10.0, 0.0)):
        prob = ODEProblem(lambda t, u, k, dose=dose: dose - k * u, u, (t0, t1), p[2])
        u = solve(prob, Tsit5(), **options).u[-1]
    (got,) = torch.autograd.grad(u.sum(), p)
    expected = torch.tensor([-math.exp(-0.3 * 8), math.exp(-0.3 * 5)], dtype=F64)
    torch.testing.assert_close(got[:2], expected, rtol=1e-6, atol=1e-9)
