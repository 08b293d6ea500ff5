"""Steps of SDEs in machine code: their noise, their values inside, and their reverse.

A step is one function over all rows (``native/programs/rows.py``), which is given the noise.
The noise is that of ``noise/path.py: BrownianPath``, draw by draw: the same serials, the same
intervals, so that both engines follow one path. With fixed steps every step is drawn afresh. With
adaptive ones, what a rejected step has drawn is known: the intervals from the time at hand on, in
order, of which a shorter step divides one by a Brownian bridge (algorithm RSwM3 of Rackauckas and
Nie, 2017). ``W`` and ``H`` of these lie in float64, in the direction of time, not of the steps.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.estimates import ERROR, SPARE, TOTAL
from diffsolve.solvers.kernels.functions import StepFunctions
from diffsolve.solvers.kernels.memory import (
    beside_breaks,
    bits_of,
    call_field,
    call_kernel,
    call_reverse_of_rows,
    call_step,
    call_vjp,
    cast,
    inlined,
    integers,
    reals,
    size_of,
    ulp,
    view,
)
from diffsolve.solvers.kernels.norms import (
    add_scaled,
    copy,
    fill_zero,
    larger,
    scaled_norm,
    tolerance_scale,
)
from diffsolve.solvers.kernels.rows import (
    bar_row,
    marks_of,
    nothing_to_complete,
    row,
    stage_times,
)

_ULPS, _PART = 4, 3 / 8  # as in BrownianPath
_READS = 1 << 56  # the domain of counters that are made of a time
_WORD_56 = (1 << 56) - 1


# -- normals -------------------------------------------------------------------------------------


@inlined
def scale_into(n, a, source, target, like):
    """``target = a * source``, from float64 to the type of the state."""
    x, y = reals(source), view(target, like)
    m = 0
    while m + 4 <= n:
        p, q, r, s = a * x[m], a * x[m + 1], a * x[m + 2], a * x[m + 3]
        y[m], y[m + 1] = cast(p, like), cast(q, like)
        y[m + 2], y[m + 3] = cast(r, like), cast(s, like)
        m += 4
    while m < n:
        y[m] = cast(a * x[m], like)
        m += 1


@inlined
def next_normals(I):
    """Address of the normals of the next serial; those of ``H`` lie behind all those of ``W``."""
    i = I[L.SERIAL] - I[L.AHEAD_FIRST]
    if i < 0 or i >= I[L.AHEAD_COUNT]:
        i = I[L.SERIAL] % I[L.AHEAD_COUNT]  # blocks begin where they do for a reverse pass, too
        with_ = integers(I[L.DRAW_WITH])
        with_[2], with_[3] = I[L.SERIAL] - i, I[L.AHEAD_COUNT]
        place = I[L.AHEAD]
        with_[7] = place
        with_[8] = place + 8 * I[L.AHEAD_COUNT] * I[L.NOISE_SIZE] if draws_both(I) else 0
        call_kernel(I[L.DRAW], I[L.DRAW_WITH], I[L.DRAW_WITH])
        I[L.AHEAD_FIRST] = I[L.SERIAL] - i
    I[L.SERIAL] += 1
    return I[L.AHEAD] + 8 * i * I[L.NOISE_SIZE]


@inlined
def draws_both(I):
    """Whether normals are drawn for ``H``, too: steps need it, or bridges do."""
    return I[L.AREA] != 0 or I[L.REMEMBERS] != 0 or I[L.N_SAVES] > 0


@inlined
def normals_of(I, counter):
    """Address of the normals of a counter that stands alone, ``(2, NOISE_SIZE)``."""
    with_ = integers(I[L.DRAW_WITH])
    place = I[L.SPARE_NORMALS]
    with_[2], with_[3], with_[7] = counter, 1, place
    with_[8] = place + 8 * I[L.NOISE_SIZE]
    call_kernel(I[L.DRAW], I[L.DRAW_WITH], I[L.DRAW_WITH])
    return place


@inlined
def shifted_right(x, count):
    """Bits of an integer without sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


@inlined
def counter_of_time(t):
    """``philox.counter_of`` of a time that is read."""
    x = bits_of(t + 0.0)
    x = (x ^ shifted_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted_right(x, 27)) * -0x6B2FB644ECCEEE15
    x ^= shifted_right(x, 31)
    return _READS | (shifted_right(x, 8) & _WORD_56)


