"""Capture of right-hand sides as expressions: what is found, what is declined, and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from native_graphs import F64, pullback, torch_pullback, traced, value
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from traced_functions import U, hamiltonian

P = torch.tensor([1.5, -0.5, 0.25], dtype=F64)


def agrees(f: Any, u: Tensor = U, p: Any = None) -> None:
    """Values and pullbacks are torch's; ``p`` is None or a list of tensors."""
    tr = traced(f, u, p)
    w = torch.linspace(0.5, 1.5, u.numel(), dtype=u.dtype)
    expected, row = torch_pullback(f, u, w, p or ())
    np.testing.assert_allclose(value(tr, u, p), expected, rtol=1e-12, atol=1e-13)
    found = pullback(tr, u, w, p)
    np.testing.assert_allclose(found[: len(row)], row, rtol=1e-12, atol=1e-13)


class TestInputs:
    def test_time_state_and_parameters(self):
        tr = traced(lambda t, u, p: t * u * p, U, P)
        assert tr.t.data == ("t", 0)
        assert [x.data for x in tr.u] == [("u", 0), ("u", 1), ("u", 2)]
        assert [(x.tensor, x.p_position, x.offset, x.count) for x in tr.inputs] == [(None, 0, 0, 3)]
        agrees(lambda t, u, p: torch.sin(t) * u * p[0], U, [P])

    def test_leaves_of_p_come_first_used_or_not(self):
        p = {"b": torch.ones(2, dtype=F64), "a": [torch.ones(3, dtype=F64), 2, torch.arange(2)]}
        captured = torch.full((3,), 2.0, dtype=F64)
        tr = traced(lambda t, u, p: captured * u * p["a"][0] * p["a"][1], U, p)
        leaves = pytree.tree_leaves(p)
        places = [(x.p_position, x.offset, x.count) for x in tr.inputs]
        assert [leaves[i].numel() for i, _, _ in places[:2]] == [n for _, _, n in places[:2]]
        assert [(o, n) for _, o, n in places][-1] == (5, 3)
        assert tr.inputs[-1].tensor is captured

    def test_p_and_a_captured_tensor_are_told_apart(self):
        w = torch.tensor([2.0], dtype=F64, requires_grad=True)
        tr = traced(lambda t, u, p: w * u, U, (w, w))
        assert [x.p_position for x in tr.inputs] == [0, 1, None]
        assert tr.inputs[2].tensor is w
        assert {x.args[-1].data for x in tr.outputs} <= {("p", 2), ("u", 0), ("u", 1), ("u", 2)}

    def test_captured_tensors_are_lifted_once(self):
        w = torch.randn(3, 3, dtype=F64, requires_grad=True)
        tr = traced(
            lambda t, u: (
                w @ u + w.t() @ u + w[0] + w.data_like if False else w @ u + w.t() @ u + w[0]
            ),
            U,
        )
        assert [x.tensor is w for x in tr.inputs] == [True]
        agrees(lambda t, u: w @ u + w.t() @ u + w[0])
        with torch.no_grad():
            w.mul_(2.0)
        np.testing.assert_allclose(
            value(tr, U), (w @ U + w.t() @ U + w[0]).detach().numpy(), rtol=1e-13
        )

    def test_parameters_and_buffers_of_modules(self):
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 3))
        net = net.double().eval()
        tr = traced(lambda t, u: net(u[None])[0], U)
        found = {id(x.tensor) for x in tr.inputs}
        buffers = [x for x in net.buffers() if x.is_floating_point()]
        assert found == {id(x) for x in [*net.parameters(), *buffers]}
        np.testing.assert_allclose(value(tr, U), net(U[None])[0].detach().numpy(), rtol=1e-12)

    def test_parametrized_modules(self):
        net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)).double()
        tr = traced(lambda t, u: net(u), U)
        assert {id(x.tensor) for x in tr.inputs} == {id(x) for x in net.parameters()}
        np.testing.assert_allclose(value(tr, U), net(U).detach().numpy(), rtol=1e-12)

    def test_slices_of_one_tensor_as_parameters(self):
        flat = torch.arange(1.0, 7.0, dtype=F64)
        agrees(lambda t, u, p: u * p[0] + p[1], U, [flat[:3], flat[3:]])

    def test_an_expanded_captured_tensor(self):
        base = torch.tensor([2.0], dtype=F64, requires_grad=True)
        wide = base.expand(3)
        tr = traced(lambda t, u: wide * u, U)
        assert tr.inputs[0].tensor is wide
        np.testing.assert_allclose(value(tr, U), (wide * U).detach().numpy())

    def test_transposed_leaves_are_read_in_c_order(self):
        w = torch.arange(9.0, dtype=F64).view(3, 3)
        agrees(lambda t, u, p: p[0] @ u, U, [w.t()])
        agrees(lambda t, u, p: p[0] @ u, U, [torch.arange(18.0, dtype=F64).view(3, 6)[:, ::2]])

    def test_numbers_and_integer_tensors_are_constants(self):
        index = torch.tensor([2, 0, 1])
        tr = traced(lambda t, u: 2.0 * u[index] + torch.tensor([1.0, 2.0, 3.0], dtype=F64), U)
        assert tr.inputs == []
        assert [(x is index, version) for x, version in tr.constants] == [(True, 0)]

    def test_arrays_of_numpy_are_read_at_each_solve(self):
        array = np.array([1.0, 2.0, 3.0])
        tr = traced(lambda t, u: torch.from_numpy(array) * u, U)
        array[0] = 10.0
        np.testing.assert_allclose(value(tr, U), array * U.numpy())

    def test_pytree_states(self):
        u = {"x": torch.tensor([1.0, 2.0], dtype=F64), "v": torch.tensor(3.0, dtype=F64)}
        tr = traced(lambda t, s: {"v": -s["x"].sum(), "x": s["v"] * s["x"]}, u)
        flat = torch.cat([x.reshape(-1) for x in pytree.tree_leaves(u)])
        expected = {"x": u["v"] * u["x"], "v": -u["x"].sum()}
        leaves = [expected[k].reshape(-1) for k in u]
        np.testing.assert_allclose(value(tr, flat), torch.cat(leaves).numpy())

    def test_float32(self):
        net = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 3))
        u = U.float()
        tr = traced(lambda t, u: net(u) * t, u)
        np.testing.assert_allclose(value(tr, u), (net(u) * 0.3).detach().numpy(), rtol=1e-5)

    def test_the_state_is_untouched(self):
        u = U.clone()
        traced(lambda t, u: u * 2, u)
        assert torch.equal(u, U)

    def test_what_f_returns_as_it_is(self):
        constant = torch.ones(3, dtype=F64)
        assert traced(lambda t, u: constant, U).inputs[0].tensor is constant
        assert [x.data for x in traced(lambda t, u: torch.ones(3, dtype=F64), U).outputs] == [
            1.0
        ] * 3
        assert [x.data for x in traced(lambda t, u: u, U).outputs] == [("u", i) for i in range(3)]


