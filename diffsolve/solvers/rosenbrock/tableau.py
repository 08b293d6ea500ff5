"""The coefficients of a Rosenbrock method.

The literature prints them in two forms: ``alpha``, ``Gamma``, ``b`` over the stages ``K``, in which
the order conditions are written, and the transformed form ``a``, ``C``, ``m`` over ``V = Gamma K``,
whose stages need no products with the Jacobian. ``RosenbrockTableau`` takes either;
``RosenbrockTableau.stages`` is the transformed form, as the step and the kernels use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from diffsolve.solvers.continuous_extension import Interpolant, cubic_hermite
from diffsolve.solvers.interpolation_error import interpolation_error
from diffsolve.solvers.order_conditions import (
    Array,
    TableauError,
    check_order,
    elementary_weights,
    require,
    triangle,
    warn_if_blind,
)


@dataclass(frozen=True, eq=False)
class RosenbrockStages:
    """A tableau in the form of the step, over ``n = s + 2`` rows.

    Row 0 is ``f`` at the start of the step, rows 1 to ``s`` are the stages ``V_i``, the last row is
    ``f`` at the new point: a last stage that evaluates ``f`` there shares it. With
    ``M = I / gamma - h J``::

        M V_i = f(t + c_i h, g_i) + sum_j coupling_ij V_j + h d_i df/dt
        g_i = u + h sum_j a_ij V_j

    Attributes
    ----------
    gamma
        Diagonal coefficient.
    a
        ``(n, n)``: strictly lower triangular; its last row holds the weights of the solution.
    c
        ``n`` nodes.
    coupling
        ``(n, n)``, strictly lower triangular.
    d
        ``n`` coefficients of the derivative with respect to time.
    b_error
        ``n`` weights of the error estimate, or None.
    b_error_low
        None: no Rosenbrock method here has a second estimate.
    interpolant
        Continuous extension over the ``n`` rows.
    """

    gamma: float
    a: Array
    c: Array
    coupling: Array
    d: Array
    b_error: Array | None
    b_error_low: None
    interpolant: Interpolant

    @property
    def n(self) -> int:
        return len(self.c)

    @cached_property
    def at_end(self) -> int:
        """The last stage, where it evaluates ``f`` at the new point; 0: it does not."""
        same = self.c[-2] == 1 and np.array_equal(self.a[-2], self.a[-1])
        return self.n - 2 if same and self.n > 3 else 0

    @cached_property
    def b_dense(self) -> Array | None:
        """``n`` weights of an estimate of the interpolant's error, or None."""
        known = self.interpolant.error
        return interpolation_error(self, smoothed=False) if known is None else known

    def elementary_weights(self, order: int) -> dict[tuple, Array]:
        """Of the rows: those of the stages ``K``, and ``V = Gamma K``."""
        gamma, full = np.zeros((self.n, self.n)), np.eye(self.n)
        inner = _inverse(np.eye(self.n - 2) / self.gamma - self.coupling[1:-1, 1:-1])
        gamma[1:-1, 1:-1] = full[1:-1, 1:-1] = inner
        alpha = self.a @ full
        found = elementary_weights(alpha, order, alpha + gamma)
        return {tree: full @ phi for tree, phi in found.items()}

    def linear_rows(self, z: float, u: float, g: Callable[[float], float], slope: float) -> Array:
        k = np.zeros(self.n)
        k[0] = z * u + g(0.0)
        for i in range(1, self.n - 1):
            right = z * (u + self.a[i] @ k) + g(float(self.c[i]))
            k[i] = (right + self.coupling[i] @ k + self.d[i] * slope) / (1 / self.gamma - z)
        k[-1] = z * (u + self.a[-1] @ k) + g(1.0)
        return k


