"""Choosing the native engine, falling back, and everything around its kernels.

That its numbers are those of the torch engine is shown in ``test_native_parity.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradients import CONTINUOUS, DOUBLE, STEPWISE, TAPE, Decay, each, leaf, linear
from torch import nn

from diffsolve import (
    BS3,
    DP5,
    RK4,
    BacksolveAdjoint,
    DiscreteAdjoint,
    Euler,
    InterpolatingAdjoint,
    ODEProblem,
    PIController,
    ReturnCode,
    SolveError,
    Tsit5,
    Vern7,
    solve,
)
from diffsolve.engines.native import engine as engine_module
from diffsolve.engines.native import field as field_module
from diffsolve.engines.native import llvm
from diffsolve.engines.native.kernels import kernel
from diffsolve.problems import library
from diffsolve.problems.vector_field import VectorField

REVERSIBLE = [*STEPWISE, *CONTINUOUS]
ENGINES = pytest.mark.parametrize("engine", ["auto", "native"])


def ones(n=1):
    return torch.ones(n, dtype=DOUBLE)


def rate_of(sol):
    """The rate of decay that a solution over [0, 1] shows."""
    return -float(torch.log(sol.u[-1, 0] / sol.u[0, 0]).detach())


def run(f, engine="native", u0=None, p=None, alg=None, **options):
    options = {"rtol": 1e-8, "atol": 1e-8, **options}
    prob = ODEProblem(f, ones() if u0 is None else u0, (0.0, 1.0), p)
    return solve(prob, alg or Vern7(), engine=engine, **options)


def compiled_of(f, u0=None, p=None):
    field = VectorField.of(ODEProblem(f, ones() if u0 is None else u0, (0.0, 1.0), p))
    return field_module.find(field, 0.0, ones() if u0 is None else u0, 1.0, guard=False).compiled


# -- choosing ------------------------------------------------------------------------------------


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
    assert "test_native_engine.py:" in str(caught.value)
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


# -- changes of what f uses ----------------------------------------------------------------------

a_global = 1.0
a_global_tensor = torch.ones(1, dtype=DOUBLE)


def closure():
    rate = 1.0

    def change():
        nonlocal rate
        rate = 2.0

    return (lambda t, u: -rate * u), change


def closure_tensor():
    rate = ones()

    def change():
        nonlocal rate
        rate = 2 * ones()

    return (lambda t, u: -rate * u), change


def tensor_in_place():
    rate = ones()
    return (lambda t, u: -rate * u), lambda: rate.fill_(2.0)


def attribute():
    settings = SimpleNamespace(rate=1.0)
    return (lambda t, u: -settings.rate * u), lambda: setattr(settings, "rate", 2.0)


def attribute_tensor():
    settings = SimpleNamespace(rate=ones())
    return (lambda t, u: -settings.rate * u), lambda: setattr(settings, "rate", 2 * ones())


def buffer():
    net = Decay(1.0)
    net.register_buffer("b", ones())
    net.forward = lambda t, u: -net.b * u
    return net, lambda: setattr(net, "b", 2 * ones())


def module_attribute():
    net = Decay(1.0)
    return net, lambda: setattr(net, "a", 2.0)


def parameter_in_place():
    net = Decay(nn.Parameter(ones()))

    def change():
        with torch.no_grad():
            net.a.mul_(2.0)

    return net, change


def parameter_rebound():
    net = Decay(nn.Parameter(ones()))
    return net, lambda: setattr(net, "a", nn.Parameter(2 * ones()))


def parameter_data():
    net = Decay(nn.Parameter(ones()))
    return net, lambda: setattr(net.a, "data", 2 * ones())


def state_dict():
    net = Decay(nn.Parameter(ones()))
    return net, lambda: net.load_state_dict({"a": 2 * ones()})


def bound_method():
    net = Decay(1.0)
    return net.rate, lambda: setattr(net, "a", 2.0)


def change_global():
    global a_global
    a_global = 2.0


def a_global_number():
    global a_global
    a_global = 1.0
    return (lambda t, u: -a_global * u), change_global


def global_tensor():
    global a_global_tensor
    a_global_tensor = ones()

    def change():
        global a_global_tensor
        a_global_tensor = 2 * ones()

    return (lambda t, u: -a_global_tensor * u), change


def global_of_a_forward():
    global a_global
    a_global = 1.0

    class Net(nn.Module):
        def forward(self, t, u):
            return -a_global * u

    return Net(), change_global


def global_of_a_callable():
    global a_global
    a_global = 1.0

    class Call:
        def __call__(self, t, u):
            return -a_global * u

    return Call(), change_global


def attribute_of_a_module():
    module = types.ModuleType("settings")
    module.rate = 1.0
    return (lambda t, u: -module.rate * u), lambda: setattr(module, "rate", 2.0)


def attribute_of_a_class():
    class Settings:
        rate = 1.0

    return (lambda t, u: -Settings.rate * u), lambda: setattr(Settings, "rate", 2.0)


def list_entry():
    rates = [1.0]
    return (lambda t, u: -rates[0] * u), lambda: rates.__setitem__(0, 2.0)


def list_length():
    rates = [1.0]
    return (lambda t, u: -sum(rates) * u), lambda: rates.append(1.0)


def dict_entry():
    rates = {"a": ones()}
    return (lambda t, u: -rates["a"] * u), lambda: rates.update(a=2 * ones())


def default_argument():
    def f(t, u, p=1.0):
        return -p * u

    def change():
        f.__defaults__ = (2.0,)

    return f, change


def keyword_default():
    def f(t, u, *, rate=1.0):
        return -rate * u

    def change():
        f.__kwdefaults__ = {"rate": 2.0}

    return f, change


def inner_function():
    rate = 1.0

    def slope(u):
        return -rate * u

    def change():
        nonlocal rate
        rate = 2.0

    return (lambda t, u: slope(u)), change


def rebound_function():
    def slope(u):
        return -u

    def change():
        nonlocal slope

        def slope(u):
            return -2 * u

    return (lambda t, u: slope(u)), change


def training_mode():
    class Net(nn.Module):
        def forward(self, t, u):
            return -u if self.training else -2 * u

    net = Net()
    return net, lambda: net.eval()


def forward_replaced():
    net = Decay(1.0)
    return net, lambda: setattr(net, "forward", lambda t, u: -2 * u)


def forward_hook():
    net = Decay(1.0)
    return net, lambda: net.register_forward_hook(lambda module, args, out: 2 * out)


def submodule():
    net = nn.Module()
    net.inner = Decay(1.0)
    net.forward = lambda t, u: net.inner(t, u)
    return net, lambda: setattr(net, "inner", Decay(2.0))


def slots():
    class Settings:
        __slots__ = ("rate",)

    settings = Settings()
    settings.rate = 1.0
    return (lambda t, u: -settings.rate * u), lambda: setattr(settings, "rate", 2.0)


def array():
    rate = np.ones(1)
    return (lambda t, u: -torch.from_numpy(rate) * u), lambda: rate.fill(2.0)


def int_tensor():
    rate = torch.ones(1, dtype=torch.int64)
    return (lambda t, u: -rate * u), lambda: rate.fill_(2)


def buried():
    class Box:
        pass

    box = inner = Box()
    for _ in range(8):
        inner.box = Box()
        inner = inner.box
    inner.rate = 1.0

    def f(t, u):
        x = box
        while hasattr(x, "box"):
            x = x.box
        return -x.rate * u

    return f, lambda: setattr(inner, "rate", 2.0)


SEEN = [
    closure, closure_tensor, tensor_in_place, attribute, attribute_tensor, buffer,
    module_attribute, parameter_in_place, parameter_rebound, parameter_data, state_dict,
    bound_method, a_global_number, global_tensor, list_entry, list_length, dict_entry,
    default_argument, keyword_default, inner_function, rebound_function, training_mode,
    forward_replaced, forward_hook, submodule, slots, int_tensor, global_of_a_forward,
    global_of_a_callable, attribute_of_a_module, attribute_of_a_class,
]  # fmt: skip
#: What only the comparison of values sees: an array's contents, and what lies deep in objects.
GUARDED = [array, buried]


@pytest.mark.parametrize("change_of", [*SEEN, *GUARDED], ids=lambda x: x.__name__)
@ENGINES
def test_changes_between_solves_are_seen(change_of, engine):
    if engine == "native" and change_of in GUARDED:
        pytest.skip("left to the guard of auto")
    f, change = change_of()
    try:
        first = run(f, engine)
    except ValueError as error:  # numpy's memory cannot be followed
        assert change_of is array
        assert "cannot run" in str(error)
        return
    assert rate_of(first) == pytest.approx(1.0, rel=1e-6)
    assert rate_of(run(f, engine)) == pytest.approx(1.0, rel=1e-6)
    change()
    assert rate_of(run(f, engine)) == pytest.approx(2.0, rel=1e-6)
    assert rate_of(run(f, engine)) == pytest.approx(2.0, rel=1e-6)
    assert rate_of(first) == pytest.approx(1.0, rel=1e-6)


@ENGINES
def test_frozen_parameters(engine):
    net = nn.Linear(1, 1, bias=False).double()
    f = lambda t, u: net(u)  # noqa: E731
    net.weight.requires_grad_(False)
    net.weight.fill_(-1.0)
    sol = run(f, engine)
    assert not sol.u.requires_grad
    sol = run(f, engine, u0=leaf([1.0]))
    sol.u[-1].sum().backward()
    assert net.weight.grad is None
    net.weight.requires_grad_(True)
    sol = run(f, engine)
    assert sol.stats.engine == "native"
    sol.u[-1].sum().backward()
    assert float(net.weight.grad) == pytest.approx(float(sol.u[-1].detach()), rel=1e-6)
    net.weight.requires_grad_(False)
    assert not run(f, engine).u.requires_grad


def test_gradient_is_of_the_problem_as_it_was_solved():
    for sensealg in REVERSIBLE:
        rate = 1.0
        u0 = leaf([1.0])
        sol = run(lambda t, u: -rate * u, u0=u0, sensealg=sensealg)  # noqa: B023
        rate = 3.0
        sol.u[-1].sum().backward()
        assert float(u0.grad) == pytest.approx(np.exp(-1), rel=1e-6)


@each(REVERSIBLE)
def test_parameter_changed_in_place_before_backward_is_refused(sensealg):
    net = Decay(nn.Parameter(ones()))
    sol = run(net, sensealg=sensealg)
    with torch.no_grad():
        net.a.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sol.u[-1].sum().backward()


@each(REVERSIBLE)
def test_untouched_numbers_changed_in_place_do_not_matter(sensealg):
    """A captured tensor without gradient is copied, and u0 too."""
    rate, u0 = ones(), leaf([1.0])
    sol = run(lambda t, u: -rate * u, u0=u0, sensealg=sensealg)
    rate.fill_(5.0)
    sol.u[-1].sum().backward()
    assert float(u0.grad) == pytest.approx(np.exp(-1), rel=1e-6)


# -- caching -------------------------------------------------------------------------------------


def test_f_is_not_kept_alive():
    def make():
        captured, net = torch.full((1,), 0.7, dtype=DOUBLE), Decay(nn.Parameter(ones()))
        f = lambda t, u: net(t, u) * captured  # noqa: E731
        run(f).u[-1].sum().backward()
        return captured, [weakref.ref(x) for x in (f, net, net.a, captured)]

    captured, references = make()
    gc.collect()
    assert [r() for r in references] == [None, None, None, captured]
    del captured
    assert references[-1]() is None


def test_module_is_not_kept_alive():
    class F(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

        def forward(self, t, u):
            return self.net(u)

    f = F()
    run(f, u0=ones(2)).u.sum().backward()
    run(f.forward, u0=ones(2)).u.sum().backward()
    references = [weakref.ref(f), weakref.ref(f.net[0]), weakref.ref(f.net[0].weight)]
    del f
    gc.collect()
    assert [r() for r in references] == [None] * 3


def test_a_lambda_made_anew_is_not_compiled_again():
    net = nn.Linear(2, 2).double()
    found, seconds = set(), []
    for i in range(4):
        f = lambda t, u, i=i: torch.tanh(net(u)) * 0.37 + t  # noqa: E731
        sol = run(f, u0=leaf([1.0, 2.0]))
        sol.u.sum().backward()
        found.add(id(compiled_of(f, ones(2))))
        seconds.append(sol.stats.compile_s)
    assert len(found) == 1
    assert max(seconds[1:]) < 0.1  # a trace
    sol = run(f, u0=leaf([1.0, 2.0]))
    assert sol.stats.compile_s < 1e-3


def test_other_shapes_and_types_are_other_programs():
    def f(t, u, p):
        return -u * p.sum()

    for u0, p in (
        (ones(), ones()),
        (ones(2), ones()),
        (ones(2), ones(2) / 2),
        (ones(2).float(), ones(2).float() / 2),
        (ones(2).view(2, 1), ones(2) / 2),
        (ones(1), ones(4).view(2, 2) / 4),
    ):
        sol = run(f, u0=u0, p=p, rtol=1e-5, atol=1e-5)
        assert sol.u.dtype is u0.dtype
        assert sol.u.shape[1:] == u0.shape
        assert float(sol.u[-1].reshape(-1)[0]) == pytest.approx(np.exp(-1), rel=1e-4)

    def g(t, u, p):
        return -u * p["a"] * p["n"]

    for n in (1, 2.0, 3):
        for a in (ones(), 2 * ones()):
            sol = run(g, p={"a": a, "n": n})
            assert rate_of(sol) == pytest.approx(n * float(a), rel=1e-6)


def test_data_beside_f_is_not_gone_through():
    class Model:
        def __init__(self):
            self.rate = 1.0
            self.data = [[[float(i) for i in range(50)] for _ in range(100)] for _ in range(100)]

        def rhs(self, t, u):
            return -self.rate * u

    model = Model()
    assert rate_of(run(model.rhs)) == pytest.approx(1.0, rel=1e-6)
    started = time.perf_counter()
    run(model.rhs)
    assert time.perf_counter() - started < 0.05  # all of it would take a tenth of a second
    model.rate = 2.0
    assert rate_of(run(model.rhs)) == pytest.approx(2.0, rel=1e-6)


def test_traces_of_gone_functions_are_forgotten():
    before = len(field_module._by_function)
    for i in range(5):
        run(lambda t, u, i=i: -u * i)
    gc.collect()
    assert len(field_module._by_function) <= before
    for i in range(field_module._MOST_KEPT + 3):
        compiled_of(lambda t, u, i=i: -u * (i + 0.123))
    assert len(field_module._by_content) <= field_module._MOST_KEPT


def test_unhashable_and_unreferable_callables():
    class Rates:
        __slots__ = ("rate",)

        def __call__(self, t, u):
            return -self.rate * u

    class NoHash:
        __hash__ = None
        rate = 1.0

        def __call__(self, t, u):
            return -self.rate * u

    for f in (Rates(), NoHash()):
        for engine in ("auto", "native"):
            for rate in (1.0, 2.0):
                f.rate = rate
                assert rate_of(run(f, engine)) == pytest.approx(rate, rel=1e-6)


# -- gradients and graphs ------------------------------------------------------------------------


@each(REVERSIBLE)
def test_backward_twice(sensealg):
    u0, p = leaf([1.0, 0.5]), leaf([[-1.0, 0.3], [0.1, -0.7]])
    sol = run(linear, u0=u0, p=p, sensealg=sensealg)
    loss = sol.u[-1].sum()
    first = torch.autograd.grad(loss, (u0, p), retain_graph=True)
    second = torch.autograd.grad(loss, (u0, p))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (u0, p))


@each(REVERSIBLE)
def test_double_backward_is_explained(sensealg):
    u0, p = leaf([1.0, 0.5]), leaf([[-1.0, 0.3], [0.1, -0.7]])
    sol = run(linear, u0=u0, p=p, sensealg=sensealg)
    (g,) = torch.autograd.grad(sol.u[-1].square().sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="tape=True"):
        torch.autograd.grad(g.sum(), p)


@each(REVERSIBLE)
def test_memory_is_freed_after_backward(sensealg):
    u0 = leaf([1.0, 0.5])
    prob = ODEProblem(linear, u0, (0.0, 1.0), leaf([[-1.0, 0.3], [0.1, -0.7]]))
    sol = solve(prob, Tsit5(), sensealg=sensealg, saveat=[1.0], engine="native")
    node = sol.u.grad_fn
    while not hasattr(node, "carrier"):
        node = node.next_functions[0][0]
    memory = node.memory
    kept = [weakref.ref(x) for x in node.saved_tensors[2:]]
    assert kept
    sol.u.sum().backward()
    with pytest.raises(RuntimeError, match="freed"):
        _ = node.saved_tensors
    del sol
    gc.collect()
    slots = (engine_module.L.STATES, engine_module.L.DENSE, engine_module.L.OUT_U)
    assert not set(slots) & set(memory.held)
    assert all(x() is None for x in kept)


@ENGINES
def test_detached_parts_of_f(engine):
    """Gradients do not flow where f keeps them from flowing: a matter for torch."""

    def detaching(t, u, p):
        return -p * u.detach()

    def ungraded(t, u, p):
        with torch.no_grad():
            rate = p * 2
        return -rate * u

    for f, words in ((detaching, "detach"), (ungraded, "no_grad")):
        u0, p = leaf([1.0]), leaf([0.5])
        if engine == "native":
            with pytest.raises(ValueError, match=words):
                run(f, engine, u0, p)
        else:
            sol = run(f, engine, u0, p)
            assert words in sol.stats.engine
            reference = run(f, "torch", u0, p)
            ours = torch.autograd.grad(sol.u[-1].sum(), (u0, p))
            theirs = torch.autograd.grad(reference.u[-1].sum(), (u0, p))
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a, b)
        # without gradients it does not matter
        assert run(f, engine, u0.detach(), p.detach()).stats.engine == "native"


def test_cotangents_that_are_not_finite():
    for sensealg in CONTINUOUS:
        sol = run(lambda t, u: -u, u0=leaf([1.0]), sensealg=sensealg)
        with pytest.raises(RuntimeError, match="NaN or Inf"):
            (sol.u[-1] * float("nan")).sum().backward()


def test_dense_output_has_no_gradient_and_says_so():
    sol = run(lambda t, u: -u, u0=leaf([1.0]))
    with pytest.raises(RuntimeError, match="saveat"):
        sol(0.5).sum().backward()
    t = leaf(0.5)
    with torch.no_grad():
        value = sol(t)
    assert float(value) == pytest.approx(np.exp(-0.5), rel=1e-6)
    with pytest.raises(ValueError, match="outside"):
        sol(1.5)


# -- failures ------------------------------------------------------------------------------------


def root(t, u):
    return torch.sqrt(0.5 - t) * u


def blow_up(t, u):
    return u * u


def singular(t, u):
    return u / u.abs() * 1e3 / (t - 0.37).abs() ** 1.5


FAILURES = {
    "steps": (lambda t, u: -1000 * u, {"maxiters": 20}, ReturnCode.MAX_ITERS),
    "stiff": (lambda t, u: -1e7 * (u - t), {"maxiters": 200, "alg": Tsit5()}, ReturnCode.MAX_ITERS),
    "blow up": (blow_up, {"u0": 2 * ones()}, ReturnCode.DT_LESS_THAN_MIN),
    "dtmin": (lambda t, u: -300 * torch.sin(300 * t) * u, {"dtmin": 0.05},
              ReturnCode.DT_LESS_THAN_MIN),
    "NaN in a step": (root, {"dtmin": 1e-4}, ReturnCode.UNSTABLE),
    "NaN at the start": (lambda t, u: torch.log(u - 2), {}, ReturnCode.UNSTABLE),
    "NaN at the start, given dt": (lambda t, u: torch.log(u - 2), {"dt": 0.1},
                                   ReturnCode.UNSTABLE),
    "Inf at the start": (lambda t, u: u / (u - 1), {}, ReturnCode.UNSTABLE),
    "fixed": (root, {"adaptive": False, "dt": 0.1}, ReturnCode.UNSTABLE),
    "fixed Euler": (lambda t, u: u * u * 1e200, {"alg": Euler(), "dt": 0.1}, ReturnCode.UNSTABLE),
    "no limit": (blow_up, {"u0": 2 * ones(), "maxiters": 10**20}, ReturnCode.DT_LESS_THAN_MIN),
    "fixed, too many": (lambda t, u: -u, {"adaptive": False, "dt": 0.01, "maxiters": 7},
                        ReturnCode.MAX_ITERS),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("saveat", [None, [0.0, 0.01, 0.3, 1.0]], ids=["every step", "saveat"])
def test_failures_are_those_of_torch(name, saveat):
    f, options, code = FAILURES[name]
    options = {"alg": DP5(), "saveat": saveat, "rtol": 1e-4, "atol": 1e-4, **options}
    theirs, ours = (run(f, engine, throw=False, **options) for engine in ("torch", "native"))
    assert ours.retcode is theirs.retcode is code
    assert not ours.success
    assert ours.stats.naccept == theirs.stats.naccept
    assert ours.stats.nreject == theirs.stats.nreject
    assert ours.stats.nf == theirs.stats.nf
    assert ours.u.shape == theirs.u.shape
    assert torch.allclose(ours.t, theirs.t, rtol=1e-9)
    assert torch.allclose(ours.u, theirs.u, rtol=1e-6)
    errors = []
    for engine in ("torch", "native"):
        with pytest.raises(SolveError) as caught:
            run(f, engine, **options)
        errors.append(caught.value)
    theirs, ours = errors
    assert ours.retcode is code
    assert without_digits(str(ours)) == without_digits(str(theirs))
    assert ours.t == pytest.approx(theirs.t, rel=1e-6, abs=1e-12)
    assert ours.h == pytest.approx(theirs.h, rel=1e-3, nan_ok=True)
    assert ours.solution.retcode is code


def without_digits(message):
    """A message without the digits that may differ by rounding."""
    words = []
    for word in message.split():
        try:
            words.append(f"{float(word.strip(',.;')):.2g}")
        except ValueError:
            words.append(word)
    return " ".join(words)


@each(REVERSIBLE)
def test_gradient_of_a_partial_solution(sensealg):
    found = []
    for engine in ("torch", "native"):
        u0, p = leaf([1.0]), leaf([1.3])
        prob = ODEProblem(lambda t, u, p: p * torch.sqrt(0.5 - t) * u, u0, (0.0, 1.0), p)
        sol = solve(
            prob, BS3(), sensealg=sensealg, engine=engine, throw=False, saveat=[0.2, 0.4, 0.9],
            dt=0.05, adaptive=False,
        )  # fmt: skip
        assert sol.t.tolist() == [0.2, 0.4]
        found.append(torch.autograd.grad(sol.u.sum(), (u0, p)))
    for a, b in zip(*found, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-12)


def test_failed_at_once():
    """No step was taken: nothing to go back through, or to read."""
    for sensealg in REVERSIBLE:
        for dense in (False, True):
            u0 = leaf([1.0])
            options = {"sensealg": sensealg, "throw": False, "dense": dense}
            sol = run(lambda t, u: torch.log(u - 2), "native", u0, **options)
            assert sol.u.tolist() == [[1.0]]
            assert torch.autograd.grad(3 * sol.u.sum(), u0)[0].tolist() == [3.0]
            if dense:
                assert sol(0.0).tolist() == [1.0]
            sol = run(lambda t, u: torch.log(u - 2), "native", u0, saveat=[0.5], **options)
            assert sol.u.shape == (0, 1)
            assert len(sol.steps.t) == 0


def test_failure_of_the_reverse_solve_is_explained():
    for sensealg in CONTINUOUS:
        hard = dataclasses.replace(sensealg, rtol=1e-13, atol=1e-13)
        said = []
        for engine in ("torch", "native"):
            u0, p = leaf([1.0, 0.5]), leaf([[-1.0, 4.3], [-5.1, -0.7]])
            prob = ODEProblem(linear, u0, (0.0, 3.0), p)
            sol = solve(prob, BS3(), saveat=[3.0], engine=engine, sensealg=hard, maxiters=100)
            with pytest.raises(
                SolveError, match=f"reverse solve of {type(hard).__name__}"
            ) as caught:
                sol.u.sum().backward()
            assert caught.value.retcode is ReturnCode.MAX_ITERS
            said.append(without_digits(str(caught.value)))
        assert said[0] == said[1]


# -- sizes, spans and long solves ----------------------------------------------------------------


@each([None, *REVERSIBLE])
def test_empty_span(sensealg):
    found = []
    for engine in ("torch", "native"):
        u0, p = leaf([1.0, 2.0]), leaf([[-1.0, 0.3], [0.1, -0.7]])
        for saveat in (None, [0.5]):
            prob = ODEProblem(linear, u0, (0.5, 0.5), p)
            sol = solve(prob, Tsit5(), sensealg=sensealg, engine=engine, saveat=saveat, dense=True)
            assert sol.t.tolist() == [0.5]
            assert torch.equal(sol.u[0], u0)
            assert torch.equal(sol(0.5), u0)
            grads = torch.autograd.grad((sol.u * 3).sum(), (u0, p))
            found.append([g.tolist() for g in grads])
            assert sol.stats.naccept == 0
    assert found == [[[3.0, 3.0], [[0.0, 0.0], [0.0, 0.0]]]] * 4


@pytest.mark.parametrize("alg", [RK4(), Vern7()], ids=["RK4", "Vern7"])
def test_buffers_grow(alg):
    """3000 steps, where there is room for 256 at first."""
    prob = library.lotka_volterra_time(tspan=(0.0, 3.0))
    options = {"adaptive": False, "dt": 0.001}
    reference = solve(prob, alg, engine="torch", **options)
    sol = solve(prob, alg, engine="native", **options)
    assert sol.stats.naccept == 3000
    assert float((sol.u - reference.u).abs().max()) < 1e-10
    assert torch.equal(sol.steps.t, reference.steps.t)
    times = torch.linspace(0.0, 3.0, 1001, dtype=DOUBLE)
    assert float((sol(times) - reference(times)).abs().max()) < 1e-10
    for name in ("error_norm", "stiffness"):
        a, b = getattr(sol.steps, name), getattr(reference.steps, name)
        assert a.shape == b.shape == (3000,)
    sol = solve(prob, alg, engine="native", saveat=times, **options)
    assert float((sol.u - reference(times)).abs().max()) < 1e-10


def test_a_solve_in_many_chunks_is_the_same(monkeypatch):
    """The kernels return to Python after some steps, and go on as if they had not."""
    results = []
    for work in (engine_module._WORK_A_CALL, 1.0):
        monkeypatch.setattr(engine_module, "_WORK_A_CALL", work)
        compiled_of(linear, ones(2), -torch.eye(2, dtype=DOUBLE)).templates.clear()
        for sensealg in REVERSIBLE:
            u0, p = leaf([1.0, 0.5]), leaf([[-1.0, 4.3], [-5.1, -0.7]])
            prob = ODEProblem(linear, u0, (0.0, 3.0), p)
            sol = solve(
                prob, Tsit5(), sensealg=sensealg, saveat=[1.0, 2.5, 3.0], tstops=[1.3],
                engine="native",
            )  # fmt: skip
            grads = torch.autograd.grad(sol.u.sum() + sol.u[1, 0], (u0, p))
            results.append([sol.u, sol.steps.error, *grads])
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_progress_bar(capsys):
    sol = run(lambda t, u: -u, progress=True)
    assert "100%" in capsys.readouterr().err
    assert sol.success


@pytest.mark.parametrize("n", [1, 1000])
def test_large_and_small_states_have_gradients(n):
    u0 = torch.linspace(0.1, 1.0, n, dtype=DOUBLE).requires_grad_()
    for sensealg in (DiscreteAdjoint(), InterpolatingAdjoint(), BacksolveAdjoint()):
        sol = run(lambda t, u: -u * u, u0=u0, sensealg=sensealg, alg=Tsit5(), saveat=[1.0])
        (g,) = torch.autograd.grad(sol.u.sum(), u0)
        assert torch.allclose(g, (1 + u0.detach()) ** -2, rtol=1e-5)


# -- threads and signals -------------------------------------------------------------------------


def oscillator(t, u, p):
    return torch.stack([u[1], -p * u[0]])


def test_threads_solve_the_same_and_other_problems():
    u0 = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    shared = [ODEProblem(oscillator, u0, (0.0, 20.0), torch.tensor(k * 1.0)) for k in (1, 2)]
    shared = [x.remake(p=x.p.double()) for x in shared]
    wrong = []

    def work(index):
        try:
            for i in range(6):
                k = 1 + (index + i) % 2
                p = torch.tensor(float(k), dtype=DOUBLE, requires_grad=True)
                if i % 3 == 0:  # one more program
                    f = lambda t, u, p, n=index * 10 + i: oscillator(t, u, p) * (1 + 0 * n)  # noqa: E731
                else:
                    f = oscillator
                sol = solve(
                    shared[k - 1].remake(f=f, p=p), Vern7(), rtol=1e-9, atol=1e-9, saveat=[20.0],
                    sensealg=REVERSIBLE[i % 3],
                )  # fmt: skip
                assert sol.stats.engine == "native"
                sol.u[-1, 0].backward()
                w = k**0.5
                assert abs(float(sol.u[-1, 0].detach()) - np.cos(20 * w)) < 1e-6
                assert abs(float(p.grad) + 10 / w * np.sin(20 * w)) < 1e-4
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_read_the_same_solution():
    """Also the first to ask for values, when the extra stages are not there yet."""
    prob = ODEProblem(oscillator, torch.tensor([1.0, 0.0], dtype=DOUBLE), (0.0, 40.0), ones()[0])
    options = {"rtol": 1e-9, "atol": 1e-9, "engine": "native"}
    wrong = []

    def read(sol, seed):
        times = torch.linspace(0, 40, 301, dtype=DOUBLE)[torch.randperm(301)]
        try:
            for i in range(10):
                some = times[i * seed : 200 + i]
                assert float((sol(some)[:, 0] - torch.cos(some)).abs().max()) < 1e-6
        except BaseException as error:
            wrong.append(error)

    for _ in range(5):
        sol = solve(prob, Vern7(), **options)
        threads = [threading.Thread(target=read, args=(sol, i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_a_long_solve_does_not_hold_up_other_threads():
    u0 = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    prob = ODEProblem(oscillator, u0, (0.0, 1.0), torch.tensor(1e4, dtype=DOUBLE))
    options = {"adaptive": False, "engine": "native", "saveat": [1.0]}
    solve(prob, RK4(), dt=1e-3, **options)
    ends = []

    def long():
        solve(prob, RK4(), dt=1e-7 * 5, maxiters=10**9, **options)
        ends.append(time.perf_counter())

    thread = threading.Thread(target=long)
    beats = []
    started = time.perf_counter()
    thread.start()
    while thread.is_alive():
        time.sleep(0.002)
        beats.append(time.perf_counter())
    lasted = ends[0] - started
    assert lasted > 0.1
    gaps = np.diff([started, *beats])
    assert len(beats) > 5
    assert gaps.max() < max(0.5 * lasted, 0.1)


INTERRUPTED = """
import sys, time, torch
from diffsolve import *
def f(t, u):
    return torch.stack([u[1], -u[0]])
