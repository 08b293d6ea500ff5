"""Coefficients of stochastic Runge-Kutta methods, checked when they are built.

A tableau is given as in the literature. Its ``program`` is the form that the step and the kernels
use: the evaluations of drift and diffusion that are needed, each one once, in order, and what each
combines of the rows that the ones before it left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from diffsolve.solvers.order_conditions import Array, TableauError, require, triangle
from diffsolve.solvers.tableau import Frozen

Kind = Literal["drift", "diffusion"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluation of ``f`` or ``g`` at ``(t + c h, u + weights . rows)``.

    Attributes
    ----------
    kind
        ``"drift"`` or ``"diffusion"``.
    c
        Node.
    by_h, by_root, plain
        Coefficients of the rows so far: the weight of a row is
        ``by_h * h + by_root * sqrt(|h|) + plain``.
    row
        Where its value goes.
    weighted
        Row of the value times ``I_(1,0) / h``, which drift stages combine; None: none does.
    at_start
        Whether the state there is ``u`` itself.
    """

    kind: Kind
    c: float
    by_h: Array
    by_root: Array
    plain: Array
    row: int
    weighted: int | None

    @cached_property
    def at_start(self) -> bool:
        return not (self.by_h.any() or self.by_root.any() or self.plain.any())


@dataclass(frozen=True, eq=False)
class Program:
    """A tableau in the form of the step.

    Attributes
    ----------
    evaluations
        In order.
    rows
        Number of rows that they leave.
    alpha, alpha_error
        Weights ``(rows,)`` of the drift in the solution and in the error estimate, in units of
        ``h``.
    beta
        Weights ``(k, rows)`` of the diffusion that multiply the step's random variables: ``I_(1)``
        and ``I_(1,0) / h`` for additive noise, ``I_(1)``, ``I_(1,1) / sqrt(h)``, ``I_(1,0) / h``
        and ``I_(1,1,1) / h`` for diagonal noise.
    """

    evaluations: tuple[Evaluation, ...]
    rows: int
    alpha: Array
    alpha_error: Array
    beta: Array

    def count(self, kind: Kind) -> int:
        """Evaluations of ``f`` or ``g`` a step."""
        return sum(e.kind == kind for e in self.evaluations)

    @cached_property
    def nodes(self) -> Array:
        """Those of the evaluations."""
        return np.array([e.c for e in self.evaluations])

    @cached_property
    def weights(self) -> tuple[Array, Array, Array]:
        """``by_h``, ``by_root`` and ``plain`` of all: each evaluation, the solution, the error.

        The rows are followed by ``k`` more, the diffusion times the random variables, with weight
        one in the solution; the embedded solution lacks the second half of them. The error is that
        of the drift alone.
        """
        k = len(self.beta)
        shape = (len(self.evaluations) + 2, self.rows + k)
        by_h, by_root, plain = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for i, e in enumerate(self.evaluations):
            n = len(e.plain)
            by_h[i, :n], by_root[i, :n], plain[i, :n] = e.by_h, e.by_root, e.plain
        by_h[-2, : self.rows], by_h[-1, : self.rows] = self.alpha, self.alpha_error
        plain[-2, self.rows :] = 1
        return by_h, by_root, plain


