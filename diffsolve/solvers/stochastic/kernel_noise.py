"""The noise of the steps of SDEs in machine code: that of ``noise/path.py``, draw by draw.

Serials and intervals are those of ``BrownianPath``, so that both engines follow one path. With
fixed steps every step is drawn afresh. With adaptive ones, what a rejected step has drawn is known:
the intervals from the time at hand on, in order. A shorter step divides one of them by a Brownian
bridge (algorithm RSwM3 of Rackauckas and Nie, 2017). ``W`` and ``H`` of the intervals lie in
float64, in the direction of time and not of the steps.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import (
    bits_of,
    call_kernel,
    cast,
    inlined,
    integers,
    reals,
    size_of,
    ulp,
    view,
)
from diffsolve.solvers.kernels.norms import fill_zero

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
        i = I[L.SERIAL] % I[L.AHEAD_COUNT]  # so that a reverse pass draws the same blocks
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
    """Whether a time that is read is a known point, up to rounding; ``BrownianPath._rounding``."""
    x, start = abs(at), abs(R[L.NOISE_START])
    return abs(at - known) <= _ULPS * ulp(x if x > start else start)


@inlined
def nearness(R, t, end):
    """A time closer than this to a known point is that point; ``BrownianPath._find``."""
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
    """Drop the intervals before the time at hand, or before the known point that it is close to."""
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
def has_room(I):
    """Whether there is room for an interval, and for one more for each value inside."""
    inside = I[L.N_SAVES] - I[L.SAVED] if I[L.N_SAVES] > I[L.SAVED] else 0
    return I[L.KNOWN] + 2 <= I[L.KNOWN_ROOM] and I[L.LOGGED] + inside + 2 <= I[L.LOG_ROOM]
