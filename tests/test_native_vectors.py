"""Elementary functions of many numbers of one state are computed by vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from native_runs import program_of
from torch import Tensor

from diffsolve import DiscreteAdjoint, ODEProblem, Tsit5, solve
from diffsolve.engines.native.graph.expression import Pool, needed
from diffsolve.engines.native.graph.groups import in_groups
from diffsolve.engines.native.programs.lookup import find
from diffsolve.engines.native.programs.recipes import recipe_of
from diffsolve.problems.vector_field import VectorField

FUNCTIONS = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
CORNERS = [
    *(0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 5e-324, -5e-324, 1e-300),
    *(1e-20, 1e300, -1e300, 708.0, 745.0, -745.0, 750.0, 88.0, -104.0, 1e6, 1e7),
]
each_function = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def computed(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    prob = ODEProblem(lambda t, u: f(u), torch.ones_like(x), (0.0, 1.0))
    field = VectorField.of(prob)
    native = find(field, recipe_of(field), 0.0, prob.u0, 1.0, verify=False)
    return native.evaluate(0.0, x)


@each_function
@each_dtype
@pytest.mark.parametrize("n", [3, 4, 8, 9, 17])
def test_values(f: Callable[[Tensor], Tensor], dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = (3 * torch.randn(200, n, generator=generator, dtype=torch.float64)).to(dtype)
    for row in x:
        exact = f(row.double()).to(dtype)
        ours = computed(f, row)
        torch.testing.assert_close(
            ours, exact, rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True
        )


@each_function
@each_dtype
def test_corners(f: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    for x in CORNERS:
        for place in range(9):  # in each lane, and in the one that is filled up
            row = torch.full((9,), 0.5, dtype=torch.float64)
            row[place] = x
            row = row.to(dtype)
            ours, theirs = computed(f, row), f(row)
            rtol = 8 * torch.finfo(dtype).eps
            atol = 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
            if x == 0:
                assert torch.equal(ours.signbit(), theirs.signbit())


def test_order_of_groups() -> None:
    """What waits for other calls comes after them, and everything comes once."""
    pool = Pool("float64", 1000)
    x = list(pool.inputs("u", 6))
    first = [pool.unary("tanh", a * 2.0) for a in x]
    mixed = [pool.unary("tanh", a + b) for a, b in pairwise(first)]
    other = [pool.unary("exp", a) for a in x[:3]]  # too few
    last = [*mixed, *other, pool.sum([*first, *other])]
    groups = in_groups(needed(last))
    flat = [node.index for group in groups for node in group]
    assert sorted(flat) == sorted(node.index for node in needed(last))
    assert [len(group) for group in groups if len(group) > 1] == [6, 5]
    seen: set[int] = set()
    for group in groups:
        for node in group:
            assert all(arg.index in seen for arg in node.args)
        seen |= {node.index for node in group}


def deep(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    inner = torch.tanh(p * u + torch.sin(u.roll(1)))
    return torch.sigmoid(inner.roll(2)) - torch.log1p(u * u) + 0.1 * torch.exp(-u.abs())


@each_dtype
def test_solves_and_gradients(dtype: torch.dtype) -> None:
    u0 = torch.linspace(-1, 1, 11, dtype=dtype, requires_grad=True)
    p = torch.linspace(0.5, 2, 11, dtype=dtype, requires_grad=True)
    found = []
    for engine in ("native", "torch"):
        sol = solve(
            ODEProblem(deep, u0, (0.0, 2.0), p),
            Tsit5(),
            sensealg=DiscreteAdjoint(),
            adaptive=False,
            dt=0.05,
            saveat=0.5,
            engine=engine,
        )
        found.append((sol.u.detach(), *torch.autograd.grad(sol.u.square().sum(), [u0, p])))
    tolerance = 1e-12 if dtype is torch.float64 else 1e-4
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert program_of(deep, u0.detach(), p.detach()).n == 11