@dataclass(frozen=True, eq=False)
class _StochasticTableau(Frozen):
    """What both families share; see the subclasses."""

    name: str
    source: str
    alpha: Array
    beta: Array
    a0: Array
    b0: Array
    c0: Array
    c1: Array
    alpha_embedded: Array
    program: Program = field(init=False, repr=False)

    def _fill(
        self,
        name: str,
        source: str,
        alpha: ArrayLike,
        beta: tuple[ArrayLike, ...],
        a0: ArrayLike | tuple,
        b0: ArrayLike | tuple,
        c1: ArrayLike,
        alpha_embedded: ArrayLike | None,
    ) -> int:
        """Set the fields that both families have; the number of stages."""
        weights = np.asarray(alpha, np.float64)
        s = len(weights)
        rows = [np.asarray(b, np.float64) for b in beta]
        nodes = np.asarray(c1, np.float64)
        for label, values in (*((f"beta{i}", b) for i, b in enumerate(rows, 1)), ("c1", nodes)):
            if values.shape != (s,):
                raise TableauError(f"{name}: {label} has shape {values.shape}, alpha has {s}")
        embedded = np.eye(s)[0] if alpha_embedded is None else np.asarray(alpha_embedded, float)
        if embedded.shape != (s,):
            raise TableauError(f"{name}: alpha_embedded has shape {embedded.shape}, alpha has {s}")
        drift = triangle(name, a0, s)
        self._set(
            name=name,
            source=source,
            alpha=weights,
            beta=np.stack(rows),
            a0=drift,
            b0=triangle(name, b0, s),
            c0=drift.sum(1),
            c1=nodes,
            alpha_embedded=embedded,
        )
        return s

    def _require(self, label: str, terms: Array, target: float) -> None:
        """Check that ``terms`` add up to ``target``."""
        defect = abs(float(terms.sum()) - target)
        require(defect, terms, f"{self.name}: the condition {label} fails")

    def _check_drift(self) -> None:
        """What both families ask of the drift: deterministic order 2, and the noise in it."""
        noise = self.b0.sum(1)
        for label, terms, target in (
            ("alpha e = 1", self.alpha, 1.0),
            ("alpha A0 e = 1/2", self.alpha * self.c0, 0.5),
            ("alpha B0 e = 1", self.alpha * noise, 1.0),
            ("alpha (B0 e)^2 = 3/2", self.alpha * noise**2, 1.5),
            ("alpha_embedded e = 1", self.alpha_embedded, 1.0),
        ):
            self._require(label, terms, target)


@dataclass(frozen=True, eq=False)
class SRATableau(_StochasticTableau):
    """Coefficients of a method for additive noise, of strong order 1.5.

    With ``J1 = I_(1)`` and ``J2 = I_(1,0) / h``::

        H_i   = u + h sum_j a0_ij f(t + c0_j h, H_j) + J2 sum_j b0_ij g(t + c1_j h)
        u_new = u + h sum_i alpha_i f(t + c0_i h, H_i)
                + sum_i (beta1_i J1 + beta2_i J2) g(t + c1_i h)

    and ``c0`` are the sums of the rows of ``a0``. The embedded solution of strong order 1 has the
    drift weights ``alpha_embedded`` and no terms with ``beta2``. The error estimate is the
    difference, with the magnitudes of its two parts added.

    Parameters
    ----------
    name, source
        Name of the method, and where the numbers come from.
    alpha, beta1, beta2
        ``s`` weights each.
    a0, b0
        ``s`` rows; row ``i`` holds its ``i`` coefficients left of the diagonal.
    c1
        Nodes of the diffusion.
    alpha_embedded
        Drift weights of the embedded solution. Default: all on the first stage, Euler's drift.
    checked
        Whether to check the conditions now, rather than in ``check``.

    Raises
    ------
    TableauError
        If shapes disagree or an order condition fails.

    References
    ----------
    Rößler, Runge-Kutta methods for the strong approximation of solutions of stochastic differential
    equations, SIAM J. Numer. Anal. 48 (2010) 922; the embedding: Rackauckas, Nie, Discrete Contin.
    Dyn. Syst. B 22 (2017) 2731.

    Notes
    -----
    StochasticDiffEq.jl has the sum of all drift stages, ``h sum_i f_i``, in the place of the
    difference of drifts. It is as large as the step itself, ``O(h)``, where the difference is
    ``O(h^1.5)``, and would not vanish where ``f`` is constant.
    """

    def __init__(
        self,
        name: str,
        source: str,
        alpha: ArrayLike,
        beta1: ArrayLike,
        beta2: ArrayLike,
        a0: ArrayLike | tuple,
        b0: ArrayLike | tuple,
        c1: ArrayLike,
        alpha_embedded: ArrayLike | None = None,
        checked: bool = True,
    ):
        s = self._fill(name, source, alpha, (beta1, beta2), a0, b0, c1, alpha_embedded)
        self._set(program=_compiled(self, np.zeros((s, s)), np.zeros((s, s))))
        if checked:
            self.check()

    def check(self) -> None:
        """Check the conditions of strong order 1.5 for additive noise (Rößler 2010).

        Raises
        ------
        TableauError
            If one fails.
        """
        self._check_drift()
        for i, (total, moment) in enumerate(((1.0, 1.0), (0.0, -1.0)), 1):
            beta = self.beta[i - 1]
            self._require(f"beta{i} e = {total:g}", beta, total)
            self._require(f"beta{i} c1 = {moment:g}", beta * self.c1, moment)