# -- intervals -----------------------------------------------------------------------------------


@inlined
def values_of(I, i):
    """Address of ``W`` of the known interval ``i``; ``H`` follows."""
    return I[L.KNOWN_VALUES] + integers(I[L.KNOWN_PLACE])[i] * 16 * I[L.NOISE_SIZE]


@inlined
def near_end(I, R, i):
    """Where the known interval ``i`` begins, as the steps go."""
    return R[L.KNOWN_FROM] if i == 0 else reals(I[L.KNOWN_END])[i - 1]


@inlined
def write_log(I, parent, counter, left, middle, right):
    entry = integers(I[L.LOG] + 16 * I[L.LOGGED])
    times = reals(I[L.LOG_TIMES] + 24 * I[L.LOGGED])
    entry[0], entry[1] = parent, counter
    times[0], times[1], times[2] = left, middle, right
    I[L.LOGGED] += 1


@inlined
def insert(I, at, end, piece):
    """A new interval before that number ``at``; its values are still to be written."""
    ends, pieces = reals(I[L.KNOWN_END]), integers(I[L.KNOWN_PIECE])
    places = integers(I[L.KNOWN_PLACE])
    place = places[I[L.KNOWN]]
    for i in range(I[L.KNOWN], at, -1):
        ends[i], pieces[i], places[i] = ends[i - 1], pieces[i - 1], places[i - 1]
    ends[at], pieces[at], places[at] = end, piece, place
    I[L.KNOWN] += 1


@inlined
def drop_first(I, R):
    """Pass the first of the known intervals."""
    ends, pieces = reals(I[L.KNOWN_END]), integers(I[L.KNOWN_PIECE])
    places = integers(I[L.KNOWN_PLACE])
    R[L.KNOWN_FROM] = ends[0]
    place = places[0]
    I[L.KNOWN] -= 1
    for i in range(I[L.KNOWN]):
        ends[i], pieces[i], places[i] = ends[i + 1], pieces[i + 1], places[i + 1]
    places[I[L.KNOWN]] = place


@inlined
def append_fresh(I, R, end):
    """A fresh interval from the last known point on."""
    n, start = I[L.NOISE_SIZE], near_end(I, R, I[L.KNOWN])
    serial = I[L.SERIAL]
    normals = next_normals(I)
    left, right = (start, end) if start < end else (end, start)
    insert(I, I[L.KNOWN], end, serial)
    write_log(I, L.FRESH_INTERVAL, serial, left, left, right)
    values = values_of(I, I[L.KNOWN] - 1)
    scale = math.sqrt(right - left)
    scale_into(n, scale, normals, values, 0.0)
    scale_into(n, scale, normals + 8 * I[L.AHEAD_COUNT] * n, values + 8 * n, 0.0)


@inlined
def divide(I, R, i, at, counter, normals, normals_h):
    """Divide the known interval ``i`` at a time in it, by the formulas of ``noise/bridge.py``."""
    n = I[L.NOISE_SIZE]
    start, end = near_end(I, R, i), reals(I[L.KNOWN_END])[i]
    left, right = (start, end) if start < end else (end, start)
    k, parent = I[L.DIVISIONS], integers(I[L.KNOWN_PIECE])[i]
    write_log(I, parent, counter, left, at, right)
    I[L.DIVISIONS] += 1
    first, second = ~(2 * k), ~(2 * k + 1)
    forward = start < end
    insert(I, i, at, first if forward else second)
    integers(I[L.KNOWN_PIECE])[i + 1] = second if forward else first
    h = (at - left) + (right - at)
    a, b = (at - left) / h, (right - at) / h
    q = 1.0 - 3.0 * a * b
    c = math.sqrt(h * a * b * q)
    e = c / q
    near, far = reals(values_of(I, i)), reals(values_of(I, i + 1))
    one, two = reals(normals), reals(normals_h)
    for m in range(n):
        W, H = far[m], far[n + m]
        z = 6.0 * a * b * H + c * one[m]
        rest = H - 0.5 * e * one[m]
        w1, h1 = z + a * W, a * a * rest + b * e * two[m]
        w2, h2 = b * W - z, b * b * rest - a * e * two[m]
        near[m], near[n + m] = (w1, h1) if forward else (w2, h2)
        far[m], far[n + m] = (w2, h2) if forward else (w1, h1)


