"""Regenerate the stiff problems of ``references.json``, and check them, without diffsolve.

Every trajectory is computed three times, for the float64 values of the problem's data:

* Radau IIA collocation with 9 stages, order 17, in 40 digits, tolerance 1e-20: stored;
* the same with 7 stages, order 13, and tolerance 1e-16, to see the convergence;
* SciPy's Radau, order 5, in float64 at ``rtol`` 1e-10 or 1e-12: another code.

Tolerances and differences are relative to each component at each time, however small it is.
The script prints the differences, those from published values too, and refuses to write where the
first two do not agree to 1e-12, or the first and SciPy's not to 1e-10. Published values are given
to 16 digits and are right to about 13 of them.

Run ``python benchmarks/make_stiff_references.py [problem ...]``; with ``--check``, nothing is
written.
"""

from __future__ import annotations

import argparse
import decimal
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import mpmath
import numpy as np
from make_references import REQUIRED, TARGET, write
from scipy.integrate import solve_ivp
from stiff_equations import (
    hires_equations,
    orego_equations,
    pollu_equations,
    rober_equations,
    van_der_pol_equations,
)

REQUIRED_OF_SCIPY = 1e-10
DIGITS = 40


# ---------------------------------------------------------------------------------------------
# Further equations, as those of ``stiff_equations.py``
# ---------------------------------------------------------------------------------------------


def e5(u: Any, p: Any) -> list:
    a, b, c, m = p
    split, bind, meet, back = a * u[0], b * u[0] * u[2], m * c * u[1] * u[2], c * u[3]
    return [-split - bind, split - meet, split - bind - meet + back, bind - back]


def brusselator_1d(u: Any, p: Any) -> Any:
    (a, b, alpha), n = p, len(u) // 2
    x, y = u[:n], u[n:]
    stretch = alpha * (n + 1) * (n + 1)
    source = x * x * y

    def diffusion(z: Any, wall: int) -> Any:
        edge = np.zeros_like(z[:1]) + wall
        padded = np.concatenate([edge, z, edge])
        return stretch * (padded[:-2] - 2 * z + padded[2:])

    return np.concatenate(
        [a + source - (b + 1) * x + diffusion(x, 1), b * x - source + diffusion(y, 3)]
    )


@dataclass(frozen=True)
class Case:
    """The data of a library problem; ``given`` are the parameters that are not the defaults.

    ``published`` maps a time to the values there, of the references in the problem's docstring;
    ``rtol`` is SciPy's.
    """

    name: str
    equations: Callable[[Any, Any], Any]
    u0: list[float]
    times: list[float]
    p: list[float]
    given: dict[str, Any] = field(default_factory=dict)
    published: dict[float, str] = field(default_factory=dict)
    rtol: float = 1e-10

    def f(self, u: Any, p: Any) -> np.ndarray:
        """The derivatives, with the components along axis 0."""
        return np.stack(self.equations(u, p))


def even(end: float) -> list[float]:
    return np.linspace(0.0, end, 11).tolist()


def decades(last: int) -> list[float]:
    return [0.0, *(float(f"1e{k}") for k in range(last - 9, last + 1))]


