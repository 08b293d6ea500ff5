"""The sparsity of a right-hand side, against the Jacobian that torch computes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffsolve import KenCarp4, ODEProblem, jacobian_sparsity, solve
from diffsolve.problems import library
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.jacobian import linearise

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


COUPLED = {
    (2, 1): lambda u: u.flip(0),
    (1, 2): lambda u: u.flip(1),
    (2, 2): lambda u: u.flip(0),
    (3, 1): lambda u: u.roll(1, 0),
    (2, 2, 1): lambda u: u.flip(1),
    (30, 1): lambda u: u.roll(1, 0),
    (30, 2): lambda u: torch.cat([u[:15], u[:15] ** 2]),
    (2, 20): lambda u: u.flip(0),
}


@pytest.mark.parametrize("shape", COUPLED)
@pytest.mark.parametrize("by_autograd", [True, False])
def test_rows_that_are_coupled_are_no_batch(shape, by_autograd):
    """The blocks that an implicit method uses are the whole Jacobian, also where rows are coupled
    only from some time or state on."""
    mixed = COUPLED[shape]

    def f(t, u):
        du = -u + (t > 1) * mixed(u) * 1e-3
        return du if by_autograd else torch.from_numpy(du.detach().numpy().copy())

    n = math.prod(shape)
    u0 = torch.linspace(0.5, 1.5, n, dtype=torch.float64).reshape(shape)
    field = VectorField.of(ODEProblem(f, u0, (0.0, 2.0)))
    flat = u0.reshape(-1)
    for t in (0.0, 1.5):
        found = torch.block_diag(*linearise(field, t, 0.1, flat).blocks)
        expected = torch.func.jacrev(
            lambda x, t=t: -x + (t > 1) * mixed(x.view(shape)).reshape(-1) * 1e-3
        )(flat)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_column_of_coupled_equations_is_solved_as_a_vector():
    matrix = torch.tensor([[-1.0, 0.5], [100.0, -101.0]], dtype=torch.float64)
    found = []
    for shape in ((2,), (2, 1)):
        A = matrix.clone().requires_grad_()
        u0 = torch.tensor([1.0, 0.3], dtype=torch.float64).reshape(shape)
        prob = ODEProblem(lambda t, u, A: A @ u, u0, (0.0, 1.0), A)
        sol = solve(prob, KenCarp4(), saveat=[1.0], rtol=1e-7, atol=1e-9, engine="torch")
        found.append((sol.stats.naccept, torch.autograd.grad(sol.u.sum(), A)[0]))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-10, atol=1e-12)
