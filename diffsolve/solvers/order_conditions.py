"""Rooted trees and the order conditions of one-step methods.

Shared by all families: the conditions differ only in the coefficients that lead from a vertex to
its children.
"""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
TOLERANCE = 1e-11  # decimal coefficients in the literature carry 1e-14 or so


class TableauError(ValueError):
    """A tableau is inconsistent: wrong shape, row sums, weights or order."""


def triangle(name: str, rows: ArrayLike | tuple, s: int, diagonal: bool = False) -> Array:
    """Rows of coefficients as a lower triangular ``(s, s)`` matrix.

    Parameters
    ----------
    name
        Name of the method, for the message.
    rows
        At most ``s`` rows; missing entries on the right are zero.
    s
        Number of stages.
    diagonal
        Whether the diagonal may differ from zero.

    Raises
    ------
    TableauError
        If a row is too long or has entries right of the triangle.
    """
    a = np.zeros((s, s))
    for i, row in enumerate(rows):  # type: ignore[arg-type]
        values = np.asarray(row, dtype=np.float64)
        if i >= s or len(values) > s or np.any(values[i + diagonal :]):
            kind = "diagonally implicit" if diagonal else "explicit"
            raise TableauError(f"{name}: row {i} of a does not fit {s} {kind} stages")
        a[i, : len(values)] = values
    return a


def require(defect: float, scale: Array, message: str) -> None:
    """Raise ``TableauError`` if ``defect`` is more than rounding beside the rows of ``scale``."""
    if not defect <= TOLERANCE * max(1.0, float(np.abs(scale).sum(-1).max())):
        raise TableauError(f"{message} (defect {defect:.3g})")


def check_order(
    name: str, a: Array, b: Array, order: int, theta: float = 1.0, beta: Array | None = None
) -> None:
    """Check ``b . Phi(tree) = theta**|tree| / gamma(tree)`` for every tree up to ``order``.

    Parameters
    ----------
    name
        What is checked, for the message.
    a
        Coefficients of the stages.
    b
        Weights of the solution at ``theta``.
    order
        Order to check.
    theta
        Where in the step the solution is: 1 is its end.
    beta
        Coefficients of vertices with a single child, see ``elementary_weights``.

    Raises
    ------
    TableauError
        If a condition fails.
    """
    weights = elementary_weights(a, order, beta)
    for tree, (size, density) in rooted_trees(order).items():
        phi = weights[tree]
        defect = abs(b @ phi - theta**size / density)
        scale = max(1.0, float(np.abs(b) @ np.abs(phi)))
        if not defect <= TOLERANCE * scale:
            raise TableauError(
                f"{name}: order condition of a tree with {size} nodes fails (defect {defect:.3g}); "
                f"the method does not have order {order}"
            )


def warn_if_blind(name: str, nodes: Array, single: Array, b_error: Array) -> None:
    """Warn where an error estimate is zero for a whole class of problems, whatever the step.

    Steps then grow without bound, and the solution is wrong at every tolerance.

    Parameters
    ----------
    name
        Name of the method.
    nodes
        Those of the stages.
    single
        Coefficients of vertices with a single child, as ``beta`` in ``check_order``.
    b_error
        Weights of the error estimate over the stages.
    """
    one = np.ones(len(nodes))
    sums = single @ one
    linear = [one]
    for _ in nodes:
        linear.append(single @ linear[-1])
    by_time = [one, sums, *(nodes**k for k in range(2, len(nodes) + 2))]
    for phis, problems in ((by_time, "u' = g(t)"), (linear, "linear systems u' = A u")):
        if all(abs(b_error @ x) <= TOLERANCE * max(1.0, np.abs(b_error) @ np.abs(x)) for x in phis):
            warnings.warn(
                f"{name}: the error estimate is zero for {problems}, whatever the step. Adaptive "
                "solves of such problems, or of some parts of one, are wrong at every tolerance; "
                "use fixed steps there, or other weights b_error",
                stacklevel=5,  # where the tableau is built
            )


def elementary_weights(a: Array, order: int, beta: Array | None = None) -> dict[tuple, Array]:
    """Elementary weights ``Phi_i(tree)`` of the stages, for every tree up to ``order``.

    Parameters
    ----------
    a
        Coefficients that lead from a vertex to its children.
    order
        Largest number of nodes.
    beta
        Coefficients that lead from a vertex to its only child, where they differ from ``a``:
        ``alpha + gamma`` of a Rosenbrock method, which evaluates ``f`` with ``alpha``.

    References
    ----------
    Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I (1993), section II.2;
    Hairer, Wanner, Solving Ordinary Differential Equations II (1996), section IV.7.
    """
    single = a if beta is None else beta
    weights: dict[tuple, Array] = {}
    for tree in rooted_trees(order):
        phi = np.ones(len(a))
        for child in tree:
            phi = phi * ((single if len(tree) == 1 else a) @ weights[child])
        weights[tree] = phi
    return weights


@cache
def rooted_trees(order: int) -> dict[tuple, tuple[int, float]]:
    """Rooted trees with at most ``order`` nodes, as sorted tuples of their children.

    Returns
    -------
    dict
        Tree to its number of nodes and its density ``gamma``, smaller trees first.
    """
    sized: dict[int, list[tuple]] = {1: [()]}
    info: dict[tuple, tuple[int, float]] = {(): (1, 1.0)}
    for size in range(2, order + 1):
        found = set()
        for part in range(1, size):
            # graft one branch of `part` nodes onto the root of a smaller tree
            for branch in sized[part]:
                for rest in sized[size - part]:
                    found.add(tuple(sorted((*rest, branch))))
        sized[size] = sorted(found)
        for tree in sized[size]:
            density = float(size)
            for child in tree:
                density *= info[child][1]
            info[tree] = (size, density)
    return info
