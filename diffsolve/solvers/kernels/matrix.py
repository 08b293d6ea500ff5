"""The matrix of the linear systems in implicit steps: ``M = I / gamma - h J``.

This is the one place where kernels form it: the door by which a mass matrix ``B`` would come in, as
``B / gamma - h J``. The equations of the stages, which are the families' own, would then have
``B k`` instead of ``k``.

Columns of ``J`` from ``N_COLUMNS`` on are zero by structure: those components are integrals of the
others. So only the leading block of ``M`` is formed and factored. The other components, the
*integrals*, follow from what is solved.
"""

from __future__ import annotations

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import cast, inlined, integers, reals, view


@inlined
def form_matrix(I, h, like):
    """The leading block of ``M`` in ``MATRIX``, from the Jacobian at hand."""
    n, a = I[L.N_COLUMNS], reals(I[L.MATRIX])
    values = view(I[L.JAC_VALUES], like)
    rows, columns = integers(I[L.JAC_ROWS]), integers(I[L.JAC_COLUMNS])
    diagonal = 1.0 / reals(I[L.GAMMA])[0]
    for i in range(n * n):
        a[i] = 0.0
    for i in range(n):
        a[i * n + i] = diagonal
    for e in range(I[L.JAC_ENTRIES]):
        if rows[e] < n:
            a[rows[e] * n + columns[e]] -= h * float(values[e])


@inlined
def solve_integrals(I, R, b_row, like):
    """``M x = b`` for the integrals, in place; ``VECTOR`` holds the other components of ``x``."""
    n, x, b = I[L.N_COLUMNS], reals(I[L.VECTOR]), view(b_row, like)
    values = view(I[L.JAC_VALUES], like)
    rows, columns = integers(I[L.JAC_ROWS]), integers(I[L.JAC_COLUMNS])
    gamma, h = reals(I[L.GAMMA])[0], R[L.FACTORED_H]
    for i in range(n, I[L.N]):
        x[i] = float(b[i])
    for e in range(I[L.JAC_ENTRIES]):
        if rows[e] >= n:
            x[rows[e]] += h * float(values[e]) * x[columns[e]]
    for i in range(n, I[L.N]):
        b[i] = cast(gamma * x[i], like)


@inlined
def solve_integrals_transposed(I, R, like):
    """``M^T x = b`` for the integrals in ``VECTOR``, whose part goes to the other components."""
    n, total, x = I[L.N_COLUMNS], I[L.N], reals(I[L.VECTOR])
    values = view(I[L.JAC_VALUES], like)
    rows, columns = integers(I[L.JAC_ROWS]), integers(I[L.JAC_COLUMNS])
    gamma, h = reals(I[L.GAMMA])[0], R[L.FACTORED_H]
    for i in range(n, total):
        x[i] *= gamma
    for e in range(I[L.JAC_ENTRIES]):
        if rows[e] >= n:
            x[columns[e]] += h * float(values[e]) * x[rows[e]]
