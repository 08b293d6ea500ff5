"""The Jacobian in a compiled step, and linear systems with ``M = I / gamma - h J``.

Entries of the Jacobian lie in ``JAC_VALUES``, those of the time derivative behind them. Columns
from ``HEAD`` on are zero by structure (components that are integrals of the others), so only the
leading block is factored. The arithmetic of the factors is float64 whatever the state's type.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import (
    beside_breaks,
    call_field,
    call_jac_vjp,
    call_jvp,
    cast,
    inlined,
    integers,
    reals,
    size_of,
    view,
)
from diffsolve.solvers.kernels.norms import add_scaled
from diffsolve.solvers.kernels.rows import read_path


@inlined
def evaluate_jacobian(I, R, value, start, end, u, like):
    """The Jacobian at a time of a step from ``start`` to ``end``; whether it is finite."""
    t = cast(beside_breaks(I, value, start, end, like), like)
    if I[L.PATH] != 0:
        read_path(I, R, float(t), 0, I[L.PATH_OUT], like)
        if I[L.TIME_TERMS] != 0:
            slope = I[L.PATH_OUT] + I[L.PRIMAL_N] * size_of(like)
            read_path(I, R, float(t), 1, slope, like)
    call_field(I[L.JAC], t, u, I[L.PARAMS], I[L.JAC_VALUES])
    I[L.NJAC] += 1
    I[L.FACTORED] = 0
    values = view(I[L.JAC_VALUES], like)
    total = 0.0
    for e in range(I[L.JAC_ENTRIES] + I[L.TIME_TERMS]):
        total += abs(float(values[e]))
    return total < math.inf


@inlined
def jacobian_of_step(I, R, t, h, u, like):
    """The Jacobian at the start of the step at hand; whether it is finite."""
    if I[L.FRESH] != 0:
        return True
    if not evaluate_jacobian(I, R, t, t, t + h, u, like):
        I[L.HAS_JAC] = 0
        I[L.FAILURE] = L.JAC_NOT_FINITE
        return False
    I[L.HAS_JAC], I[L.FRESH], I[L.STALE] = 1, 1, 0
    return True


@inlined
def factor(I, R, h, like):
    """Factors of ``M`` by elimination with row exchanges; False where it is singular."""
    n = I[L.HEAD]
    place, a, pivots = I[L.MATRIX], reals(I[L.MATRIX]), integers(I[L.PIVOTS])
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
    n = I[L.HEAD]
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
        solve_tail(I, R, b_row, like)


@inlined
def solve_tail(I, R, b_row, like):
    """The components whose columns are zero, from those that are solved."""
    n, x, b = I[L.HEAD], reals(I[L.VECTOR]), view(b_row, like)
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
def solve_transposed(I, R, b_row, like):
    """``M^T x = b``, in place."""
    n, total = I[L.HEAD], I[L.N]
    place, a, pivots = I[L.MATRIX], reals(I[L.MATRIX]), integers(I[L.PIVOTS])
    at, x, b = I[L.VECTOR], reals(I[L.VECTOR]), view(b_row, like)
    I[L.NSOLVE] += 1
    for i in range(total):
        x[i] = float(b[i])
    if n < total:
        values = view(I[L.JAC_VALUES], like)
        rows, columns = integers(I[L.JAC_ROWS]), integers(I[L.JAC_COLUMNS])
        gamma, h = reals(I[L.GAMMA])[0], R[L.FACTORED_H]
        for i in range(n, total):
            x[i] *= gamma
        for e in range(I[L.JAC_ENTRIES]):
            if rows[e] >= n:
                x[columns[e]] += h * float(values[e]) * x[rows[e]]
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


@inlined
def multiply(I, R, t, h, x_row, y_row, like):
    """``y = J x`` with the Jacobian at the start of the step, from its entries or by a product."""
    n = I[L.N]
    if I[L.FRESH] == 0:
        time = cast(beside_breaks(I, t, t, t + h, like), like)
        u = I[L.WORK] + L.W_U * n * size_of(like)
        call_jvp(I[L.JVP], time, u, I[L.PARAMS], x_row, y_row)
        return
    values, x, y = view(I[L.JAC_VALUES], like), view(x_row, like), view(y_row, like)
    rows, columns = integers(I[L.JAC_ROWS]), integers(I[L.JAC_COLUMNS])
    for i in range(n):
        y[i] = like
    for e in range(I[L.JAC_ENTRIES]):
        y[rows[e]] += values[e] * x[columns[e]]


@inlined
def multiply_transposed(I, x_row, y_row, like):
    """``y += J^T x`` with the entries at hand."""
    values, x, y = view(I[L.JAC_VALUES], like), view(x_row, like), view(y_row, like)
    rows, columns = integers(I[L.JAC_ROWS]), integers(I[L.JAC_COLUMNS])
    for e in range(I[L.JAC_ENTRIES]):
        y[columns[e]] += values[e] * x[rows[e]]


@inlined
def add_outer(I, factor, x_row, y_row, like):
    """Add ``factor * x y^T`` to the cotangent of the Jacobian, where it has entries."""
    bars, x, y = view(I[L.JAC_BAR], like), view(x_row, like), view(y_row, like)
    rows, columns = integers(I[L.JAC_ROWS]), integers(I[L.JAC_COLUMNS])
    a = cast(factor, like)
    for e in range(I[L.JAC_ENTRIES]):
        bars[e] += a * x[rows[e]] * y[columns[e]]


@inlined
def through_jacobian(I, t, h, total, like):
    """Cotangents of the Jacobian at the start of the step to those of ``u`` and ``p``."""
    n = I[L.N]
    time = cast(beside_breaks(I, t, t, t + h, like), like)
    u = I[L.WORK] + L.W_U * n * size_of(like)
    call_jac_vjp(I[L.JAC_VJP], time, u, I[L.PARAMS], I[L.JAC_BAR], total, I[L.P_BAR])
    bars = view(I[L.JAC_BAR], like)
    for e in range(I[L.JAC_ENTRIES] + I[L.TIME_TERMS]):
        bars[e] = like
