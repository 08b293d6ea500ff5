"""Values of an SDE inside of its steps in machine code, and their reverse.

The solution follows the path there: the straight line between the ends of the step, plus ``g`` at
its start times the Brownian bridge of the step (``method.py: PathInterpolant``).
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.estimates import SPARE, TOTAL
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
from diffsolve.solvers.kernels.norms import add_scaled, copy, fill_zero
from diffsolve.solvers.kernels.rows import bar_row, row
from diffsolve.solvers.stochastic.kernel_noise import (
    are_one,
    counter_of_time,
    divide,
    drop_first,
    insert,
    normals_of,
    scale_into,
    values_of,
)


@inlined
def begin_reading(I, R, t, h, like):
    """Prepare to read the path within the step: its intervals, and the diffusion at its start."""
    n = I[L.NOISE_SIZE]
    if I[L.READING] == I[L.ACCEPTED]:
        return
    I[L.READING] = I[L.ACCEPTED]
    fill_zero(n, I[L.READ_SUM], 0.0)
    now = cast(beside_breaks(I, t, t, t + h, like), like)
    call_field(I[L.DIFFUSION], now, row(I, L.W_U, like), I[L.PARAMS], I[L.G_ROW])
    if I[L.REMEMBERS] == 0:  # the interval of the step, from its normals
        i = I[L.SERIAL] - 1 - I[L.AHEAD_FIRST]
        normals = I[L.AHEAD] + 8 * i * n
        insert(I, 0, R[L.NOISE_END], I[L.SERIAL] - 1)
        scale = math.sqrt(abs(R[L.NOISE_END] - R[L.KNOWN_FROM]))
        scale_into(n, scale, normals, values_of(I, 0), 0.0)
        below = normals + 8 * I[L.AHEAD_COUNT] * n
        scale_into(n, scale, below, values_of(I, 0) + 8 * n, 0.0)


@inlined
def pass_in_reading(I, R):
    add_scaled(I[L.NOISE_SIZE], R[L.DIRECTION], values_of(I, 0), I[L.READ_SUM], 0.0)
    drop_first(I, R)


@inlined
def read_noise(I, R, t, h, at, like):
    """``READ_NOISE``: ``W`` from the start of the step to a time in it, less the straight line."""
    n, direction, ends = I[L.NOISE_SIZE], R[L.DIRECTION], reals(I[L.KNOWN_END])
    begin_reading(I, R, t, h, like)
    while I[L.KNOWN] > 1 and direction * (at - ends[0]) > 0.0 and not are_one(R, at, ends[0]):
        pass_in_reading(I, R)
    if direction * (at - R[L.KNOWN_FROM]) > 0.0 and not are_one(R, at, R[L.KNOWN_FROM]):
        if direction * (ends[0] - at) > 0.0 and not are_one(R, at, ends[0]):
            counter = counter_of_time(at)
            normals = normals_of(I, counter)
            divide(I, R, 0, at, counter, normals, normals + 8 * n)
        pass_in_reading(I, R)
    theta = (at - t) / h
    scale_into(n, 1.0, I[L.READ_SUM], I[L.READ_NOISE], like)
    add_scaled(n, -theta, I[L.NOISE], I[L.READ_NOISE], like)


@inlined
def value_at(I, R, t, h, at, out, like):
    """``u + theta (new - u) + G B``, ``B`` from ``read_noise``, as ``PathInterpolant`` has it."""
    n = I[L.N]
    read_noise(I, R, t, h, at, like)
    theta = (at - t) / h
    u, new, y = (
        view(row(I, L.W_U, like), like),
        view(row(I, L.W_NEW, like), like),
        view(out, like),
    )
    near, far = cast(theta, like), cast(1.0 - theta, like)
    g, b = view(I[L.G_ROW], like), view(I[L.READ_NOISE], like)
    rows, d, m = shape_of(I)
    for k in range(n):
        if theta < 0.5:
            y[k] = u[k] + near * (new[k] - u[k])
        else:
            y[k] = new[k] - far * (new[k] - u[k])
    if I[L.DIFFUSION_SIZE] == n and m == d:
        for k in range(n):
            y[k] += g[k] * b[k]
    else:
        for i in range(rows):
            for c in range(d):
                total = like
                for j in range(m):
                    total += g[(i * d + c) * m + j] * b[i * m + j]
                y[i * d + c] += total
    if I[L.SAVE_NOISE] != 0:
        place = I[L.SAVE_NOISE] + I[L.SAVED] * I[L.NOISE_SIZE] * size_of(like)
        copy(I[L.NOISE_SIZE], I[L.READ_NOISE], place, like)


@inlined
def shape_of(I):
    """Paths, and of each the entries and the Brownian motions."""
    m = integers(I[L.DRAW_WITH])[6]
    rows = integers(I[L.DRAW_WITH])[5]
    return rows, I[L.N] // rows, m


@inlined
def reverse_values(I, R, t, h, first, inside, like):
    """Cotangents of values inside of a step to those of its ends, and through ``g`` of all else.

    ``STATE_BAR`` is the cotangent of the new state, ``TOTAL`` gets that of the state before.
    """
    n, size = I[L.N], size_of(like)
    times = reals(I[L.SAVES])
    rows, d, m = shape_of(I)
    total, new_bar = bar_row(I, TOTAL, like), I[L.STATE_BAR]
    g_bar = I[L.G_ROW] + I[L.DIFFUSION_SIZE] * size
    y = view(g_bar, like)
    fill_zero(I[L.DIFFUSION_SIZE], g_bar, like)
    for k in range(first, first + inside):
        bars = I[L.SAVED_BARS] + k * I[L.OUT_STRIDE] * size
        theta = (times[k] - t) / h
        add_scaled(n, 1.0 - theta, bars, total, like)
        add_scaled(n, theta, bars, new_bar, like)
        w = view(bars, like)
        b = view(I[L.SAVE_NOISE] + k * I[L.NOISE_SIZE] * size, like)
        if I[L.DIFFUSION_SIZE] == n and m == d:
            for i in range(n):
                y[i] += w[i] * b[i]
        else:
            for i in range(rows):
                for c in range(d):
                    for j in range(m):
                        y[(i * d + c) * m + j] += w[i * d + c] * b[i * m + j]
    now = cast(beside_breaks(I, t, t, t + h, like), like)
    bar = bar_row(I, SPARE, like)
    call_vjp(I[L.DIFFUSION_VJP], now, I[L.AT_STATE], I[L.PARAMS], g_bar, bar, I[L.P_BAR])
    add_scaled(n, 1.0, bar, total, like)
