"""The size of the next step in machine code: the controllers, and stops that it must not pass."""

from __future__ import annotations

import math

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.memory import inlined, reals, ulp

# all as in the torch engine
_STRETCH = 1.01
ROUNDING = 1 + 1e-8
_ULPS = 8
_LEAST_MEMORY = math.log(1e-4)


@inlined
def pid(R, log_error):
    """The factor of a PID controller, limited smoothly."""
    exponent = R[L.BETA1] * log_error + R[L.BETA2] * R[L.MEMORY1] + R[L.BETA3] * R[L.MEMORY2]
    return 1 + math.atan(math.exp(-exponent) - 1)


@inlined
def clamped(factor, low, high):
    factor = high if high < factor else factor
    return low if factor < low else factor


@inlined
def propose(I, R, error, remembers):
    """Whether to accept a step, and the factor of its size for the next one.

    ``remembers``: whether the controller may note the error.
    """
    kind, safety, smallest = I[L.CONTROLLER], R[L.SAFETY], R[L.FACTOR_MIN]
    if not error < math.inf:
        return False, smallest
    if error > 1:
        log_error = math.log(error)
        factor = math.exp(-R[L.BETA1] * log_error)
        if kind == L.PID:
            plain = math.exp(-R[L.BETA_PLAIN] * log_error)
            factor = pid(R, log_error)
            factor = plain if plain < factor else factor
        return False, clamped(safety * factor, smallest, 1.0)
    limit = 1.0 if I[L.REJECTIONS] > 0 else R[L.FACTOR_MAX]
    if error == 0:
        return True, limit
    log_error = math.log(error)
    exponent = R[L.BETA1] * log_error
    if kind == L.PI:
        if I[L.HAS_MEMORY] == 0:
            exponent += 0.75 * R[L.BETA2] * log_error
        else:
            exponent -= R[L.BETA2] * R[L.MEMORY1]
    factor = pid(R, log_error) if kind == L.PID else math.exp(-exponent)
    if remembers and kind != L.INTEGRAL:
        I[L.HAS_MEMORY] = 1
        R[L.MEMORY2] = R[L.MEMORY1]
        R[L.MEMORY1] = log_error if error > 1e-4 else _LEAST_MEMORY
    factor = clamped(safety * factor, smallest, limit)
    return True, 1.0 if 1.0 <= factor <= R[L.STEADY] else factor


@inlined
def fit(I, R):
    """Size of the next step, and whether it ends at the next stop."""
    size = R[L.DTMAX] if R[L.DTMAX] < R[L.SIZE] else R[L.SIZE]
    if I[L.STABLE] != 0:
        stable = R[L.STABLE_SIZE] if R[L.STABLE_SIZE] > R[L.DTMIN] else R[L.DTMIN]
        size = stable if stable < size else size
    stop = reals(I[L.STOPS])[I[L.STOP]]
    remaining = R[L.DIRECTION] * (stop - R[L.T])
    if remaining > 2 * size:
        return size, False
    if I[L.ADAPTIVE] == 0:
        largest = abs(R[L.ANCHOR]) if abs(R[L.ANCHOR]) > abs(stop) else abs(stop)
        rounding = _ULPS * ulp(largest)  # that of the time at hand
        rounding = 0.5 * size if 0.5 * size < rounding else rounding
        at_stop = remaining <= size * ROUNDING + rounding
        return remaining if at_stop else size, at_stop
    if remaining <= size * _STRETCH and remaining <= R[L.DTMAX] * ROUNDING:
        return remaining, True
    if remaining >= 2 * R[L.DTMIN]:
        return remaining / 2, False
    return size, False


@inlined
def below_floor(I, R, t):
    """Whether the step size is too small: for the time to tell, or below ``DTMIN``."""
    size = R[L.SIZE]
    if size > 1e-300 and size > 1e-14 * abs(t) and size >= R[L.DTMIN]:
        return False  # the common case: far above rounding
    return size < 4 * ulp(t) or (I[L.ADAPTIVE] != 0 and size < R[L.DTMIN])
