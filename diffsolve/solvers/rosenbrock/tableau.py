"""The coefficients of a Rosenbrock method.

The literature prints them in two forms: ``alpha``, ``Gamma``, ``b`` over the stages ``K``, in which
the order conditions are written, and the transformed form ``a``, ``C``, ``m`` over ``V = Gamma K``,
whose stages need no products with the Jacobian. ``RosenbrockTableau`` takes either;
``RosenbrockTableau.stages`` is the transformed form, as the step and the kernels use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from diffsolve.solvers.continuous_extension import Interpolant, cubic_hermite
from diffsolve.solvers.order_conditions import (
    Array,
    TableauError,
    check_order,
    elementary_weights,
    require,
    triangle,
)
from diffsolve.solvers.tableau import ImplicitRows, RungeKuttaTableau, as_array


@dataclass(frozen=True, eq=False, kw_only=True)
class RosenbrockStages(ImplicitRows):
    """A tableau in the form of the step, over ``n = s + 2`` rows.

    Row 0 is ``f`` at the start of the step, rows 1 to ``s`` are the stages ``V_i``, the last row is
    ``f`` at the new point: a last stage that evaluates ``f`` there shares it. With
    ``M = I / gamma - h J``::

        M V_i = f(t + c_i h, g_i) + sum_j coupling_ij V_j + h d_i df/dt
        g_i = u + h sum_j a_ij V_j

    Attributes
    ----------
    a
        Strictly lower triangular.
    coupling
        ``(n, n)``, strictly lower triangular.
    d
        ``n`` coefficients of the derivative with respect to time.
    """

    coupling: Array
    d: Array

    @cached_property
    def at_end(self) -> int:
        """The last stage, where it evaluates ``f`` at the new point; 0: it does not."""
        same = self.c[-2] == 1 and np.array_equal(self.a[-2], self.a[-1])
        return self.n - 2 if same and self.n > 3 else 0

    def elementary_weights(self, order: int) -> dict[tuple, Array]:
        """Of the rows: those of the stages ``K``, and ``V = Gamma K``."""
        gamma, full = np.zeros((self.n, self.n)), np.eye(self.n)
        inner = _inverse(np.eye(self.n - 2) / self.gamma - self.coupling[1:-1, 1:-1])
        gamma[1:-1, 1:-1] = full[1:-1, 1:-1] = inner
        alpha = self.a @ full
        of_stages = elementary_weights(alpha, order, alpha + gamma)
        return {tree: full @ phi for tree, phi in of_stages.items()}

    def linear_rows(self, z: float, u: float, g: Callable[[float], float], slope: float) -> Array:
        k = np.zeros(self.n)
        k[0] = z * u + g(0.0)
        for i in range(1, self.n - 1):
            right = z * (u + self.a[i] @ k) + g(float(self.c[i]))
            k[i] = (right + self.coupling[i] @ k + self.d[i] * slope) / (1 / self.gamma - z)
        k[-1] = z * (u + self.a[-1] @ k) + g(1.0)
        return k


@dataclass(frozen=True, eq=False)
class RosenbrockTableau(RungeKuttaTableau):
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

    alpha: Array
    gamma: Array

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
        self._set_common(name, source, order, b, b_error, error_order, interpolant)
        s = len(self.b)
        self._set(alpha=triangle(name, alpha, s), gamma=triangle(name, gamma, s, diagonal=True))
        diagonal = self.gamma.diagonal()
        if not diagonal[0] > 0 or np.any(diagonal != diagonal[0]):
            raise TableauError(f"{name}: the diagonal of gamma is not one positive number")
        if self.b_error is not None and self.b_error.shape != self.b.shape:
            raise TableauError(f"{name}: b_error has shape {self.b_error.shape}, b {self.b.shape}")
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
        e = as_array(e)
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
    def stiffly_accurate(self) -> bool:
        """Whether the last stage with a weight, ``alpha_si + gamma_si = b_i``, is the solution."""
        s = np.flatnonzero(self.b)[-1]
        return bool(np.allclose(self.alpha[s] + self.gamma[s], self.b, rtol=0, atol=1e-10))

    def _rows(
        self, gamma: float, a: Array, c: Array, m: Array, e: Array | None, nodes: Array, d: Array
    ) -> RosenbrockStages:
        s = len(m)
        if nodes.shape != (s,) or d.shape != (s,) or (e is not None and e.shape != (s,)):
            raise TableauError(f"{self.name}: nodes, d or e do not have {s} entries")
        self._require_first_node(nodes[0])

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
        self._check_embedded(form.c[1:-1], alpha, b, self.b_error, beta=alpha + gamma)
        self._require_dense_rows()
        self._check_rows()

    def _check_rows(self) -> None:
        """Check the interpolant, with ``f`` at both ends as explicit stages of the same method."""
        n = self.stages.n
        alpha, gamma = np.zeros((n, n)), np.zeros((n, n))
        alpha[1:-1, 1:-1], gamma[1:-1, 1:-1], alpha[-1, 1:-1] = self.alpha, self.gamma, self.b

        def of_k(weights: Array) -> Array:
            """Weights of the stages ``V`` as those of ``K``."""
            weights[1:-1] = weights[1:-1] @ self.gamma
            return weights

        self._check_dense(alpha, alpha + gamma, of_k)


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