@dataclass(frozen=True, eq=False)
class SRITableau(_StochasticTableau):
    """Coefficients of a method for diagonal or scalar noise of Ito equations, of strong order 1.5.

    With ``J1 = I_(1)``, ``J2 = I_(1,1) / sqrt(h)``, ``J3 = I_(1,0) / h`` and
    ``J4 = I_(1,1,1) / h``, and in each sum ``f_j = f(t + c0_j h, H0_j)``,
    ``g_j = g(t + c1_j h, H1_j)``::

        H0_i  = u + h sum_j a0_ij f_j + J3 sum_j b0_ij g_j
        H1_i  = u + h sum_j a1_ij f_j + sqrt(h) sum_j b1_ij g_j
        u_new = u + h sum_i alpha_i f_i
                + sum_i (beta1_i J1 + beta2_i J2 + beta3_i J3 + beta4_i J4) g_i

    and ``c0``, ``c1`` are the sums of the rows of ``a0``, ``a1``. The embedded solution of strong
    order 1 has the drift weights ``alpha_embedded`` and no terms with ``beta3`` and ``beta4``. The
    error estimate is the difference, with the magnitudes of its two parts added.

    Parameters
    ----------
    name, source
        Name of the method, and where the numbers come from.
    alpha, beta1, beta2, beta3, beta4
        ``s`` weights each.
    a0, a1, b0, b1
        ``s`` rows; row ``i`` holds its ``i`` coefficients left of the diagonal.
    alpha_embedded
        Drift weights of the embedded solution. Default: all on the first stage, Euler's drift.
    checked
        Whether to check the conditions now, rather than in ``check``.

    Raises
    ------
    TableauError
        If shapes disagree or an order condition fails.

    References
    ----------
    Rößler, Runge-Kutta methods for the strong approximation of solutions of stochastic differential
    equations, SIAM J. Numer. Anal. 48 (2010) 922; the embedding: Rackauckas, Nie, Discrete Contin.
    Dyn. Syst. B 22 (2017) 2731.
    """

    a1: Array
    b1: Array

    def __init__(
        self,
        name: str,
        source: str,
        alpha: ArrayLike,
        beta1: ArrayLike,
        beta2: ArrayLike,
        beta3: ArrayLike,
        beta4: ArrayLike,
        a0: ArrayLike | tuple,
        a1: ArrayLike | tuple,
        b0: ArrayLike | tuple,
        b1: ArrayLike | tuple,
        alpha_embedded: ArrayLike | None = None,
        checked: bool = True,
    ):
        s = len(np.asarray(alpha))
        drift, noise = triangle(name, a1, s), triangle(name, b1, s)
        betas = (beta1, beta2, beta3, beta4)
        self._fill(name, source, alpha, betas, a0, b0, drift.sum(1), alpha_embedded)
        self._set(a1=drift, b1=noise)
        self._set(program=_compiled(self, drift, noise))
        if checked:
            self.check()

    def check(self) -> None:
        """Check the conditions of strong order 1.5 for diagonal noise (Rößler 2010).

        Raises
        ------
        TableauError
            If one fails.
        """
        self._check_drift()
        noise = self.b1.sum(1)
        vectors = {
            "e": np.ones(len(self.alpha)),
            "B1 e": noise,
            "(B1 e)^2": noise**2,
            "B1 B1 e": self.b1 @ noise,
            "A1 e": self.c1,
        }
        targets = ((1, 0, 1, 0, 1), (0, 1, 0, 0, 0), (0, 0, -1, 0, -1), (0, 0, 2, 1, 0))
        for i, (beta, wanted) in enumerate(zip(self.beta, targets, strict=True), 1):
            for (label, vector), target in zip(vectors.items(), wanted, strict=True):
                self._require(f"beta{i} {label} = {target}", beta * vector, target)
        # the mean of J1 J3 is h/2, that of J3^2 is h/3
        mixed = (self.beta[0] / 2 + self.beta[2] / 3) * (self.a1 @ self.b0.sum(1))
        self._require("beta1 A1 B0 e / 2 + beta3 A1 B0 e / 3 = 0", mixed, 0.0)


