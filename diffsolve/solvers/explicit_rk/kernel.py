"""One step of an explicit Runge-Kutta method in machine code, and its reverse.

The same formulas as in ``step.py``, over rows of numbers in the work space that ``layout``
describes. ``take_step`` goes from ``W_U, W_DU`` to the stages, ``W_NEW``, ``W_STIFF`` and the error
rows; ``reverse_step`` pulls cotangents back through it by products with the Jacobian of ``f``.
"""

from __future__ import annotations

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import (
    beside_breaks,
    call_field,
    call_step,
    call_step_vjp,
    call_vjp,
    cast,
    inlined,
    integers,
    reals,
    size_of,
    view,
)
from diffsolve.solvers.kernels.norms import add_scaled, copy, fill_zero


@inlined
def row(I, index, like):
    """Address of a row of the work space."""
    return I[L.WORK] + index * I[L.N] * size_of(like)


@inlined
def stage(I, index, like):
    return row(I, L.W_STAGES + index, like)


@inlined
def stage_bar(I, index, like):
    """Address of the cotangent of a stage; the rows follow the stages and the times."""
    rows = I[L.STAGES] + I[L.EXTRA]
    return row(I, L.W_STAGES + rows + index, like) + rows * size_of(like)


@inlined
def interpolate(n, rows, degree, poly, theta, h, derivative, dense, out, like):
    """Continuous extension of a step whose state and stages lie in ``rows + 1`` rows."""
    coefficients = reals(poly)
    size = size_of(like)
    fill_zero(n, out, like)
    scale = h
    for _ in range(derivative):
        scale /= h
    for j in range(rows):
        weight = 0.0
        for i in range(degree - 1, -1, -1):  # Horner, of the derivative of theta**(i + 1)
            power = i + 1
            if power < derivative:
                break
            factor = 1.0
            for d in range(derivative):
                factor *= power - d
            weight = weight * theta + factor * coefficients[j * degree + i]
        if derivative == 0:
            weight *= theta
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
def read_path(I, R, t, like):
    """Put the forward solution at ``t`` where the reverse right-hand side reads it."""
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
    dense = I[L.PATH] + first * (rows + 1) * n * size_of(like)
    interpolate(
        n,
        rows,
        I[L.PATH_DEGREE],
        I[L.PATH_POLY],
        theta,
        sizes[first],
        0,
        dense,
        I[L.PATH_OUT],
        like,
    )


@inlined
def field_at(I, R, value, start, end, u, out, like):
    """``f`` at a time of a step that goes from ``start`` to ``end``."""
    t = cast(beside_breaks(I, value, start, end, like), like)
    if I[L.PATH] != 0:
        read_path(I, R, float(t), like)
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
    n, stages = I[L.N], I[L.STAGES]
    coefficients = reals(weights)
    fill_zero(n, out, like)
    for j in range(stages):
        if coefficients[j] != 0.0:
            add_scaled(n, coefficients[j] * h, stage(I, j, like), out, like)


@inlined
def stage_times(I, t, h, like):
    """Write the times of the stages, as ``f`` sees them; returns where."""
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
def take_step(I, R, t, h, like):
    """Stages, new state and error rows of a step from ``W_U, W_DU``."""
    n, stages = I[L.N], I[L.STAGES]
    new, stiff = row(I, L.W_NEW, like), row(I, L.W_STIFF, like)
    error, low = row(I, L.W_ERROR, like), row(I, L.W_LOW, like)
    copy(n, row(I, L.W_DU, like), stage(I, 0, like), like)
    if I[L.FUSED] != 0:
        times = stage_times(I, t, h, like)
        u, k = row(I, L.W_U, like), stage(I, 0, like)
        call_step(I[L.FUSED], cast(h, like), times, u, k, I[L.PARAMS], new, stiff, error, low)
        I[L.NF] += stages - 1
        return
    nodes = reals(I[L.C])
    if I[L.STIFF_STAGE] == 0:
        copy(n, row(I, L.W_U, like), stiff, like)
    for i in range(1, stages):
        g = stiff if i == I[L.STIFF_STAGE] else new
        combine(I, I[L.A], i * stages, i, h, g, like)
        field_at(I, R, t + nodes[i] * h, t, t + h, g, stage(I, i, like), like)
    if I[L.B_ERROR] != 0:
        combine_error(I, I[L.B_ERROR], h, error, like)
    if I[L.B_LOW] != 0:
        combine_error(I, I[L.B_LOW], h, low, like)


@inlined
def combine_results(I, h, like):
    """What a step gives, from stages that are known."""
    stages, same = I[L.STAGES], I[L.STIFF_STAGE]
    combine(I, I[L.A], same * stages, same, h, row(I, L.W_STIFF, like), like)
    combine(I, I[L.A], (stages - 1) * stages, stages - 1, h, row(I, L.W_NEW, like), like)
    if I[L.B_ERROR] != 0:
        combine_error(I, I[L.B_ERROR], h, row(I, L.W_ERROR, like), like)
    if I[L.B_LOW] != 0:
        combine_error(I, I[L.B_LOW], h, row(I, L.W_LOW, like), like)


