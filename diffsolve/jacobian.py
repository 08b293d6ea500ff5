"""Public functions about the Jacobian of a problem: its sparsity, and a check of ``jac``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.graph.derivative import sparsity
from diffsolve.engines.native.tracing.trace import trace
from diffsolve.problems.ode import ODEProblem
from diffsolve.problems.structure import StateStructure
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.given_jacobian import given_jacobian
from diffsolve.solvers.jacobian import differentiator

_MOST_OPERATIONS = 2_000_000
_MOST_SHOWN = 8


def jacobian_sparsity(prob: ODEProblem) -> Tensor:
    """Which entries of ``df/du`` can be other than zero.

    ``f`` is run once and its operations are followed one number at a time, so the pattern holds
    for every state, time and parameter, as far as ``f`` has no branches in Python.

    Parameters
    ----------
    prob
        The problem; its state has ``N`` numbers, all leaves of a pytree counted in their order.

    Returns
    -------
    Tensor
        Sparse COO tensor of booleans, ``(N, N)``: row ``i``, column ``j`` for
        ``d f_i / d u_j``. ``.to_dense()`` makes a matrix of it, ``.indices()`` lists the entries.

    Raises
    ------
    TypeError
        If ``prob`` is not an ``ODEProblem``.
    ValueError
        If ``f`` cannot be followed; the message names the operation and its line.

    Examples
    --------
    >>> decay_chain = ODEProblem(
    ...     lambda t, u: torch.stack([-u[0], u[0] - u[1]]), torch.ones(2), (0.0, 1.0)
    ... )
    >>> jacobian_sparsity(decay_chain).to_dense().int()
    tensor([[1, 0],
            [1, 1]], dtype=torch.int32)
    """
    if not isinstance(prob, ODEProblem):
        raise TypeError(f"prob must be an ODEProblem, got {type(prob).__name__}")
    structure = StateStructure.of(prob.u0)
    u0, t0 = structure.ravel(prob.u0).detach(), float(prob.tspan[0])
    try:
        graph = trace(prob.f, structure, prob.p, t0, u0, _MOST_OPERATIONS)
    except Declined as reason:
        raise ValueError(f"the sparsity of f cannot be found: {reason}") from None
    entries = sorted(sparsity(graph.outputs, graph.u))
    indices = torch.tensor(entries, dtype=torch.long, device="cpu").reshape(-1, 2).T
    values = torch.ones(len(entries), dtype=torch.bool, device="cpu")
    size = (structure.size, structure.size)
    return torch.sparse_coo_tensor(indices, values, size, is_coalesced=True, check_invariants=True)


def check_jacobian(
    prob: ODEProblem, t: float | None = None, u: Any = None, *, rtol: float | None = None
) -> float:
    """Compare ``prob.jac`` with the exact Jacobian of ``prob.f``.

    Parameters
    ----------
    prob
        The problem.
    t
        Time; default ``tspan[0]``.
    u
        A state, or a list of states. Default: ``u0``, and two states beside it, where terms show
        that vanish at an initial state with zeros.
    rtol
        Largest difference of an entry relative to its size; default 1e-6, or 1e-3 in single
        precision.

    Returns
    -------
    float
        The largest such difference.

    Raises
    ------
    TypeError
        If ``prob`` is not an ``ODEProblem``.
    ValueError
        If the problem has no ``jac``, or that returns a wrong shape or wrong entries; the message
        lists the worst as ``J[i, j]``: ``d f_i / d u_j``, all numbers of the state counted in their
        order.

    Examples
    --------
    >>> def jac(t, u):
    ...     return torch.diag(-2 * u)
    >>> check_jacobian(ODEProblem(lambda t, u: -(u**2), torch.ones(2), (0.0, 1.0), jac=jac))
    0.0
    """
    if not isinstance(prob, ODEProblem):
        raise TypeError(f"prob must be an ODEProblem, got {type(prob).__name__}")
    if prob.jac is None:
        raise ValueError("the problem has no jac to check")
    field = VectorField.of(prob)
    time = field.time(float(prob.tspan[0]) if t is None else t)
    double = field.structure.time_dtype == torch.float64
    rtol = (1e-6 if double else 1e-3) if rtol is None else rtol
    return max(_compared(field, time, flat, rtol) for flat in _states(field, prob.u0, u))


def _states(field: VectorField, u0: Any, u: Any) -> list[Tensor]:
    ravel = field.structure.ravel
    if u is not None:
        are_states = isinstance(u, (list, tuple)) and field.structure.is_tensor
        return [ravel(x).detach() for x in (u if are_states else [u])]
    start = ravel(u0).detach()
    generator = torch.Generator("cpu").manual_seed(0)
    states = [start]
    for _ in range(2):
        factors = torch.rand(len(start), generator=generator, dtype=torch.float64, device="cpu").to(
            start
        )
        states.append(start * (0.9 + 0.2 * factors) + 1e-3 * factors)
    return states


def _compared(field: VectorField, time: Tensor, u: Tensor, rtol: float) -> float:
    with torch.no_grad():
        given = _whole(given_jacobian(field, time, u))
    exact = _whole(differentiator(field).exact_at(partial(field, time), u, u))
    off = (given - exact).abs()
    size = torch.maximum(given.abs(), exact.abs())
    # what rounding of the largest term can do to the others of a row
    allowed = rtol * size + 100 * torch.finfo(u.dtype).eps * size.amax(1, keepdim=True)
    wrong = (~(off <= allowed) & ~(given.isnan() & exact.isnan())).nonzero()
    if len(wrong):
        rows = sorted(wrong.tolist(), key=lambda ij: -float(off[tuple(ij)].nan_to_num(torch.inf)))
        listed = "\n".join(
            f"  J[{i}, {j}]: given {float(given[i, j]):.8g}, exact {float(exact[i, j]):.8g}"
            for i, j in rows[:_MOST_SHOWN]
        )
        more = f"\n  and {len(rows) - _MOST_SHOWN} more" if len(rows) > _MOST_SHOWN else ""
        raise ValueError(
            f"jac is not the Jacobian of f at t = {float(time):.8g}; entries that differ, of "
            f"{tuple(given.shape)}:\n{listed}{more}"
        )
    relative = off / size.clamp(min=torch.finfo(u.dtype).tiny)
    relative[off <= 100 * torch.finfo(u.dtype).eps * size.amax(1, keepdim=True)] = 0.0
    return float(relative.max())


def _whole(blocks: Tensor) -> Tensor:
    return torch.block_diag(*blocks)
