"""From expressions to machine code: LLVM IR, object files, and a cache of them on disk."""

from __future__ import annotations

import functools
import hashlib
import math
import struct
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffsolve.engines.native.codegen.cache import KERNEL, read, write
from diffsolve.engines.native.codegen.vector_math import definitions, function_name
from diffsolve.engines.native.graph.expression import COMPARE, Node, needed
from diffsolve.engines.native.graph.groups import in_groups
from diffsolve.engines.native.locks import compiling

#: Raised by one whenever the generated code changes for the same graph.
_FORMAT = 1
_BLOCK = 150  # lines of IR in a basic block
NEVER = "%never = icmp eq ptr %u, null"


@dataclass(frozen=True)
class Output:
    """A place that a compiled function writes.

    Attributes
    ----------
    block, index
        Where: an entry of an array that is among the function's arguments.
    node
        What.
    add
        Whether to add to what is there.
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
    """Text of one function."""

    longest = 2 * _BLOCK  # lines that are left in one block

    def __init__(self, kind: str, signature: Signature):
        self.kind = kind  # LLVM's name of the number type
        self.type, self.truth = kind, "i1"  # of values: a number, or a vector of them
        self.suffix = "f64" if kind == "double" else "f32"
        self.signature = signature
        self.lines: list[str] = []
        self.names: dict[int, str] = {}
        self.declared: dict[str, str] = {}
        self.count = 0
        self.vector_calls: set[str] = set()  # functions that are called with vectors

    def fresh(self, text: str) -> str:
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
        """The one of two that wins, or a NaN among them."""
        kind, truth = self.type, self.truth
        wins = self.fresh(f"fcmp {predicate} {kind} {a}, {b}")
        is_nan = self.fresh(f"fcmp uno {kind} {a}, {a}")
        first = self.fresh(f"or {truth} {wins}, {is_nan}")
        return self.fresh(f"select {truth} {first}, {kind} {a}, {kind} {b}")

    def half_power(self, x: str, exponent: float) -> str:
        """``x**1.5`` and the like by a square root, many times faster; right at every corner."""
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
        kind, op, truth, constant = self.type, node.op, self.truth, self.constant
        if op in _ARITHMETIC:
            return self.fresh(f"{_ARITHMETIC[op]} {kind} {args[0]}, {args[1]}")
        if op == "held":
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
        """The lines, in blocks: LLVM's time grows with the square of a block's length.

        What keeps it from joining them again is a branch that is never taken.
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
        """Of the functions that are called."""
        results = {name: types.split(",")[0] for name, types in self.declared.items()}
        return [
            f"declare {results[name]} @{name}({types}) #1"
            for name, types in sorted(self.declared.items())
        ]

    def emit_together(self, nodes: Sequence[Node]) -> None:
        """The same function of several numbers, by vectors; the last one is filled up."""
        op, kind, lanes = nodes[0].op, self.kind, lanes_of(self.kind == "float")
        inner = "exp" if op == "sigmoid" else op
        self.vector_calls.add(inner)
        vector, name = f"<{lanes} x {kind}>", function_name(inner, kind == "float")
        for begin in range(0, len(nodes), lanes):
            some = nodes[begin : begin + lanes]
            args = [self.names[node.args[0].index] for node in some]
            if op == "sigmoid":
                args = [self.fresh(f"fneg {kind} {arg}") for arg in args]
            x = "poison"
            for i, arg in enumerate([*args, *args[:1] * (lanes - len(args))]):
                x = self.fresh(f"insertelement {vector} {x}, {kind} {arg}, i32 {i}")
            y = self.fresh(f"call {vector} @{name}({vector} {x})")
            for i, node in enumerate(some):
                value = self.fresh(f"extractelement {vector} {y}, i32 {i}")
                if op == "sigmoid":
                    value = self.one_over_one_plus(value)
                self.names[node.index] = value

    def one_over_one_plus(self, x: str) -> str:
        below = self.fresh(f"fadd {self.type} {x}, {self.constant(1.0)}")
        return self.fresh(f"fdiv {self.type} {self.constant(1.0)}, {below}")

    def store(self, out: Output) -> None:
        kind, value = self.kind, self.names[out.node.index]
        place = self.address(out.block, out.index)
        if out.add:
            before = self.fresh(f"load {kind}, ptr {place}")
            value = self.fresh(f"fadd {kind} {before}, {value}")
        self.lines.append(f"store {kind} {value}, ptr {place}")

    def vector_definitions(self) -> str:
        """Of the functions of vectors that are called."""
        single, found = self.kind == "float", []
        for op in sorted(self.vector_calls):
            library = op + ("f" if single else "")
            found += definitions(op, 1, library, lanes_of(single), single)
        return "\n".join(found)

    def function(self, name: str, outputs: Sequence[Output]) -> str:
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
        return once(
            f"{head}\n{body}\nret void\n}}\n{declared}\n{vectors}"
            "attributes #0 = { nounwind }\n"
            "attributes #1 = { nounwind willreturn memory(none) }\n"
        )


def once(text: str) -> str:
    """Without the second declaration of one function."""
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


