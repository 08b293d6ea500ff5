"""What is known of the Jacobian of a problem's right-hand side."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.derivative import sparsity
from diffsolve.engines.native.trace import trace
from diffsolve.problems.ode import ODEProblem
from diffsolve.problems.structure import StateStructure

_MOST_OPERATIONS = 2_000_000


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
    structure = StateStructure(prob.u0)
    u0, t0 = structure.ravel(prob.u0).detach(), float(prob.tspan[0])
    try:
        found = trace(prob.f, structure, prob.p, t0, u0, _MOST_OPERATIONS)
    except Declined as reason:
        raise ValueError(f"the sparsity of f cannot be found: {reason}") from None
    entries = sorted(sparsity(found.outputs, found.u))
    indices = torch.tensor(entries, dtype=torch.long).reshape(-1, 2).T
    values = torch.ones(len(entries), dtype=torch.bool)
    size = (structure.size, structure.size)
    return torch.sparse_coo_tensor(indices, values, size, is_coalesced=True, check_invariants=True)
