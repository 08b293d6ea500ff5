"""One step of an (E)SDIRK method in machine code, and its reverse; the formulas of ``step.py``.

The stages are found by simplified Newton iterations whose matrix is used again from step to step
(Hairer, Wanner, Solving ODEs II, section IV.8); the reverse follows from the implicit function
theorem with the Jacobian at each stage.
"""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.estimates import NEW, SPARE, TOTAL
from diffsolve.solvers.kernels.functions import StepFunctions
from diffsolve.solvers.kernels.implicit import combine_smoothed, measure, reverse_estimates
from diffsolve.solvers.kernels.jacobian import evaluate_jacobian, jacobian_of_step, through_jacobian
from diffsolve.solvers.kernels.linear import factor, solve, solve_transposed
from diffsolve.solvers.kernels.memory import cast, inlined, integers, is_single, reals, ulp, view
from diffsolve.solvers.kernels.norms import add_scaled, copy, fill_zero, scaled_norm
from diffsolve.solvers.kernels.one_step import ONE_STEP, keeps_stages
from diffsolve.solvers.kernels.rows import (
    bar_row,
    combine,
    field_at,
    forget,
    nothing_to_complete,
    row,
    stage,
    stage_bar,
    through_combination,
    vjp_at,
)

_MOST_ITERATIONS, _MOST_INSISTENT = 10, 20
_SLOW = 0.2  # rate of convergence that asks for a new Jacobian
_REUSE = 0.2  # change of the step size up to which the matrix is kept
_UNITS, _MOST_UNITS = 4.0, 1e3  # multiples of rounding, as in newton.py


@inlined
def epsilon(like):
    return 2.0**-23 if is_single(like) else 2.0**-52


@inlined
def increment_size(I, step, delta, k, g, like):
    """Size of an increment, in tolerances or in units of rounding."""
    if I[L.TO_ROUNDING] == 0:
        return abs(step) * scaled_norm(I, delta, row(I, L.W_U, like), g, like)
    x, y, z = view(delta, like), view(k, like), view(g, like)
    unit, largest = _UNITS * epsilon(like), 0.0
    for j in range(I[L.N]):
        size = abs(step * float(x[j]))
        if not size < math.inf:
            return math.inf
        a, b = abs(float(z[j])), abs(step * float(y[j]))
        size /= unit * (a if a > b else b) + 1e-300
        largest = size if size > largest else largest
    return largest


@inlined
def is_small(I, R, step, delta, like):
    """Whether the first increment is, beside the state at the start: see ``newton.py``."""
    u = row(I, L.W_U, like)
    return I[L.TO_ROUNDING] != 0 or abs(step) * scaled_norm(I, delta, u, u, like) < R[L.KAPPA]


@inlined
def is_rounding(I, step, delta, k, g, units, like):
    """Whether an increment is small beside the largest component; enough for fixed steps only."""
    if I[L.ADAPTIVE] != 0:
        return False
    x, y, z = view(delta, like), view(k, like), view(g, like)
    size, largest = 0.0, 0.0
    for j in range(I[L.N]):
        a, b, c = abs(step * float(x[j])), abs(step * float(y[j])), abs(float(z[j]))
        size = a if a > size else size
        largest = b if b > largest else largest
        largest = c if c > largest else largest
    return size <= units * largest


@inlined
def leaves(I, R, t, h, node):
    """Whether a node lies beyond a break or the end of the span, while the step does not."""
    if node <= 1.0:
        return False
    sign, size = (1.0, h) if h > 0 else (-1.0, -h)
    largest = abs(t) if abs(t) > abs(t + h) else abs(t + h)
    near = 8 * ulp(largest)
    near = 0.125 * (node - 1.0) * size if 0.125 * (node - 1.0) * size < near else near
    ahead = sign * (R[L.T_END] - t)
    found = near < ahead and ahead < node * size - near
    for i in range(I[L.N_BREAKS]):
        ahead = sign * (reals(I[L.BREAKS])[i] - t)
        found = found or (near < ahead and ahead < node * size - near)
    return found


@inlined
def stage_field(I, R, t, h, i, g, out, like):
    """``f`` at the time of stage ``i``; extrapolated in time where a node ``leaves``."""
    n, node = I[L.N], reals(I[L.C])[i]
    if not leaves(I, R, t, h, node):
        field_at(I, R, t + node * h, t, t + h, g, out, like)
        return
    spare, nodes = row(I, L.W_ERROR, like), reals(I[L.INSIDE])
    fill_zero(n, out, like)
    for j in range(4):
        field_at(I, R, t + nodes[j] * h, t, t + h, g, spare, like)
        add_scaled(n, nodes[4 * (i + 1) + j], spare, out, like)