@dataclass(frozen=True, eq=False)
class RosenbrockTableau:
    """Coefficients of a Rosenbrock method with ``s`` stages.

    The stages are ``K_i = f(g_i) + h J sum_j gamma_ij K_j``, where
    ``g_i = u + h sum_j alpha_ij K_j``, and the solution is ``u + h sum_i b_i K_i``.

    Parameters
    ----------
    name
        Name of the method.
    source
        Where the numbers come from.
    order
        Order of the solution that is propagated.
    alpha
        ``s`` rows, strictly lower triangular.
    gamma
        ``s`` rows, lower triangular, with the same number all along the diagonal.
    b
        ``s`` weights of the solution.
    b_error
        ``s`` weights of the error estimate, ``b - b_hat``. None: there is none.
    error_order
        Order of the embedded solution ``b_hat``; default ``order - 1``.
    interpolant
        Continuous extension over the rows of ``RosenbrockStages``. Default: the cubic Hermite
        polynomial.
    checked
        Whether to check the conditions now, rather than in ``check``.

    Raises
    ------
    TableauError
        If shapes disagree or a condition fails.

    References
    ----------
    Hairer, Wanner, Solving Ordinary Differential Equations II (1996), section IV.7; the transformed
    form is their eq. (7.25).
    """

    name: str
    source: str
    order: int
    alpha: Array
    gamma: Array
    b: Array
    b_error: Array | None = None
    error_order: int | None = None
    interpolant: Interpolant | None = None
    stages: RosenbrockStages = field(init=False, repr=False)

    def __init__(
        self,
        name: str,
        source: str,
        order: int,
        alpha: ArrayLike | tuple,
        gamma: ArrayLike | tuple,
        b: ArrayLike,
        b_error: ArrayLike | None = None,
        error_order: int | None = None,
        interpolant: Interpolant | None = None,
        checked: bool = True,
    ):
        b = np.asarray(b, dtype=np.float64)
        self._set(
            name=name,
            source=source,
            order=order,
            alpha=triangle(name, alpha, len(b)),
            gamma=triangle(name, gamma, len(b), diagonal=True),
            b=b,
            b_error=None if b_error is None else np.asarray(b_error, dtype=np.float64),
            error_order=order - 1 if error_order is None else error_order,
            interpolant=interpolant,
        )
        diagonal = self.gamma.diagonal()
        if not diagonal[0] > 0 or np.any(diagonal != diagonal[0]):
            raise TableauError(f"{name}: the diagonal of gamma is not one positive number")
        if self.b_error is not None and self.b_error.shape != b.shape:
            raise TableauError(f"{name}: b_error has shape {self.b_error.shape}, b {b.shape}")
        inverse = _inverse(self.gamma)
        stages = self._rows(
            float(diagonal[0]),
            self.alpha @ inverse,
            np.tril(-inverse, -1),
            self.b @ inverse,
            None if self.b_error is None else self.b_error @ inverse,
            self.alpha.sum(1),
            self.gamma.sum(1),
        )
        self._set(stages=stages)
        if checked:
            self.check()

    @classmethod
    def from_transformed(
        cls,
        name: str,
        source: str,
        order: int,
        gamma: float,
        a: ArrayLike | tuple,
        c: ArrayLike | tuple,
        m: ArrayLike,
        e: ArrayLike | None = None,
        error_order: int | None = None,
        interpolant: Interpolant | None = None,
        nodes: ArrayLike | None = None,
        d: ArrayLike | None = None,
        checked: bool = True,
    ) -> RosenbrockTableau:
        """Tableau from a table in transformed form, whose numbers the stages keep as they are.

        Parameters
        ----------
        name, source, order, error_order, interpolant, checked
            As above.
        gamma
            Diagonal coefficient.
        a, c
            ``s`` rows each, strictly lower triangular: ``a_ij`` and ``c_ij`` (often ``C_ij``).
        m
            ``s`` weights of the solution.
        e
            ``s`` weights of the error estimate.
        nodes, d
            ``s`` nodes and coefficients of the derivative with respect to time, which are the sums
            of the rows of ``alpha`` and ``Gamma``; computed where they are not given.
        """
        m = np.asarray(m, dtype=np.float64)
        a, c = triangle(name, a, len(m)), triangle(name, c, len(m))
        e = None if e is None else np.asarray(e, dtype=np.float64)
        full = _inverse(np.eye(len(m)) / gamma - c)
        np.fill_diagonal(full, gamma)
        made = cls(
            name,
            source,
            order,
            alpha=np.tril(a @ full, -1),
            gamma=full,
            b=m @ full,
            b_error=None if e is None else e @ full,
            error_order=error_order,
            interpolant=interpolant,
            checked=False,
        )
        alpha_sums = made.alpha.sum(1) if nodes is None else np.asarray(nodes, dtype=np.float64)
        gamma_sums = full.sum(1) if d is None else np.asarray(d, dtype=np.float64)
        made._set(stages=made._rows(gamma, a, c, m, e, alpha_sums, gamma_sums))
        if checked:
            made.check()
        return made

    @property
    def estimate_order(self) -> int:
        """Power of the step size that the error estimate falls with."""
        return min(self.order, self.error_order or 1) + 1

    @property
    def stiffly_accurate(self) -> bool:
        """Whether the last stage with a weight, ``alpha_si + gamma_si = b_i``, is the solution."""
        s = np.flatnonzero(self.b)[-1]
        return bool(np.allclose(self.alpha[s] + self.gamma[s], self.b, rtol=0, atol=1e-10))

    def _set(self, **fields: object) -> None:
        for key, value in fields.items():
            object.__setattr__(self, key, value)

    def _rows(
        self,
        gamma: float,
        a: Array,
        c: Array,
        m: Array,
        e: Array | None,
        nodes: Array,
        d: Array,
    ) -> RosenbrockStages:
        s = len(m)
        if nodes.shape != (s,) or d.shape != (s,) or (e is not None and e.shape != (s,)):
            raise TableauError(f"{self.name}: nodes, d or e do not have {s} entries")
        if nodes[0] != 0:
            raise TableauError(f"{self.name}: the first node is {nodes[0]}, not 0")

        def framed(matrix: Array, last: Array | float) -> Array:
            rows = np.zeros((s + 2, s + 2))
            rows[1:-1, 1:-1], rows[-1, 1:-1] = matrix, last
            return rows

        rows = framed(a, m)
        dense = self.interpolant or cubic_hermite(rows[-1], self.order)
        return RosenbrockStages(
            gamma=gamma,
            a=rows,
            c=np.array([0.0, *nodes, 1.0]),
            coupling=framed(c, 0.0),
            d=np.pad(d, 1),
            b_error=None if e is None else np.pad(e, 1),
            b_error_low=None,
            interpolant=dense.ending_at(rows[-1]),
        )

    def check(self) -> None:
        """Check the order conditions of the method, its estimate and its interpolant.

        Those of autonomous problems imply the others, where the nodes and the coefficients of the
        derivative with respect to time are the sums that they should be.

        Raises
        ------
        TableauError
            If one fails.
        """
        form = self.stages
        alpha, gamma, b = self.alpha, self.gamma, self.b
        require(np.abs(alpha.sum(1) - form.c[1:-1]).max(), alpha, f"{self.name}: nodes")
        require(np.abs(gamma.sum(1) - form.d[1:-1]).max(), gamma, f"{self.name}: time derivatives")
        check_order(self.name, alpha, b, self.order, beta=alpha + gamma)
        if self.b_error is not None:
            label = f"{self.name}: embedded solution"
            order = self.error_order or 1
            check_order(label, alpha, b - self.b_error, order, beta=alpha + gamma)
            warn_if_blind(self.name, form.c[1:-1], alpha + gamma, self.b_error)
        self._check_interpolant()

    def _check_interpolant(self) -> None:
        dense, n = self.stages.interpolant, self.stages.n
        if len(dense.polynomial) != n or dense.c_extra:
            raise TableauError(
                f"{self.name}: the interpolant has {len(dense.polynomial)} rows for {n} of the step"
            )
        # f at both ends are explicit stages of the same method
        alpha, gamma = np.zeros((n, n)), np.zeros((n, n))
        alpha[1:-1, 1:-1], gamma[1:-1, 1:-1], alpha[-1, 1:-1] = self.alpha, self.gamma, self.b
        for theta in (0.25, 0.5, 0.75, 1.0):
            weights = dense.weights(theta)
            weights[1:-1] = weights[1:-1] @ self.gamma  # of V into those of K
            label = f"{self.name}: interpolant at theta={theta}"
            check_order(label, alpha, weights, dense.order, theta, beta=alpha + gamma)


