"""Whatever f depends on gets its gradient, wherever it comes from, or an error names it."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from gradients import (
    DOUBLE,
    TIGHT,
    Decay,
    assert_near,
    each,
    leaf,
)
from torch import nn

from diffsolve import (
    DiscreteAdjoint,
    InterpolatingAdjoint,
    ODEProblem,
    Vern7,
    solve,
)

# -- captured tensors ---------------------------------------------------------------------------


class Method:
    def __init__(self, module):
        self.module = module

    def __call__(self, t, u):
        return self.module(t, u)


class Twice(torch.autograd.Function):
    """A custom function, inside of which no mode of PyTorch looks."""

    @staticmethod
    def forward(ctx, a, u):
        ctx.save_for_backward(a, u)
        return -2 * a * u

    @staticmethod
    def backward(ctx, g):
        a, u = ctx.saved_tensors
        return -2 * g * u, -2 * g * a


def decay(t, u, w):
    return -w * u


def from_closure(a):
    return lambda t, u: -a * u, None


def from_what_was_computed(a):
    w = 2 * a
    return lambda t, u: -w * u, None


def from_a_view(a):
    w = a[:2]
    return lambda t, u: -w * u, None


def from_both(a):
    w = 2 * a
    return lambda t, u: -(a + w) * u, None


def from_p(a):
    return decay, a


def from_p_and_closure(a):
    return lambda t, u, p: -(a + p) * u, a


def from_computed_p(a):
    return decay, 2 * a


def from_computed_p_and_closure(a):
    w = 2 * a
    return lambda t, u, p: -(w + p) * u, w


def from_p_and_what_was_computed(a):
    w = 2 * a
    return lambda t, u, p: -(w + p) * u, a


def from_p_twice(a):
    return lambda t, u, p: -(p[0] + p[1] + p[2]) * u, (a, a, 2 * a)


def from_module(a):
    return Decay(a), None


def from_parameters_of_module(a):
    module = Decay(a)
    return lambda t, u, p: module(t, u), module.parameters()


def from_bound_method(a):
    return Decay(a).rate, None


def from_object(a):
    return Method(Decay(a)), None


def from_partial(a):
    return functools.partial(decay, w=a), None


def from_partial_of_computed(a):
    return functools.partial(decay, w=2 * a), None


def from_functional_call(a):
    module = Decay(nn.Parameter(torch.zeros_like(a)))
    return lambda t, u, p: torch.func.functional_call(module, p, (t, u)), {"a": 2 * a}


def from_functional_call_of_captured(a):
    module, state = Decay(nn.Parameter(torch.zeros_like(a))), {"a": 2 * a}
    return lambda t, u: torch.func.functional_call(module, state, (t, u)), None


def from_custom_function(a):
    return lambda t, u: Twice.apply(a, u), None


def from_custom_function_of_computed(a):
    w = 2 * a
    return lambda t, u: Twice.apply(w, u), None


# how the rate follows from ``a``
SOURCES = {
    from_closure: 1,
    from_what_was_computed: 2,
    from_a_view: 1,
    from_both: 3,
    from_p: 1,
    from_p_and_closure: 2,
    from_computed_p: 2,
    from_computed_p_and_closure: 4,
    from_p_and_what_was_computed: 3,
    from_p_twice: 4,
    from_module: 1,
    from_parameters_of_module: 1,
    from_bound_method: 1,
    from_object: 1,
    from_partial: 1,
    from_partial_of_computed: 2,
    from_functional_call: 2,
    from_functional_call_of_captured: 2,
    from_custom_function: 2,
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda f: f.__name__)
@each()
def test_parameters_are_found_wherever_they_come_from(sensealg, source):
    a = nn.Parameter(torch.tensor([0.3, 0.5], dtype=DOUBLE))
    f, p = source(a)
    u0 = leaf([1.0, 2.0])
    sol = solve(ODEProblem(f, u0, (0.0, 1.0), p), Vern7(), sensealg=sensealg, saveat=[1.0], **TIGHT)
    sol.u.sum().backward()
    k = SOURCES[source]
    end = u0.detach() * torch.exp(-k * a.detach())
    assert_near(a.grad, -k * end)
    assert_near(u0.grad, end / u0.detach())


@each()
def test_custom_function_of_a_computed_tensor_is_right_or_refused(sensealg):
    # what it is given cannot be replaced from outside; its gradient must not vanish silently
    a = nn.Parameter(torch.tensor([0.3, 0.5], dtype=DOUBLE))
    f, _ = from_custom_function_of_computed(a)
    u0 = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    try:
        sol = solve(ODEProblem(f, u0, (0.0, 1.0)), Vern7(), sensealg=sensealg, **TIGHT)
        sol.u[-1].sum().backward()
    except RuntimeError:
        return
    assert_near(a.grad, -4 * u0 * torch.exp(-4 * a.detach()))


@each()
def test_start_captured_by_f(sensealg):
    u0 = leaf([1.0])
    prob = ODEProblem(lambda t, u: u0 - 2 * u, u0, (0.0, 1.0))
    solve(prob, Vern7(), sensealg=sensealg, saveat=[1.0], **TIGHT).u.sum().backward()
    assert float(u0.grad) == pytest.approx(0.5 + 0.5 * math.exp(-2), rel=1e-8)


@each()
def test_start_computed_from_p(sensealg):
    a = leaf([0.4])
    prob = ODEProblem(lambda t, u, p: p * u, 3 * a, (0.0, 1.0), a)
    solve(prob, Vern7(), sensealg=sensealg, saveat=[1.0], **TIGHT).u.sum().backward()
    assert float(a.grad) == pytest.approx(3 * math.exp(0.4) * 1.4, rel=1e-8)


W_GLOBAL = nn.Parameter(torch.tensor([0.7], dtype=DOUBLE))


def late(t, u, w):
    return -w * u if t > 0.5 else -u


class Late(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, t, u):
        return late(t, u, self.a)


class Slots:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a

    def __call__(self, t, u):
        return late(t, u, self.a)


def late_closure(a):
    return lambda t, u: late(t, u, a)


def late_default(a):
    return lambda t, u, w=a: late(t, u, w)


def late_keyword_default(a):
    def f(t, u, *, w=a):
        return late(t, u, w)

    return f


def late_partial(a):
    return functools.partial(late, w=a)


def late_module(a):
    return Late(a)


def late_submodule(a):
    inner, outer = Late(a), nn.Module()
    outer.inner = inner
    return lambda t, u: outer.inner(t, u)


def late_plain_attribute_of_submodule(a):
    inner = nn.Identity()
    inner.rates = [a]
    model = nn.Sequential(nn.Sequential(inner))
    return lambda t, u: late(t, u, model[0][0].rates[0])


def late_closure_of_forward(a):
    class Net(nn.Module):
        def forward(self, t, u):
            return late(t, u, a)

    return Net()


def late_helper(a):
    def helper(t, u):
        return late(t, u, a)

    def f(t, u):
        return helper(t, u)

    return f


def late_nested_container(a):
    box = {"one": [{"two": ({"three": a},)}]}
    return lambda t, u: late(t, u, box["one"][0]["two"][0]["three"])


def late_slots(a):
    return Slots(a)


def late_global(a):
    return lambda t, u: late(t, u, W_GLOBAL)


def late_global_in_inner_function(a):
    def f(t, u):
        def inner():
            return -W_GLOBAL * u

        return inner() if t > 0.5 else -u

    return f


LATE = [
    late_closure,
    late_default,
    late_keyword_default,
    late_partial,
    late_module,
    late_submodule,
    late_plain_attribute_of_submodule,
    late_closure_of_forward,
    late_helper,
    late_nested_container,
    late_slots,
    late_global,
    late_global_in_inner_function,
]


@pytest.mark.parametrize("source", LATE, ids=lambda f: f.__name__)
@each([DiscreteAdjoint(), InterpolatingAdjoint()])
def test_parameter_used_only_in_a_later_branch(sensealg, source):
    W_GLOBAL.grad = None
    a = nn.Parameter(torch.tensor([0.7], dtype=DOUBLE))
    f = source(a)
    if "global" in source.__name__:
        a = W_GLOBAL
    prob = ODEProblem(f, leaf([1.0]), (0.0, 1.0))
    sol = solve(prob, Vern7(), sensealg=sensealg, saveat=[1.0], tstops=[0.5], **TIGHT)
    sol.u.sum().backward()
    assert a.grad is not None, "silently without gradient"
    assert float(a.grad) == pytest.approx(-0.5 * math.exp(-0.5 - 0.35), rel=1e-8)


@each()
def test_hook_of_a_parameter_runs_once(sensealg):
    calls = []
    module, p = Decay(nn.Parameter(torch.tensor([0.3], dtype=DOUBLE))), leaf([0.2])
    module.a.register_hook(lambda g: calls.append("module") or 10 * g)
    p.register_hook(lambda g: calls.append("p") or 10 * g)
    prob = ODEProblem(lambda t, u, p: module(t, u) - p * u, leaf([1.0]), (0.0, 1.0), p)
    solve(prob, Vern7(), sensealg=sensealg, saveat=[1.0], **TIGHT).u.sum().backward()
    assert sorted(calls) == ["module", "p"]
    for x in (module.a, p):
        assert float(x.grad) == pytest.approx(-10 * math.exp(-0.5), rel=1e-8)
