"""The formulas of stochastic methods as expressions; those of ``solvers/stochastic/``, once more.

``step_method`` finds the ones of an algorithm. Each object stands for one method, with one kind of
noise, and there is one of each.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.graph.expression import Node
from diffsolve.engines.native.programs.row_steps import Nodes, Step
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.stochastic.low_order import EM, EulerHeun, LambaEM, LambaEulerHeun
from diffsolve.solvers.stochastic.milstein import RKMil, RKMilCommute, RKMilGeneral
from diffsolve.solvers.stochastic.srk import SRA, SRI


class Formulas:
    """A method.

    Attributes
    ----------
    nodes
        Of the evaluations, in units of the step.
    needs_area
        Whether it uses ``H``.
    has_estimate, has_stiffness
        Whether it estimates its error, and the stiffness.
    """

    nodes: np.ndarray = np.array([0.0, 1.0])
    needs_area = False
    has_estimate = True
    has_stiffness = True

    def write(self, step: Step) -> None:
        """Fill in the expressions of a step."""
        raise NotImplementedError


def _difference(x: Nodes, y: Nodes) -> Nodes:
    return [a - b for a, b in zip(x, y, strict=True)]


def _sum(x: Nodes, y: Nodes) -> Nodes:
    return [a + b for a, b in zip(x, y, strict=True)]


def _scaled(x: Nodes, a: Any) -> Nodes:
    return [a * y for y in x]


def _sizes(x: Nodes) -> Nodes:
    return [y.pool.unary("abs", y) for y in x]


def _is_simple(step: Step) -> bool:
    """Whether the noise is diagonal or one Brownian motion, so that ``g`` has the state's shape."""
    return step.is_diagonal or step.m == 1


class EulerMaruyama(Formulas):
    """``low_order.py: EM``."""

    nodes = np.zeros(1)
    has_estimate = has_stiffness = False

    def write(self, step: Step) -> None:
        f, G = step.drift(0, step.u), step.diffusion(0, step.u)
        step.new = _sum(_sum(step.u, _scaled(f, step.h)), step.product(G, step.W))


class Lamba(Formulas):
    """``low_order.py: LambaEM``."""

    def __init__(self, additive: bool):
        self.additive = additive

    def write(self, step: Step) -> None:
        u = step.u
        f, G = step.drift(0, u), step.diffusion(0, u)
        K = _sum(u, _scaled(f, step.h))
        step.new = _sum(K, step.product(G, step.W))
        end = step.new if self.additive else K
        df = _difference(step.drift(1, end), f)
        step.error = _sizes(_scaled(df, step.h * 0.5))
        left_out = _by_time(step, G) if self.additive else self._of_noise(step, G)
        if left_out is not None:
            step.error = _sum(step.error, left_out)
        step.slopes = df, _difference(end, u)

    @staticmethod
    def _of_noise(step: Step, G: Nodes) -> Nodes:
        if _is_simple(step):
            return _sizes(_ito_correction(step, 1, step.u, G))
        beside = _sum(step.u, step.product(G, step.W))
        return _row_norms(step, _difference(step.diffusion(1, beside), G))


class Heun(Formulas):
    """``low_order.py: EulerHeun``, with the estimate of ``LambaEulerHeun`` or without."""

    def __init__(self, estimate: bool):
        self.has_estimate = estimate

    def write(self, step: Step) -> None:
        u, W = step.u, step.W
        f, G = step.drift(0, u), step.diffusion(0, u)
        K = _sum(_sum(u, _scaled(f, step.h)), step.product(G, W))
        df = _difference(step.drift(1, K), f)
        dG = _difference(step.diffusion(1, K), G)
        of_drift, of_noise = _scaled(df, step.h * 0.5), _scaled(step.product(dG, W), 0.5)
        step.new = _sum(_sum(K, of_drift), of_noise)
        if self.has_estimate:
            beside = _sizes(of_noise) if _is_simple(step) else _row_norms(step, dG)
            step.error = _sum(_sizes(of_drift), beside)
        step.slopes = df, _difference(K, u)


