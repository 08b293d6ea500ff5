"""One step of an (E)SDIRK method in machine code, and its reverse; the formulas of ``step.py``.

The stages are found by simplified Newton iterations whose matrix is used again from step to step
(Hairer, Wanner, Solving ODEs II, section IV.8); the reverse follows from the implicit function
theorem with the Jacobian at each stage.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.estimates import NEW, TOTAL
from diffsolve.solvers.kernels.implicit import combine_smoothed
from diffsolve.solvers.kernels.linear import (
    evaluate_jacobian,
    factor,
    jacobian_of_step,
    solve,
    solve_transposed,
    through_jacobian,
)
from diffsolve.solvers.kernels.memory import cast, inlined, integers, reals, view
from diffsolve.solvers.kernels.norms import add_scaled, copy, fill_zero, scaled_norm
from diffsolve.solvers.kernels.rows import (
    bar_row,
    combine,
    field_at,
    row,
    stage,
    stage_bar,
    through_combination,
    vjp_at,
)

_MOST_ITERATIONS = 10
_SLOW = 0.2  # rate of convergence that asks for a new Jacobian
_REUSE = 0.2  # change of the step size up to which the matrix is kept
_EXACT = 1e-5  # a first correction that says that there is nothing to correct


@inlined
def newton(I, R, t, h, i, base, like):
    """Solve stage ``i``: whether that converged, and the worst rate of convergence."""
    n = I[L.N]
    node = reals(I[L.C])[i]
    step = h * reals(I[L.GAMMA])[0]
    k, g = stage(I, i, like), row(I, L.W_NEW, like)
    delta, u = row(I, L.W_LOW, like), row(I, L.W_U, like)
    scale = cast(1.0 / reals(I[L.GAMMA])[0], like)
    eta = R[L.NEWTON_ETA]
    eta = (eta if eta > 2.2e-16 else 2.2e-16) ** 0.8
    other = abs(h / R[L.FACTORED_H] - 1.0)  # no faster than the step size in the factors differs
    eta = other if other > eta else eta
    before, theta, slowest = 0.0, 0.0, 0.0
    I[L.FAILURE] = L.NOT_CONVERGED  # unless it converges
    for m in range(1, _MOST_ITERATIONS + 1):
        copy(n, base, g, like)
        add_scaled(n, step, k, g, like)
        field_at(I, R, t + node * h, t, t + h, g, delta, like)
        x, y = view(delta, like), view(k, like)
        for j in range(n):
            x[j] = (x[j] - y[j]) * scale
        solve(I, R, delta, like)
        add_scaled(n, 1.0, delta, k, like)
        I[L.NNEWTON] += 1
        size = abs(step) * scaled_norm(I, delta, u, u, like)
        if not size < math.inf:
            I[L.FAILURE] = L.NOT_FINITE
            return False, 1.0
        if m > 1:
            rate = size / before if before > 0.0 else 0.0
            theta = rate if rate > 0.3 * theta else 0.3 * theta
            slowest = theta if theta > slowest else slowest
            if theta >= 1.0:
                return False, 1.0
            eta = theta / (1.0 - theta)
            left = theta ** float(_MOST_ITERATIONS - m) / (1.0 - theta) * size
            if left > R[L.KAPPA]:
                return False, 1.0
        if eta * size < R[L.KAPPA] or (m == 1 and size <= _EXACT):
            R[L.NEWTON_ETA], I[L.FAILURE] = eta, 0
            copy(n, base, g, like)
            add_scaled(n, step, k, g, like)
            return True, slowest
        before = size
    return False, 1.0


@inlined
def solve_stages(I, R, t, h, like):
    """All stages from row 1 on; leaves the new state in ``W_NEW``."""
    n, stages = I[L.N], I[L.STAGES]
    implicit, nodes = integers(I[L.IMPLICIT]), reals(I[L.C])
    predictor, base, slowest = reals(I[L.PREDICTOR]), row(I, L.W_TEMP, like), 0.0
    for i in range(1, stages):
        k = stage(I, i, like)
        if implicit[i] == 0:
            g = row(I, L.W_NEW, like)
            combine(I, I[L.A], i * stages, i, h, g, like)
            field_at(I, R, t + nodes[i] * h, t, t + h, g, k, like)
            continue
        combine(I, I[L.A], i * stages, i, h, base, like)
        fill_zero(n, k, like)
        for j in range(i):
            if predictor[i * stages + j] != 0.0:
                add_scaled(n, predictor[i * stages + j], stage(I, j, like), k, like)
        converged, rate = newton(I, R, t, h, i, base, like)
        if not converged:
            R[L.NEWTON_ETA] = 1.0
            return False
        slowest = rate if rate > slowest else slowest
    if slowest > _SLOW:
        I[L.STALE] = 1
    return True


@inlined
def take_step(I, R, t, h, like):
    """Stages, new state and error row of a step from ``W_U, W_DU``; whether Newton converged."""
    n, smoothed = I[L.N], I[L.SMOOTHED] != 0
    u = row(I, L.W_U, like)
    copy(n, row(I, L.W_DU, like), stage(I, 0, like), like)
    renew = I[L.HAS_JAC] == 0 or smoothed or I[L.STALE] != 0
    if renew and not jacobian_of_step(I, R, t, h, u, like):
        return False
    while True:
        kept = I[L.FACTORED] != 0 and abs(h / R[L.FACTORED_H] - 1.0) <= _REUSE
        if smoothed and R[L.FACTORED_H] != h:
            kept = False
        if not kept and not factor(I, R, h, like):
            return False
        if solve_stages(I, R, t, h, like):
            break
        if I[L.FRESH] != 0:
            return False
        if not jacobian_of_step(I, R, t, h, u, like):
            return False
    if I[L.B_ERROR] != 0:
        combine_smoothed(I, R, h, like)
    return True


@inlined
def recall(I, R, t, h, inside, like):
    """Make the stages of a step and its new state for the reverse pass; whether that worked."""
    if I[L.STATE_ROWS] == 2:
        return take_step(I, R, t, h, like)
    count, last = I[L.STAGES], I[L.STAGES] - 1
    combine(I, I[L.A], last * count, count, h, row(I, L.W_NEW, like), like)
    return True


@inlined
def reverse_step(I, R, t, h, like):
    """Pull the cotangents of the stages and of the new state back to the start of the step.

    That of the state is added to the row ``TOTAL``, that of the derivative there is left in its
    row. ``W_DU`` is used as work space.
    """
    n, stages = I[L.N], I[L.STAGES]
    implicit, nodes = integers(I[L.IMPLICIT]), reals(I[L.C])
    gamma = reals(I[L.GAMMA])[0]
    total, g, bar = bar_row(I, TOTAL, like), row(I, L.W_TEMP, like), row(I, L.W_DU, like)
    if I[L.STIFFNESS_BARS] != 0 or (I[L.SMOOTHED] != 0 and I[L.B_ERROR] != 0):
        through_jacobian(I, t, h, total, like)  # what the estimates left there
    I[L.FRESH] = 0
    for i in range(stages - 1, 0, -1):
        w = stage_bar(I, i, like)
        time = t + nodes[i] * h
        # of the state that the stage is evaluated at
        combine(I, I[L.A], i * stages, i + 1, h, g, like)
        if implicit[i] != 0:
            if i == stages - 1:
                add_scaled(n, h * gamma, bar_row(I, NEW, like), w, like)
            evaluate_jacobian(I, R, time, t, t + h, g, like)
            factor(I, R, h, like)
            x, scale = view(w, like), cast(1.0 / gamma, like)
            for j in range(n):
                x[j] *= scale
            solve_transposed(I, R, w, like)
        vjp_at(I, time, t, t + h, g, w, bar, like)
        if i == stages - 1:
            add_scaled(n, 1.0, bar_row(I, NEW, like), bar, like)
        add_scaled(n, 1.0, bar, total, like)
        through_combination(I, I[L.A], i * stages, i, h, bar, like)