@inlined
def stage_jacobian(I, R, t, h, i, g, like):
    """The Jacobian at the time of stage ``i``, extrapolated as in ``stage_field``."""
    node, nodes = reals(I[L.C])[i], reals(I[L.INSIDE])
    if not leaves(I, R, t, h, node):
        evaluate_jacobian(I, R, t + node * h, t, t + h, g, like)
        return
    values, sums = view(I[L.JAC_VALUES], like), view(I[L.JAC_BAR], like)  # zero between steps
    for j in range(4):
        evaluate_jacobian(I, R, t + nodes[j] * h, t, t + h, g, like)
        weight = cast(nodes[4 * (i + 1) + j], like)
        for e in range(I[L.JAC_ENTRIES]):
            sums[e] += weight * values[e]
    for e in range(I[L.JAC_ENTRIES]):
        values[e], sums[e] = sums[e], like


@inlined
def stage_vjp(I, R, t, h, i, g, w, bar, like):
    """``bar = J^T w`` at the time of stage ``i``, extrapolated as in ``stage_field``."""
    n, node, nodes = I[L.N], reals(I[L.C])[i], reals(I[L.INSIDE])
    if not leaves(I, R, t, h, node):
        vjp_at(I, t + node * h, t, t + h, g, w, bar, like)
        return
    scaled, part = bar_row(I, SPARE, like), row(I, L.W_ERROR, like)
    fill_zero(n, bar, like)
    for j in range(4):
        fill_zero(n, scaled, like)
        add_scaled(n, nodes[4 * (i + 1) + j], w, scaled, like)
        vjp_at(I, t + nodes[j] * h, t, t + h, g, scaled, part, like)
        add_scaled(n, 1.0, part, bar, like)


@inlined
def corrected(I, R, t, h, i, base, k, g, delta, like):
    """Newton's increment in ``delta``, and the stage and the state ``g`` after it."""
    n, gamma = I[L.N], reals(I[L.GAMMA])[0]
    stage_field(I, R, t, h, i, g, delta, like)
    x, y, scale = view(delta, like), view(k, like), cast(1.0 / gamma, like)
    for j in range(n):
        x[j] = (x[j] - y[j]) * scale
    solve(I, R, delta, like)
    add_scaled(n, 1.0, delta, k, like)
    copy(n, base, g, like)
    add_scaled(n, h * gamma, k, g, like)
    I[L.NNEWTON] += 1


@inlined
def newton(I, R, t, h, i, base, like):
    """Solve stage ``i``: whether that converged, and the worst rate of convergence."""
    n = I[L.N]
    step = h * reals(I[L.GAMMA])[0]
    k, g, delta = stage(I, i, like), row(I, L.W_NEW, like), row(I, L.W_LOW, like)
    before, theta, eta, slowest, earlier = 0.0, 0.0, 1.0, 0.0, 0.0
    I[L.FAILURE] = L.NOT_CONVERGED  # until it converges
    copy(n, base, g, like)
    add_scaled(n, step, k, g, like)
    for m in range(1, _MOST_ITERATIONS + 1):
        corrected(I, R, t, h, i, base, k, g, delta, like)
        size = increment_size(I, step, delta, k, g, like)
        if not size < math.inf:
            I[L.FAILURE] = L.NOT_FINITE
            return False, 1.0
        if m > 1:
            rate = size / before if before > 0.0 else 0.0
            theta = rate if rate > 0.3 * theta else 0.3 * theta
            earlier, slowest = slowest, theta if theta > slowest else slowest
            if theta >= 1.0:
                break
            eta = theta / (1.0 - theta)
            left = theta ** float(_MOST_ITERATIONS - m) / (1.0 - theta) * size
            if left > R[L.KAPPA]:
                break
        if eta * size < R[L.KAPPA] and (m > 1 or is_small(I, R, step, delta, like)):
            I[L.FAILURE] = 0
            return True, slowest
        before = size
    if is_rounding(I, step, delta, k, g, _MOST_UNITS * epsilon(like), like):
        I[L.FAILURE] = 0
        return True, earlier  # the last rate is one of rounding
    return False, 1.0


