"""Steps that are stable also for what the solution does not show.

The error estimate of an explicit method sees a mode of the solution once it has grown to the
tolerance. Up to then steps may be too long for it, shorter ones make up for them, and the solution
is right. The derivative of the steps is not: with sizes that are constants, each step too long
multiplies the mode in the gradient. So where the steps are to be differentiated, their size is
limited by the largest eigenvalues of the Jacobian, whatever the solution holds of their modes.
``solvers/kernels/stable_steps.py`` does the same in machine code: change one, change the other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.structure import detached
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.stability_constants import (
    AGREEMENT,
    DIRECTIONS,
    FASTER,
    GROWN,
    GROWTH_IN_ALL,
    GROWTHS,
    HALF,
    MIXED,
    MOST_LOOKS,
    MOST_WAIT,
    NEAR,
    NEW,
    NONLINEAR,
    TOO_LONG,
    WIDER,
)


class StableSteps:
    """The limit of the step size, kept up to date by products with the Jacobian.

    A power iteration goes along with the solve. Two products a look give the Jacobian on the plane
    that they span, whose two eigenvalues tell the direction in the complex plane, too; a pair in
    agreement with the one before lets the next look wait.

    Parameters
    ----------
    field
        Right-hand side.
    sizes
        What ``stable_sizes`` gives for the method.
    span
        Length of the whole solve.
    evaluations
        Of the right-hand side in a step.

    Attributes
    ----------
    limit
        Of the step size; infinite where nothing limits it.
    rate
        Magnitude of the eigenvalue that it comes from.

    References
    ----------
    Power iteration with differences beside the solve: Sommeijer, Shampine, Verwer, J. Comput. Appl.
    Math. 88 (1998) 315. Eigenvalues on a Krylov space: Saad, Numerical Methods for Large Eigenvalue
    Problems (2011), section 6.2.
    """

    def __init__(self, field: VectorField, sizes: np.ndarray, evaluations: int, span: float):
        self.field, self.sizes, self.span = field, sizes, span
        self._most_wait = most_wait(evaluations)
        self.limit, self.rate = math.inf, 0.0
        self._direction: Tensor | None = None
        self._seen = math.inf  # size of the step at the last look
        self._age, self._wait, self._last_wait, self._sure = 1, 1, 1, False
        self._eps = max(torch.finfo(field.dtype).eps, field.low_eps)

    def accepted(self) -> None:
        """Take note of an accepted step."""
        self._age += 1

    def look_again(self) -> None:
        """The right-hand side may have jumped."""
        self._age = self._wait

    def update(self, t: Any, direction: float, u: Tensor, du: Tensor, size: Any) -> None:
        """Look at the Jacobian at ``(t, u)``, where a step of ``size`` asks for that."""
        wanted = float(detached(size))
        near = wanted > NEAR * self.limit
        if self._age >= self._wait or (near and not self._sure):
            self._look_until_agreed(t, direction, u, du, wanted)

    def refuses(
        self, t: Any, direction: float, u: Tensor, du: Tensor, size: Any, stiffness: Any
    ) -> bool:
        """Whether a step to ``(t, u)`` turns out to be too long for the Jacobian there.

        Looked at where its own estimate of the stiffness is more than what is known, where it is
        much longer than the step before which the Jacobian was seen, and near a new limit.
        """
        taken = float(detached(size))
        known = max(FASTER * self.rate, HALF * float(self.sizes[0, -1]) / taken)
        is_new = taken > NEAR * self.limit and self._wait <= NEW
        is_new = is_new or taken > GROWN * self._seen
        if float(detached(stiffness)) <= known and not is_new:
            return False
        self._look_until_agreed(t, direction, u, du, taken)
        refused = taken > TOO_LONG * self.limit
        self._age = self._wait if refused else -1  # where it ends the next one starts
        return refused

    def stiffness_of(self, size: Any, stiffness: Any) -> float:
        """The stiffness where it limits a step of this size: what an estimate may not see."""
        limits = float(detached(size)) >= self.limit
        return max(float(detached(stiffness)), self.rate if limits else 0.0)

    def _look_until_agreed(
        self, t: Any, direction: float, u: Tensor, du: Tensor, wanted: float
    ) -> None:
        near, agreed = wanted > NEAR * self.limit, False
        for _ in range(MOST_LOOKS):
            before = self.limit
            self._look(t, direction, u.detach(), du.detach(), wanted, near)
            near = wanted > NEAR * self.limit
            agreed = abs(self.limit - before) <= AGREEMENT * before
            if agreed or not wanted > self.limit:
                break
        self._age, self._sure, self._seen = 0, near, wanted
        self._wait = self._most_wait
        if near:
            self._wait = min(2 * self._last_wait, self._most_wait) if agreed else 1
        self._last_wait = self._wait if near else 1

    def _look(self, t: Any, sign: float, u: Tensor, du: Tensor, size: float, checked: bool) -> None:
        fresh = pseudo_random(u)
        w = fresh if self._direction is None else self._direction
        w = w / torch.linalg.vector_norm(w)
        norms = torch.linalg.vector_norm(u) + size * torch.linalg.vector_norm(du)
        delta = self._eps**0.75 * torch.where(norms > 0, norms, torch.ones_like(norms))
        time = self.field.after(t, sign)

        def product(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """``J v``, its squared norm, and that of its difference from a wider one."""
            with torch.no_grad():
                y = (self.field(time, u + delta * v) - du) / delta
                square = _dot(y, y)
                if not checked:
                    return y, square, torch.zeros_like(square)
                wide = delta * WIDER
                off = (self.field(time, u + wide * v) - du) / wide - y
            return y, square, _dot(off, off)

        a, aa, a_off = product(w)
        alpha = aa.sqrt()
        v = a / torch.where(alpha > 0, alpha, torch.ones_like(alpha))
        b, bb, b_off = product(v)
        numbers = torch.stack([aa, bb, _dot(w, a), _dot(w, b), _dot(a, b), a_off, b_off])
        aa, bb, wa, wb, ab, a_off, b_off = detached(numbers).to(torch.float64).tolist()
        sane = 0 < aa + bb < math.inf
        self._direction = None
        self.limit, self.rate = math.inf, 0.0
        if not sane or a_off > NONLINEAR**2 * aa or b_off > NONLINEAR**2 * bb:
            return
        if bb > 0:
            mixed = MIXED * math.sqrt(3 / u.numel())
            self._direction = b / math.sqrt(bb) + mixed * fresh
        for real, imaginary in eigenvalues(aa, wa, wb, ab, self._eps):
            limit = self._size_for(sign * real, imaginary)
            if limit < self.limit:
                self.limit, self.rate = limit, math.hypot(real, imaginary)

    def _size_for(self, real: float, imaginary: float) -> float:
        """Largest step for a mode; one that grows is limited by its rotation alone.

        ``real`` is the part of the eigenvalue along the direction of the solve.
        """
        size = imaginary if real >= 0 else math.hypot(real, imaginary)
        if size == 0:
            return math.inf
        row = math.log10(max(size * self.span / GROWTH_IN_ALL, 10.0)) - 1
        column = max(-real, 0.0) / size * (DIRECTIONS - 1)
        j, i = min(int(row), len(GROWTHS) - 2), min(int(column), DIRECTIONS - 2)
        y, x = min(row - j, 1.0), column - i
        low, high = self.sizes[j : j + 2, i : i + 2] @ (1 - x, x)
        return float(low + y * (high - low)) / size


def most_wait(evaluations: int) -> int:
    """Steps from one look to the next, at most, of a method with so many evaluations a step."""
    return -(-MOST_WAIT // evaluations)


def eigenvalues(
    aa: float, wa: float, wb: float, ab: float, eps: float
) -> list[tuple[float, float]]:
    """Those of ``J`` on the plane of ``w`` and ``a = J w``; of a pair one.

    Parameters
    ----------
    aa, wa, wb, ab
        Inner products, where ``w`` has norm 1 and ``b = J a / |a|``.
    eps
        Relative rounding of ``f``.
    """
    alpha = math.sqrt(aa)
    rest = aa - wa * wa  # squared norm of what a has beside w
    if rest <= eps**0.25 * aa:  # w is an eigenvector, as far as differences can tell
        return [(wa, 0.0)]
    coupling = alpha * wb - wa * wa
    other = (alpha * ab - wa * aa - wa * coupling) / rest
    middle, shift = 0.5 * (wa + other), 0.5 * (wa - other)
    square = shift * shift + coupling
    if square < 0:
        return [(middle, math.sqrt(-square))]
    root = math.sqrt(square)
    return [(middle - root, 0.0), (middle + root, 0.0)]


def pseudo_random(like: Tensor) -> Tensor:
    """Numbers between -1 and 1 that have something of every mode, always the same.

    The mixing is that of MurmurHash3 by Appleby, in 32 bits.
    """
    x = torch.arange(1, like.numel() + 1, dtype=torch.int64, device=like.device) * 0x9E3779B1
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) / 2.0**31 - 1.0).to(like.dtype)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of the real numbers that they consist of."""
    if x.is_complex():
        x, y = torch.view_as_real(x).reshape(-1), torch.view_as_real(y).reshape(-1)
    return torch.dot(x, y)