@inlined
def are_one(R, at, known):
    """Whether a time that is read is a known point; ``BrownianPath._rounding``."""
    x, start = abs(at), abs(R[L.NOISE_START])
    return abs(at - known) <= _ULPS * ulp(x if x > start else start)


@inlined
def nearness(R, t, end):
    """Times of a step that are closer to a known point are that; ``BrownianPath._find``."""
    largest = abs(t) if abs(t) > abs(end) else abs(end)
    start = abs(R[L.NOISE_START])
    near, part = _ULPS * ulp(start if start > largest else largest), _PART * abs(end - t)
    return near if near < part else part


@inlined
def write_union(I, R, count, like):
    """``W`` and ``H`` of the step over the first ``count`` known intervals."""
    n, direction, size = I[L.NOISE_SIZE], R[L.DIRECTION], size_of(like)
    W, H = I[L.NOISE], I[L.NOISE] + n * size
    if count == 0:
        fill_zero(2 * n, W, like)
        return
    if count == 1:
        values = values_of(I, 0)
        scale_into(n, direction, values, W, like)
        scale_into(n, 1.0, values + 8 * n, H, like)
        return
    start, stop = R[L.KNOWN_FROM], reals(I[L.KNOWN_END])[count - 1]
    left, right = (start, stop) if start < stop else (stop, start)
    total = I[L.SPARE_NORMALS]
    w, h = reals(total), reals(total + 8 * n)
    fill_zero(2 * n, total, 0.0)
    for i in range(count):
        values = reals(values_of(I, i))
        a, b = near_end(I, R, i), reals(I[L.KNOWN_END])[i]
        later = (right - 0.5 * (a + b)) / (right - left) - 0.5
        part = abs(b - a) / (right - left)
        for m in range(n):
            w[m] += values[m]
            h[m] += later * values[m] + part * values[n + m]
    scale_into(n, direction, total, W, like)
    scale_into(n, 1.0, total + 8 * n, H, like)


@inlined
def pass_known(I, R, t, near):
    """Drop the intervals before the time at hand, which is the known point that it is close to."""
    direction, ends = R[L.DIRECTION], reals(I[L.KNOWN_END])
    while I[L.KNOWN] > 0 and direction * (ends[0] - t) <= 0.0:
        drop_first(I, R)
    beside = I[L.KNOWN] > 0 and direction * (ends[0] - t) <= near
    if beside and direction * (t - R[L.KNOWN_FROM]) > near:
        drop_first(I, R)


@inlined
def known_noise(I, R, t, end, like):
    """Noise of a step where the path may be known; what is not yet is drawn."""
    direction, ends, n = R[L.DIRECTION], reals(I[L.KNOWN_END]), I[L.NOISE_SIZE]
    near = nearness(R, t, end)
    pass_known(I, R, t, near)
    i = 0
    while i < I[L.KNOWN] and direction * (end - ends[i]) > 0.0:
        i += 1
    if direction * (end - near_end(I, R, i)) <= near:
        i -= 1
    elif i == I[L.KNOWN]:
        append_fresh(I, R, end)
    elif direction * (ends[i] - end) > near:
        serial = I[L.SERIAL]
        normals = next_normals(I)
        divide(I, R, i, end, serial, normals, normals + 8 * I[L.AHEAD_COUNT] * n)
    write_union(I, R, i + 1, like)


@inlined
def fresh_noise(I, R, end, like):
    """Noise of a step that begins where the path ends."""
    n = I[L.NOISE_SIZE]
    normals = next_normals(I)
    scale = math.sqrt(abs(end - R[L.NOISE_END]))
    scale_into(n, R[L.DIRECTION] * scale, normals, I[L.NOISE], like)
    if I[L.AREA] != 0:
        target = I[L.NOISE] + n * size_of(like)
        scale_into(n, scale, normals + 8 * I[L.AHEAD_COUNT] * n, target, like)
    R[L.KNOWN_FROM], R[L.NOISE_END] = R[L.NOISE_END], end
    I[L.KNOWN] = 0


@inlined
def draw_noise(I, R, t, h, like):
    if I[L.REMEMBERS] != 0:
        known_noise(I, R, t, t + h, like)
    else:
        fresh_noise(I, R, t + h, like)


