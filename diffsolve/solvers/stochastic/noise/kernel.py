"""Normals from counters, in the part of Python that Numba compiles.

``pair`` gives the two normals of a counter, ``fill`` those of many paths. Both are inlined into the
kernel that calls them. Nothing here branches within a loop or calls a library: LLVM makes vectors
of the loop in ``fill``. Integers of 32 bits lie in int64, the upper half of which is garbage.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from diffsolve.solvers.kernels.memory import inlined, size_of

#: As `inlined`, whatever its size: a loop with a call in it is not vectorised.
_always = njit(
    error_model="numpy",
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    _nrt=False,
    forceinline=True,
)
_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57  # Salmon et al. (2011), section 4.3
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_INV_SQRT_12 = 12**-0.5
_ARRAYS = 16
_TILE = 4096  # numbers that one loop makes: its index must fit 31 bits with `_inverse`


@intrinsic
def _bits(typingctx: Any, x: Any) -> Any:
    """The bits of a float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), codegen


@intrinsic
def _of_bits(typingctx: Any, bits: Any) -> Any:
    """The float64 of these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def fused(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a b + c``, rounded once where the processor can: always or never, in vectors or not."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        double = ir.DoubleType()
        kind = ir.FunctionType(double, [double] * 3)
        function = builder.module.declare_intrinsic("llvm.fmuladd", [double], kind)
        return builder.call(function, args)

    return types.float64(types.float64, types.float64, types.float64), codegen


def _tagged(builder: Any, access: Any, which: int) -> None:
    """Tell LLVM that an access is to the array ``which``, and that such arrays do not overlap."""
    module = builder.module

    def named(text: str, *more: Any) -> Any:
        return module.add_metadata([ir.MetaDataString(module, f"diffsolve {text}"), *more])

    domain = named("arrays")
    scopes = [named(f"array {i}", domain) for i in range(_ARRAYS)]
    others = [scope for i, scope in enumerate(scopes) if i != which]
    access.set_metadata("alias.scope", module.add_metadata([scopes[which]]))
    access.set_metadata("noalias", module.add_metadata(others))


def _place(builder: Any, address: Any, i: Any, kind: Any) -> Any:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [i], source_etype=kind)


def array(which: int) -> tuple[Any, Any]:
    """``load(address, i)`` and ``store(address, i, x)`` of float64 in the array number ``which``.

    Memory that is one array must not be another one elsewhere in the same kernel: LLVM may exchange
    accesses to different ones. Without that promise it makes no vectors of loops over many arrays.
    """

    @intrinsic
    def load(typingctx: Any, address: Any, i: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.DoubleType()
            value = builder.load(_place(builder, args[0], args[1], kind), typ=kind)
            _tagged(builder, value, which)
            return value

        return types.float64(types.int64, types.int64), codegen

    @intrinsic
    def store(typingctx: Any, address: Any, i: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            place = _place(builder, args[0], args[1], ir.DoubleType())
            _tagged(builder, builder.store(args[2], place), which)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float64), codegen

    return load, store


@intrinsic
def _seed(typingctx: Any, seeds: Any, i: Any) -> Any:
    """The seed number ``i``: the array number 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        value = builder.load(_place(builder, args[0], args[1], word), typ=word)
        _tagged(builder, value, 0)
        return value

    return types.int64(types.int64, types.int64), codegen


def _store_as(which: int) -> Any:
    """``store(address, i, x, like)`` of a float64 in the type of ``like``."""

    @intrinsic
    def store(typingctx: Any, address: Any, i: Any, x: Any, like: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = context.cast(builder, args[2], types.float64, like)
            place = _place(builder, args[0], args[1], context.get_value_type(like))
            _tagged(builder, builder.store(value, place), which)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float64, like), codegen

    return store


_store_w, _store_h = _store_as(1), _store_as(2)


# -- integers ------------------------------------------------------------------------------------


