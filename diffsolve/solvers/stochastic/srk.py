"""Stochastic Runge-Kutta methods of strong order 1.5: SRA for additive, SRI for diagonal noise.

The formulas of a family stand once. What differs is where its rows go: into buffers, for speed,
where nothing is recorded; into fresh tensors where autograd or a ``torch.func`` transform looks on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.sde_field import Increment, SDEField
from diffsolve.solvers.algorithm import Step
from diffsolve.solvers.stage_rows import constant
from diffsolve.solvers.stochastic import tableaus
from diffsolve.solvers.stochastic.method import (
    PathInterpolant,
    StochasticMethod,
    register,
    root,
    scaled,
)
from diffsolve.solvers.stochastic.tableau import Program, SRATableau, SRITableau
from diffsolve.solvers.tableau_method import Named, OfTableau


class _SRK(OfTableau, StochasticMethod):
    """Base of both families: a tableau and what follows from it."""

    strong_order = 1.5
    estimate_order = 1.0
    adaptive = True
    needs_levy_area = True


class SRA(_SRK):
    """Method for additive noise of any tableau, adaptive, of strong order 1.5 and weak order 2.

    The noise may have any shape that ``noise="additive"`` allows. The error estimate is the
    difference from the embedded solution of strong order 1, see the tableau.

    Parameters
    ----------
    tableau
        Its coefficients, checked when the tableau was built.

    Raises
    ------
    TypeError
        If ``tableau`` is not an ``SRATableau``.

    References
    ----------
    Rößler, SIAM J. Numer. Anal. 48 (2010) 922.
    """

    noise_types = frozenset({"additive"})
    interpretation = frozenset({"ito", "stratonovich"})
    weak_order = 2.0
    tableau_type = SRATableau

    def step(self, field: Any, t: Any, h: Any, state: tuple[Tensor, ...]) -> Step:
        return additive_step(field, self.tableau.program, t, h, state[0])


class SRI(_SRK):
    """Method for diagonal or scalar noise of any tableau, adaptive, of strong and weak order 1.5.

    Diagonal noise is that of a ``g`` whose component ``i`` depends on component ``i`` of ``u``;
    with another ``g`` the methods of this family have strong order 1/2. The error estimate is the
    difference from the embedded solution of strong order 1, see the tableau.

    Parameters
    ----------
    tableau
        Its coefficients, checked when the tableau was built.

    Raises
    ------
    TypeError
        If ``tableau`` is not an ``SRITableau``.

    References
    ----------
    Rößler, SIAM J. Numer. Anal. 48 (2010) 922.

    Notes
    -----
    The documentation of StochasticDiffEq.jl says weak order 2. But the third derivative of ``g``,
    for one, enters ``E[(u_new - u)^2]`` with ``h^2.5``, by ``(beta1 + beta3/2) (B1 e)^3``, which no
    condition of strong order 1.5 makes vanish: it is -1/4 for SRIW1 and 2.84 for SOSRI.
    """

    noise_types = frozenset({"diagonal", "scalar"})
    interpretation = frozenset({"ito"})
    weak_order = 1.5
    tableau_type = SRITableau

    def step(self, field: Any, t: Any, h: Any, state: tuple[Tensor, ...]) -> Step:
        return diagonal_step(field, self.tableau.program, t, h, state[0])


class SRA1(Named, SRA):
    """Rößler's SRA1: two evaluations of ``f`` and of ``g`` a step.

    References
    ----------
    Rößler, SIAM J. Numer. Anal. 48 (2010) 922.
    """

    coefficients = tableaus.SRA1


class SOSRA(Named, SRA):
    """Stability-optimised method for additive noise: three evaluations of ``f`` and ``g`` a step.

    References
    ----------
    Rackauckas, Nie, IEEE HPEC (2020), arXiv:1804.04344.
    """

    coefficients = tableaus.SOSRA


class SRIW1(Named, SRI):
    """Rößler's SRIW1: two evaluations of ``f`` and four of ``g`` a step.

    References
    ----------
    Rößler, SIAM J. Numer. Anal. 48 (2010) 922.
    """

    coefficients = tableaus.SRIW1


class SOSRI(Named, SRI):
    """Stability-optimised method for diagonal noise: four evaluations of ``f`` and ``g`` a step.

    Two of its evaluations of ``f`` are outside of the step, at ``t - 0.042 h`` and ``t + 3.75 h``,
    and so before the start and beyond the end of ``tspan``; none is beyond a time of ``tstops``
    that bounds the step. Where ``f`` must not be evaluated outside, use ``SRIW1()``.

    References
    ----------
    Rackauckas, Nie, IEEE HPEC (2020), arXiv:1804.04344.
    """

    coefficients = tableaus.SOSRI


for _method in (SOSRI(), SRIW1(), SOSRA(), SRA1()):
    register(_method)


# -- the steps ---------------------------------------------------------------------------------


def diagonal_step(field: SDEField, program: Program, t: Any, h: Any, u: Tensor) -> Step:
    """Attempt a step with diagonal or scalar noise; on the tape when autograd records.

    Parameters
    ----------
    field, t, h, u
        The step; ``u`` flat.
    program
        Of an ``SRITableau``.
    """
    rows = _rows(field, program, h)
    W, H = (flat_noise(field, x) for x in both(field.increment(t, h)))
    J1, J2, J3, J4 = rows.noise
    # Hermite polynomials of W, whose variance is |h| backward in time, too
    side = root(h, W.dtype)
    size, square = side * side, W * W
    J2 = torch.sub(square * (0.5 / side), 0.5 * side, out=J2)
    J3 = torch.add(H, W, alpha=0.5, out=J3)
    J4 = torch.mul(square.mul_(1 / (6 * size)).sub_(0.5), W, out=J4)
    start = _evaluate(field, rows, t, h, u, J3)
    rows.weigh_noise((rows.kept(W, J1), J2, J3, J4))
    return _finish(field, rows, t, h, u, start)


def additive_step(field: SDEField, program: Program, t: Any, h: Any, u: Tensor) -> Step:
    """Attempt a step with additive noise; on the tape when autograd records.

    Parameters
    ----------
    field, t, h, u
        The step; ``u`` flat.
    program
        Of an ``SRATableau``.
    """
    rows = _rows(field, program, h)
    W, H = both(field.increment(t, h))
    if field.is_diagonal or field.m == 1:
        J1, J2 = rows.noise
        W, H = flat_noise(field, W), flat_noise(field, H)
        J2 = torch.add(H, W, alpha=0.5, out=J2)
        start = _evaluate(field, rows, t, h, u, J2)
        rows.weigh_noise((rows.kept(W, J1), J2))
    else:
        J2 = torch.add(H, W, alpha=0.5)
        start = _evaluate(field, rows, t, h, u, J2)
        for i, noise in enumerate((W, J2)):
            combined = _combined(rows.matrices, program.beta[i])
            rows.put(program.rows + i, field.product(combined, noise))
    return _finish(field, rows, t, h, u, start)


def both(increment: Increment) -> tuple[Tensor, Tensor]:
    """``W`` and ``H``, which the path was asked for."""
    W, H = increment
    assert H is not None
    return W, H


def flat_noise(field: SDEField, w: Tensor) -> Tensor:
    """Noise ``(R, m)`` as a factor of flat states, where ``g`` is diagonal or ``m`` is 1."""
    return (w if field.is_diagonal else w.expand(field.rows, field.d)).reshape(-1)


def _evaluate(field: SDEField, rows: _Rows, t: Any, h: Any, u: Tensor, J: Tensor) -> Tensor:
    """Fill the rows of the stages, and return the diffusion nearest to the start.

    ``J`` is ``I_(1,0) / h``: flat where products with ``g`` go entry by entry, else ``(R, m)``.
    """
    start, earliest = u, math.inf
    times = field.times(t, h, rows.program.nodes)
    for i, (e, time) in enumerate(zip(rows.program.evaluations, times, strict=True)):
        at = u if e.at_start else rows.state(i, u)
        if e.kind == "drift":
            rows.drifts.append((rows.put(e.row, field(time, at)), at))
            continue
        G = field.diffusion(time, at)
        if abs(e.c) < earliest:
            start, earliest = G, abs(e.c)
        if J.dim() > 1:
            rows.matrices.append((e.row, G))
            if e.weighted is not None:
                rows.put(e.weighted, field.product(G, J))
            continue
        flat = G if field.is_diagonal else G.reshape(-1)
        rows.put(e.row, flat)
        if e.weighted is not None:
            rows.put_product(e.weighted, flat, J)
    return start


def _combined(matrices: list[tuple[int, Tensor]], beta: np.ndarray) -> Tensor:
    (row, G), *rest = matrices
    total = G * float(beta[row])
    for row, G in rest:
        total = total.add(G, alpha=float(beta[row]))
    return total


def _finish(field: SDEField, rows: _Rows, t: Any, h: Any, u: Tensor, start: Tensor) -> Step:
    new, error = rows.results(u)
    stiffness = None
    if len(rows.drifts) > 1:
        (f0, u0), (f1, u1) = rows.drifts[-2:]
        stiffness = (f1 - f0, u1 - u0)
    return Step((new,), error, stiffness, PathInterpolant(field, t, h, u, new, start))


# -- their rows --------------------------------------------------------------------------------


class _Rows:
    """Rows of one step: what its evaluations gave, flat, then the noise; see ``Program.weights``.

    Attributes
    ----------
    drifts
        Derivatives and the states where they were evaluated.
    matrices
        Row and value of the diffusion, where that is no flat tensor.
    noise
        Where the random variables of the step go, or None.
    """

    def __init__(self, field: SDEField, program: Program):
        self.program = program
        self.by_h, self.by_root, self.plain = (constant(field, x) for x in program.weights)
        self.beta = constant(field, program.beta)
        self.sizes = [len(e.plain) for e in program.evaluations]
        self.drifts: list[tuple[Tensor, Tensor]] = []
        self.matrices: list[tuple[int, Tensor]] = []
        self.noise: Sequence[Any] = [None] * len(program.beta)

    def put(self, row: int, value: Tensor) -> Tensor:
        """Keep a row; it is returned as it is kept."""
        raise NotImplementedError

    def put_product(self, row: int, a: Tensor, b: Tensor) -> None:
        raise NotImplementedError

    def kept(self, w: Tensor, out: Tensor | None) -> Tensor:
        """``w``, in ``out`` where that is a place for it."""
        raise NotImplementedError

    def state(self, i: int, u: Tensor) -> Tensor:
        """The state of evaluation ``i``."""
        raise NotImplementedError

    def weigh_noise(self, noise: tuple[Tensor, ...]) -> None:
        """Fill the last rows: the diffusion, weighed by ``beta``, times the random variables."""
        raise NotImplementedError

    def results(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The new state and the error."""
        raise NotImplementedError