# -- values inside of a step ---------------------------------------------------------------------


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


# -- steps ---------------------------------------------------------------------------------------


@inlined
def step_on(I, R, t, h, u, noise, like):
    """The step from a state with some noise, to ``W_NEW``, ``W_ERROR`` and ``SUMS``."""
    call_step(
        I[L.FUSED],
        cast(h, like),
        stage_times(I, t, h, like),
        u,
        noise,
        noise + I[L.NOISE_SIZE] * size_of(like),
        I[L.PARAMS],
        row(I, L.W_NEW, like),
        row(I, L.W_ERROR, like),
        I[L.SUMS],
    )
    I[L.NF] += I[L.DRIFTS]
    I[L.NG] += I[L.DIFFUSIONS]


@inlined
def take_step(I, R, t, h, like):
    """Draw the noise of a step and take it; true: nothing to solve."""
    draw_noise(I, R, t, h, like)
    step_on(I, R, t, h, row(I, L.W_U, like), I[L.NOISE], like)
    return True


@inlined
def measure(I, R, t, h, like):
    """Scaled error (returned), its norm and the stiffness of the step in the work space.

    All three follow from sums of squares over the entries, which are noted: those of the paths that
    other threads have are to be added. They are the scaled error, the error, and both differences
    of the stiffness.
    """
    n = I[L.N]
    sums = view(I[L.SUMS], like)
    error, norm, stiffness = 0.0, 0.0, 0.0
    if float(sums[3]) != 0.0:  # NaN too
        error = math.nan
    else:
        above, below = float(sums[0]), float(sums[1])
        stiffness = math.sqrt(above / below) if below > 0.0 else 0.0
        if I[L.B_ERROR] != 0:
            norm = math.sqrt(float(sums[2]) / n)
            error = quick_norm(I, row(I, L.W_ERROR, like), like)
        if not error + stiffness < math.inf:
            error = math.nan
    if I[L.STEP_SUMS] != 0:
        noted = reals(I[L.STEP_SUMS] + 32 * I[L.ACCEPTED])
        noted[0], noted[1] = error * error * n, float(sums[2])
        noted[2], noted[3] = float(sums[0]), float(sums[1])
    if keeps_errors(I):
        copy(n, row(I, L.W_ERROR, like), kept_error(I, I[L.NOISE], like), like)
    R[L.LAST_ERROR], R[L.LAST_STIFFNESS] = error, stiffness
    return error, norm, stiffness


@inlined
def keeps_errors(I):
    """Whether the errors of steps are recorded, behind their states and noise."""
    return I[L.STATE_SIZE] > I[L.N] + 2 * I[L.NOISE_SIZE]


@inlined
def kept_error(I, noise, like):
    """Address of the error of a step whose noise is there."""
    return noise + 2 * I[L.NOISE_SIZE] * size_of(like)


@inlined
def quick_norm(I, x_row, like):
    """``norms.scaled_norm``, its sum in four parts."""
    n, u_row, new_row = I[L.N], row(I, L.W_U, like), row(I, L.W_NEW, like)
    x, u, v = view(x_row, like), view(u_row, like), view(new_row, like)
    rtol, by_rtol = reals(I[L.RTOL]), I[L.RTOL_STRIDE]
    atol, by_atol = reals(I[L.ATOL]), I[L.ATOL_STRIDE]
    p, q, r, s = 0.0, 0.0, 0.0, 0.0
    m = 0
    while m + 4 <= n:
        a = float(x[m]) / (atol[m * by_atol] + rtol[m * by_rtol] * larger(u[m], v[m]))
        k = m + 1
        b = float(x[k]) / (atol[k * by_atol] + rtol[k * by_rtol] * larger(u[k], v[k]))
        k = m + 2
        c = float(x[k]) / (atol[k * by_atol] + rtol[k * by_rtol] * larger(u[k], v[k]))
        k = m + 3
        d = float(x[k]) / (atol[k * by_atol] + rtol[k * by_rtol] * larger(u[k], v[k]))
        p, q, r, s = p + a * a, q + b * b, r + c * c, s + d * d
        m += 4
    while m < n:
        a = float(x[m]) / (atol[m * by_atol] + rtol[m * by_rtol] * larger(u[m], v[m]))
        p += a * a
        m += 1
    total = (p + q) + (r + s)
    if total < math.inf:
        return math.sqrt(total / n)
    return scaled_norm(I, x_row, u_row, new_row, like)


