"""The Jacobian in an implicit step: its values, products with it, and its cotangent.

Its entries lie in ``JAC_VALUES``, those of the derivative by time behind them, and their cotangents
likewise in ``JAC_BAR``.
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
    size_of,
    view,
)
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
