"""Elementary functions of vectors of numbers, as LLVM IR.

The mathematical library takes one number at a time. These functions take as many as a register of
the processor holds, without branches. They err by two units in the last place at most, and treat
infinities, NaN, signed zeros and subnormal numbers as the library does. Other functions call the
library for each entry of a vector.

Single precision is computed in double precision, and rounded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

#: For 1.5 * 2**52: a number that is added to it is rounded to an integer, in its lowest bits.
_MAGIC = 6755399441055744.0
# ln 2 in two parts, the first of 32 bits: an integer times it is exact (FreeBSD msun, e_exp.c)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# pi / 2 in parts of 33 bits, and what they leave (FreeBSD msun, e_rem_pio2.c)
_HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624871116645580e-21)
_HALF_PI_REST = 8.47842766036889956997e-32
_MOST_ANGLE = 1e6  # beyond it the library reduces the angle
# log(1 + f) = 2 s + s R(s**2) with s = f / (2 + f) (FreeBSD msun, e_log.c)
_LOG = (
    6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
    2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
    1.479819860511658591e-01,
)  # fmt: skip
# sin x = x + x**3 S(x**2), cos x = 1 - x**2 / 2 + x**4 C(x**2) up to pi / 4 (k_sin.c, k_cos.c)
_SIN = (
    -1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
    2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10,
)  # fmt: skip
_COS = (
    4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
    -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11,
)  # fmt: skip
#: exp r = 1 + r + r**2 sum r**i / (i + 2)!, as far as it counts up to ln 2 / 2.
_EXP = tuple(1.0 / math.factorial(i) for i in range(2, 14))


class _Vector:
    """Writes the IR of a function of one vector of float64 numbers."""

    def __init__(self, lanes: int):
        self.lanes = lanes
        self.type, self.bits = f"<{lanes} x double>", f"<{lanes} x i64>"
        self.truth = f"<{lanes} x i1>"
        self.lines: list[str] = []
        self.declared: set[str] = set()

    def fresh(self, text: str) -> str:
        name = f"%v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name

    def number(self, x: float) -> str:
        word = struct.unpack("<Q", struct.pack("<d", x))[0]
        return "<" + ", ".join([f"double 0x{word:016X}"] * self.lanes) + ">"

    def integer(self, i: int) -> str:
        return "<" + ", ".join([f"i64 {i}"] * self.lanes) + ">"

    def op(self, name: str, a: str, b: str) -> str:
        return self.fresh(f"{name} {self.type} {a}, {b}")

    def bit_op(self, name: str, a: str, b: str) -> str:
        return self.fresh(f"{name} {self.bits} {a}, {b}")

    def intrinsic(self, name: str, *args: str) -> str:
        full = f"llvm.{name}.v{self.lanes}f64"
        self.declared.add(f"declare {self.type} @{full}({', '.join([self.type] * len(args))})")
        return self.fresh(
            f"call {self.type} @{full}({', '.join(f'{self.type} {a}' for a in args)})"
        )

    def fma(self, a: str, b: str, c: str) -> str:
        return self.intrinsic("fmuladd", a, b, c)

    def negative(self, a: str) -> str:
        return self.fresh(f"fneg {self.type} {a}")

    def is_true(self, predicate: str, a: str, b: str) -> str:
        return self.fresh(f"fcmp {predicate} {self.type} {a}, {b}")

    def where(self, condition: str, a: str, b: str) -> str:
        return self.fresh(f"select {self.truth} {condition}, {self.type} {a}, {self.type} {b}")

    def within(self, x: str, low: float | None, high: float | None) -> str:
        """``x`` clamped; NaN stays."""
        if low is not None:
            x = self.where(self.is_true("olt", x, self.number(low)), self.number(low), x)
        if high is not None:
            x = self.where(self.is_true("ogt", x, self.number(high)), self.number(high), x)
        return x

    def as_bits(self, x: str) -> str:
        return self.fresh(f"bitcast {self.type} {x} to {self.bits}")

    def of_bits(self, x: str) -> str:
        return self.fresh(f"bitcast {self.bits} {x} to {self.type}")

    def power_of_two(self, i: str) -> str:
        """``2**i`` for integers whose lowest 11 bits count."""
        shifted = self.bit_op("shl", self.bit_op("add", i, self.integer(1023)), self.integer(52))
        return self.of_bits(shifted)

    def polynomial(self, coefficients: Sequence[float], x: str) -> str:
        """A polynomial, lowest power first, by Estrin's scheme: few operations wait for another."""
        terms = [self.number(c) for c in coefficients]
        while len(terms) > 1:
            pairs = [self.fma(terms[i + 1], x, terms[i]) for i in range(0, len(terms) - 1, 2)]
            terms = pairs + terms[2 * len(pairs) :]
            if len(terms) > 1:
                x = self.op("fmul", x, x)
        return terms[0]

    # -- the functions -----------------------------------------------------------------------------

    def _reduced(self, x: str) -> tuple[str, str, str]:
        """``x`` as ``n ln 2 + r``: ``n`` plus the magic number, ``n``, and ``r``."""
        shifted = self.fma(x, self.number(1.0 / math.log(2)), self.number(_MAGIC))
        n = self.op("fsub", shifted, self.number(_MAGIC))
        r = self.fma(n, self.number(-_LN2_HIGH), x)
        return shifted, n, self.fma(n, self.number(-_LN2_LOW), r)

    def exp(self, x: str) -> str:
        x = self.within(x, -746.0, 710.0)
        shifted, n, r = self._reduced(x)
        square = self.op("fmul", r, r)
        below = self.fma(square, self.polynomial(_EXP, r), r)
        value = self.op("fadd", below, self.number(1.0))
        # in two factors: the power itself may overflow, or be subnormal
        half = self.as_bits(self.fma(n, self.number(0.5), self.number(_MAGIC)))
        rest = self.bit_op("sub", self.as_bits(shifted), half)
        value = self.op("fmul", value, self.power_of_two(half))
        return self.op("fmul", value, self.power_of_two(rest))

    def expm1(self, x: str) -> str:
        x = self.within(x, -60.0, 710.0)
        shifted, _, r = self._reduced(x)
        square = self.op("fmul", r, r)
        below = self.fma(square, self.polynomial(_EXP, r), r)
        half = self.power_of_two(self.bit_op("sub", self.as_bits(shifted), self.integer(1)))
        shift = self.op("fsub", half, self.number(0.5))
        value = self.fma(half, below, shift)
        value = self.op("fadd", value, value)
        return self._with_signed_zero(x, value)

    def _with_signed_zero(self, x: str, value: str) -> str:
        """``value`` where ``x`` is not zero, else ``x``: zero keeps its sign."""
        return self.where(self.is_true("oeq", x, self.number(0.0)), x, value)

    def tanh(self, x: str) -> str:
        size = self.intrinsic("fabs", x)
        e = self.expm1(self.op("fmul", size, self.number(-2.0)))
        value = self.op("fdiv", self.negative(e), self.op("fadd", e, self.number(2.0)))
        return self.intrinsic("copysign", value, x)

    def log(self, x: str) -> str:
        tiny = self.is_true("olt", x, self.number(2.0**-1022))
        scaled = self.where(tiny, self.op("fmul", x, self.number(2.0**54)), x)
        shift = self.where(tiny, self.number(-54.0), self.number(0.0))
        bits = self.as_bits(scaled)
        above = self.bit_op("sub", bits, self.integer(0x3FE6A09E667F3BCD))  # the root of a half
        exponent = self.bit_op("ashr", above, self.integer(52))
        m = self.of_bits(self.bit_op("sub", bits, self.bit_op("shl", exponent, self.integer(52))))
        magic = self.integer(struct.unpack("<q", struct.pack("<d", _MAGIC))[0])
        e = self.of_bits(self.bit_op("add", exponent, magic))
        e = self.op("fadd", self.op("fsub", e, self.number(_MAGIC)), shift)
        f = self.op("fsub", m, self.number(1.0))
        s = self.op("fdiv", f, self.op("fadd", f, self.number(2.0)))
        z = self.op("fmul", s, s)
        rest = self.op("fmul", z, self.polynomial(_LOG, z))
        half = self.op("fmul", self.op("fmul", f, f), self.number(0.5))
        low = self.fma(s, self.op("fadd", half, rest), self.op("fmul", e, self.number(_LN2_LOW)))
        inner = self.op("fsub", self.op("fsub", half, low), f)
        value = self.op("fsub", self.op("fmul", e, self.number(_LN2_HIGH)), inner)
        value = self.where(self.is_true("oeq", x, self.number(0.0)), self.number(-math.inf), value)
        positive = self.is_true("oge", x, self.number(0.0))
        value = self.where(positive, value, self.number(math.nan))
        return self.where(self.is_true("oeq", x, self.number(math.inf)), x, value)

    def log1p(self, x: str) -> str:
        """By ``log(u) x / (u - 1)`` with ``u = 1 + x`` rounded (Kahan)."""
        u = self.op("fadd", x, self.number(1.0))
        value = self.log(u)
        lost = self.op("fdiv", x, self.op("fsub", u, self.number(1.0)))
        value = self.where(
            self.is_true("oeq", u, self.number(math.inf)), value, self.op("fmul", value, lost)
        )
        return self.where(self.is_true("oeq", u, self.number(1.0)), x, value)

    def _angle(self, x: str, turned: int) -> str:
        """``sin(x + turned pi / 2)``."""
        shifted = self.fma(x, self.number(2.0 / math.pi), self.number(_MAGIC))
        n = self.op("fsub", shifted, self.number(_MAGIC))
        r = x
        for part in (*_HALF_PI, _HALF_PI_REST):
            r = self.fma(n, self.number(-part), r)
        z = self.op("fmul", r, r)
        sine = self.fma(self.op("fmul", z, r), self.polynomial(_SIN, z), r)
        sine = self._with_signed_zero(x, sine)
        below = self.fma(z, self.number(-0.5), self.number(1.0))
        cosine = self.fma(self.op("fmul", z, z), self.polynomial(_COS, z), below)
        quarter = self.bit_op("add", self.as_bits(shifted), self.integer(turned))
        odd = self.bit_op("and", quarter, self.integer(1))
        is_odd = self.fresh(f"icmp ne {self.bits} {odd}, {self.integer(0)}")
        value = self.as_bits(self.where(is_odd, cosine, sine))
        sign = self.bit_op("shl", self.bit_op("and", quarter, self.integer(2)), self.integer(62))
        return self.of_bits(self.bit_op("xor", value, sign))

    def sin(self, x: str) -> str:
        return self._angle(x, 0)

    def cos(self, x: str) -> str:
        return self._angle(x, 1)