class _Recorded(_Rows):
    """Fresh tensors, for steps that are recorded."""

    def __init__(self, field: SDEField, program: Program, h: Any):
        super().__init__(field, program)
        by_h = scaled(self.by_h, h)
        self.weights = self.plain + scaled(self.by_root, root(h)) + by_h
        self.rows: list[Any] = [None] * by_h.shape[1]
        # a row of a matrix of diffusion stays blank: what products need of it has rows of its own
        self.blank = torch.zeros(field.structure.size, dtype=field.dtype, device=field.device)

    def put(self, row: int, value: Tensor) -> Tensor:
        self.rows[row] = value
        return value

    def put_product(self, row: int, a: Tensor, b: Tensor) -> None:
        self.rows[row] = a * b

    def kept(self, w: Tensor, out: Tensor | None) -> Tensor:
        return w

    def columns(self, n: int) -> Tensor:
        return torch.stack([self.blank if x is None else x for x in self.rows[:n]], 1)

    def state(self, i: int, u: Tensor) -> Tensor:
        n = self.sizes[i]
        return u + self.columns(n) @ self.weights[i, :n]

    def weigh_noise(self, noise: tuple[Tensor, ...]) -> None:
        n = self.program.rows
        self.rows[n:] = (self.columns(n) @ self.beta.T * torch.stack(noise, 1)).unbind(1)

    def results(self, u: Tensor) -> tuple[Tensor, Tensor]:
        columns, k = self.columns(len(self.rows)), len(self.noise) // 2
        drift, noise = columns @ self.weights[-1], columns[:, -k:].sum(1)
        return u + columns @ self.weights[-2], drift.abs() + noise.abs()


