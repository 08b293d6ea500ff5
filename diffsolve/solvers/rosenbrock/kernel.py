"""One step of a Rosenbrock method in machine code, and its reverse; the formulas of ``step.py``.

Row 0 of the stages is the derivative at the start, then come the solutions of the linear systems,
then the derivative at the end.
"""

from __future__ import annotations

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.estimates import NEW, TOTAL
from diffsolve.solvers.kernels.functions import StepFunctions
from diffsolve.solvers.kernels.implicit import combine_smoothed, measure, reverse_estimates
from diffsolve.solvers.kernels.linear import (
    add_outer,
    evaluate_jacobian,
    factor,
    jacobian_of_step,
    solve,
    solve_transposed,
    through_jacobian,
)
from diffsolve.solvers.kernels.memory import (
    call_step,
    call_step_reverse,
    cast,
    inlined,
    is_single,
    reals,
    size_of,
    view,
)
from diffsolve.solvers.kernels.norms import add_scaled, copy
from diffsolve.solvers.kernels.rows import (
    bar_row,
    combine,
    field_at,
    nothing_to_complete,
    polynomial_at,
    row,
    stage,
    stage_bar,
    stage_times,
    through_combination,
    vjp_at,
)

_CANCELLATION = 1e3  # of pivots that are not chosen; its square is what gradients lose


@inlined
def fused_step(I, t, h, like):
    """The whole step by one function, if its systems could be solved without exchanging rows."""
    u, k, new = row(I, L.W_U, like), stage(I, 0, like), row(I, L.W_NEW, like)
    error, check = row(I, L.W_ERROR, like), row(I, L.W_LOW, like)
    times, values = stage_times(I, t, h, like), I[L.JAC_VALUES]
    call_step(I[L.FUSED], cast(h, like), times, u, k, I[L.PARAMS], new, values, error, check)
    limit = 30.0 if is_single(like) else _CANCELLATION
    if not float(view(check, like)[0]) < limit:
        I[L.FRESH] = 0  # its time terms are not there
        return False
    count_step(I)
    I[L.HAS_JAC], I[L.FRESH], I[L.FACTORED], I[L.WHOLE] = 1, 1, 0, 1
    return True


@inlined
def count_step(I):
    """The work of a step that one function takes, or goes back through."""
    I[L.NF] += I[L.STAGES] - 2 - (1 if I[L.AT_END] != 0 else 0)
    I[L.NSOLVE] += I[L.STAGES] - 2
    I[L.NLU] += 1
    I[L.NJAC] += 1 - I[L.FRESH]


@inlined
def take_step(I, R, t, h, like):
    """Stages, new state and error row of a step from ``W_U, W_DU``; whether it could be taken."""
    I[L.WHOLE] = 0
    copy(I[L.N], row(I, L.W_DU, like), stage(I, 0, like), like)
    if I[L.FUSED] != 0 and fused_step(I, t, h, like):
        return True
    if not solve_stages(I, R, t, h, like):
        return False
    if I[L.B_ERROR] != 0:
        combine_smoothed(I, R, h, like)
    return True


@inlined
def solve_stages(I, R, t, h, like):
    """The stages, one linear system after the other, and the new state."""
    n, stages = I[L.N], I[L.STAGES]
    if not jacobian_of_step(I, R, t, h, row(I, L.W_U, like), like):
        return False
    if not factor(I, R, h, like):
        return False
    nodes, coupling, weights = reals(I[L.C]), reals(I[L.COUPLING]), reals(I[L.TIME_WEIGHTS])
    slope = I[L.JAC_VALUES] + I[L.JAC_ENTRIES] * size_of(like)  # by the time
    g, last = row(I, L.W_NEW, like), stages - 1
    for i in range(1, last):
        k = stage(I, i, like)
        if i == 1:
            copy(n, stage(I, 0, like), k, like)
        else:
            combine(I, I[L.A], i * stages, i, h, g, like)
            field_at(I, R, t + nodes[i] * h, t, t + h, g, k, like)
        if i == I[L.AT_END]:
            copy(n, k, stage(I, last, like), like)
        for j in range(1, i):
            if coupling[i * stages + j] != 0.0:
                add_scaled(n, coupling[i * stages + j], stage(I, j, like), k, like)
        if I[L.TIME_TERMS] != 0 and weights[i] != 0.0:
            add_scaled(n, h * weights[i], slope, k, like)
        solve(I, R, k, like)
    if I[L.AT_END] == 0:
        combine(I, I[L.A], last * stages, last, h, g, like)
        field_at(I, R, t + h, t, t + h, g, stage(I, last, like), like)
    return True