_OWN = ("exp", "expm1", "tanh", "log", "log1p", "sin", "cos")


def function_name(op: str, is_float32: bool) -> str:
    """Name of the function for vectors, which ``definitions`` writes."""
    return f"vector_{op}{'f' if is_float32 else ''}"


def definitions(op: str, arguments: int, library: str, lanes: int, is_float32: bool) -> list[str]:
    """IR of the function ``op`` of vectors, and of what it needs.

    Parameters
    ----------
    arguments
        How many it takes.
    library
        Name in the mathematical library, for numbers of the type at hand.
    lanes
        Numbers in a vector.
    """
    if op not in _OWN:
        kind = "float" if is_float32 else "double"
        return [_by_lanes(function_name(op, is_float32), library, kind, arguments, lanes)]
    texts = _own(op, lanes)
    if is_float32:
        wide, narrow = f"<{lanes} x double>", f"<{lanes} x float>"
        texts.append(
            f"define internal {narrow} @{function_name(op, True)}({narrow} %x) #2 {{\n"
            f"%wide = fpext {narrow} %x to {wide}\n"
            f"%y = call {wide} @{function_name(op, False)}({wide} %wide)\n"
            f"%narrow = fptrunc {wide} %y to {narrow}\n"
            f"ret {narrow} %narrow\n}}"
        )
    return texts