def lanes_of(single: bool) -> int:
    """How many numbers are computed at a time: as many as a register holds, at least four."""
    wide = 8 if "+avx512f" in machine().features and "+avx512dq" in machine().features else 4
    return 2 * wide if single else wide


def number(x: float) -> str:
    """A constant in LLVM's exact notation, which for both types is that of doubles."""
    return f"0x{struct.unpack('<Q', struct.pack('<d', x))[0]:016X}"


def function_ir(name: str, signature: Signature, outputs: Sequence[Output], single: bool) -> str:
    """IR of a function that computes the outputs; arrays it is given must not overlap.

    Parameters
    ----------
    single
        Whether numbers are float32 rather than float64.
    """
    return Emitter("float" if single else "double", signature).function(name, outputs)


# -- compiling -----------------------------------------------------------------------------------


class _Machine:
    """The processor at hand, as LLVM sees it; made when code is first compiled."""

    def __init__(self) -> None:
        import llvmlite
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self.llvm = llvm
        self.cpu = llvm.get_host_cpu_name()
        self.features = llvm.get_host_cpu_features().flatten()
        self.target = llvm.Target.from_default_triple()
        self.linker = _Linker(self)
        version = ".".join(map(str, llvm.llvm_version_info))
        self.identity = f"{_FORMAT} {llvmlite.__version__} {version} {self.cpu} {self.features}"

    def target_machine(self, level: int) -> Any:
        return self.target.create_target_machine(
            cpu=self.cpu, features=self.features, opt=level, reloc="pic", jit=True
        )

    def run_passes(self, module: Any, options: Any, level: int = 2) -> None:
        """Simplify a module, by LLVM's pipeline with these options."""
        builder = self.llvm.create_pass_builder(self.target_machine(level), options)
        passes = builder.getModulePassManager()
        passes.run(module, builder)
        # llvmlite has what frees it, but an empty method of a base comes before (50 kB each time)
        if type(passes)._dispose is self.llvm.ffi.ObjectRef._dispose:
            self.llvm.newpassmanagers.NewPassManager._dispose(passes)


@functools.cache
def _machine() -> _Machine:
    return _Machine()


def machine() -> Any:
    with compiling:
        return _machine()


class _Linker:
    """Loads object files.

    What LLVM notes of a library stays with its linker when the library is unloaded, and its name
    is not free again. So there is a new linker after some libraries; an old one lives as long as
    code that it loaded.
    """

    most = 32  # libraries

    def __init__(self, machine: _Machine):
        self._machine, self._count = machine, self.most

    def load(self, name: str, object_file: bytes) -> tuple[Any, Any]:
        """The library, and the linker that it needs."""
        llvm = self._machine.llvm
        while _unused:
            library, _linker = _unused.popleft()
            library.close()
        if self._count == self.most:
            self._jit = llvm.create_lljit_compiler(self._machine.target_machine(2))
            self._count = 0
        self._count += 1
        builder = llvm.JITLibraryBuilder().add_object_img(object_file)
        builder = builder.export_symbol(name).add_current_process()
        return builder.link(self._jit, f"{name}_{self._count}"), self._jit


#: Libraries to unload. Objects die in any thread at any time, where no lock must be waited for.
_unused: deque[tuple[Any, Any]] = deque()


class Code:
    """Machine code that is loaded as long as this object lives; ``address`` is callable."""

    def __init__(self, name: str, object_file: bytes):
        self.name = name
        with compiling:
            library, linker = machine().linker.load(name, object_file)
        self.address = int(library[name])
        # not at exit: a thread may be running it
        weakref.finalize(self, _unused.append, (library, linker)).atexit = False


def compile_function(
    signature: Signature, outputs: Sequence[Output], single: bool, level: int = 2
) -> Code:
    """Machine code of a function of the outputs, from the disk where it was compiled before.

    Parameters
    ----------
    level
        Care of LLVM's code generation, 0 to 3.
    """
    text = function_ir("{name}", signature, outputs, single)
    passes = NEVER not in text  # they would join the blocks
    return cached_code(f"{level}\n{text}", lambda: text, passes, level)


def cached_code(
    content: str,
    make_ir: Callable[[], str],
    passes: bool = False,
    level: int = 2,
    is_kernel: bool = False,
) -> Code:
    """Machine code that was compiled before from the same ``content``, or is from ``make_ir()``.

    In the IR the function's name stands as ``{name}``. ``passes``: whether LLVM is to simplify it.
    """
    key = hashlib.sha256(f"{machine().identity}\n{content}".encode()).hexdigest()
    name, file = f"diffsolve_{key[:24]}", key + KERNEL if is_kernel else key
    found = read(file)
    if found is None:
        found = _compiled(make_ir().replace("{name}", name, 1), passes, level)
        write(file, found)
    return Code(name, found)


def _compiled(text: str, passes: bool, level: int) -> bytes:
    with compiling:
        llvm = machine().llvm
        module = llvm.parse_assembly(text)
        module.verify()
        if passes:
            options = llvm.create_pipeline_tuning_options(speed_level=1)
            options.slp_vectorization = False  # takes seconds on long straight code, for nothing
            options.loop_vectorization = False
            machine().run_passes(module, options, level)
        return machine().target_machine(level).emit_object(module)