class Milstein(Formulas):
    """``milstein.py: RKMil`` and ``RKMilCommute``; the derivative at the start is made anew."""

    def __init__(self, ito: bool, additive: bool):
        self.ito, self.additive = ito, additive

    def write(self, step: Step) -> None:
        u = step.u
        f, G = step.drift(0, u), step.diffusion(0, u)
        K = _sum(u, _scaled(f, step.h))
        new, correction = _sum(K, step.product(G, step.W)), None
        if not self.additive:
            correction = self._correction(step, K, G)
            new = _sum(new, correction)
        change = _difference(step.drift(1, new), f)
        step.new, step.error = new, _sizes(_scaled(change, step.h * 0.5))
        if correction is not None:
            step.error = _sum(step.error, _sizes(correction))
        if correction is None or self.ito:
            changes = _by_time(step, G)
            if changes is not None:
                step.error = _sum(step.error, changes)
        step.slopes = change, _difference(new, u)

    def _correction(self, step: Step, K: Nodes, G: Nodes) -> Nodes:
        if not self.ito:
            beside = _sum(K, step.product(G, step.W))
            change = _difference(step.diffusion(1, beside), G)
            return step.product(change, _scaled(step.W, 0.5))
        if _is_simple(step):
            return _ito_correction(step, 0, K, G)
        total: Nodes = [step.pool.const(0.0)] * step.d
        m, W = step.m, step.W
        for j in range(m):
            column = [G[i * m + j] for i in range(step.d)]
            beside = _sum(step.u, _scaled(column, step.root))
            change = _difference(step.diffusion(0, beside), G)
            weights = [
                (W[j] * W[k] - (step.size if j == k else 0.0)) * 0.5 / step.root for k in range(m)
            ]
            total = _sum(total, step.product(change, weights))
        return total