HIRES_P = [1.71, 0.43, 8.32, 0.69, 0.035, 8.32, 280, 0.69, 0.69, 0.0007]
HIRES_END = """7.371312573325668e-4 1.442485726316185e-4 5.888729740967575e-5 1.175651343283149e-3
2.386356198831331e-3 6.238968252742796e-3 2.849998395185769e-3 2.850001604814231e-3"""
POLLU_U0 = [0, 0.2, 0, 0.04, 0, 0, 0.1, 0.3, 0.01, 0, 0, 0, 0, 0, 0, 0, 0.007, 0, 0, 0]
POLLU_P = [0.35, 26.6, 1.23e4, 8.6e-4, 8.2e-4, 1.5e4, 1.3e-4, 2.4e4, 1.65e4, 9e3, 0.022, 1.2e4]
POLLU_P += [1.88, 1.63e4, 4.8e6, 3.5e-4, 0.0175, 1e8, 4.44e11, 1240, 2.1, 5.78, 0.0474, 1780, 3.12]
POLLU_END = """0.5646255480022769e-1 0.1342484130422339 0.4139734331099427e-8 0.5523140207484359e-2
0.2018977262302196e-6 0.1464541863493966e-6 0.7784249118997964e-1 0.3245075353396018
0.7494013383880406e-2 0.1622293157301561e-7 0.1135863833257075e-7 0.2230505975721359e-2
0.2087162882798630e-3 0.1396921016840158e-4 0.8964884856898295e-2 0.4352846369330103e-17
0.6899219696263405e-2 0.1007803037365946e-3 0.1772146513969984e-5 0.5682943292316392e-4"""
# those published for 1e11 are off by 1e-2 in y1 and y4, and right in y2 and y3 to 5e-11
E5_TIMES = {
    1e3: "1.6180769999072942552e-3 1.3822370304983735443e-10 8.2515735006838336088e-12 "
    "1.2997212954915352082e-10",
    1e5: "7.4813208224292220114e-6 2.3734781561205975019e-12 2.2123586689581663654e-12 "
    "1.6111948716243113653e-13",
    1e7: "4.7150333630401632232e-10 1.8188895860807021729e-14 1.8188812376786725407e-14 "
    "8.3484020296321693074e-20",
    1e9: "3.1317148329356996037e-14 1.4840957952870064294e-16 1.4840957948345691466e-16 "
    "4.5243728279782625194e-26",
}
ROBER_END = {1e11: "0.2083340149701255e-7 0.8333360770334713e-13 0.9999999791665050"}
OREGO_P = [77.27, 0.161, 8.375e-6]
OREGO_END = {360.0: "0.1000814870318523e1 0.1228178521549917e4 0.1320554942846706e3"}
VDP_END = {2000.0: "0.1706167732170469e1 -0.8928097010248125e-3"}
BRUSS_U0 = [1 + math.sin(2 * math.pi * i / 41) for i in range(1, 41)] + [3.0] * 40

CASES = [  # the longest first
    Case("brusselator_1d", brusselator_1d, BRUSS_U0, even(10), [1, 3, 0.02]),
    Case("rober", rober_equations, [1, 0, 0], decades(5), [0.04, 3e7, 1e4]),
    Case(
        "rober",
        rober_equations,
        [1, 0, 0],
        decades(11),
        [0.04, 3e7, 1e4],
        {"tspan": [0.0, 1e11]},
        ROBER_END,
    ),
    Case(
        "orego",
        orego_equations,
        [1, 2, 3],
        even(360),
        [77.27, 0.161, 8.375e-6],
        published=OREGO_END,
    ),
    Case(
        "hires",
        hires_equations,
        [1, 0, 0, 0, 0, 0, 0, 0.0057],
        even(321.8122),
        HIRES_P,
        published={321.8122: HIRES_END},
        rtol=1e-12,
    ),
    Case("pollu", pollu_equations, POLLU_U0, even(60), POLLU_P, published={60.0: POLLU_END}),
    Case(
        "e5",
        e5,
        [1.76e-3, 0, 0, 0],
        decades(11),
        [7.89e-10, 1.1e7, 1.13e3, 1e6],
        published=E5_TIMES,
    ),
    Case("van_der_pol", van_der_pol_equations, [2, 0], even(2e3), [1e3], published=VDP_END),
    Case("van_der_pol", van_der_pol_equations, [2, 0], even(2e6), [1e6], {"mu": 1e6}),
]


def jacobian(f: Callable, u: np.ndarray, p: Any) -> np.ndarray:
    """``[i, ..., j]`` is ``d f_i / d u_j``, by complex steps: exact to rounding."""
    n, tiny = len(u), 1e-150
    steps = np.eye(n).reshape(n, *([1] * (u.ndim - 1)), n)
    return f(u[..., None] + 1j * tiny * steps, p).imag / tiny


# ---------------------------------------------------------------------------------------------
# Collocation at Radau points in many digits
# ---------------------------------------------------------------------------------------------


