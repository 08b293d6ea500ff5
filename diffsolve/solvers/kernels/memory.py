"""Raw memory, calls by address and times, for kernels that Numba compiles.

Arrays are addresses, and so are their rows. Every function that reads numbers of the state has a
last argument ``like``: a zero of the type of the state, float64 or float32. Numba compiles the
function once for each type of ``like``, and takes all addresses for those of such numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from diffsolve.solvers.kernels import layout as L

inlined = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False)

_nextafter = types.ExternalFunction("nextafter", types.float64(types.float64, types.float64))
_nextafterf = types.ExternalFunction("nextafterf", types.float32(types.float32, types.float32))


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to numbers of the type of ``like``."""
    pointer = types.CPointer(like)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return pointer(address, like), codegen


@intrinsic
def cast(typingctx: Any, x: Any, like: Any) -> Any:
    """A float64 number in the type of ``like``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], types.float64, signature.return_type)

    return like(types.float64, like), codegen


@intrinsic
def size_of(typingctx: Any, like: Any) -> Any:
    """Bytes of a number, known when the kernel is compiled."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.int64, like.bitwidth // 8)

    return types.int64(like), codegen


@intrinsic
def is_single(typingctx: Any, like: Any) -> Any:
    """Whether numbers are float32, known when the kernel is compiled."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.boolean, like == types.float32)

    return types.boolean(like), codegen


@inlined
def view(address, like):
    """The numbers at an address, of the type of ``like``."""
    return _pointer(address, like)


@inlined
def reals(address):
    """The float64 numbers at an address."""
    return _pointer(address, 0.0)


@inlined
def integers(address):
    """The 64-bit integers at an address."""
    return _pointer(address, 0)


def _caller(scalars: int, arrays: int) -> Any:
    """An intrinsic ``call(address, *scalars, *array_addresses)`` of a void function."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = list(args[1 : 1 + scalars])
        pointers = [builder.inttoptr(x, cgutils.voidptr_t) for x in args[1 + scalars :]]
        kinds = [x.type for x in numbers] + [cgutils.voidptr_t] * arrays
        kind = ir.FunctionType(ir.VoidType(), kinds)
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [*numbers, *pointers])
        return context.get_dummy_value()

    return codegen


@intrinsic
def call_field(typingctx, address, t, u, p, out):
    """``f(t, u, p, out)``."""
    return types.void(address, t, u, p, out), _caller(1, 3)


@intrinsic
def call_vjp(typingctx, address, t, u, p, w, u_bar, p_bar):
    """``vjp(t, u, p, w, u_bar, p_bar)``."""
    return types.void(address, t, u, p, w, u_bar, p_bar), _caller(1, 5)


@intrinsic
def call_jvp(typingctx, address, t, u, p, v, out):
    """``jvp(t, u, p, v, out)``."""
    return types.void(address, t, u, p, v, out), _caller(1, 4)


@intrinsic
def call_jac_vjp(typingctx, address, t, u, p, jac_bar, u_bar, p_bar):
    """Reverse of ``jac``; added to: ``u_bar`` and ``p_bar``."""
    return types.void(address, t, u, p, jac_bar, u_bar, p_bar), _caller(1, 5)


@intrinsic
def call_step(typingctx, address, h, times, u, k, p, new, stiff, error, low):
    """``step(h, times, u, k, p, new, stiff, error, low)``."""
    return types.void(address, h, times, u, k, p, new, stiff, error, low), _caller(1, 8)


@intrinsic
def call_step_reverse(typingctx, address, h, times, u, k, p, k_bar, new_bar, bar, p_bar):
    """Reverse of a Rosenbrock ``step``; added to: ``bar``, row 0 of ``k_bar``, and ``p_bar``."""
    return types.void(address, h, times, u, k, p, k_bar, new_bar, bar, p_bar), _caller(1, 8)


@intrinsic
def call_step_vjp(
    typingctx, address, h, times, u, k, p, k_bar, new_bar, stiff_bar, error_bar, low_bar, bar, p_bar
):
    """Reverse of ``step``; added to: ``bar`` of ``u``, row 0 of ``k_bar``, and ``p_bar``."""
    arguments = (h, times, u, k, p, k_bar, new_bar, stiff_bar, error_bar, low_bar, bar, p_bar)
    return types.void(address, *arguments), _caller(1, 11)


@intrinsic
def call_reverse_of_rows(
    typingctx, address, h, times, u, W, H, p, new_bar, error_bar, sums_bar, bar, p_bar
):
    """Reverse of a step of an SDE; written: ``bar`` of ``u``; added to: the lanes of ``p_bar``."""
    arguments = (h, times, u, W, H, p, new_bar, error_bar, sums_bar, bar, p_bar)
    return types.void(address, *arguments), _caller(1, 10)


@intrinsic
def call_kernel(typingctx, address, integers, reals):
    """``kernel(integers, reals)``, one of those that are built here; what it returns is dropped."""
    return types.void(address, integers, reals), _caller(0, 2)


@intrinsic
def bits_of(typingctx: Any, x: Any) -> Any:
    """The bits of a float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), codegen


@inlined
def ulp(x):
    """Distance from a float64 number to the next larger one."""
    x = abs(x)
    return _nextafter(x, np.inf) - x


@inlined
def _next(t, towards, like):
    if is_single(like):
        return float(_nextafterf(np.float32(t), np.float32(towards)))
    return _nextafter(t, towards)


@inlined
def beside_breaks(I, value, start, end, like):
    """A time of a step, moved just inside if it is at a break that bounds it, or beyond."""
    count = I[L.N_BREAKS]
    if count == 0:
        return value
    low, high = (start, end) if start < end else (end, start)
    near = 8 * ulp(abs(low) if abs(low) > abs(high) else abs(high))
    near = 0.25 * (high - low) if 0.25 * (high - low) < near else near
    if low + near < value < high - near:
        return value
    breaks = reals(I[L.BREAKS])
    i = 0
    while i < count and breaks[i] <= low + near:
        i += 1
    if i > 0 and value <= breaks[i - 1] + near:
        value = _next(breaks[i - 1], np.inf, like)
    while i < count and breaks[i] < high - near:
        i += 1
    if i < count and value >= breaks[i] - near:
        value = _next(breaks[i], -np.inf, like)
    return value
