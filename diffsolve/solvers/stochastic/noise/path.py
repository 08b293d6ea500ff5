"""A Brownian path that remembers where it was looked at."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from diffsolve.problems.sde_field import Increment
from diffsolve.solvers.stochastic.noise.base import Noise
from diffsolve.solvers.stochastic.noise.philox import READS, STEPS, counter_of

#: Two times are one, by rounding, if they are closer than this many units in the last place ...
_ULPS = 4
_PART = 3 / 8  # ... and than this part of the step that ends there
_SHORTEST = 2  # the ends of a shorter interval, in units in the last place, are one time
_LANDING = 8  # units in the last place by which a step to the end of a span may miss it
_AHEAD = {"cpu": 1 << 15}  # numbers drawn ahead at most: what a processor's cache holds
_AHEAD_ELSEWHERE = 1 << 22  # where a draw costs a hundred launches
_ROWS_AHEAD = 256
#: Bytes of divided intervals that are kept, because drawing them again costs more than memory.
_REMEMBERED = 1 << 22


class Division(NamedTuple):
    """An interval that was divided.

    Attributes
    ----------
    parent
        The interval, as in ``BrownianPath.pieces``.
    counter
        Of the normals that divided it.
    left, middle, right
        Its ends, and where it was divided.
    """

    parent: int
    counter: int
    left: float
    middle: float
    right: float


class BrownianPath(Noise):
    """Brownian motions that are drawn when they are asked for, and remembered.

    The path is known at points. An interval beyond the last or before the first of them is drawn
    afresh; a time between two of them divides their interval, by a Brownian bridge of ``W`` and
    ``H`` jointly, and is a known point from then on. So a step that is rejected, and every shorter
    one that is tried after it, see one and the same path: this is algorithm RSwM3 of Rackauckas and
    Nie (2017), Adaptive methods for stochastic differential equations via natural embeddings and
    rejection sampling with memory, with nothing ever forgotten.

    Each draw by ``increment`` takes the next serial of a counter-based generator. What is kept is
    the points and the serials, not the numbers: those are drawn again where they are wanted.

    So two paths of one seed are the same where they were asked for the same intervals in the same
    order: in solves with equal steps, whatever the batch. Adaptive steps are those of a whole
    batch, with which the path of each row changes; ``VirtualBrownianTree`` does not. Beyond what is
    known the path depends on what is asked for next, so ``check`` refuses a solve that reaches
    there. A read by ``at`` takes no serial, so it leaves fresh intervals and the law as they are,
    but it makes a known point: another time in the same interval is drawn given it, whether that is
    read or stepped on. Values between known points depend on the order of the questions.

    Parameters
    ----------
    seed, rows, m, dtype, device, levy_area
        As in ``Noise``.
    t0
        The first known point. Default 0.

    Attributes
    ----------
    times
        The known points, increasing.
    pieces
        What lies between each and the next: the counter of a fresh interval, ``>= 0``, or
        ``~(2 k + side)`` for a half of ``divisions[k]``, the first (0) or the second (1).
    divisions
        Every interval that was divided.
    serial
        Serial of the next draw.

    Examples
    --------
    >>> path = BrownianPath(seed=1)
    >>> whole = path.increment(0.0, 1.0).W
    >>> half = path.increment(0.0, 0.5).W
    >>> torch.allclose(half + path.increment(0.5, 1.0).W, whole)
    True
    """

    def __init__(
        self,
        seed: int | Tensor,
        rows: int = 1,
        m: int = 1,
        t0: float = 0.0,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        levy_area: bool = False,
    ):
        super().__init__(seed, rows, m, dtype=dtype, device=device, levy_area=levy_area)
        self.t0 = float(t0)
        self.times = [self.t0]
        self.pieces: list[int] = []
        self.divisions: list[Division] = []
        self.serial = 0
        self._forget()

    def _forget(self) -> None:
        """Start with nothing drawn ahead and nothing kept."""
        size = max(1, self.rows * self.m)
        self._first = 0  # serial of the first row that was drawn ahead
        self._ahead: Sequence[Tensor] = ()
        most = _AHEAD.get(self._draws.device.type, _AHEAD_ELSEWHERE)
        self._most_ahead = max(1, min(_ROWS_AHEAD, most // size))
        self._expected = 0
        self._halves: OrderedDict[int, Tensor] = OrderedDict()
        self._most_halves = max(16, _REMEMBERED // (32 * size + 1024))

    # -- what is asked for ---------------------------------------------------------------------

    def increment(self, s: float, t: float) -> Increment:
        """As in ``Noise``.

        Raises
        ------
        ValueError
            If a time is not finite.
        """
        length = t - s
        if abs(length) < _SHORTEST * math.ulp(max(abs(s), abs(t))):
            return self._zeros()  # one time, by rounding: two stops, say, that a solve goes through
        if length < 0:
            W, H = self._between(t, s, length)
            return Increment(-W, H)
        return self._between(s, t, length)

    def _between(self, s: float, t: float, length: float) -> Increment:
        """Increment from ``s`` to a later time; a negative length where the step goes backward."""
        i = self._find(s, length)
        j = self._find(t, length)
        if j == i + 1:
            return self._whole(self.pieces[i], self.times[j] - self.times[i])
        if i == j:
            return self._zeros()
        return self._union(i, j)

    def at(self, times: Sequence[float], since: float | None = None) -> Tensor:
        """As in ``Noise``. The times become known points, and take no serials.

        Their numbers are drawn by counters that are made of the bits of the time. So reading a path
        does not change what the next fresh steps draw, nor the intervals that are known. What is
        drawn later inside of the interval of a time is drawn given it.
        """
        start = self.t0 if since is None else float(since)
        wanted = [float(x) for x in times]
        far = max(wanted, key=lambda x: abs(x - start), default=start)
        self._find(start, far - start, reading=True)
        for time in wanted:
            self._find(time, reading=True)
        origin = self._find(start, far - start, reading=True)
        at = [self._find(time, reading=True) for time in wanted]
        zero = self._zeros_inside()
        values = {origin: zero}
        for side in (1, -1):  # outward from the origin: a short way loses no digits to a long one
            where, total = origin, zero
            for k in sorted({k for k in at if (k - origin) * side > 0}, key=lambda k: side * k):
                low, high = (where, k) if side > 0 else (k, where)
                total = total + side * self._sum(self._spans(low, high), False)[0]
                values[k] = total
                where = k
        if not at:
            return self._out(zero[None][:0])
        return self._out(torch.stack([values[k] for k in at]))

    def fork(
        self,
        *,
        levy_area: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """As in ``Noise``: a copy that knows the same points, and then goes its own way."""
        copy = type(self)(
            self.seed,
            self.rows,
            self.m,
            self.t0,
            dtype=self.dtype if dtype is None else dtype,
            device=self.device if device is None else device,
            levy_area=self.levy_area if levy_area is None else levy_area,
        )
        copy.remember(self.times, self.pieces, self.divisions, self.serial)
        return copy

    def check(self, rows: int, m: int, t0: float, t1: float) -> None:
        """As in ``Noise``: only where the path is known, it is the same to every solve."""
        super().check(rows, m, t0, t1)
        first, last = self.times[0], self.times[-1]
        near = _LANDING * math.ulp(max(map(abs, (first, last, t0, t1))))
        if min(t0, t1) >= first - near and max(t0, t1) <= last + near and first < last:
            return
        known = (
            f"is known from t = {first:.8g} to t = {last:.8g}"
            if first < last
            else "knows nothing yet"
        )
        raise ValueError(
            f"the Brownian path {known}, and cannot be followed from t = {t0:.8g} to {t1:.8g}: "
            "what it draws beyond depends on the steps, and would be another path in every solve. "
            "Give seed=... for a new path; or solve the longest span first, with the finest "
            "steps, and follow its sol.noise; or give VirtualBrownianTree(seed, t0, t1, ...), "
            "which is the same whatever the steps"
        )

    def expect(self, count: int) -> None:
        self._expected = self.serial + count

    def remember(
        self,
        times: Iterable[float],
        pieces: Iterable[int],
        divisions: Iterable[tuple[int, int, float, float, float]],
        serial: int,
    ) -> None:
        """Replace what is known by these points, in the form of the attributes of these names."""
        self.times, self.pieces = list(times), list(pieces)
        self.divisions = [Division(*x) for x in divisions]
        self.serial = serial
        self._halves.clear()

    # -- points --------------------------------------------------------------------------------

    def _find(self, time: float, length: float = 0.0, reading: bool = False) -> int:
        """Index of a time among the known points, of which it becomes one.

        It is an end of a step of ``length``, negative backward in time; or ``at`` reads it.
        """
        times = self.times
        i = bisect_left(times, time)
        known = len(times)
        if i < known and times[i] == time:
            return i
        time = float(time)
        if not math.isfinite(time):
            raise ValueError(f"a Brownian path is asked for at t = {time}")
        k = i - 1 if i == known or (i and time - times[i - 1] < times[i] - time) else i
        near = self._rounding(time, length)
        if not reading:  # the ends of a step are never one
            near = min(near, _PART * abs(length))
        if abs(time - times[k]) <= near:
            return k
        if reading:
            counter = counter_of(READS, time)
        else:
            counter = STEPS | self.serial
            self.serial += 1
        if i == known:
            self.pieces.append(counter)
        elif i == 0:
            self.pieces.insert(0, counter)
        else:
            k = ~(2 * len(self.divisions))
            division = Division(self.pieces[i - 1], counter, times[i - 1], time, times[i])
            self.divisions.append(division)
            self.pieces[i - 1 : i] = [k, k - 1]
        times.insert(i, time)
        return i

    def _rounding(self, time: float, length: float) -> float:
        """Distance up to which a known point counts as this time.

        Solves add up their times from the start, and those of a replay from where that begins.
        """
        largest = max(abs(time), abs(length), abs(self.t0))
        if length:
            largest = max(largest, abs(self.times[0 if length > 0 else -1]))
        return _ULPS * math.ulp(largest)

    # -- numbers -------------------------------------------------------------------------------

    def _whole(self, piece: int, length: float) -> Increment:
        """Increment over one interval."""
        if piece < 0:
            parts, row = self._half(piece)
            W = self._out(parts[row].clone())  # a copy: what is handed out may be changed
            return Increment(W, self._out(parts[row + 1].clone()) if self.levy_area else None)
        drawn = self._normals(piece) * math.sqrt(length)
        if drawn.dtype is not self.dtype or drawn.device != self.device:
            drawn = self._out(drawn)
        return Increment(*drawn.unbind(0)) if self.levy_area else Increment(drawn)

    def _normals(self, counter: int) -> Tensor:
        """What drives ``W``, ``(rows, m)``; with ``levy_area`` that and what drives ``H``."""
        i = counter - self._first
        if not 0 <= i < len(self._ahead):
            if counter >> 56:  # the counter of a read stands alone
                drawn = self._draws(counter, 1, self.levy_area)
                return drawn[:, 0] if self.levy_area else drawn[0, 0]
            self._draw_ahead(counter)
            i = counter - self._first
        return self._ahead[i]

    def _draw_ahead(self, serial: int) -> None:
        """Draw a block of rows that holds ``serial``: longer ones where serials go on in turn."""
        known, first = len(self._ahead), self._first
        if known and serial == first + known:
            count = min(self._most_ahead, max(2 * known, self._expected - serial))
            first = serial
        elif known and serial == first - 1:
            count = min(self._most_ahead, 2 * known, first)
            first -= count
        else:
            count = max(1, min(self._most_ahead, self._expected - serial))
            first = serial
        drawn = self._draws(STEPS | first, count, self.levy_area)
        self._ahead = (drawn if self.levy_area else drawn[0]).unbind(1 if self.levy_area else 0)
        self._first = first

    def _half(self, piece: int) -> tuple[Tensor, int]:
        """The tensor with a half of a divided interval, and the row of ``W``; the next is ``H``."""
        k = ~piece // 2
        halves = self._halves.get(k)
        if halves is None:
            halves = self._divide(k)
        else:
            self._halves.move_to_end(k)
        return halves, 2 * (~piece % 2)

    def _divide(self, k: int) -> Tensor:
        """``W, H`` of both halves of ``divisions[k]``, after the intervals that it came from."""
        line = [k]
        while (parent := self.divisions[line[-1]].parent) < 0 and ~parent // 2 not in self._halves:
            line.append(~parent // 2)
        whole = self._halves[~parent // 2] if parent < 0 else self._draws(parent, 1, True)[:, 0]
        for k in reversed(line):
            parent, counter, left, middle, right = self.divisions[k]
            row, scale = (2 * (~parent % 2), 1.0) if parent < 0 else (0, math.sqrt(right - left))
            whole = self._draws.divide(whole, row, scale, counter, middle - left, right - middle)
            self._halves[k] = whole
            if len(self._halves) > self._most_halves:
                self._halves.popitem(last=False)
        return whole

    def _union(self, i: int, j: int) -> Increment:
        """Increment over the intervals between the points ``i`` and ``j``."""
        spans = self._spans(i, j)
        if len(spans) == 1:  # one that was divided since: its own numbers, not a rounded sum
            piece, left, right = spans[0]
            return self._whole(piece, right - left)
        W, H = self._sum(spans, self.levy_area)
        return Increment(self._out(W), None if H is None else self._out(H))

    def _spans(self, i: int, j: int) -> list[tuple[int, float, float]]:
        """The largest intervals that lie between two points, divided since or not, and their ends.

        However many points there are in an interval, a part of it is a few of these.
        """
        times, end, spans = self.times, self.times[j], []
        while i < j:
            piece, left, right = self.pieces[i], times[i], times[i + 1]
            while piece < 0 and ~piece % 2 == 0:
                division = self.divisions[~piece // 2]
                if division.right > end:
                    break
                piece, right = division.parent, division.right
            spans.append((piece, left, right))
            i = i + 1 if right == times[i + 1] else bisect_left(times, right, i + 1)
        return spans

    def _sum(
        self, spans: list[tuple[int, float, float]], area: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``W`` and ``H`` over intervals, one after the other, float64.

        ``h (H + W/2)``, the integral, is the sum over the intervals of ``h_k (H_k + W_k/2)`` and of
        ``W_k`` times what comes after.
        """
        W = H = None
        start, end = spans[0][1], spans[-1][2]
        for piece, left, right in spans:
            if piece >= 0:
                scale, row = math.sqrt(right - left), self._normals(piece)
                w, h = row if self.levy_area else (row, row)
            else:
                scale, (parts, k) = 1.0, self._half(piece)
                w, h = parts[k], parts[k + 1]
            W = w * scale if W is None else W.add_(w, alpha=scale)
            if area:
                # what W adds to H, and H itself
                early = scale * ((end - 0.5 * (left + right)) / (end - start) - 0.5)
                H = w * early if H is None else H.add_(w, alpha=early)
                H.add_(h, alpha=scale * (right - left) / (end - start))
        assert W is not None
        return W, H

    def _zeros_inside(self) -> Tensor:
        shape = self.rows, self.m
        return torch.zeros(shape, dtype=torch.float64, device=self._draws.device)

    # -- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_ahead"], state["_halves"] = (), OrderedDict()
        return state

    def _span(self) -> str:
        first, last = self.times[0], self.times[-1]
        return f"known from t={first:.6g} to t={last:.6g} at {len(self.times)} points"