def exact(values: Any) -> np.ndarray:
    flat = [Decimal(x) for x in np.asarray(values, dtype=object).ravel()]
    return np.array(flat, dtype=object).reshape(np.shape(values))


class Radau:
    """The nodes ``c`` and the matrix ``A`` of Radau IIA, and where a step's polynomial goes on."""

    def __init__(self, stages: int):
        with mpmath.workdps(2 * DIGITS):
            ends = [
                mpmath.taylor(lambda x, k=k: mpmath.legendre(k, 2 * x - 1), 0, stages)
                for k in (stages, stages - 1)
            ]
            difference = [a - b for a, b in zip(*ends, strict=True)]
            c = sorted(mpmath.re(x) for x in mpmath.polyroots(difference[::-1], 200, extraprec=200))
            c[-1] = mpmath.mpf(1)
            powers = mpmath.matrix(stages, stages)
            integrals = mpmath.matrix(stages, stages)
            for i in range(stages):
                for j in range(stages):
                    powers[i, j] = c[i] ** j
                    integrals[i, j] = c[i] ** (j + 1) / (j + 1)
            a = integrals * powers**-1
            text = [
                [mpmath.nstr(a[i, j], DIGITS + 5) for j in range(stages)] for i in range(stages)
            ]
            self.halves = [
                exact(
                    [
                        [
                            mpmath.nstr(self._lagrange([mpmath.mpf(0), *c], j, (x + half) / 2), 20)
                            for j in range(1, stages + 1)
                        ]
                        for x in c
                    ]
                )
                for half in (0, 1)
            ]
        self.A, self.order = exact(text), 2 * stages - 1

    @staticmethod
    def _lagrange(nodes: list, j: int, x: Any) -> Any:
        return mpmath.fprod((x - z) / (nodes[j] - z) for i, z in enumerate(nodes) if i != j)


def collocate(
    f: Callable,
    u: np.ndarray,
    h: Decimal,
    p: np.ndarray,
    rule: Radau,
    guess: np.ndarray,
    tol: float,
) -> np.ndarray | None:
    """Increments at the nodes, ``(n, stages)``, by Newton's method whose matrix is in float64.

    The equations are evaluated in all digits, so that each iteration gains those of the matrix.
    """
    n, stages = guess.shape
    z, rough = guess, float(h) * rule.A.astype(float)
    for _ in range(12):
        states = u[:, None] + z
        residual = h * f(states, p).dot(rule.A.T) - z
        rounded = states.astype(float)
        size = np.maximum(np.abs(rounded).max(1), np.abs(u.astype(float)))
        size[size == 0] = 1.0
        slopes = jacobian(f, rounded, p.astype(float))
        blocks = np.einsum("ij,kjm->kijm", rough, slopes) * (size / size[:, None])[:, None, None, :]
        matrix = np.eye(n * stages) - blocks.transpose(0, 1, 3, 2).reshape(n * stages, -1)
        scaled = (residual / exact(size)[:, None]).astype(float)
        change = np.linalg.solve(matrix, scaled.ravel()).reshape(n, stages)
        z = z + exact(change) * exact(size)[:, None]
        error = np.abs(change).max()
        if not error < 1e3:
            return None
        if error < tol * 1e-2:
            return z
    return None


def collocation(case: Case, stages: int, tol: float) -> tuple[np.ndarray, int]:
    """Solution at the times, with the error of a step seen in two halves of it; and its steps."""
    rule, p, u = Radau(stages), exact(case.p), exact(case.u0)
    t, out, steps = exact(case.times)[0], [exact(case.u0)], 0
    h = exact(case.times)[1] / 10000
    nothing = exact(np.zeros((len(u), stages)))
    for end in exact(case.times)[1:]:
        while t < end:
            size = min(h, end - t)
            whole = collocate(case.f, u, size, p, rule, nothing, tol)
            first = second = None
            if whole is not None:
                parts = [whole.dot(m.T) for m in rule.halves]
                first = collocate(case.f, u, size / 2, p, rule, parts[0], tol)
            if first is not None:
                middle = u + first[:, -1]
                start = parts[1] - first[:, -1:]
                second = collocate(case.f, middle, size / 2, p, rule, start, tol)
            if second is None:
                h = size / 5
                continue
            new = middle + second[:, -1]
            scale = np.maximum(abs(u), abs(new))
            error = float(max(abs(new - u - whole[:, -1]) / scale))
            factor = 0.8 * (tol / max(error, 1e-40)) ** (1 / (rule.order + 1))
            h = size * Decimal(min(max(factor, 0.2), 4.0))
            if error <= tol:
                t, u, steps = (end if size == end - t else t + size), new, steps + 1
        out.append(u)
    return np.array(out, dtype=object), steps