class RungeKutta(Formulas):
    """``srk.py: SRA`` and ``SRI``, from the program of a tableau."""

    needs_area = True

    def __init__(self, program: Any, additive: bool):
        self.program, self.additive = program, additive
        self.nodes = np.array([e.c for e in program.evaluations])
        self.has_stiffness = program.count("drift") > 1

    def write(self, step: Step) -> None:
        program = self.program
        W, H = step.W, step.H
        area = [b + 0.5 * a for a, b in zip(W, H, strict=True)]  # I_(1,0) / h
        noise = [W, area] if self.additive else self._hermite(step, W, area)
        rows: list[Nodes] = []
        matrices: dict[int, Nodes] = {}
        drifts: list[tuple[Nodes, Nodes]] = []
        blank = [step.pool.const(0.0)] * step.d
        for i, e in enumerate(program.evaluations):
            state = step.u
            if not e.at_start:
                numbers = zip(e.by_h, e.by_root, e.plain, strict=True)
                weights = [self._weight(step, *w) for w in numbers]
                state = _sum(step.u, step.combined(weights, rows[: len(weights)]))
            if e.kind == "drift":
                rows.append(step.drift(i, state))
                drifts.append((rows[-1], state))
                continue
            G = matrices[len(rows)] = step.diffusion(i, state)
            rows.append(G if _is_simple(step) else blank)
            if e.weighted is not None:
                rows.append(step.product(G, area))
        of_noise = [
            self._weighed(step, matrices, beta, x)
            for beta, x in zip(program.beta, noise, strict=True)
        ]

        def parts(weights: np.ndarray, noises: list[Nodes]) -> tuple[Nodes, Nodes]:
            by_drift = _scaled(step.combined(weights, rows), step.h)
            return by_drift, [step.pool.sum(x) for x in zip(*noises, strict=True)]

        step.new = _sum(step.u, _sum(*parts(program.alpha, of_noise)))
        left_out = parts(program.alpha_error, of_noise[len(of_noise) // 2 :])
        step.error = _sum(*map(_sizes, left_out))
        if len(drifts) > 1:
            (f0, u0), (f1, u1) = drifts[-2:]
            step.slopes = _difference(f1, f0), _difference(u1, u0)

    @staticmethod
    def _weighed(step: Step, matrices: dict[int, Nodes], beta: np.ndarray, x: Nodes) -> Nodes:
        """A combination of the diffusions, applied to noise."""
        used = [(float(b), matrices[row]) for row, b in enumerate(beta) if b]
        width = len(used[0][1])
        G = [step.pool.sum([b * g[i] for b, g in used]) for i in range(width)]
        return step.product(G, x)

    @staticmethod
    def _weight(step: Step, by_h: float, by_root: float, plain: float) -> Any:
        terms: list[Node] = [x * float(w) for x, w in ((step.h, by_h), (step.root, by_root)) if w]
        if plain:
            terms.append(step.pool.const(float(plain)))
        return step.pool.sum(terms) if terms else 0.0

    @staticmethod
    def _hermite(step: Step, W: Nodes, area: Nodes) -> list[Nodes]:
        third = [(w * w / (6.0 * step.size) - 0.5) * w for w in W]
        return [W, _second(step), area, third]


def _second(step: Step) -> Nodes:
    """``(W**2 - |h|) / (2 sqrt |h|)``."""
    return [(w * w / step.root - step.root) * 0.5 for w in step.W]


def _ito_correction(step: Step, node: int, base: Nodes, G: Nodes) -> Nodes:
    """``milstein.py: ito_correction``."""
    beside = _sum(base, _scaled(G, step.root))
    return step.product(_difference(step.diffusion(node, beside), G), _second(step))


def _by_time(step: Step, G: Nodes) -> Nodes | None:
    """Magnitudes of ``time_change_of_noise``; None where ``g`` does not read the time."""
    if step.is_steady:
        step.spared += 1
        return None
    pool = step.pool
    sizes = [pool.unary("sqrt", 0.25 * w * w + step.size * (1.0 / 12.0)) for w in step.W]
    signed = [
        pool.where(pool.binary("lt", w, 0.0), -x, x) for w, x in zip(step.W, sizes, strict=True)
    ]
    return _sizes(step.product(_difference(step.diffusion(1, step.u), G), signed))


def _row_norms(step: Step, dG: Nodes) -> Nodes:
    """``low_order.py: _row_norms``; no slope where a row is zero, as in torch."""
    pool, m = step.pool, step.m
    scale = step.root * math.sqrt(0.5)
    quotients = []
    for i in range(step.d):
        square = pool.sum([x * x for x in dG[i * m : (i + 1) * m]])
        is_zero = pool.binary("eq", square, 0.0)
        root = pool.unary("sqrt", pool.where(is_zero, 1.0, square))
        quotients.append(scale * pool.where(is_zero, 0.0, root))
    return quotients


@functools.cache
def _euler() -> Formulas:
    return EulerMaruyama()


@functools.cache
def _lamba(additive: bool) -> Formulas:
    return Lamba(additive)


@functools.cache
def _heun(estimate: bool) -> Formulas:
    return Heun(estimate)


@functools.cache
def _milstein(ito: bool, additive: bool) -> Formulas:
    return Milstein(ito, additive)


@functools.lru_cache(maxsize=100)
def _runge_kutta(program: Any, additive: bool) -> Formulas:
    return RungeKutta(program, additive)


#: The classes whose steps are known here; a subclass with a step of its own is not.
_KNOWN: tuple[type[Any], ...] = (
    LambaEM, LambaEulerHeun, EM, EulerHeun, RKMil, RKMilCommute, RKMilGeneral, SRA, SRI,
)  # fmt: skip


def step_method(alg: Algorithm, noise: str, simple: bool) -> Formulas:
    """The formulas of an algorithm.

    Parameters
    ----------
    noise
        As ``SDEProblem`` has it.
    simple
        Whether it is diagonal or one Brownian motion.

    Raises
    ------
    Declined
        If there are none.
    """
    method: Any = alg
    kind = type(alg)
    base = next((x for x in _KNOWN if isinstance(alg, x)), None)
    if base is None or any(
        getattr(kind, name, None) is not getattr(base, name, None)
        for name in ("step", "init", "correction")
    ):
        raise Declined(f"{alg.name} has no compiled step")
    additive = noise == "additive"
    if base in (EM, EulerHeun):
        return _euler() if base is EM else _heun(False)
    if base in (LambaEM, LambaEulerHeun):
        return _lamba(additive) if base is LambaEM else _heun(True)
    if base in (SRA, SRI):
        return _runge_kutta(method.tableau.program, base is SRA)
    if base is RKMilGeneral and not (simple or additive):
        raise Declined(f"{alg.name} reads Levy areas from the path, which has no compiled form")
    return _milstein(method.integral == "ito", additive)