def _compiled(tableau: _StochasticTableau, a1: Array, b1: Array) -> Program:
    """The program of a tableau: stages that are equal or not used cost no evaluation."""
    merged = _Merged(tableau, a1, b1)
    needed_f, needed_g = merged.needed()
    rows = 0
    row_of_f: dict[int, int] = {}
    row_of_g: dict[int, int] = {}
    row_of_product: dict[int, int] = {}
    evaluations = []
    for i in range(len(tableau.alpha)):
        if i in needed_f:
            by_h = _spread(merged.a0[i], row_of_f, rows)
            plain = _spread(merged.b0[i], row_of_product, rows)
            node, row_of_f[i] = float(tableau.c0[i]), rows
            evaluations.append(Evaluation("drift", node, by_h, np.zeros(rows), plain, rows, None))
            rows += 1
        if i in needed_g:
            by_h = _spread(merged.a1[i], row_of_f, rows)
            by_root = _spread(merged.b1[i], row_of_g, rows)
            node, plain, weighted = float(tableau.c1[i]), np.zeros(rows), None
            if merged.b0[sorted(needed_f), i].any():
                weighted = row_of_product[i] = rows + 1
            row_of_g[i] = rows
            evaluations.append(Evaluation("diffusion", node, by_h, by_root, plain, rows, weighted))
            rows += 1 if weighted is None else 2
    return Program(
        tuple(evaluations),
        rows,
        _spread(merged.alpha, row_of_f, rows),
        _spread(merged.error, row_of_f, rows),
        _spread(merged.beta, row_of_g, rows),
    )


class _Merged:
    """The coefficients of a tableau with those of equal stages added up at the first of them."""

    def __init__(self, tableau: _StochasticTableau, a1: Array, b1: Array):
        s = len(tableau.alpha)
        self.first_f = _first_equal([(tableau.a0[i], tableau.b0[i]) for i in range(s)])
        self.first_g = _first_equal([(a1[i], b1[i], tableau.c1[i : i + 1]) for i in range(s)])

        def merged(columns: Array, firsts: list[int]) -> Array:
            out = np.zeros_like(columns)
            for i, first in enumerate(firsts):
                out[..., first] += columns[..., i]
            return out

        self.alpha = merged(tableau.alpha, self.first_f)
        self.error = merged(tableau.alpha - tableau.alpha_embedded, self.first_f)
        self.beta = merged(tableau.beta, self.first_g)
        self.a0, self.a1 = merged(tableau.a0, self.first_f), merged(a1, self.first_f)
        self.b0, self.b1 = merged(tableau.b0, self.first_g), merged(b1, self.first_g)

    def needed(self) -> tuple[set[int], set[int]]:
        """Stages whose drift, and whose diffusion, later stages or the result use."""
        needed_f: set[int] = set()
        needed_g: set[int] = set()
        for i in reversed(range(len(self.alpha))):
            later_f, later_g = sorted(needed_f), sorted(needed_g)
            uses = self.a0[later_f, i].any() or self.a1[later_g, i].any()
            if self.first_f[i] == i and (uses or self.alpha[i] or self.error[i]):
                needed_f.add(i)
            later_f = sorted(needed_f)
            uses = self.b0[later_f, i].any() or self.b1[later_g, i].any()
            if self.first_g[i] == i and (uses or self.beta[:, i].any()):
                needed_g.add(i)
        return needed_f, needed_g


def _spread(values: Array, row_of: dict[int, int], rows: int) -> Array:
    """Values of stages at the rows that the stages have."""
    out = np.zeros((*values.shape[:-1], rows))
    for i, row in row_of.items():
        out[..., row] = values[..., i]
    return out


def _first_equal(stages: list[tuple[Array, ...]]) -> list[int]:
    """For each stage the first one with the same coefficients."""
    return [
        next(j for j in range(i + 1) if all(map(np.array_equal, stages[j], stages[i])))
        for i in range(len(stages))
    ]
