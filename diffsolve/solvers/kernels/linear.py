"""Linear systems with the matrix of an implicit step (``matrix.py``), and their transposes.

The arithmetic of the factors is float64 whatever the type of the state.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.matrix import (
    form_matrix,
    solve_integrals,
    solve_integrals_transposed,
)
from diffsolve.solvers.kernels.memory import cast, inlined, integers, reals, view
from diffsolve.solvers.kernels.norms import add_scaled


@inlined
def factor(I, R, h, like):
    """Factors of ``M`` by elimination with row exchanges; False where it is singular."""
    n = I[L.N_COLUMNS]
    place, a, pivots = I[L.MATRIX], reals(I[L.MATRIX]), integers(I[L.PIVOTS])
    form_matrix(I, h, like)
    I[L.NLU] += 1
    I[L.FACTORED], R[L.FACTORED_H] = 1, h
    for k in range(n):
        best, pivot = abs(a[k * n + k]), k
        for i in range(k + 1, n):
            x = abs(a[i * n + k])
            if x > best:
                best, pivot = x, i
        if not 0.0 < best < math.inf:
            I[L.FACTORED], I[L.FAILURE] = 0, L.SINGULAR
            return False
        pivots[k] = pivot
        if pivot != k:
            for j in range(n):
                a[k * n + j], a[pivot * n + j] = a[pivot * n + j], a[k * n + j]
        inverse = 1.0 / a[k * n + k]
        a[k * n + k] = inverse
        for i in range(k + 1, n):
            x = a[i * n + k]
            if x != 0.0:
                x *= inverse
                a[i * n + k] = x
                below, above = place + 8 * (i * n + k + 1), place + 8 * (k * n + k + 1)
                add_scaled(n - k - 1, -x, above, below, 0.0)
    return True


@inlined
def dot(n, x_place, y_place):
    x, y = reals(x_place), reals(y_place)
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    m = 0
    while m + 4 <= n:
        a += x[m] * y[m]
        b += x[m + 1] * y[m + 1]
        c += x[m + 2] * y[m + 2]
        d += x[m + 3] * y[m + 3]
        m += 4
    while m < n:
        a += x[m] * y[m]
        m += 1
    return (a + b) + (c + d)


@inlined
def solve(I, R, b_row, like):
    """``M x = b``, in place."""
    n = I[L.N_COLUMNS]
    place, a, pivots = I[L.MATRIX], reals(I[L.MATRIX]), integers(I[L.PIVOTS])
    at, x, b = I[L.VECTOR], reals(I[L.VECTOR]), view(b_row, like)
    I[L.NSOLVE] += 1
    for i in range(n):
        x[i] = float(b[i])
    for k in range(n):
        pivot = pivots[k]
        x[k], x[pivot] = x[pivot], x[k]
    for i in range(1, n):
        x[i] -= dot(i, place + 8 * i * n, at)
    for i in range(n - 1, -1, -1):
        known = dot(n - 1 - i, place + 8 * (i * n + i + 1), at + 8 * (i + 1))
        x[i] = (x[i] - known) * a[i * n + i]
    for i in range(n):
        b[i] = cast(x[i], like)
    if n < I[L.N]:
        solve_integrals(I, R, b_row, like)


@inlined
def solve_transposed(I, R, b_row, like):
    """``M^T x = b``, in place."""
    n, total = I[L.N_COLUMNS], I[L.N]
    place, a, pivots = I[L.MATRIX], reals(I[L.MATRIX]), integers(I[L.PIVOTS])
    at, x, b = I[L.VECTOR], reals(I[L.VECTOR]), view(b_row, like)
    I[L.NSOLVE] += 1
    for i in range(total):
        x[i] = float(b[i])
    if n < total:
        solve_integrals_transposed(I, R, like)
    for i in range(n):
        x[i] *= a[i * n + i]
        above = place + 8 * (i * n + i + 1)
        add_scaled(n - 1 - i, -x[i], above, at + 8 * (i + 1), 0.0)
    for i in range(n - 1, 0, -1):
        add_scaled(i, -x[i], place + 8 * i * n, at, 0.0)
    for k in range(n - 1, -1, -1):
        pivot = pivots[k]
        x[k], x[pivot] = x[pivot], x[k]
    for i in range(total):
        b[i] = cast(x[i], like)
