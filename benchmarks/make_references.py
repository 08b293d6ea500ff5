"""Regenerate ``diffsolve/problems/library/references.json``, and check it, without diffsolve.

Every trajectory is computed three times, for the float64 values of the problem's data (``8 / 3``
means the nearest float64, so that the reference belongs to the problem that a solver is given):

* Gragg-Bulirsch-Stoer extrapolation of order 30 in 45 digits (mpmath), tolerance 1e-28: stored;
* the same with tolerance 1e-22, to see the convergence;
* Taylor series of order 26 in ``np.longdouble`` (80 bits): another method and another arithmetic.
  The Arenstorf orbit multiplies errors by 2e6, too much for 80 bits: there the series are in
  mpmath as well.

The script prints the agreement and refuses to write when it is worse than 1e-12.

Run ``python benchmarks/make_references.py [problem ...]``; with ``--check``, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
from mpmath import mpf

TARGET = Path(__file__).parents[1] / "diffsolve" / "problems" / "library" / "references.json"
REQUIRED = 1e-12
POINTS = 11
DIGITS = 45


# ---------------------------------------------------------------------------------------------
# The equations: ``f(t, u, p)`` returns pieces of the derivative, scalars or vectors, and uses only
# + - * / and powers, so that it works for arrays of mpf and for truncated Taylor series.
# ---------------------------------------------------------------------------------------------


def lotka_volterra(t: Any, u: Any, p: Any) -> list:
    return [p[0] * u[0] - p[1] * u[0] * u[1], p[3] * u[0] * u[1] - p[2] * u[1]]


def lotka_volterra_time(t: Any, u: Any, p: Any) -> list:
    return [p[0] * u[0] - p[1] * u[0] * u[1] * t, p[3] * u[0] * u[1] * t - p[2] * u[1]]


def lorenz(t: Any, u: Any, p: Any) -> list:
    x, y, z = u[0], u[1], u[2]
    return [p[0] * (y - x), x * (p[1] - z) - y, x * y - p[2] * z]


def fitzhugh_nagumo(t: Any, u: Any, p: Any) -> list:
    v, w = u[0], u[1]
    return [v - v * v * v / 3 - w + p[3], p[2] * (v + p[0] - p[1] * w)]


def pleiades(t: Any, u: Any, p: Any) -> list:
    x, y = u[0:7], u[7:14]
    dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
    weight = (dx * dx + dy * dy + np.eye(7, dtype=int)) ** -1.5 * p
    return [u[14:28], (weight * dx).sum(-1), (weight * dy).sum(-1)]


def arenstorf(t: Any, u: Any, p: Any) -> list:
    x, y, vx, vy = u[0], u[1], u[2], u[3]
    earth, moon = x + p[0], x - (1 - p[0])
    a = (1 - p[0]) * (earth * earth + y * y) ** -1.5
    b = p[0] * (moon * moon + y * y) ** -1.5
    return [vx, vy, x + 2 * vy - a * earth - b * moon, y - 2 * vx - a * y - b * y]


def rigid_body(t: Any, u: Any, p: Any) -> list:
    return [p[0] * u[1] * u[2], p[1] * u[0] * u[2], p[2] * u[0] * u[1]]


def henon_heiles(t: Any, u: Any, p: Any) -> list:
    x, y = u[0], u[1]
    return [u[2], u[3], -x - 2 * p[0] * x * y, -y - p[0] * (x * x - y * y)]


def spiral(t: Any, u: Any, p: Any) -> list:
    x, y = u[0] * u[0] * u[0], u[1] * u[1] * u[1]
    return [p[0] * x + p[2] * y, p[1] * x + p[3] * y]


@dataclass(frozen=True)
class Case:
    """The default data of a library problem."""

    f: Callable[[Any, Any, Any], list]
    u0: list[float]
    end: float
    p: list[float]


ARENSTORF_MU = "0.012277471"
ARENSTORF_V0 = "-2.00158510637908252240537862224"
ARENSTORF_PERIOD = "17.0652165601579625588917206249"

PLEIADES_U0 = [3, 3, -1, -3, 2, -2, 2]
PLEIADES_U0 += [3, -3, 2, 0, 0, -4, 4]
PLEIADES_U0 += [0, 0, 0, 0, 0, 1.75, -1.5]
PLEIADES_U0 += [0, 0, 0, -1.25, 1, 0, 0]

CASES = {
    "lotka_volterra": Case(lotka_volterra, [1, 1], 10, [1.5, 1, 3, 1]),
    "lotka_volterra_time": Case(lotka_volterra_time, [1, 1], 10, [1.5, 1, 3, 1]),
    "lorenz": Case(lorenz, [1, 0, 0], 10, [10, 28, 8 / 3]),
    "fitzhugh_nagumo": Case(fitzhugh_nagumo, [1, 1], 10, [0.7, 0.8, 0.08, 0.5]),
    "pleiades": Case(pleiades, PLEIADES_U0, 3, [1, 2, 3, 4, 5, 6, 7]),
    "arenstorf": Case(
        arenstorf,
        [0.994, 0, 0, float(ARENSTORF_V0)],
        float(ARENSTORF_PERIOD),
        [float(ARENSTORF_MU)],
    ),
    "rigid_body": Case(rigid_body, [1, 0, 0.9], 20, [-2, 1.25, -0.5]),
    "henon_heiles": Case(henon_heiles, [0, 0.1, 0.5, 0], 100, [1]),
    "spiral": Case(spiral, [2, 0], 1.5, [-0.1, 2, -2, -0.1]),
}


# ---------------------------------------------------------------------------------------------
# Method one: Gragg-Bulirsch-Stoer extrapolation in multiple precision
# ---------------------------------------------------------------------------------------------


def to_mpf(values: Any) -> np.ndarray:
    return np.array([mpf(v) for v in values], dtype=object)


def largest(values: np.ndarray) -> mpf:
    return max(abs(v) for v in values)


def extrapolation(
    f: Callable, u0: Any, times: Any, p: Any, tolerance: float, columns: int = 15
) -> np.ndarray:
    """Solution at ``times``; one step has order ``2 * columns`` and a controlled size."""
    p, u, t = to_mpf(p), to_mpf(u0), mpf(times[0])
    tol = mpf(tolerance)

    def rhs(time: mpf, state: np.ndarray) -> np.ndarray:
        pieces = f(time, state, p)
        return np.concatenate([np.atleast_1d(np.asarray(x, dtype=object)) for x in pieces])

    def step(t0: mpf, y0: np.ndarray, size: mpf) -> tuple[np.ndarray, mpf]:
        slope, row = rhs(t0, y0), []
        for j in range(1, columns + 1):
            n = 2 * j
            h = size / n
            before, now = y0, y0 + h * slope
            for m in range(1, n):
                before, now = now, before + 2 * h * rhs(t0 + m * h, now)
            new = [now]  # an even midpoint end value has an error series in h**2 as it is
            for k, old in enumerate(row):
                ratio = mpf(j) / (j - 1 - k)
                new.append(new[k] + (new[k] - old) / (ratio * ratio - 1))
            row = new
        return row[-1], largest(row[-1] - row[-2]) / (1 + largest(y0))

    out, h = [u], mpf(times[-1] - times[0]) / 100
    for end in [mpf(x) for x in times[1:]]:
        while t < end:
            size = min(h, end - t)
            new, error = step(t, u, size)
            factor = mpf("0.85") * (tol / max(error, mpf(10) ** -DIGITS)) ** (
                mpf(1) / (2 * columns - 1)
            )
            h = size * min(max(factor, mpf("0.2")), 3)
            if error <= tol:
                t, u = (end if size == end - t else t + size), new
        out.append(u)
    return np.array(out, dtype=object)


# ---------------------------------------------------------------------------------------------
# Method two: Taylor series, in extended or multiple precision
# ---------------------------------------------------------------------------------------------


class Series:
    """Taylor coefficients along axis 0 of arrays; arithmetic is truncated."""

    __array_ufunc__ = None  # array * Series goes to Series.__rmul__

    def __init__(self, c: np.ndarray):
        self.c = c

    def __getitem__(self, key: Any) -> Series:
        key = key if isinstance(key, tuple) else (key,)
        return Series(self.c[(slice(None), *key)])

    def _lift(self, other: Any) -> np.ndarray:
        if isinstance(other, Series):
            return other.c
        shape = np.broadcast_shapes(np.shape(other), self.c.shape[1:])
        c = np.zeros((len(self.c), *shape), dtype=self.c.dtype)
        c[0] = other
        return c

    def __add__(self, other: Any) -> Series:
        return Series(self.c + self._lift(other))

    def __sub__(self, other: Any) -> Series:
        return Series(self.c - self._lift(other))

    def __rsub__(self, other: Any) -> Series:
        return Series(self._lift(other) - self.c)

    def __neg__(self) -> Series:
        return Series(-self.c)

    def __mul__(self, other: Any) -> Series:
        if not isinstance(other, Series):
            return Series(self.c * other)
        a, b = self.c, other.c
        return Series(np.stack([(a[: k + 1] * b[k::-1]).sum(0) for k in range(len(a))]))

    def __truediv__(self, other: Any) -> Series:
        return Series(self.c / other)

    def __pow__(self, power: float) -> Series:
        a, w = self.c, np.empty_like(self.c)
        w[0] = a[0] ** (mpf(power) if a.dtype == object else np.longdouble(power))
        for k in range(1, len(a)):
            j = np.arange(1, k + 1).reshape(-1, *([1] * (a.ndim - 1)))
            w[k] = ((j * power - (k - j)) * a[1 : k + 1] * w[k - 1 :: -1][:k]).sum(0) / (k * a[0])
        return Series(w)

    def sum(self, axis: int) -> Series:
        return Series(self.c.sum(axis))

    __radd__, __rmul__ = __add__, __mul__


def taylor(f: Callable, u0: Any, times: Any, p: Any, precise: bool, order: int = 26) -> np.ndarray:
    """Solution at ``times`` by Taylor steps whose last terms are below the tolerance."""
    real: Any = mpf if precise else np.longdouble
    dtype: Any = object if precise else np.longdouble
    tolerance = real("1e-28" if precise else "1e-21")
    p, u, t = (np.array([real(x) for x in values], dtype) for values in (p, u0, times[:1]))
    t, out = t[0], [u]
    for end in [real(x) for x in times[1:]]:
        while t < end:
            c = u[None]
            for k in range(order):  # each pass of the Picard iteration makes one more term exact
                clock = np.zeros(k + 1, dtype)
                clock[0] = t
                clock[1:2] = 1
                pieces = f(Series(clock), Series(c), p)
                slope = np.concatenate([x.c.reshape(k + 1, -1) for x in pieces], axis=1)
                c = np.concatenate([c, slope[k : k + 1] / (k + 1)])
            scale, sizes = 1 + np.abs(u).max(), np.abs(c).max(1)
            radii = [(tolerance * scale / sizes[k]) ** (real(1) / k) for k in (order - 1, order)]
            h = min(real("0.9") * min(radii), end - t)
            t = end if h == end - t else t + h
            u = c[-1]
            for coefficient in c[-2::-1]:
                u = coefficient + h * u
        out.append(u)
    return np.array(out, dtype)


# ---------------------------------------------------------------------------------------------


def disagreement(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, relative to each component's size or to 1e-2 of its largest."""
    floor = np.array([largest(column) for column in a.T], dtype=object) / 100
    return float(max((abs(a - b) / np.maximum(np.maximum(abs(a), floor), mpf(10) ** -30)).ravel()))


