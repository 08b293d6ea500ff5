"""Backward through native solves: graphs, freed memory, and what is refused."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from gradients import CONTINUOUS, Decay, each, leaf, linear
from native_runs import ENGINES, REVERSIBLE, ones, run
from torch import nn

from diffsolve import (
    ODEProblem,
    Tsit5,
    solve,
)
from diffsolve.solvers.kernels import layout as L


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
    while not hasattr(node, "records"):
        node = node.next_functions[0][0]
    memory = node.records
    kept = [weakref.ref(x) for x in node.saved_tensors[2:]]
    assert kept
    sol.u.sum().backward()
    with pytest.raises(RuntimeError, match="freed"):
        _ = node.saved_tensors
    del sol
    gc.collect()
    slots = (L.STATES, L.DENSE, L.OUT_U)
    assert not set(slots) & set(memory.arrays)
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


@each(REVERSIBLE)
def test_saved_tensors_may_be_moved(sensealg):
    """Hooks, and checkpoints of torch, put other tensors in the place of those that were saved."""
    u0, p = leaf([1.0, 0.5]), leaf([[-1.0, 0.3], [0.1, -0.7]])

    def loss(u0, p):
        sol = run(linear, u0=u0, p=p, sensealg=sensealg, engine="native")
        return sol.u.square().sum() + (sol.steps.error.sum() if sensealg.handles_steps else 0.0)

    expected = torch.autograd.grad(loss(u0, p), (u0, p))
    with torch.autograd.graph.save_on_cpu():
        value = loss(u0, p)
    moved = torch.autograd.grad(value, (u0, p))
    again = torch.utils.checkpoint.checkpoint(loss, u0, p, use_reentrant=False)
    repeated = torch.autograd.grad(again, (u0, p))
    for a, b, c in zip(expected, moved, repeated, strict=True):
        assert a.abs().min() > 0
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_solve_inside_of_a_compiled_function():
    u0, p = leaf([1.0, 0.5]), leaf([[-1.0, 0.3], [0.1, -0.7]])

    def loss(p):
        return run(linear, u0=u0, p=p, engine="native").u.square().sum()

    (expected,) = torch.autograd.grad(loss(p), p)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="eager")(p), p)
    assert torch.equal(got, expected)
