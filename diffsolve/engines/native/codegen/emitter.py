"""Writes the LLVM IR of functions that compute expressions."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from diffsolve.engines.native.codegen.machine import lanes_of
from diffsolve.engines.native.codegen.vector_math import definitions, function_name
from diffsolve.engines.native.graph.expression import COMPARE, Node, needed
from diffsolve.engines.native.graph.groups import in_groups

_BLOCK = 150  # lines of IR in a basic block
#: A condition that is never true, which LLVM cannot know.
NEVER = "%never = icmp eq ptr %u, null"


@dataclass(frozen=True)
class Output:
    """An entry of an array that a compiled function writes.

    Attributes
    ----------
    block, index
        The array, one of the function's arguments, and the entry.
    node
        The expression that is written.
    add
        Whether to add to the entry rather than to replace it.
    """

    block: str
    index: int
    node: Node
    add: bool = False


@dataclass(frozen=True)
class Signature:
    """Arguments of a compiled function, in order: numbers by value, then arrays by address."""

    scalars: tuple[str, ...]
    arrays: tuple[str, ...]


#: ``f(t, u, p, out)``.
FIELD = Signature(("t",), ("u", "p", "out"))

_INTRINSIC = {
    "abs": "fabs",
    "floor": "floor",
    "ceil": "ceil",
    "trunc": "trunc",
    "round": "roundeven",
    "sqrt": "sqrt",
    "pow": "pow",
}
_LIBM = {
    op: op
    for op in [
        "exp",
        "expm1",
        "log",
        "log1p",
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "asinh",
        "acosh",
        "atanh",
        "erf",
        "erfc",
        "atan2",
    ]
}
_ARITHMETIC = {
    "add": "fadd contract",
    "sub": "fsub contract",
    "mul": "fmul contract",
    "div": "fdiv",
    "fmod": "frem",
}
_ORDERED = {"lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge", "eq": "oeq", "ne": "une"}


class Emitter:
    """Writes the IR of one function."""

    longest = 2 * _BLOCK  # a body of no more lines is not divided into blocks

    def __init__(self, kind: str, signature: Signature):
        self.kind = kind  # LLVM's name of the number type
        # LLVM's types of values and of truth values: is_float32 ones here, vectors in a subclass
        self.type, self.truth = kind, "i1"
        self.suffix = "f64" if kind == "double" else "f32"
        self.signature = signature
        self.lines: list[str] = []
        self.names: dict[int, str] = {}  # of the nodes that were emitted, by index
        self.declared: dict[str, str] = {}  # functions that are called, with their arguments' types
        self.count = 0
        self.vector_calls: set[str] = set()  # functions that are called with vectors

    def fresh(self, text: str) -> str:
        """Emit an instruction; the name of its result."""
        self.count += 1
        name = f"%v{self.count}"
        self.lines.append(f"{name} = {text}")
        return name

    def call(self, op: str, args: Sequence[str]) -> str:
        if op in _INTRINSIC:
            name = f"llvm.{_INTRINSIC[op]}.{self.suffix}"
        else:
            name = _LIBM[op] + ("" if self.kind == "double" else "f")
        self.declared[name] = ", ".join([self.type] * len(args))
        passed = ", ".join(f"{self.type} {a}" for a in args)
        return self.fresh(f"call {self.type} @{name}({passed})")

    def constant(self, x: float) -> str:
        return number(x)

    def true(self) -> str:
        return "true"

    def address(self, block: str, index: int) -> str:
        return self.fresh(f"getelementptr inbounds {self.kind}, ptr %{block}, i64 {index}")

    def larger(self, a: str, b: str, predicate: str) -> str:
        """``a`` where ``a predicate b``, else ``b``; NaN if one of them is."""
        kind, truth = self.type, self.truth
        wins = self.fresh(f"fcmp {predicate} {kind} {a}, {b}")
        is_nan = self.fresh(f"fcmp uno {kind} {a}, {a}")
        first = self.fresh(f"or {truth} {wins}, {is_nan}")
        return self.fresh(f"select {truth} {first}, {kind} {a}, {kind} {b}")

    def half_power(self, x: str, exponent: float) -> str:
        """``x`` to the power 1.5, 2.5, -1.5 or -2.5.

        It is made of a square root, many times faster than ``pow``, and is right for zeros,
        infinities and NaN.
        """
        kind, constant = self.type, self.constant
        power = self.fresh(f"fmul {kind} {x}, {self.call('sqrt', [x])}")
        if abs(exponent) == 2.5:
            power = self.fresh(f"fmul {kind} {self.call('abs', [x])}, {power}")  # 0.0 for -0.0
        at_end = constant(math.inf)  # the power of minus infinity
        if exponent < 0:
            power, at_end = self.fresh(f"fdiv {kind} {constant(1.0)}, {power}"), constant(0.0)
        is_end = self.fresh(f"fcmp oeq {kind} {x}, {constant(-math.inf)}")
        return self.fresh(f"select {self.truth} {is_end}, {kind} {at_end}, {kind} {power}")

    def emit(self, node: Node) -> str:
        """Emit a node whose arguments were emitted; the name of its value."""
        op = node.op
        if op == "const":
            if isinstance(node.data, bool):
                return "true" if node.data else "false"
            return self.constant(node.data)
        if op == "input":
            block, i = node.data
            if block in self.signature.scalars:
                return f"%{block}"
            return self.fresh(f"load {self.kind}, ptr {self.address(block, i)}")
        return self.operation(node, [self.names[a.index] for a in node.args])

    def operation(self, node: Node, args: list[str]) -> str:
        """Emit an operation on values with these names."""
        kind, op, truth, constant = self.type, node.op, self.truth, self.constant
        if op in _ARITHMETIC:
            return self.fresh(f"{_ARITHMETIC[op]} {kind} {args[0]}, {args[1]}")
        if op == "stop_gradient":
            return args[0]
        if op == "neg":
            return self.fresh(f"fneg {kind} {args[0]}")
        if op in COMPARE:
            return self.fresh(f"fcmp {_ORDERED[op]} {kind} {args[0]}, {args[1]}")
        if op in ("and", "or", "xor"):
            return self.fresh(f"{op} {truth} {args[0]}, {args[1]}")
        if op == "not":
            return self.fresh(f"xor {truth} {args[0]}, {self.true()}")
        if op == "where":
            return self.fresh(f"select {truth} {args[0]}, {kind} {args[1]}, {kind} {args[2]}")
        if op in ("max", "min", "largest", "smallest"):
            predicate = "ogt" if op in ("max", "largest") else "olt"
            return functools.reduce(lambda a, b: self.larger(a, b, predicate), args)
        one, zero = constant(1.0), constant(0.0)
        if op == "sign":
            up = self.fresh(f"fcmp ogt {kind} {args[0]}, {zero}")
            down = self.fresh(f"fcmp olt {kind} {args[0]}, {zero}")
            inner = self.fresh(f"select {truth} {down}, {kind} {constant(-1.0)}, {kind} {zero}")
            return self.fresh(f"select {truth} {up}, {kind} {one}, {kind} {inner}")
        if op == "pow" and node.args[1].is_const and abs(node.args[1].data) in (1.5, 2.5):
            return self.half_power(args[0], node.args[1].data)
        if op == "sigmoid":
            minus = self.fresh(f"fneg {kind} {args[0]}")
            return self.one_over_one_plus(self.call("exp", [minus]))
        return self.call(op, args)

    def body(self) -> str:
        """The lines. Long code is divided into blocks, since LLVM's time grows with their square.

        Branches that are never taken keep LLVM from joining the blocks again.
        """
        lines = self.lines
        if len(lines) <= self.longest:
            return "\n".join(lines)
        parts = [NEVER, *lines[:_BLOCK]]
        for i, begin in enumerate(range(_BLOCK, len(lines), _BLOCK)):
            parts.append(f"br i1 %never, label %end, label %b{i}")
            parts.append(f"b{i}:")
            parts += lines[begin : begin + _BLOCK]
        return "\n".join([*parts, "br label %end", "end:"])

    def declarations(self) -> list[str]:
        """Declarations of the functions that are called."""
        results = {name: types.split(",")[0] for name, types in self.declared.items()}
        return [
            f"declare {results[name]} @{name}({types}) #1"
            for name, types in sorted(self.declared.items())
        ]

    def emit_together(self, nodes: Sequence[Node]) -> None:
        """Emit calls of one function, several in one vector; the last vector is filled up."""
        op, kind, lanes = nodes[0].op, self.kind, lanes_of(self.kind == "float")
        inner = "exp" if op == "sigmoid" else op
        self.vector_calls.add(inner)
        vector, name = f"<{lanes} x {kind}>", function_name(inner, kind == "float")
        for begin in range(0, len(nodes), lanes):
            group = nodes[begin : begin + lanes]
            args = [self.names[node.args[0].index] for node in group]
            if op == "sigmoid":
                args = [self.fresh(f"fneg {kind} {arg}") for arg in args]
            x = "poison"
            for i, arg in enumerate([*args, *args[:1] * (lanes - len(args))]):
                x = self.fresh(f"insertelement {vector} {x}, {kind} {arg}, i32 {i}")
            y = self.fresh(f"call {vector} @{name}({vector} {x})")
            for i, node in enumerate(group):
                value = self.fresh(f"extractelement {vector} {y}, i32 {i}")
                if op == "sigmoid":
                    value = self.one_over_one_plus(value)
                self.names[node.index] = value

    def one_over_one_plus(self, x: str) -> str:
        below = self.fresh(f"fadd {self.type} {x}, {self.constant(1.0)}")
        return self.fresh(f"fdiv {self.type} {self.constant(1.0)}, {below}")

    def store(self, out: Output) -> None:
        """Write an output whose node was emitted."""
        kind, value = self.kind, self.names[out.node.index]
        place = self.address(out.block, out.index)
        if out.add:
            before = self.fresh(f"load {kind}, ptr {place}")
            value = self.fresh(f"fadd {kind} {before}, {value}")
        self.lines.append(f"store {kind} {value}, ptr {place}")

    def vector_definitions(self) -> str:
        """Definitions of the functions of vectors that are called."""
        is_float32, texts = self.kind == "float", []
        for op in sorted(self.vector_calls):
            library = op + ("f" if is_float32 else "")
            texts += definitions(op, 1, library, lanes_of(is_float32), is_float32)
        return "\n".join(texts)

    def function(self, name: str, outputs: Sequence[Output]) -> str:
        """IR of the function with these outputs."""
        kind = self.kind
        ends: dict[int, list[Output]] = {}
        for out in outputs:
            ends.setdefault(out.node.index, []).append(out)
        for group in in_groups(needed([out.node for out in outputs])):
            if len(group) > 1:
                self.emit_together(group)
            else:
                self.names[group[0].index] = self.emit(group[0])
            for node in group:
                for out in ends.get(node.index, ()):
                    self.store(out)
        scalars = [f"{kind} %{s}" for s in self.signature.scalars]
        arrays = [f"ptr noalias %{a}" for a in self.signature.arrays]
        body = self.body()
        head = f"define void @{name}({', '.join(scalars + arrays)}) #0 {{"
        declared = "\n".join(self.declarations())
        vectors = ""
        if self.vector_calls:
            attributes = "attributes #2 = { nounwind willreturn memory(none) }"
            vectors = f"{self.vector_definitions()}\n{attributes}\n"
        return declared_once(
            f"{head}\n{body}\nret void\n}}\n{declared}\n{vectors}"
            "attributes #0 = { nounwind }\n"
            "attributes #1 = { nounwind willreturn memory(none) }\n"
        )


def declared_once(text: str) -> str:
    """IR in which each function is declared only once."""
    seen: set[str] = set()
    kept = []
    for line in text.split("\n"):
        if line.startswith("declare "):
            name = line.split("@", 1)[1].split("(", 1)[0]
            if name in seen:
                continue
            seen.add(name)
        kept.append(line)
    return "\n".join(kept)


def number(x: float) -> str:
    """A constant in LLVM's exact notation, that of doubles for both types."""
    return f"0x{struct.unpack('<Q', struct.pack('<d', x))[0]:016X}"