@inlined
def add_extra_stages(I, R, t, h, like):
    """The stages that only the interpolant needs, behind the others."""
    stages, rows = I[L.STAGES], I[L.STAGES] + I[L.EXTRA]
    nodes = reals(I[L.C_EXTRA])
    g = row(I, L.W_TEMP, like)
    for i in range(I[L.EXTRA]):
        combine(I, I[L.A_EXTRA], i * rows, stages + i, h, g, like)
        field_at(I, R, t + nodes[i] * h, t, t + h, g, stage(I, stages + i, like), like)


# -- reverse -------------------------------------------------------------------------------------


@inlined
def vjp_at(I, value, start, end, u, w, u_bar, like):
    """``u_bar = J^T w`` at a time of a step; the parameters' part is added up in ``P_BAR``."""
    t = cast(beside_breaks(I, value, start, end, like), like)
    call_vjp(I[L.VJP], t, u, I[L.PARAMS], w, u_bar, I[L.P_BAR])
    I[L.NF] += 1


@inlined
def through_combination(I, weights, offset, count, h, bar, like):
    """Cotangents of the stages that were combined with ``weights``."""
    n = I[L.N]
    coefficients = reals(weights)
    for j in range(count):
        a = coefficients[offset + j]
        if a != 0.0:
            add_scaled(n, a * h, bar, stage_bar(I, j, like), like)


@inlined
def reverse_extra_stages(I, t, h, total, like):
    stages, rows, n = I[L.STAGES], I[L.STAGES] + I[L.EXTRA], I[L.N]
    nodes = reals(I[L.C_EXTRA])
    g, bar = row(I, L.W_TEMP, like), row(I, L.W_DU, like)
    for i in range(I[L.EXTRA] - 1, -1, -1):
        combine(I, I[L.A_EXTRA], i * rows, stages + i, h, g, like)
        w = stage_bar(I, stages + i, like)
        vjp_at(I, t + nodes[i] * h, t, t + h, g, w, bar, like)
        add_scaled(n, 1.0, bar, total, like)
        through_combination(I, I[L.A_EXTRA], i * rows, stages + i, h, bar, like)


@inlined
def reverse_step(I, t, h, new_bar, stiff_bar, error_bar, low_bar, total, like):
    """Add the cotangent of the state that the step started from to ``total``.

    The cotangents of the stages lie in their rows, those of the other results are given; that of
    stage 0 is left in its row. ``W_DU`` is used as work space.
    """
    stages, n = I[L.STAGES], I[L.N]
    if I[L.FUSED_VJP] != 0:
        times = stage_times(I, t, h, like)
        call_step_vjp(
            I[L.FUSED_VJP],
            cast(h, like),
            times,
            row(I, L.W_U, like),
            stage(I, 0, like),
            I[L.PARAMS],
            stage_bar(I, 0, like),
            new_bar,
            stiff_bar,
            error_bar,
            low_bar,
            total,
            I[L.P_BAR],
        )
        I[L.NF] += stages - 1
        return
    if I[L.B_ERROR] != 0:
        through_combination(I, I[L.B_ERROR], 0, stages, h, error_bar, like)
    if I[L.B_LOW] != 0:
        through_combination(I, I[L.B_LOW], 0, stages, h, low_bar, like)
    nodes = reals(I[L.C])
    g, bar = row(I, L.W_TEMP, like), row(I, L.W_DU, like)
    if I[L.STIFF_STAGE] == 0:
        add_scaled(n, 1.0, stiff_bar, total, like)
    for i in range(stages - 1, 0, -1):
        if i == stages - 1:
            copy(n, row(I, L.W_NEW, like), g, like)
        elif i == I[L.STIFF_STAGE]:
            copy(n, row(I, L.W_STIFF, like), g, like)
        else:
            combine(I, I[L.A], i * stages, i, h, g, like)
        vjp_at(I, t + nodes[i] * h, t, t + h, g, stage_bar(I, i, like), bar, like)
        if i == stages - 1:
            add_scaled(n, 1.0, new_bar, bar, like)
        if i == I[L.STIFF_STAGE]:
            add_scaled(n, 1.0, stiff_bar, bar, like)
        add_scaled(n, 1.0, bar, total, like)
        through_combination(I, I[L.A], i * stages, i, h, bar, like)


@inlined
def interpolation_weight(I, j, theta):
    """Weight of stage ``j`` in the continuous extension."""
    degree = I[L.DEGREE]
    coefficients = reals(I[L.POLY])
    weight = 0.0
    for i in range(degree - 1, -1, -1):
        weight = weight * theta + coefficients[j * degree + i]
    return weight * theta


@inlined
def marks_of(I, index):
    """The four integers that are noted of a step."""
    return integers(I[L.MARKS] + index * 32)