@_always
def _round(c0, c1, c2, c3, k0, k1):
    a = (c0 & _WORD) * _MULTIPLIER_0
    b = (c2 & _WORD) * _MULTIPLIER_1
    return (b >> 32) ^ c1 ^ k0, b, (a >> 32) ^ c3 ^ k1, a


@_always
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: the four words of a counter and a key; only their lower halves count."""
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + _WEYL_0, k1 + _WEYL_1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + 2 * _WEYL_0, k1 + 2 * _WEYL_1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + 3 * _WEYL_0, k1 + 3 * _WEYL_1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + 4 * _WEYL_0, k1 + 4 * _WEYL_1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + 5 * _WEYL_0, k1 + 5 * _WEYL_1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + 6 * _WEYL_0, k1 + 6 * _WEYL_1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + 7 * _WEYL_0, k1 + 7 * _WEYL_1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + 8 * _WEYL_0, k1 + 8 * _WEYL_1)
    return _round(c0, c1, c2, c3, k0 + 9 * _WEYL_0, k1 + 9 * _WEYL_1)


# -- normals -------------------------------------------------------------------------------------


@_always
def _minus_two_log(k):
    """``-2 log(k / 2**53)`` for an integer ``0 < k <= 2**53``, to a few units in the last place.

    ``k = 2**e m`` with ``m`` about one, and ``log m = 2 artanh(s)``, ``s = (m - 1) / (m + 1)``:
    the series in ``s`` from a Chebyshev interpolation, error 5e-18.
    """
    bits = _bits(float(k))
    shifted = bits - 0x3FE6A09E667F3BCD  # the square root of a half
    e = shifted >> 52
    f = _of_bits(bits - (e << 52)) - 1.0
    s = f / (f + 2.0)
    z = s * s
    p = fused(z, 0.14616449685043406, 0.15331721600556042)
    p = fused(z, p, 0.18182889125261723)
    p = fused(z, p, 0.2222221113479508)
    p = fused(z, p, 0.28571428625975487)
    p = fused(z, p, 0.39999999999899505)
    p = fused(z, p, 0.666666666666667)
    log_m = fused(s * z, p, 2.0 * s)
    return -2.0 * fused(float(e - 53), 0.6931471805599453, log_m)


@_always
def _sine(r):
    """``sin(pi r / 2)`` for ``|r| <= 1``: an odd Chebyshev interpolation, relative error 3e-19."""
    z = r * r
    p = fused(z, 5.87297574479995e-12, -6.684416831856085e-10)
    p = fused(z, p, 5.6921364280986254e-08)
    p = fused(z, p, -3.5988430204672576e-06)
    p = fused(z, p, 0.0001604411847130916)
    p = fused(z, p, -0.004681754135304255)
    p = fused(z, p, 0.07969262624616565)
    p = fused(z, p, -0.6459640975062462)
    p = fused(z, p, 1.5707963267948966)
    return r * p


@_always
def pair(c0, c1, c2, c3, k0, k1):
    """The two normals of a counter and a key, by the transformation of Box and Muller (1958).

    With ``u, v`` of 53 bits in ``(0, 1]`` and ``[0, 1)``: ``sqrt(-2 log u)`` times the cosine and
    the sine of ``2 pi v``. The angle is brought into a half circle without rounding.
    """
    x0, x1, x2, x3 = philox(c0, c1, c2, c3, k0, k1)
    u = ((x1 & _WORD) << 21) | ((x0 & _WORD) >> 11)
    v = ((x3 & _WORD) << 21) | ((x2 & _WORD) >> 11)
    radius = math.sqrt(_minus_two_log(u + 1))
    half = v >> 52  # which half of the circle
    r = _of_bits((v & 0xFFFFFFFFFFFFF) | 0x4000000000000000) - 3.0
    sign = _of_bits((half << 63) ^ _bits(radius))
    return -(sign * _sine(r)), sign * _sine(1.0 - abs(r))


def _loop(seeded: bool, both: bool) -> Any:
    """The loop over a tile, for a seed a path or one for all, with ``H`` or without."""

    @_always
    def loop(n, seeds, counter, path, component, paths, m, by_m, by_paths, scale, W, H, like):
        key = 0 if seeded else _seed(seeds, 0)
        for e in range(n):
            line = ((e & _WORD) * (by_m & _WORD)) >> 31
            row = ((line & _WORD) * (by_paths & _WORD)) >> 31
            i = path + line - row * paths
            if seeded:
                key = _seed(seeds, i)
            at = counter + row
            of_path = 0 if seeded else i
            a, b = pair(at, component + e - line * m, of_path, at >> 32, key, key >> 32)
            _store_w(W, e, scale * a, like)
            if both:
                _store_h(H, e, scale * (b * _INV_SQRT_12), like)

    return loop


_one_w, _one_both = _loop(False, False), _loop(False, True)
_own_w, _own_both = _loop(True, False), _loop(True, True)


@inlined
def _inverse(n):
    """With it, ``(e * _inverse(n)) >> 31`` is ``e // n`` where ``e`` and ``n`` are small."""
    return 0x80000000 // n + 1