class _Buffered(_Rows):
    """Buffers, and views of them, that one solve uses again in every step."""

    def __init__(self, field: SDEField, program: Program):
        super().__init__(field, program)
        n, k = program.rows, len(program.beta)
        # rows that are never written, those of matrices of diffusion, have to be finite
        rows = torch.zeros(n + k, field.structure.size, dtype=field.dtype, device=field.device)
        self.rows, self.columns = rows.unbind(0), rows.T
        self.stages, self.weighed = rows[:n], rows[n:]
        self.numbers = torch.empty_like(self.weighed)
        self.noise = self.numbers.unbind(0)
        self.weights = torch.empty_like(self.by_h)
        sizes = enumerate(self.sizes)
        self.prefixes = [(self.columns[:, :j], self.weights[i, :j]) for i, j in sizes]
        self.of_new, self.of_error = self.weights[-2], (self.columns[:, :n], self.weights[-1, :n])

    def begin(self, h: float) -> None:
        torch.add(self.plain, self.by_root, alpha=root(h), out=self.weights)
        self.weights.add_(self.by_h, alpha=h)
        self.drifts, self.matrices = [], []

    def put(self, row: int, value: Tensor) -> Tensor:
        return self.rows[row].copy_(value)

    def put_product(self, row: int, a: Tensor, b: Tensor) -> None:
        torch.mul(a, b, out=self.rows[row])

    def kept(self, w: Tensor, out: Tensor | None) -> Tensor:
        return w if out is None else out.copy_(w)

    def state(self, i: int, u: Tensor) -> Tensor:
        return torch.addmv(u, *self.prefixes[i])

    def weigh_noise(self, noise: tuple[Tensor, ...]) -> None:
        torch.mm(self.beta, self.stages, out=self.weighed)
        self.weighed.mul_(self.numbers)

    def results(self, u: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.addmv(u, self.columns, self.of_new)
        drift = torch.mv(*self.of_error)
        noise, *others = self.rows[-len(self.noise) // 2 :]
        for other in others:
            noise = noise + other
        return new, drift.abs_().add_(noise.abs())


def _rows(field: SDEField, program: Program, h: Any) -> Any:
    if torch.is_grad_enabled():
        return _Recorded(field, program, h)
    rows = field.workspace.get(_Buffered)
    if rows is None or rows.program is not program:
        rows = field.workspace.put(_Buffered(field, program))
    rows.begin(h)
    return rows