def in_place_entries(t: Tensor, u: Tensor) -> Tensor:
    du = torch.empty_like(u)
    du[0] = u[1] * u[2]
    du[1:] = -u[:2] + t
    return du


def in_place_arithmetic(t: Tensor, u: Tensor) -> Tensor:
    x = u * 2
    x += 1
    x[1:] *= u[:2]
    x.clamp_(-2.0, 2.0).sin_()
    return x


def out_arguments(t: Tensor, u: Tensor) -> Tensor:
    du = torch.zeros(3, dtype=F64)
    torch.mul(u, 3.0, out=du)
    torch.add(du, u.flip(0), out=du)
    return du


def partly_constant(t: Tensor, u: Tensor) -> Tensor:
    m = torch.eye(3, dtype=F64)
    m[0, 1] = u[0]
    m[2] = u
    m.view(-1)[3:5].add_(u[:2])
    return m @ u


def overlapping_copy(t: Tensor, u: Tensor) -> Tensor:
    x = u.clone()
    x[1:] = x[:-1].clone() * 2
    return x


def views_of_views(t: Tensor, u: Tensor) -> Tensor:
    m = torch.outer(u, u).unsqueeze(0).expand(2, 3, 3)[1].t()[1:, ::2]
    a, b = m.unbind(1)
    return torch.cat([a * b, (a - b)[:1]])


def accumulated(t: Tensor, u: Tensor) -> Tensor:
    total = torch.zeros_like(u)
    for k in range(3):
        total = total + u.roll(k) ** (k + 1)
    total.index_add_(0, torch.tensor([0, 0, 2]), u)
    return total


@pytest.mark.parametrize(
    "f",
    [
        in_place_entries,
        in_place_arithmetic,
        out_arguments,
        partly_constant,
        overlapping_copy,
        views_of_views,
        accumulated,
        hamiltonian,
        lambda t, u: torch.func.grad(lambda x: (x.sin() * x.roll(1)).sum())(u),
        lambda t, u: torch.func.vmap(lambda x: x * x.exp())(u),
        lambda t, u: torch.func.jvp(torch.sin, (u,), (u.cos(),))[1],
        lambda t, u: torch.stack([*u.unbind()][::-1]),
        lambda t, u: u * (u > 0),
        lambda t, u: torch.cat([u[3:], u, u.new_zeros(0)]) + u[:0].sum(),
        lambda t, u: u * (u > 0).sum() + u.long() * t,
        lambda t, u: torch.mul(u, 2.0) * torch.arange(3) + torch.eye(3, dtype=F64)[1],
    ],
)
def test_forms_of_right_hand_sides(f):
    if f is out_arguments:  # has no gradient in torch
        np.testing.assert_allclose(value(traced(f, U), U), f(None, U).numpy())
    else:
        agrees(f)


def test_a_network_with_autograd_inside():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1))
    net = net.double()

    def f(t, u):
        with torch.enable_grad():
            x = u.view(2) * 1.0 if u.requires_grad else u.clone().requires_grad_()
            (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return torch.stack([slope[1], -slope[0]])

    u = torch.tensor([0.3, -0.8], dtype=F64)
    tr = traced(f, u)
    assert tr.detached is None
    # the last bias has no slope, and still is used
    assert {id(x.tensor) for x in tr.inputs} == {id(x) for x in net.parameters()}
    w = torch.tensor([1.0, 2.0], dtype=F64)
    leaf = u.clone().requires_grad_()
    du = f(None, leaf)
    by = [leaf, *[x.tensor for x in tr.inputs]]
    grads = torch.autograd.grad(du, by, w, allow_unused=True)
    row = [
        torch.zeros(x.numel()) if g is None else g.flatten() for g, x in zip(grads, by, strict=True)
    ]
    np.testing.assert_allclose(value(tr, u), du.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(
        pullback(tr, u, w)[1:], torch.cat(row).numpy(), rtol=1e-10, atol=1e-14
    )