@inlined
def fill(seeds, seeded, counter, count, first, paths, m, scale, W, H, like):
    """Normals of ``count`` counters from ``counter`` on and ``paths`` paths from ``first`` on.

    Parameters
    ----------
    seeds, seeded
        Address of the seed; where ``seeded``, of one for each path of the batch, by path index.
    counter
        A serial or a node, and the domain in its highest byte (``philox.STEPS`` and so on).
    first, paths, m
        First path, number of paths, components of each.
    scale
        Factor: the square root of the length of the interval, or 1.
    W, H
        Addresses of ``(count, paths, m)`` numbers of the type of ``like``: increments, and
        space-time Levy areas, of variances ``scale**2`` and ``scale**2 / 12``. ``H`` may be 0.
        What is ``W`` in one call must not be ``H`` in another of the same kernel (`array`).
    """
    by_m, by_paths = 0, 0
    lines, rows = 1, 1  # of a tile; 1 where a tile is part of one line or of one row
    width = min(m, _TILE)
    if m <= _TILE:
        by_m = _inverse(m)
        lines = min(paths, _TILE // m)
        if paths * m <= _TILE:
            by_paths = _inverse(paths)
            rows = min(count, _TILE // (paths * m))
    for at in range(0, count, rows):
        for path in range(0, paths, lines):
            for component in range(0, m, width):
                n = min(rows, count - at) * min(lines, paths - path) * min(width, m - component)
                begin = ((at * paths + path) * m + component) * size_of(like)
                w, h, i, number = W + begin, H + begin, first + path, counter + at
                if seeded == 0:
                    if H == 0:
                        _one_w(
                            n,
                            seeds,
                            number,
                            i,
                            component,
                            paths,
                            m,
                            by_m,
                            by_paths,
                            scale,
                            w,
                            w,
                            like,
                        )
                    else:
                        _one_both(
                            n,
                            seeds,
                            number,
                            i,
                            component,
                            paths,
                            m,
                            by_m,
                            by_paths,
                            scale,
                            w,
                            h,
                            like,
                        )
                elif H == 0:
                    _own_w(
                        n, seeds, number, i, component, paths, m, by_m, by_paths, scale, w, w, like
                    )
                else:
                    _own_both(
                        n, seeds, number, i, component, paths, m, by_m, by_paths, scale, w, h, like
                    )


# -- what Python calls ---------------------------------------------------------------------------
# integers: address of the seeds, whether there is one a path, counter, count, first path, paths, m,
# addresses of W and H


@inlined
def draw(I, R, like):
    """`fill` with the scale 1."""
    fill(I[0], I[1], I[2], I[3], I[4], I[5], I[6], 1.0, I[7], I[8], like)
    return 0
