"""The sparsity of a right-hand side, against the Jacobian that torch computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffsolve import ODEProblem, jacobian_sparsity
from diffsolve.problems import library

F64 = torch.float64


def problem(f, n, p=None):
    return ODEProblem(f, torch.rand(n, dtype=F64) + 0.5, (0.0, 1.0), p)


def true_pattern(prob):
    args = () if prob.p is None else (prob.p,)
    t = torch.tensor(0.3, dtype=F64)
    found = torch.zeros(len(prob.u0), len(prob.u0), dtype=torch.bool)
    for _ in range(3):
        u = torch.rand_like(prob.u0) + 0.5
        found |= torch.autograd.functional.jacobian(lambda u: prob.f(t, u, *args), u) != 0
    return found


def diffusion(t, u, p):
    return p * (torch.roll(u, 1) + torch.roll(u, -1) - 2 * u) + u * u


def chain(t, u):
    flow = 2.0 * u
    du = torch.empty_like(u)
    du[0] = -flow[0]
    du[1:] = flow[:-1] - flow[1:]
    return du


def test_pattern_is_that_of_the_jacobian():
    for prob in (
        problem(diffusion, 20, torch.rand(20, dtype=F64)),
        problem(chain, 7),
        problem(lambda t, u: torch.where(u > 1, u.flip(0), t * u), 5),
        library.pleiades(),
        library.lorenz(),
    ):
        pattern = jacobian_sparsity(prob)
        assert pattern.dtype == torch.bool and pattern.layout == torch.sparse_coo
        truth = true_pattern(prob)
        # more than the truth only where a branch was not taken
        assert bool((pattern.to_dense() | ~truth).all())
        if "where" not in (getattr(prob.f, "__code__", None) or chain.__code__).co_names:
            assert torch.equal(pattern.to_dense(), truth)


def test_branches_not_taken_count():
    prob = problem(lambda t, u: torch.where(t > 100, u.flip(0), u), 2)
    assert bool(jacobian_sparsity(prob).to_dense().all())


def test_products_with_zeros_do_not_count():
    matrix = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=F64)
    prob = ODEProblem(
        lambda t, u: torch.tensor([[1.0, 0.0], [3.0, 2.0]], dtype=F64) @ u,
        torch.ones(2, dtype=F64),
        (0.0, 1.0),
    )
    assert jacobian_sparsity(prob).to_dense().int().tolist() == [[1, 0], [1, 1]]
    # a captured matrix may change, so its zeros prove nothing
    captured = ODEProblem(lambda t, u: matrix @ u, torch.ones(2, dtype=F64), (0.0, 1.0))
    assert bool(jacobian_sparsity(captured).to_dense().all())


def test_pytree_states_are_flat_in_their_order():
    u0 = {"a": torch.ones(2, dtype=F64), "b": torch.ones((), dtype=F64)}
    prob = ODEProblem(lambda t, u: {"a": -u["a"], "b": u["a"].sum()}, u0, (0.0, 1.0))
    assert jacobian_sparsity(prob).to_dense().int().tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 0]]


def test_independent_of_everything():
    prob = problem(lambda t, u: torch.ones_like(u), 3)
    assert jacobian_sparsity(prob)._nnz() == 0


def test_large_stencil_needs_no_dense_matrix():
    n = 3000
    pattern = jacobian_sparsity(problem(diffusion, n, torch.rand(n, dtype=F64)))
    assert pattern.shape == (n, n) and pattern._nnz() == 3 * n


def test_what_cannot_be_followed_is_named():
    with pytest.raises(ValueError, match=r"sort.*test_jacobian\.py"):
        jacobian_sparsity(problem(lambda t, u: torch.sort(u)[0], 3))
    with pytest.raises(TypeError, match="ODEProblem"):
        jacobian_sparsity(nn.Linear(2, 2))
