"""What happens at saved times in a solve of an adjoint equation."""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import inlined, integers, reals, size_of, view
from diffsolve.solvers.kernels.norms import add_scaled, copy
from diffsolve.solvers.kernels.rows import row


@inlined
def jump(I, R, stop, like):
    """Add the loss's cotangents at a saved time, and put right the state that is solved again."""
    if I[L.JUMPS] == 0:
        return
    index, n, size = integers(I[L.JUMPS])[stop], I[L.PRIMAL_N], size_of(like)
    if index < 0:
        return
    u = row(I, L.W_U, like)
    add_scaled(n, 1.0, I[L.BARS] + index * n * size, u, like)
    if I[L.RESET] != 0:
        true = I[L.RESET] + index * n * size
        note_distance(I, R, u + n * size, true, like)
        copy(n, true, u + n * size, like)


@inlined
def note_distance(I, R, reached, true, like):
    """Note by how many tolerances a reconstructed state is off."""
    n = I[L.PRIMAL_N]
    x, y = view(reached, like), view(true, like)
    rtol = reals(I[L.FORWARD_RTOL])
    atol = reals(I[L.FORWARD_ATOL])
    total = 0.0
    for m in range(n):
        scale = rtol[m * I[L.FORWARD_RTOL_STRIDE]] * abs(float(y[m]))
        q = (float(x[m]) - float(y[m])) / (atol[m * I[L.FORWARD_ATOL_STRIDE]] + scale)
        total += q * q
    off = math.sqrt(total / n)
    if not off <= R[L.WORST]:
        R[L.WORST] = off