u0 = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
options = dict(adaptive=False, engine="native", saveat=[1.0])
sol = solve(ODEProblem(f, u0, (0.0, 1.0)), RK4(), dt=0.1, **options)
sol.u.sum().backward()
print("ready", flush=True)
started = time.perf_counter()
try:
    solve(ODEProblem(f, u0.detach(), (0.0, 1.0)), RK4(), dt=1e-12, maxiters=10**13, **options)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sol = solve(ODEProblem(f, u0, (0.0, 1.0)), RK4(), dt=0.1, **options)
    sol.u.sum().backward()
    print("fine", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
def test_interrupt():
    script = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True
    )
    try:
        assert script.stdout.readline() == "ready\n"
        time.sleep(0.5)
        assert script.poll() is None
        sent = time.perf_counter()
        script.send_signal(signal.SIGINT)
        assert script.stdout.readline() == "interrupted\n"
        assert time.perf_counter() - sent < 1.5
        assert script.stdout.readline() == "fine\n"
        assert script.wait(20) == 0
    finally:
        script.kill()
        script.wait()


# -- copies --------------------------------------------------------------------------------------


def test_copies_of_problems_and_solutions():
    net = nn.Linear(2, 2).double()
    prob = ODEProblem(library.lotka_volterra().f, ones(2), (0.0, 1.0), library.lotka_volterra().p)
    sol = solve(prob, Tsit5(), engine="native")
    again = solve(copy.deepcopy(prob), Tsit5(), engine="native")
    assert torch.equal(sol.u, again.u)

    class F(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, u):
            return self.net(u)

    f = F()
    first = run(f, u0=ones(2)).u
    other = copy.deepcopy(f)
    with torch.no_grad():
        other.net.weight.mul_(2.0)
    assert not torch.equal(run(other, u0=ones(2)).u[-1], first[-1])
    assert torch.equal(run(f, u0=ones(2)).u, first)


