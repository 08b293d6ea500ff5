"""Compiled compositions of operations: values, gradients and second-order terms are torch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from native_graphs import F64, pullback, run, second_order_terms, torch_pullback, traced, value
from operation_checks import Op, zeros
from torch import Tensor

from diffsolve import ODEProblem
from diffsolve.engines.native.codegen.llvm import Signature
from diffsolve.engines.native.graph.derivative import jacobian, sparsity
from diffsolve.engines.native.graph.expression import Pool
from diffsolve.engines.native.programs.lookup import find
from diffsolve.engines.native.programs.recipes import recipe_of
from diffsolve.problems.vector_field import VectorField

# -- compositions --------------------------------------------------------------------------------

N = 4
#: Smooth enough, and bounded, that compositions stay in their domains. Without torch's layer_norm:
#: its third derivatives, which are asked for below, are not those of its formula.
_INNER: list[Op] = [
    torch.sin, torch.cos, torch.tanh, torch.sigmoid, torch.atan, torch.erf, F.softsign,
    lambda x: torch.exp(-x.abs()), lambda x: torch.log1p(x * x), lambda x: torch.sqrt(1 + x * x),
    lambda x: torch.expm1(x.clamp(-2, 2)), lambda x: 1 / (1 + x * x), torch.asinh, F.softplus,
    lambda x: torch.rsqrt(1 + x * x), lambda x: torch.asin(x / (1 + x.abs())), F.silu, F.gelu,
    lambda x: torch.acos(0.5 * torch.sin(x)), lambda x: torch.sinh(torch.tanh(x)),
    lambda x: torch.cosh(torch.sin(x)), lambda x: torch.tan(torch.sin(x)), F.elu, F.leaky_relu,
    lambda x: torch.log(0.1 + x.abs()), F.relu, torch.abs, lambda x: x**2, lambda x: x**3,
    lambda x: (x * x + 0.5) ** 1.5, lambda x: 2.0 ** torch.sin(x), torch.floor, torch.sign,
    lambda x: x.clamp(-0.7, 0.8), lambda x: torch.where(x > 0.1, x, -0.5 * x), F.mish,
    lambda x: torch.softmax(x, -1), lambda x: torch.cumsum(x, -1), lambda x: x.flip(0),
    lambda x: x - x.mean(), lambda x: x / (1 + x.norm()), lambda x: x.roll(1) - x,
    lambda x: torch.atanh(0.5 * torch.sin(x)), lambda x: x[[3, 1, 0, 0]],
    lambda x: torch.tril(torch.outer(x, x)) @ x / (1 + x @ x), lambda x: torch.stack(
        [x[0] * x[1], *x[1:].unbind()]), lambda x: x.view(2, 2).mT.reshape(-1),
    lambda x: torch.einsum("ij,j->i", torch.diag(x) + 1, torch.sin(x)), lambda x: x - x.amax(),
    lambda x: x.new_zeros(4).scatter_add(0, torch.tensor([0, 2, 2, 1]), x), lambda x: x.prod() + x,
    lambda x: x % 0.7, lambda x: (x - x.mean()) * torch.rsqrt(x.var() + 0.1),
    lambda x: (x > 0.2) * x,
    lambda x: torch.logsumexp(x, 0) - x, lambda x: torch.nan_to_num(x), lambda x: x.amin() * x,
]  # fmt: skip
_JOINS: list[Op] = [
    torch.add, torch.sub, torch.mul, lambda a, b: a / (1.5 + torch.sin(b)), torch.maximum,
    torch.minimum, lambda a, b: torch.atan2(a, 1 + b * b), lambda a, b: torch.where(a > b, a, b),
    lambda a, b: torch.outer(a, b).sum(0), lambda a, b: (a @ b) * torch.ones_like(a),
    lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: torch.addcmul(a, a, b, value=0.2),
    lambda a, b: (1 + a * a) ** torch.sin(b), lambda a, b: torch.hypot(a, 1 + b.abs()),
    lambda a, b: torch.logaddexp(a, b), lambda a, b: torch.cat([a[:2], b[2:]]),
]  # fmt: skip


@st.composite
def right_hand_sides(draw: st.DrawFn) -> Callable[..., Tensor]:
    """``f(t, u, p)`` of operations from the lists, each result open to the later ones."""
    steps = draw(
        st.lists(
            st.tuples(
                st.integers(0, len(_INNER) - 1),
                st.integers(0, len(_JOINS) - 1),
                st.integers(0, 20),
                st.integers(0, 20),
            ),
            min_size=1,
            max_size=5,
        )
    )

    def f(t: Tensor, u: Tensor, p: Any) -> Tensor:
        found = [u, p[0] * u, t + p[0]]
        for inner, join, i, j in steps:
            x = _INNER[inner](found[-1 - i % len(found)])
            found.append(_JOINS[join](x, found[-1 - j % len(found)]))
        return found[-1] + 0.1 * u

    return f


entries_of = st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=N, max_size=N)


def _scale(x: np.ndarray) -> float:
    finite = np.abs(x[np.isfinite(x)])
    return float(finite.max(initial=1.0))


def close(found: Any, expected: Any, rtol: float) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * _scale(expected))


@settings(max_examples=150)
@given(right_hand_sides(), entries_of, entries_of)
def test_compositions_and_their_pullbacks(f, u, p):
    u, p = torch.tensor(u, dtype=F64), [torch.tensor(p, dtype=F64)]
    tr = traced(f, u, p)
    w = torch.linspace(0.5, 1.5, N, dtype=F64)
    expected, row = torch_pullback(f, u, w, p)
    close(value(tr, u, p), expected, 1e-12)
    close(pullback(tr, u, w, p), row, 1e-11)


@settings(max_examples=40)
@given(right_hand_sides(), entries_of, entries_of)
def test_compositions_in_single_precision(f, u, p):
    u, p = torch.tensor(u, dtype=torch.float32), [torch.tensor(p, dtype=torch.float32)]
    exact = f(torch.tensor(0.3, dtype=F64), u.double(), [p[0].double()])
    expected = f(torch.tensor(0.3), u, p)
    found = value(traced(f, u, p), u, p)
    # as near to the exact values as torch comes
    error = (expected.double() - exact).abs().max().item()
    bound = 20 * error + 3e-6 * _scale(exact.numpy())
    assert np.abs(found - exact.numpy()).max() <= bound


JACOBIAN = Signature(("t",), ("u", "p", "out"))


@settings(max_examples=40)
@given(right_hand_sides(), entries_of, entries_of)
def test_jacobians_and_second_order_of_compositions(f, u, p):
    # off the corners, where second derivatives are as they come
    aside = torch.tensor([0.0137, 0.0291, -0.0173, 0.0419], dtype=F64)
    u, p = torch.tensor(u, dtype=F64) + aside, [torch.tensor(p, dtype=F64) - aside.flip(0) / 3]
    t = torch.tensor(0.3, dtype=F64)
    tr = traced(f, u, p)
    found = jacobian(tr.outputs, tr.u)
    expected = torch.autograd.functional.jacobian(lambda x: f(t, x, p), u).numpy()
    dense = np.zeros((N, N))
    values = run(JACOBIAN, list(found.values()), 0.3, u.numpy(), p[0].numpy())
    for (i, j), x in zip(found, values, strict=True):
        dense[i, j] = x
    close(dense, expected, 1e-11)
    pattern = sparsity(tr.outputs, tr.u)
    assert set(found) <= pattern
    assert all((i, j) in pattern for i, j in zip(*np.nonzero(expected), strict=True))
    v, w = torch.linspace(-1, 1, N, dtype=F64), torch.linspace(0.5, 1.5, N, dtype=F64)

    def contracted(x: Tensor, q: Tensor) -> np.ndarray:
        leaves = [x.clone().requires_grad_(), q.clone().requires_grad_()]
        _, dot = torch.autograd.functional.jvp(
            lambda y: f(t, y, leaves[1:]), leaves[0], v, create_graph=True
        )
        total = (dot * w).sum()
        if not total.requires_grad:
            return np.zeros(2 * N)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return torch.cat([zeros(N) if g is None else g for g in grads]).numpy()

    expected = contracted(u, p[0])
    # what rounding can make of it: near a corner it is large
    noise = 1 + 1e-14 * torch.tensor([1.0, -2.0, 3.0, -1.0], dtype=F64)
    shaken = np.abs(contracted(u * noise, p[0] * noise.flip(0)) - expected).max()
    found = second_order_terms(tr, u, p, v, w)
    bound = 1e-10 * _scale(expected) + 100 * shaken
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("exponent", [1.5, 2.5, -1.5, -2.5])
def test_half_powers_at_every_corner(exponent: float, dtype: torch.dtype) -> None:
    ends = [0.0, -0.0, math.inf, -math.inf, math.nan, -1.0, 1.0]
    points = torch.tensor([*ends, 2.3, 1e-30, 1e-12, 1e9, 1e25, 1e-150, 1e200], dtype=dtype)
    prob = ODEProblem(lambda t, u: u**exponent, torch.ones_like(points), (0.0, 1.0))
    field = VectorField.of(prob)
    native = find(field, recipe_of(field), 0.0, prob.u0, 1.0, verify=False)
    found, expected = native.evaluate(0.0, points), points**exponent
    torch.testing.assert_close(
        found, expected, rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True
    )
    kept = ~expected.isnan()
    assert torch.equal(found.signbit()[kept], expected.signbit()[kept])


def test_squares_of_opposite_differences_are_one() -> None:
    pool = Pool()
    x, y = pool.input("u", 0), pool.input("u", 1)
    assert (x - y) * (x - y) is (y - x) * (y - x)
    assert (x - y) is not -(y - x)  # the sign of zero differs
