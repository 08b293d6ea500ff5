"""Rows of numbers in the work space of a solve: stages, their sums, evaluations and products.

Every family's step goes from the rows ``W_U, W_DU`` to stages, all in units of the derivative:
states are ``W_U + h * (weighted sum of stages)``, row 0 is the derivative at the start of the step
and the last row the one at its end.
"""

from __future__ import annotations

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import (
    beside_breaks,
    call_field,
    call_vjp,
    cast,
    inlined,
    integers,
    reals,
    size_of,
    view,
)
from diffsolve.solvers.kernels.norms import add_scaled, fill_zero


@inlined
def row(I, index, like):
    """Address of a row of the work space."""
    return I[L.WORK] + index * I[L.N] * size_of(like)


@inlined
def stage(I, index, like):
    return row(I, L.W_STAGES + index, like)


@inlined
def stage_bar(I, index, like):
    """Address of the cotangent of a stage: they follow the stages and their times."""
    rows = I[L.STAGES] + I[L.EXTRA]
    return row(I, L.W_STAGES + rows + index, like) + rows * size_of(like)


@inlined
def bar_row(I, index, like):
    """Address of the cotangent of a result of the step: they follow those of the stages."""
    rows = I[L.STAGES] + I[L.EXTRA]
    return stage_bar(I, rows + index, like)


@inlined
def derived(coefficients, place, degree, i, derivative):
    """Coefficient ``i`` of a derivative of a polynomial in Bernstein's form."""
    total = 0.0
    for r in range(derivative + 1):  # Leibniz' rule
        if i + r == 0:
            continue
        factor = 1.0 if (derivative - r) % 2 == 0 else -1.0
        for d in range(r):
            factor *= (i + r - d) * (derivative - d) / (d + 1.0)
        for d in range(derivative - r):
            factor *= degree - i - r - d
        total += factor * coefficients[place + i + r - 1]
    return total


@inlined
def weight_at(poly, j, degree, theta, derivative):
    """Weight of row ``j`` in a continuous extension, or in one of its derivatives."""
    coefficients = reals(poly)
    place, rest, weight = j * degree, 1.0 - theta, 0.0
    power = theta if derivative == 0 else 1.0
    if derivative == 0:
        for i in range(degree):
            weight = weight * rest + coefficients[place + i] * power
            power *= theta
        return weight
    for i in range(degree - derivative + 1):
        weight = weight * rest + derived(coefficients, place, degree, i, derivative) * power
        power *= theta
    return weight


@inlined
def interpolate(n, rows, degree, poly, theta, h, derivative, dense, out, like):
    """Continuous extension of a step whose state and stages lie in ``1 + rows`` rows."""
    size = size_of(like)
    fill_zero(n, out, like)
    scale = h
    for _ in range(derivative):
        scale /= h
    for j in range(rows):
        weight = weight_at(poly, j, degree, theta, derivative)
        if weight != 0.0:
            add_scaled(n, weight * scale, dense + (j + 1) * n * size, out, like)
    if derivative == 0:
        add_scaled(n, 1.0, dense, out, like)  # last: its rounding is the largest


@inlined
def locate(starts, count, t, direction):
    """Index of the last of the steps that starts before ``t``, in their direction of time."""
    first, last = 0, count
    while last - first > 1:
        middle = (first + last) // 2
        if direction * starts[middle] < direction * t:
            first = middle
        else:
            last = middle
    return first


@inlined
def read_path(I, R, t, derivative, out, like):
    """The forward solution at ``t``, or its derivative, for the reverse right-hand side."""
    count, direction = I[L.PATH_STEPS], R[L.DIRECTION]
    starts, sizes = reals(I[L.PATH_T]), reals(I[L.PATH_H])
    low, high = R[L.T_LOW], R[L.T_HIGH]
    t = low if t < low else high if t > high else t
    backward = -direction  # the path was solved in the other direction
    first = locate(starts, count, t, backward)
    end = starts[first + 1] if first + 1 < count else R[L.PATH_END]
    theta = (t - starts[first]) / (end - starts[first])
    n = I[L.PRIMAL_N]
    rows = I[L.PATH_ROWS]
    dense = I[L.PATH] + first * I[L.PATH_STRIDE] * n * size_of(like)
    interpolate(
        n, rows, I[L.PATH_DEGREE], I[L.PATH_POLY], theta, sizes[first], derivative, dense, out, like
    )