def test_solution_can_be_copied_like_that_of_torch():
    prob = ODEProblem(linear, ones(2), (0.0, 1.0), -torch.eye(2, dtype=DOUBLE))
    for dense in (True, False):
        outcomes = []
        for engine in ("torch", "native"):
            sol = solve(prob, Tsit5(), engine=engine, dense=dense)
            found = []
            for copied in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
                try:
                    twin = copied(sol)
                    found.append((twin.u[-1].tolist(), dense and twin(0.3).tolist()))
                except Exception as error:
                    found.append(type(error).__name__)
            outcomes.append(found)
        for theirs, ours in zip(*outcomes, strict=True):
            assert isinstance(theirs, str) == isinstance(ours, str), outcomes
            if not isinstance(ours, str):
                assert np.allclose(ours[0], theirs[0], rtol=1e-12)
                assert np.allclose(ours[1], theirs[1], rtol=1e-12)


# -- the cache on disk ---------------------------------------------------------------------------

CACHED = """
import sys, torch, diffsolve
from diffsolve import *
u0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
sol = solve(ODEProblem(lambda t, u: -u * 1.2345, u0, (0.0, 1.0)), Tsit5(), engine="native")
sol.u[-1].sum().backward()
assert abs(float(u0.grad[0]) - 2.718281828459045 ** -1.2345) < 1e-3
"""