def _inverse(matrix: Array) -> Array:
    """Inverse of a lower triangular matrix, without rounding errors above its diagonal."""
    return np.tril(np.linalg.inv(matrix)).astype(np.float64)


def rodas_interpolant(order: int, m: ArrayLike, rows: ArrayLike | tuple) -> Interpolant:
    """Continuous extension of the Rodas family.

    It is ``(1-theta) u0 + theta (u1 + (1-theta) (D_1 + theta D_2 + theta**2 D_3 + ...))``, with
    combinations ``D_k = h sum_j rows_kj V_j`` of the stages.

    Parameters
    ----------
    order
        Order of the interpolant.
    m
        ``s`` weights of the solution.
    rows
        The weights of ``D_1``, ``D_2``, ...: ``s`` each.

    References
    ----------
    Hairer, Wanner, Solving Ordinary Differential Equations II (1996), section VI.4, and the code
    RODAS.
    """
    inner = np.asarray(rows, dtype=np.float64)
    s = inner.shape[1]
    # theta u1 + theta (1 - theta) D_1 + theta**2 (1 - theta) D_2 + ..., by powers of theta
    powers = np.zeros((len(inner) + 1, s + 2))
    powers[0, 1:-1] = m
    powers[:-1, 1:-1] += inner
    powers[1:, 1:-1] -= inner
    return Interpolant(order, powers.T)