def arenstorf_defect() -> float:
    """How far the orbit is from closing after one period, for the published decimal data."""
    u0 = [mpf("0.994"), mpf(0), mpf(0), mpf(ARENSTORF_V0)]
    times = [mpf(0), mpf(ARENSTORF_PERIOD)]
    start, end = extrapolation(arenstorf, u0, times, [mpf(ARENSTORF_MU)], 1e-32)
    return float(largest(end - start))


def write(stored: dict[str, dict[str, Any]]) -> None:
    """Write all references, one state a line."""
    blocks = []
    for name in sorted(stored):
        entry = dict(stored[name])
        rows = ",\n    ".join(json.dumps(row) for row in entry.pop("u"))
        fields = "".join(f'  "{key}": {json.dumps(value)},\n' for key, value in entry.items())
        blocks.append(f'{json.dumps(name)}: {{\n{fields}  "u": [\n    {rows}]}}')
    TARGET.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", nargs="*", help="default: all")
    parser.add_argument("--check", action="store_true", help="do not write")
    args = parser.parse_args()
    mpmath.mp.dps = DIGITS
    if np.finfo(np.longdouble).eps > 1e-18:
        raise SystemExit("this platform has no extended precision for the second method")

    stored = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    for name in args.problem or CASES:
        case, start = CASES[name], time.perf_counter()
        times = [float(x) for x in np.linspace(0.0, case.end, POINTS)]
        best = extrapolation(case.f, case.u0, times, case.p, 1e-28)
        coarse = extrapolation(case.f, case.u0, times, case.p, 1e-22)
        series = taylor(case.f, case.u0, times, case.p, precise=name == "arenstorf")
        if series.dtype != object:  # to mpf through its two float64 halves, which is exact
            high = series.astype(np.float64)
            low = (series - high).astype(np.float64)
            series = np.vectorize(mpf, "O")(high) + np.vectorize(mpf, "O")(low)
        convergence, agreement = disagreement(best, coarse), disagreement(best, series)
        print(
            f"{name:20s} extrapolation 1e-28 against 1e-22: {convergence:.1e}; "
            f"against Taylor series: {agreement:.1e}  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
        if max(convergence, agreement) > REQUIRED:
            raise SystemExit(f"{name}: the methods do not agree to {REQUIRED}")
        stored[name] = {"t": times, "u": best.astype(np.float64).tolist()}
    if not args.problem or "arenstorf" in args.problem:
        print(f"arenstorf, decimal data: orbit closes to {arenstorf_defect():.1e}")
    if not args.check:
        write(stored)


if __name__ == "__main__":
    main()
