"""Solutions of equations inside a step, put on the tape: the implicit function theorem.

Let ``x_hat`` solve ``R(x, p) = 0`` at the numbers of ``p``. One Newton correction on the tape with
a constant matrix, ``x = x_hat - R_x^{-1} R(x_hat, p)``, is ``x_hat`` with the derivative
``-R_x^{-1} R_p`` of the solution. A second correction makes second derivatives exact as well.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffsolve.problems.structure import Number, as_float
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.jacobian import Push, differentiator
from diffsolve.solvers.linear import Factors, factored_step_matrix


def stage_on_tape(
    field: VectorField,
    f: Callable[[Tensor], Tensor],
    base: Tensor,
    step: Number,
    gamma: float,
    known: Tensor,
) -> tuple[Tensor, Tensor]:
    """The stage ``k = f(base + step gamma k)`` of a method, on the tape.

    Parameters
    ----------
    field, f
        Right-hand side, and what it is at the time of the stage.
    base, step, gamma
        Of the equation; ``step`` is the step size as a factor of states.
    known
        Its solution.

    Returns
    -------
    k, g
        The stage, and the state where ``f`` is evaluated.

    Raises
    ------
    RuntimeError
        If its matrix is singular, so that there is no derivative.
    """
    k, lu = known.detach(), None
    for _ in range(1 if field.differentiated_once else 2):
        g = base + (step * gamma) * k
        value = f(g)
        if lu is None:
            blocks = differentiator(field).exact_at(f, g, value)
            lu = factored_step_matrix(field, blocks, as_float(step), gamma)
            if lu is None:
                raise RuntimeError(
                    "a stage has no derivative: its matrix I - h gamma J is singular or not finite"
                )
        k = k + lu.solve((value - k) / gamma)
    return k, base + (step * gamma) * k


def linear_on_tape(
    field: VectorField,
    lu: Factors,
    known: Tensor,
    right: Tensor,
    push: Push,
    step: Number,
    gamma: float,
    d: float,
) -> Tensor:
    """The solution of ``(I / gamma - h J) x = right + h d f_t``, with the Jacobian on the tape.

    Parameters
    ----------
    field, lu
        Right-hand side, and factors of the matrix, constants.
    known
        The solution.
    right
        Right-hand side, on the tape.
    push
        Directional derivatives of ``f``, from ``push_forward``: the only thing asked of ``J``.
    step, gamma, d
        Of the equation; ``step`` is the step size as a factor of states.
    """
    x = known.detach()
    for _ in range(1 if field.differentiated_once else 2):
        x = x + lu.solve(right - x / gamma + step * push(x, d))
    return x