def in_process(script=CACHED, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def test_cache_folder(tmp_path):
    """What was compiled is found by the next process; damaged files are compiled again."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    run(lambda t, u: -u, u0=leaf([1.0])).u.sum().backward()
    for name in ("advance", "sweep"):  # which take long to build
        begin = kernel(name, "explicit_rk", False).code.name.removeprefix("diffsolve_")
        (path,) = llvm.cache_folder().glob(f"{begin}*")
        shutil.copy(path, folder / path.name)
    kernels = {x.name for x in folder.iterdir()}
    first = in_process(DIFFSOLVE_CACHE_DIR=str(folder))
    assert "building" not in first.stderr
    files = {x.name: x.read_bytes() for x in folder.iterdir()}
    functions = sorted(files.keys() - kernels)
    assert len(functions) >= 2

    times = {x.name: x.stat().st_mtime_ns for x in folder.iterdir()}
    whole = files[functions[0]]
    (folder / functions[0]).write_bytes(whole[: len(whole) // 2])  # an interrupted write
    (folder / functions[1]).write_bytes(files[functions[1]][:-9] + b"x" + files[functions[1]][-8:])
    in_process(DIFFSOLVE_CACHE_DIR=str(folder))
    assert {x.name: x.read_bytes() for x in folder.iterdir()} == files
    for name in files.keys() - set(functions[:2]):
        assert (folder / name).stat().st_mtime_ns == times[name]


def test_no_folder_for_the_cache(tmp_path, monkeypatch):
    """Compiled for this process alone where nothing can be written, or others could write."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    try:
        for i, given in enumerate((blocked, blocked / "under", shared)):
            monkeypatch.setenv("DIFFSOLVE_CACHE_DIR", str(given))
            llvm.cache_folder.cache_clear()
            assert llvm.cache_folder() is None
            sol = run(lambda t, u, i=i: -u * (i + 1.7654))
            assert rate_of(sol) == pytest.approx(i + 1.7654, rel=1e-6)
        assert not list(shared.iterdir())
        monkeypatch.setenv("DIFFSOLVE_CACHE_DIR", str(tmp_path / "new" / "folder"))
        llvm.cache_folder.cache_clear()
        assert llvm.cache_folder() == tmp_path / "new" / "folder"
        assert llvm.cache_folder().stat().st_mode & 0o777 == 0o700
        assert blocked.read_text() == "no folder"
    finally:
        llvm.cache_folder.cache_clear()