def _own(op: str, lanes: int) -> list[str]:
    """IR of one of the functions above, for float64."""
    text = _Vector(lanes)
    method: Callable[[str], str] = getattr(text, op)
    result = method("%x")
    kind, name = text.type, function_name(op, False)
    body = "\n".join(text.lines)
    head = f"define internal {kind} @{name}({kind} %x) #2 {{\n"
    if op not in ("sin", "cos"):
        return [f"{head}{body}\nret {kind} {result}\n}}", *sorted(text.declared)]
    size = text.intrinsic("fabs", "%x")
    large = text.is_true("ogt", size, text.number(_MOST_ANGLE))
    check = "\n".join(text.lines[-2:])
    some = f"llvm.vector.reduce.or.v{lanes}i1"
    body = (
        f"{check}\n%some = call i1 @{some}({text.truth} {large})\n"
        f"br i1 %some, label %far, label %near\nfar:\n"
        f"%slow = call {kind} @{name}_by_lanes({kind} %x)\nret {kind} %slow\nnear:\n{body}"
    )
    return [
        f"{head}{body}\nret {kind} {result}\n}}",
        *sorted(text.declared),
        f"declare i1 @{some}({text.truth})",
        _by_lanes(f"{name}_by_lanes", op, "double", 1, lanes),
    ]


def _by_lanes(name: str, library: str, kind: str, arguments: int, lanes: int) -> str:
    """A function of vectors that calls the library for each lane."""
    vector = f"<{lanes} x {kind}>"
    names = [f"%x{j}" for j in range(arguments)]
    lines = []
    result = "poison"
    for i in range(lanes):
        for j, x in enumerate(names):
            lines.append(f"%a{i}_{j} = extractelement {vector} {x}, i32 {i}")
        passed = ", ".join(f"{kind} %a{i}_{j}" for j in range(arguments))
        lines.append(f"%y{i} = call {kind} @{library}({passed})")
        lines.append(f"%r{i} = insertelement {vector} {result}, {kind} %y{i}, i32 {i}")
        result = f"%r{i}"
    head = ", ".join(f"{vector} {x}" for x in names)
    declared = f"declare {kind} @{library}({', '.join([kind] * arguments)}) #1"
    body = "\n".join(lines)
    head = f"define internal {vector} @{name}({head}) #2 {{"
    return "\n".join([head, body, f"ret {vector} {result}\n}}", declared])