@inlined
def outside_path(I, R, t, h):
    """Whether a step needs the forward solution where it is not at hand."""
    if I[L.PATH] == 0:
        return False
    low, high = (t, t + h) if h > 0 else (t + h, t)
    low = R[L.T_LOW] if low < R[L.T_LOW] else low
    high = R[L.T_HIGH] if high > R[L.T_HIGH] else high
    return low < R[L.WINDOW_LOW] or high > R[L.WINDOW_HIGH]


@inlined
def field_at(I, R, value, start, end, u, out, like):
    """``f`` at a time of a step that goes from ``start`` to ``end``."""
    t = cast(beside_breaks(I, value, start, end, like), like)
    if I[L.PATH] != 0:
        read_path(I, R, float(t), 0, I[L.PATH_OUT], like)
    call_field(I[L.FIELD], t, u, I[L.PARAMS], out)
    I[L.NF] += 1


@inlined
def combine(I, weights, offset, count, h, out, like):
    """``out = W_U + h * sum_j weights[offset + j] * stage_j``."""
    n = I[L.N]
    coefficients = reals(weights)
    fill_zero(n, out, like)
    for j in range(count):
        a = coefficients[offset + j]
        if a != 0.0:
            add_scaled(n, a * h, stage(I, j, like), out, like)
    add_scaled(n, 1.0, row(I, L.W_U, like), out, like)


@inlined
def combine_error(I, weights, h, out, like):
    """``out = h * sum_j weights[j] * stage_j``."""
    n, stages = I[L.N], I[L.STAGES]
    coefficients = reals(weights)
    fill_zero(n, out, like)
    for j in range(stages):
        if coefficients[j] != 0.0:
            add_scaled(n, coefficients[j] * h, stage(I, j, like), out, like)


@inlined
def stage_times(I, t, h, like):
    """Write the times of the stages, as ``f`` sees them, and return their address."""
    stages = I[L.STAGES]
    nodes = reals(I[L.C])
    place = stage(I, stages + I[L.EXTRA], like)
    times = view(place, like)
    if I[L.N_BREAKS] == 0:
        for i in range(stages):
            times[i] = cast(t + nodes[i] * h, like)
        return place
    for i in range(stages):
        times[i] = cast(beside_breaks(I, t + nodes[i] * h, t, t + h, like), like)
    return place


@inlined
def vjp_at(I, value, start, end, u, w, u_bar, like):
    """``u_bar = J^T w`` at a time of a step; the parameters' part is added up in ``P_BAR``."""
    t = cast(beside_breaks(I, value, start, end, like), like)
    call_vjp(I[L.VJP], t, u, I[L.PARAMS], w, u_bar, I[L.P_BAR])
    I[L.NF] += 1


@inlined
def through_combination(I, weights, offset, count, h, bar, like):
    """Add to the cotangents of the stages that were combined with ``weights``; see ``combine``."""
    n = I[L.N]
    coefficients = reals(weights)
    for j in range(count):
        a = coefficients[offset + j]
        if a != 0.0:
            add_scaled(n, a * h, bar, stage_bar(I, j, like), like)


@inlined
def marks_of(I, index):
    """What ``MARKS`` notes of a step."""
    return integers(I[L.MARKS] + index * 8 * L.N_MARKS)


@inlined
def nothing_to_complete(I, R, t, h, like):
    """For methods whose interpolant has no stages of its own."""


@inlined
def nothing_to_forget(I, R):
    """For methods that learn nothing from step to step."""


@inlined
def forget(I, R):
    """Drop what Newton's iteration has learnt from the steps before."""
    I[L.HAS_JAC] = I[L.FRESH] = I[L.STALE] = I[L.FACTORED] = 0