# ---------------------------------------------------------------------------------------------


def scipy_radau(case: Case) -> np.ndarray:
    p, u0 = np.array(case.p, float), np.array(case.u0, float)
    kept = list(range(len(u0)))
    if case.name == "e5":  # y3 = y2 - y4: float64 would lose what is left of y4, and y3 with it
        kept = [0, 1, 3]

    def whole(v: np.ndarray) -> np.ndarray:
        return v if len(kept) == len(u0) else np.stack([v[0], v[1], v[1] - v[2], v[2]])

    def f(v: np.ndarray, p: np.ndarray) -> np.ndarray:
        return case.f(whole(v), p)[kept]

    out = [u0[kept]]
    for start, end in zip(case.times, case.times[1:], strict=False):
        solution = solve_ivp(
            lambda t, v: f(v, p),
            (0.0, end - start),  # a clock that starts anew resolves shorter steps
            out[-1],
            method="Radau",
            jac=lambda t, v: jacobian(f, v, p),
            rtol=case.rtol,
            atol=1e-100,
            first_step=None if start else 1e-6 * end,
        )
        if not solution.success:
            raise SystemExit(f"{case.name}: SciPy stops after {start}: {solution.message}")
        out.append(solution.y[:, -1])
    return whole(np.array(out).T).T


def disagreement(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference relative to each component at each time."""
    scale = np.where(a == 0, Decimal(1), abs(a))
    return float((abs(a - exact(b)) / scale).max())


def solve(case: Case) -> tuple[str, dict[str, Any]]:
    """The entry of the file, with its key; prints how the codes agree."""
    decimal.getcontext().prec = DIGITS
    start = time.perf_counter()
    given = ", ".join(f"{k}={v}" for k, v in case.given.items())
    label = f"{case.name}({given})" if given else case.name
    best, steps = collocation(case, 9, 1e-20)
    coarse, coarse_steps = collocation(case, 7, 1e-16)
    converged = disagreement(best, coarse)
    scipy = disagreement(best, scipy_radau(case))
    lines = [f"{label}: {steps} and {coarse_steps} steps"]
    lines += [f"    7 stages   {converged:.1e}", f"    SciPy      {scipy:.1e}"]
    for t, text in case.published.items():
        published = disagreement(best[case.times.index(t)], exact(text.split()))
        lines.append(f"    published  {published:.1e}  at {t:g}")
    print("\n".join(lines), f"\n    ({time.perf_counter() - start:.0f} s)", flush=True)
    if converged > REQUIRED:
        raise SystemExit(f"{label}: not converged to {REQUIRED}")
    if scipy > REQUIRED_OF_SCIPY:
        raise SystemExit(f"{label}: SciPy does not agree to {REQUIRED_OF_SCIPY}")
    entry = {"given": case.given} if case.given else {}
    return label, {**entry, "t": case.times, "u": best.astype(np.float64).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", nargs="*", help="default: all")
    parser.add_argument("--check", action="store_true", help="do not write")
    args = parser.parse_args()

    stored = json.loads(TARGET.read_text())
    chosen = [case for case in CASES if not args.problem or case.name in args.problem]
    with ProcessPoolExecutor(2) as pool:
        stored.update(pool.map(solve, chosen))
    if not args.check:
        write(stored)


if __name__ == "__main__":
    main()