@inlined
def reverse_fused_step(I, t, h, like):
    count_step(I)
    total = bar_row(I, TOTAL, like)
    call_step_reverse(
        I[L.FUSED_VJP],
        cast(h, like),
        stage_times(I, t, h, like),
        row(I, L.W_U, like),
        stage(I, 0, like),
        I[L.PARAMS],
        stage_bar(I, 0, like),
        bar_row(I, NEW, like),
        total,
        I[L.P_BAR],
    )
    if I[L.STIFFNESS_BARS] != 0:
        through_jacobian(I, t, h, total, like)  # what the estimates left there


@inlined
def recall(I, R, t, h, inside, like):
    """Make the stages of a step for the reverse pass, and its new state where that is read."""
    if I[L.STATE_ROWS] == 2:
        return take_step(I, R, t, h, like)
    if I[L.FUSED_VJP] == 0 or I[L.WHOLE] == 0 or I[L.ERROR_BARS] != 0:
        last = I[L.STAGES] - 1
        combine(I, I[L.A], last * I[L.STAGES], last, h, row(I, L.W_NEW, like), like)
    return True


@inlined
def reverse_step(I, R, t, h, like):
    """Pull the cotangents of the stages and of the new state back to the start of the step.

    That of the state is added to the row ``TOTAL``, that of the derivative there is left in its
    row. ``W_DU`` is used as work space.
    """
    n, stages = I[L.N], I[L.STAGES]
    nodes, coupling, weights = reals(I[L.C]), reals(I[L.COUPLING]), reals(I[L.TIME_WEIGHTS])
    total, g, bar = bar_row(I, TOTAL, like), row(I, L.W_TEMP, like), row(I, L.W_DU, like)
    if I[L.FUSED_VJP] != 0 and I[L.WHOLE] != 0:
        reverse_fused_step(I, t, h, like)
        return
    last, at_end = stages - 1, I[L.AT_END]
    if at_end == 0:
        vjp_at(I, t + h, t, t + h, row(I, L.W_NEW, like), stage_bar(I, last, like), bar, like)
        add_scaled(n, 1.0, bar_row(I, NEW, like), bar, like)
        add_scaled(n, 1.0, bar, total, like)
        through_combination(I, I[L.A], last * stages, last, h, bar, like)
    if I[L.FRESH] == 0:
        evaluate_jacobian(I, R, t, t, t + h, row(I, L.W_U, like), like)
    if I[L.FACTORED] == 0:
        factor(I, R, h, like)
    slope_bar = I[L.JAC_BAR] + I[L.JAC_ENTRIES] * size_of(like)
    for i in range(stages - 2, 0, -1):
        w = stage_bar(I, i, like)
        solve_transposed(I, R, w, like)
        add_outer(I, h, w, stage(I, i, like), like)
        if I[L.TIME_TERMS] != 0 and weights[i] != 0.0:
            add_scaled(n, h * weights[i], w, slope_bar, like)
        for j in range(1, i):
            if coupling[i * stages + j] != 0.0:
                add_scaled(n, coupling[i * stages + j], w, stage_bar(I, j, like), like)
        if i == 1:
            add_scaled(n, 1.0, w, stage_bar(I, 0, like), like)
        else:
            if i == at_end:
                add_scaled(n, 1.0, stage_bar(I, last, like), w, like)
            combine(I, I[L.A], i * stages, i, h, g, like)
            vjp_at(I, t + nodes[i] * h, t, t + h, g, w, bar, like)
            if i == at_end:
                add_scaled(n, 1.0, bar_row(I, NEW, like), bar, like)
            add_scaled(n, 1.0, bar, total, like)
            through_combination(I, I[L.A], i * stages, i, h, bar, like)
    through_jacobian(I, t, h, total, like)


FUNCTIONS = StepFunctions(
    take_step=take_step,
    measure=measure,
    complete=nothing_to_complete,
    value_at=polynomial_at,
    recall=recall,
    reverse_estimates=reverse_estimates,
    reverse_step=reverse_step,
    reverse_complete=nothing_to_complete,
)
