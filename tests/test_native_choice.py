"""Choosing the native engine, and falling back to torch with the reason."""

from __future__ import annotations

import pytest
import torch
from gradients import DOUBLE, TAPE, leaf
from native_runs import ones, rate_of, run
from torch import nn

from diffsolve import (
    RK4,
    BacksolveAdjoint,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    PIController,
    Tsit5,
    solve,
)


def test_auto_is_native_where_it_can_be():
    for u0 in (ones(), ones().float()):
        sol = run(lambda t, u: -u, "auto", u0)
        assert sol.stats.engine == "native"
        assert sol.stats.kernel_s > 0
        assert "native" in repr(sol)
    assert run(lambda t, u: -u, "torch").stats.engine == "torch"
    assert solve(ODEProblem(lambda t, u: -u, ones(), (0.0, 1.0))).stats.engine == "native"


def branching(t, u):
    if u.sum() > 0.5:
        return -u
    return -2 * u


def noisy(t, u):
    return -u + torch.rand(1, dtype=DOUBLE)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=DOUBLE))

    def forward(self, t, u):
        self.calls += 1
        return -u


def solving(t, u):
    return -torch.linalg.solve(torch.eye(1, dtype=DOUBLE) + u[:, None], u)


UNFIT = {
    "branch": (branching, "if u.sum() > 0.5"),
    "random": (noisy, "torch.rand"),
    "changes its state": (Counting(), "self.calls += 1"),
    "operation": (solving, "linalg"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_it_cannot_compile_falls_back_with_the_reason(name):
    f, words = UNFIT[name]
    with pytest.raises(ValueError, match="cannot run this solve") as caught:
        run(f)
    assert words in str(caught.value)
    assert "test_native_choice.py:" in str(caught.value)
    options = {"adaptive": False, "dt": 0.1}
    torch.manual_seed(1)
    got = run(f, "auto", **options)
    assert got.stats.engine.startswith("torch, because native declined: ")
    assert words in got.stats.engine
    torch.manual_seed(1)
    torch.rand(1, dtype=DOUBLE)  # the trace drew one
    if name != "random":
        assert torch.equal(got.u, run(f, "torch", **options).u)


class OwnController(PIController):
    pass


class OwnMethod(RK4):
    def step(self, *args):
        return super().step(*args)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"controller": OwnController()}, "OwnController"),
        ({"alg": OwnMethod(), "dt": 0.1}, "compiled step"),
        ({"norm": lambda x: x.abs().max()}, "norm"),
        ({"sensealg": TAPE}, "tape"),
        ({"sensealg": DiscreteAdjoint(through_step_size=True)}, "on the tape"),
        ({"u0": torch.ones(1, dtype=torch.complex128)}, "complex"),
        ({"u0": torch.ones(1, dtype=DOUBLE), "p": torch.ones(1, dtype=torch.complex128)}, "compl"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_that_only_torch_knows(options, words):
    def f(t, u, p=None):
        return -u if p is None else -(p * u).real

    options = {"u0": ones().requires_grad_(), **options}
    with pytest.raises(ValueError, match=words):
        run(f, **options)
    sol = run(f, "auto", **options)
    assert words in sol.stats.engine
    assert sol.success


def test_mistakes_are_reported_as_by_torch():
    for f, error, words in (
        (lambda t, u: -u[:0], ValueError, "shape"),
        (lambda t, u: 1 / 0, ZeroDivisionError, ""),
        (lambda t, u, p: -u, TypeError, "f\\(t, u\\)"),
        (lambda t, u: None, ValueError, "None"),
    ):
        for engine in ("auto", "native", "torch"):
            with pytest.raises(error, match=words):
                run(f, engine)


def test_autocast_and_inference_mode():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in run(lambda t, u: -u, "auto").stats.engine
    u0 = leaf([1.0])
    with torch.no_grad():
        assert not run(lambda t, u: -u, u0=u0).u.requires_grad
    with torch.inference_mode():
        inside = run(lambda t, u: -u, u0=ones() * 1)
        assert inside.stats.engine == "native"
    assert rate_of(inside) == pytest.approx(1.0, rel=1e-7)
    assert run(lambda t, u: -u, u0=u0).u.requires_grad


def test_transforms_run_on_torch():
    def final(u0, engine="auto"):
        sol = run(lambda t, u: -u * u, engine, u0)
        assert "transform" in sol.stats.engine
        return sol.u[-1].sum()

    (slope,) = torch.func.grad(final)(ones())  # u = 1 / (1/u0 + t)
    assert float(slope) == pytest.approx(0.25, rel=1e-6)
    _, tangent = torch.func.jvp(final, (ones(),), (ones(),))
    assert float(tangent) == pytest.approx(0.25, rel=1e-6)
    with pytest.raises(ValueError, match="transform"):
        torch.func.grad(lambda u0: final(u0, "native"))(ones())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(ones(), ones())
        tangent = torch.autograd.forward_ad.unpack_dual(final(dual)).tangent
    assert float(tangent) == pytest.approx(0.25, rel=1e-6)


def test_a_function_of_no_module_is_compiled():
    names = {}
    exec("f = lambda t, u: -u", names)
    names["f"].__module__ = None
    u0 = torch.ones(1, dtype=torch.float64)
    sol = solve(ODEProblem(names["f"], u0, (0.0, 1.0)), Tsit5(), saveat=[1.0])
    assert sol.stats.engine == "native"


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("sensealg", [BacksolveAdjoint(), InterpolatingAdjoint()], ids=str)
def test_saved_times_do_not_count_as_steps_that_a_reverse_solve_may_take(engine, sensealg):
    p = torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
    times = torch.linspace(0.0, 1.0, 201, dtype=DOUBLE)
    prob = ODEProblem(lambda t, u, p: -p * u, ones(), (0.0, 1.0), p)
    sol = solve(
        prob, Tsit5(), saveat=times, sensealg=sensealg, engine=engine, maxiters=100, rtol=1e-7
    )
    (got,) = torch.autograd.grad(sol.u[:, 0].mean(), p)
    assert got.item() == pytest.approx(float((-times * torch.exp(-times)).mean()), rel=1e-5)