@inlined
def insist(I, R, t, h, i, base, like):
    """Solve stage ``i`` with a new matrix at each iterate, of which the next step keeps none."""
    n = I[L.N]
    node, step = reals(I[L.C])[i], h * reals(I[L.GAMMA])[0]
    time = t + (node if node < 1.0 else 1.0) * h
    k, g, delta = stage(I, i, like), row(I, L.W_NEW, like), row(I, L.W_LOW, like)
    before, I[L.HAS_JAC], I[L.FRESH] = math.inf, 0, 0
    predict(I, i, like)
    copy(n, base, g, like)
    add_scaled(n, step, k, g, like)
    for _ in range(_MOST_INSISTENT):
        if not evaluate_jacobian(I, R, time, t, t + h, g, like) or not factor(I, R, h, like):
            break
        corrected(I, R, t, h, i, base, k, g, delta, like)
        size = increment_size(I, step, delta, k, g, like)
        if not size < math.inf:
            I[L.FAILURE] = L.NOT_FINITE
            return False
        theta = size / before if before > 0.0 else 0.0
        left = size * theta / (1.0 - theta) if theta < 1.0 else math.inf
        done = (size if before == math.inf else left) < R[L.KAPPA]
        # increments of this iteration fall fast until they are rounding
        if not done and theta > 0.5:
            done = is_rounding(I, step, delta, k, g, math.sqrt(epsilon(like)), like)
        if done:
            I[L.FAILURE] = 0
            return True
        before = size
    I[L.FAILURE] = L.NOT_CONVERGED
    return False


@inlined
def predict(I, i, like):
    """First guess of stage ``i``."""
    n, stages = I[L.N], I[L.STAGES]
    predictor, k = reals(I[L.PREDICTOR]), stage(I, i, like)
    fill_zero(n, k, like)
    for j in range(i):
        if predictor[i * stages + j] != 0.0:
            add_scaled(n, predictor[i * stages + j], stage(I, j, like), k, like)


@inlined
def solve_stages(I, R, t, h, like):
    """All stages from row 1 on; leaves the new state in ``W_NEW``."""
    stages, slowest = I[L.STAGES], 0.0
    implicit, nodes, base = integers(I[L.IMPLICIT]), reals(I[L.C]), row(I, L.W_TEMP, like)
    insists = I[L.ADAPTIVE] == 0 and I[L.FRESH] != 0  # a step that cannot be smaller
    for i in range(1, stages):
        k = stage(I, i, like)
        if implicit[i] == 0:
            g = row(I, L.W_NEW, like)
            combine(I, I[L.A], i * stages, i, h, g, like)
            field_at(I, R, t + nodes[i] * h, t, t + h, g, k, like)
            continue
        combine(I, I[L.A], i * stages, i, h, base, like)
        predict(I, i, like)
        converged, rate = newton(I, R, t, h, i, base, like)
        if not converged and insists:
            converged, rate = insist(I, R, t, h, i, base, like), 0.0
        if not converged:
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
        fresh = I[L.FRESH] != 0
        if solve_stages(I, R, t, h, like):
            break
        if fresh:
            return False
        if not jacobian_of_step(I, R, t, h, u, like):
            return False
    is_of_stage = smoothed and I[L.FRESH] == 0  # `insist` left the matrix of a stage
    if is_of_stage and not (jacobian_of_step(I, R, t, h, u, like) and factor(I, R, h, like)):
        return False
    if I[L.B_ERROR] != 0:
        combine_smoothed(I, R, h, like)
    return True


@inlined
def recall(I, R, t, h, marks, inside, like):
    """Make the stages of a step and its new state for the reverse pass."""
    forget(I, R)
    if not keeps_stages(I):
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
    implicit = integers(I[L.IMPLICIT])
    gamma = reals(I[L.GAMMA])[0]
    total, g, bar = bar_row(I, TOTAL, like), row(I, L.W_TEMP, like), row(I, L.W_DU, like)
    of_error = I[L.ERROR_BARS] != 0 or I[L.ERROR_NORM_BARS] != 0
    if I[L.STIFFNESS_BARS] != 0 or (I[L.SMOOTHED] != 0 and I[L.B_ERROR] != 0 and of_error):
        through_jacobian(I, t, h, total, like)  # the estimates have added to it
    I[L.FRESH] = 0
    for i in range(stages - 1, 0, -1):
        w = stage_bar(I, i, like)
        # g: the state that the stage is evaluated at
        combine(I, I[L.A], i * stages, i + 1, h, g, like)
        if implicit[i] != 0:
            if i == stages - 1:
                add_scaled(n, h * gamma, bar_row(I, NEW, like), w, like)
            stage_jacobian(I, R, t, h, i, g, like)
            factor(I, R, h, like)
            x, scale = view(w, like), cast(1.0 / gamma, like)
            for j in range(n):
                x[j] *= scale
            solve_transposed(I, R, w, like)
        stage_vjp(I, R, t, h, i, g, w, bar, like)
        if i == stages - 1:
            add_scaled(n, 1.0, bar_row(I, NEW, like), bar, like)
        add_scaled(n, 1.0, bar, total, like)
        through_combination(I, I[L.A], i * stages, i, h, bar, like)


FUNCTIONS = StepFunctions(
    **ONE_STEP,
    take_step=take_step,
    measure=measure,
    complete=nothing_to_complete,
    forget=forget,
    repeat_step=take_step,
    recall=recall,
    reverse_estimates=reverse_estimates,
    reverse_complete=nothing_to_complete,
    reverse_step=reverse_step,
)