# -- reverse -------------------------------------------------------------------------------------


@inlined
def load_step(I, R, index, like):
    """Addresses of the state and the noise of a recorded step, made again where not kept."""
    n, size, stride = I[L.N], size_of(like), I[L.STRIDE]
    if stride == 1:
        place = I[L.STATES] + index * I[L.STATE_SIZE] * size
        if I[L.STATE_SIZE] > n:
            return place, place + n * size
        draw_again(I, R, index, like)
        return place, I[L.NOISE]
    begin = index // stride * stride
    if index == I[L.SWEEP_LAST] or (index + 1) % stride == 0:
        remake_segment(I, R, begin, index, like)
    each = (n + 2 * I[L.NOISE_SIZE]) * size
    place = I[L.SEGMENT] + (index - begin) * each
    return place, place + n * size


@inlined
def draw_again(I, R, index, like):
    """Noise of a recorded step of a fixed size: its number is its serial."""
    starts, sizes = reals(I[L.STEP_T]), reals(I[L.STEP_H])
    I[L.SERIAL] = index
    R[L.NOISE_END] = R[L.NOISE_START]
    if index > 0:
        R[L.NOISE_END] = starts[index - 1] + sizes[index - 1]
    draw_noise(I, R, starts[index], sizes[index], like)


@inlined
def remake_segment(I, R, begin, last, like):
    """Repeat the steps from a state that was kept, and note where each starts and its noise."""
    n, size, noise = I[L.N], size_of(like), 2 * I[L.NOISE_SIZE]
    starts, sizes = reals(I[L.STEP_T]), reals(I[L.STEP_H])
    u = row(I, L.W_U, like)
    copy(n, I[L.STATES] + (begin // I[L.STRIDE]) * I[L.STATE_SIZE] * size, u, like)
    for i in range(begin, last + 1):
        place = I[L.SEGMENT] + (i - begin) * (n + noise) * size
        draw_again(I, R, i, like)
        copy(n, u, place, like)
        copy(noise, I[L.NOISE], place + n * size, like)
        if i < last:
            step_on(I, R, starts[i], sizes[i], u, I[L.NOISE], like)
            copy(n, row(I, L.W_NEW, like), u, like)


@inlined
def through_values(I, R, t, h, first, inside, u, like):
    """Cotangents of values inside of a step, to those of its ends and, through ``g``, of all else.

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
    call_vjp(I[L.DIFFUSION_VJP], now, u, I[L.PARAMS], g_bar, bar, I[L.P_BAR])
    add_scaled(n, 1.0, bar, total, like)


@inlined
def through_estimates(I, R, t, h, index, u, noise, like):
    """Cotangents of a step's estimates to those of its error, its sums and its states.

    ``STEP_SUMS`` holds the sums over the paths of all threads.
    """
    n = I[L.N]
    sums, sums_bar = reals(I[L.STEP_SUMS] + 32 * index), view(I[L.SUMS_BAR], like)
    sums_bar[0] = sums_bar[1] = like
    if I[L.STIFFNESS_BARS] != 0 and sums[2] > 0.0 and sums[3] > 0.0:
        bar = 0.5 * float(view(I[L.STIFFNESS_BARS], like)[index]) * math.sqrt(sums[2] / sums[3])
        sums_bar[0] = cast(bar / sums[2], like)
        sums_bar[1] = cast(-bar / sums[3], like)
    if I[L.B_ERROR] == 0:
        return
    fill_zero(n, bar_row(I, ERROR, like), like)
    if I[L.ERROR_NORM_BARS] == 0 and I[L.ERROR_BARS] == 0:
        return
    error, new = row(I, L.W_ERROR, like), row(I, L.W_NEW, like)
    if keeps_errors(I) and index < I[L.SWEEP_LAST]:
        error = kept_error(I, noise, like)
        new = I[L.STATES] + (index + 1) * I[L.STATE_SIZE] * size_of(like)
    else:
        nf, ng = I[L.NF], I[L.NG]
        step_on(I, R, t, h, u, noise, like)
        I[L.NF], I[L.NG] = nf, ng
    if I[L.ERROR_NORM_BARS] != 0 and sums[1] > 0.0:
        bar = float(view(I[L.ERROR_NORM_BARS], like)[index]) / math.sqrt(I[L.N_ALL] * sums[1])
        add_scaled(n, bar, error, bar_row(I, ERROR, like), like)
    if I[L.ERROR_BARS] != 0 and sums[0] > 0.0:
        bar = float(view(I[L.ERROR_BARS], like)[index]) / math.sqrt(I[L.N_ALL] * sums[0])
        through_scaled_error(I, bar, u, new, error, like)


@inlined
def through_scaled_error(I, factor, u, new, error, like):
    """Cotangents of a step's scaled error; ``factor`` is that of half the sum of its squares."""
    x, x_bar = view(error, like), view(bar_row(I, ERROR, like), like)
    u, v = view(u, like), view(new, like)
    u_bar, v_bar = view(bar_row(I, TOTAL, like), like), view(I[L.STATE_BAR], like)
    rtol = reals(I[L.RTOL])
    for m in range(I[L.N]):
        scale = tolerance_scale(I, m, larger(u[m], v[m]))
        q = float(x[m]) / scale
        x_bar[m] += factor * q / scale
        by_magnitude = -factor * q * q / scale * rtol[m * I[L.RTOL_STRIDE]]
        a, b = abs(float(u[m])), abs(float(v[m]))
        share = 1.0 if a > b else 0.0 if a < b else 0.5
        if u[m] != 0:
            u_bar[m] += share * by_magnitude * math.copysign(1.0, float(u[m]))
        if v[m] != 0:
            v_bar[m] += (1.0 - share) * by_magnitude * math.copysign(1.0, float(v[m]))


@inlined
def sweep_step(I, R, index, like):
    """From the cotangent of the state after a step to that of the one before it."""
    n, size = I[L.N], size_of(like)
    t, h = reals(I[L.STEP_T])[index], reals(I[L.STEP_H])[index]
    marks = marks_of(I, index)
    u, noise = load_step(I, R, index, like)
    total, beside = bar_row(I, TOTAL, like), False
    inside = marks[L.MARK_INSIDE] if I[L.SAVED_BARS] != 0 else 0
    estimated = I[L.ERROR_BARS] != 0 or I[L.ERROR_NORM_BARS] != 0 or I[L.STIFFNESS_BARS] != 0
    if I[L.SAVED_BARS] != 0 and marks[L.MARK_END_SAVE] >= 0:
        bars = I[L.SAVED_BARS] + marks[L.MARK_END_SAVE] * I[L.OUT_STRIDE] * size
        add_scaled(n, 1.0, bars, I[L.STATE_BAR], like)
    if inside > 0 or estimated:
        beside = True
        fill_zero(n, total, like)
    if inside > 0:
        through_values(I, R, t, h, marks[L.MARK_FIRST_SAVE], inside, u, like)
    if estimated:
        through_estimates(I, R, t, h, index, u, noise, like)
    call_reverse_of_rows(
        I[L.FUSED_VJP],
        cast(h, like),
        stage_times(I, t, h, like),
        u,
        noise,
        noise + I[L.NOISE_SIZE] * size,
        I[L.PARAMS],
        I[L.STATE_BAR],
        bar_row(I, ERROR, like),
        I[L.SUMS_BAR],
        I[L.BAR],
        I[L.P_BAR],
    )
    I[L.NF] += I[L.DRIFTS]
    I[L.NG] += I[L.DIFFUSIONS]
    if beside:
        add_scaled(n, 1.0, total, I[L.BAR], like)
    I[L.STATE_BAR], I[L.BAR] = I[L.BAR], I[L.STATE_BAR]


@inlined
def sweep(I, R, like):
    """Go back through the recorded steps; return to Python after ``CHUNK`` of them."""
    for _ in range(I[L.CHUNK]):
        if I[L.SWEPT] == 0:
            return L.DONE
        I[L.SWEPT] -= 1
        sweep_step(I, R, I[L.SWEPT], like)
    return L.DONE if I[L.SWEPT] == 0 else L.GO_ON


FUNCTIONS = StepFunctions(
    take_step=take_step,
    measure=measure,
    complete=nothing_to_complete,
    value_at=value_at,
    recall=nothing_to_complete,
    reverse_estimates=nothing_to_complete,
    reverse_step=nothing_to_complete,
    reverse_complete=nothing_to_complete,
)
KERNELS = {"sweep": sweep}
