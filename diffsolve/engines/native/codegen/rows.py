"""LLVM IR of routines: work on many independent rows, a vector of rows at a time.

The state of a batch lies row by row, entry ``c`` of row ``i`` at ``i * width + c``. A *routine*
works on as many rows as a vector register holds numbers. Its arrays hold a vector for each entry of
a row, with a number for each row. A routine is made of expressions, and of calls of other routines
where an expression would be too long to repeat. The loop over a batch is in ``row_functions.py``.

Values that are the same for all rows (the time, parameters, and what is computed from them) are
single numbers. They become vectors where they are used with values of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffsolve.engines.native.codegen.emitter import Emitter, Output, Signature, number
from diffsolve.engines.native.codegen.vector_math import function_name
from diffsolve.engines.native.graph.expression import Node, needed

_MOST_INLINED = 60  # lines of a routine that LLVM inlines in every caller
#: Stands for the index of the current entry, in a loop over the entries of a row.
ENTRY: Any = "c"
_NATIVE_VECTORS = {"abs", "floor", "ceil", "trunc", "round", "sqrt"}


@dataclass(frozen=True)
class Array:
    """An array among the arguments of a routine and of the row function around it.

    Attributes
    ----------
    name
        The name of its block of inputs in expressions.
    kind
        - ``"in"``: rows that are read. The last vector is filled up with copies of the last row.
        - ``"bar"``: the same for cotangents; the last vector is filled up with zeros.
        - ``"out"``: rows that are written.
        - ``"shared"``: numbers that all rows read.
        - ``"mask"``: one for each row of the batch, zero for rows that fill up the last vector. It
          is made by the loop, and is no argument of the row function.
        - ``"lanes"``: vectors that each row adds to; the caller sums up their entries.
        - ``"sums"``: numbers that are set to sums over the rows.
    width
        Numbers in a row; for ``"lanes"`` and ``"sums"``, the number of vectors or sums.
    """

    name: str
    kind: str
    width: int = 0


@dataclass
class Call:
    """A statement that calls another routine.

    Attributes
    ----------
    routine
        The routine that is called.
    scalars
        Nodes for its scalars, which are the same for all rows.
    arrays
        For each of its arrays either nodes, whose values are written to a buffer, or the name of an
        array of the caller.
    """

    routine: Routine
    scalars: list[Node]
    arrays: list[list[Node] | str]


@dataclass
class Each:
    """A statement that computes outputs for each of ``count`` entries of a row, in a loop.

    The index ``ENTRY``, in its nodes and outputs, stands for the current entry.
    """

    count: int
    outputs: list[Output]


@dataclass
class Routine:
    """A function of a vector of rows.

    Attributes
    ----------
    name
        Unique in its LLVM module.
    scalars, arrays
        Arguments. The first array is called ``u``.
    statements
        Run in order. An ``Output`` writes to an array of rows, or adds to one.
    locals
        Local arrays by name, with the number of vectors that each holds.
    """

    name: str
    scalars: tuple[str, ...]
    arrays: tuple[Array, ...]
    statements: list[Output | Call | Each] = field(default_factory=list)
    locals: dict[str, int] = field(default_factory=dict)

    def routines(self) -> list[Routine]:
        """This routine and all that it calls."""
        by_name = {self.name: self}
        for x in self.statements:
            if isinstance(x, Call):
                by_name |= {y.name: y for y in x.routine.routines()}
        return list(by_name.values())


class RoutineEmitter(Emitter):
    """Writes the IR of a routine."""

    longest = 1_000

    def __init__(self, routine: Routine, kind: str, lanes: int):
        super().__init__(kind, Signature(routine.scalars, tuple(a.name for a in routine.arrays)))
        self.routine, self.lanes = routine, lanes
        self.vector = kind if lanes == 1 else f"<{lanes} x {kind}>"
        self.kinds = {a.name: a.kind for a in routine.arrays}
        self.vectors: dict[int, str] = {}  # of nodes that depend on the row
        self.splats: dict[int, str] = {}  # vectors of nodes that do not
        self.head: list[str] = []
        #: Functions of vectors that are called: operation, number of arguments, library's name.
        self.functions: dict[str, tuple[str, int, str]] = {}
        self.buffers = self.loops = 0

    def _use(self, vectors: bool) -> None:
        """Emit vectors, or single numbers, from now on."""
        wide = vectors and self.lanes > 1
        self.type = self.vector if wide else self.kind
        self.truth = f"<{self.lanes} x i1>" if wide else "i1"
        number_suffix = "f64" if self.kind == "double" else "f32"
        self.suffix = f"v{self.lanes}{number_suffix}" if wide else number_suffix

    @property
    def _is_wide(self) -> bool:
        return self.type != self.kind

    def constant(self, x: float) -> str:
        if not self._is_wide:
            return number(x)
        return "<" + ", ".join([f"{self.kind} {number(x)}"] * self.lanes) + ">"

    def true(self) -> str:
        return "<" + ", ".join(["i1 true"] * self.lanes) + ">" if self._is_wide else "true"

    def call(self, op: str, args: Sequence[str]) -> str:
        if not self._is_wide or op in _NATIVE_VECTORS:
            return super().call(op, args)
        name = function_name(op, self.kind == "float")
        self.functions[name] = (op, len(args), op + ("" if self.kind == "double" else "f"))
        passed = ", ".join(f"{self.type} {a}" for a in args)
        return self.fresh(f"call {self.type} @{name}({passed})")

    # -- nodes -----------------------------------------------------------------------------------

    def emit(self, node: Node) -> str:
        if node.op == "input" and node.data[0] not in self.signature.scalars:
            block, i = node.data
            if self.kinds.get(block, "local") != "shared":
                place = self._vector_place(block, i)
                self.vectors[node.index] = x = self.fresh(f"load {self.vector}, ptr {place}")
                return x
        if node.args and any(a.index in self.vectors for a in node.args):
            self._use(True)
            args = [self._wide(a) for a in node.args]
            x = self.vectors[node.index] = self.operation(node, args)
            return x
        self._use(False)
        if node.op == "input" and node.data[0] not in self.signature.scalars:
            return ""  # a parameter: it is loaded where it is used
        if node.args:
            return self.operation(node, [self._narrow(a) for a in node.args])
        return super().emit(node)

    def _vector_place(self, block: str, i: Any) -> str:
        index = f"%entry{self.loops}" if i == ENTRY else i
        return self.fresh(f"getelementptr inbounds {self.vector}, ptr %{block}, i64 {index}")

    def _narrow(self, node: Node) -> str:
        """The value of a node that is the same for all rows."""
        name = self.names[node.index]
        if name:
            return name
        block, i = node.data
        return self.fresh(f"load {self.kind}, ptr {self.address(block, i)}")

    def _wide(self, node: Node) -> str:
        """The value of a node as a vector."""
        if node.index in self.vectors:
            return self.vectors[node.index]
        if node.is_const and not node.is_bool:
            return self.constant(node.data)
        if self.lanes == 1:
            return self._narrow(node)
        if node.index in self.splats:
            return self.splats[node.index]
        kind = "i1" if node.is_bool else self.kind
        one = self.fresh(
            f"insertelement <{self.lanes} x {kind}> poison, {kind} {self._narrow(node)}, i32 0"
        )
        x = self.fresh(
            f"shufflevector <{self.lanes} x {kind}> {one}, <{self.lanes} x {kind}> poison, "
            f"<{self.lanes} x i32> zeroinitializer"
        )
        if node.op != "input":  # a load is as cheap as a register that is kept for long
            self.splats[node.index] = x
        return x

    def make(self, nodes: Sequence[Node]) -> None:
        """Emit these nodes and all that they need, unless it was emitted before."""
        for node in needed(nodes, self.names):
            self.names[node.index] = self.emit(node)

    # -- statements ------------------------------------------------------------------------------

    def body(self) -> str:
        return "\n".join(self.lines) if self.loops else super().body()

    def write(self, out: Output) -> None:
        self.make([out.node])
        self._use(True)
        value = self._wide(out.node)
        place = self._vector_place(out.block, out.index)
        if self.kinds.get(out.block) == "lanes":  # the caller's memory
            place += ", align 8" if self.kind == "double" else ", align 4"
        if out.add:
            before = self.fresh(f"load {self.vector}, ptr {place}")
            value = self.fresh(f"fadd {self.vector} {before}, {value}")
        self.lines.append(f"store {self.vector} {value}, ptr {place}")

    def loop(self, each: Each) -> None:
        nodes = needed([x.node for x in each.outputs])
        varying = {x.index for x in nodes if x.op == "input" and x.data[1] == ENTRY}
        for node in nodes:
            if any(a.index in varying for a in node.args):
                varying.add(node.index)
        invariant = [x for x in nodes if x.index not in varying]  # these come before the loop
        self.make(invariant)
        for node in invariant:
            if node.index in self.vectors or not (node.is_const or self.names[node.index] == ""):
                self._use(True)
                self._wide(node)
        self.loops += 1
        k = self.loops
        label, before = f"each{k}", f"before{k}"
        self.lines += [f"br label %{before}", f"{before}:", f"br label %{label}", f"{label}:"]
        self.lines.append(f"%entry{k} = phi i64 [0, %{before}], [%following{k}, %{label}]")
        outside = self.names.copy(), self.vectors.copy(), self.splats.copy()
        for out in each.outputs:
            self.write(out)
        self.names, self.vectors, self.splats = outside
        self.lines += [
            f"%following{k} = add i64 %entry{k}, 1",
            f"%some{k} = icmp ult i64 %following{k}, {each.count}",
            f"br i1 %some{k}, label %{label}, label %done{k}",
            f"done{k}:",
        ]

    def call_routine(self, call: Call) -> None:
        self.make(call.scalars)
        passed = [f"{self.kind} {self._narrow(x)}" for x in call.scalars]
        for array in call.arrays:
            passed.append(f"ptr %{array if isinstance(array, str) else self._argument(array)}")
        self.lines.append(f"call void @{call.routine.name}({', '.join(passed)})")

    def _argument(self, nodes: list[Node]) -> str:
        first = nodes[0]
        if first.op == "input" and self.kinds.get(first.data[0], "local") != "shared":
            block = first.data[0]
            whole = [("input", (block, i)) for i in range(len(nodes))]
            if [(x.op, x.data) for x in nodes] == whole:
                return block  # the nodes are an array of this routine, as it is
        self.make(nodes)
        self.buffers += 1
        buffer = f"buffer{self.buffers}"
        self.local(buffer, len(nodes))
        self._use(True)
        for i, node in enumerate(nodes):
            value = self._wide(node)
            place = self._vector_place(buffer, i)
            self.lines.append(f"store {self.vector} {value}, ptr {place}")
        return buffer

    def local(self, name: str, count: int) -> None:
        self.head.append(f"%{name} = alloca [{max(count, 1)} x {self.vector}], align 64")

    def text(self) -> str:
        routine = self.routine
        for name, count in routine.locals.items():
            self.local(name, count)
        for statement in routine.statements:
            if isinstance(statement, Call):
                self.call_routine(statement)
            elif isinstance(statement, Each):
                self.loop(statement)
            else:
                self.write(statement)
        scalars = [f"{self.kind} %{s}" for s in routine.scalars]
        arrays = [f"ptr noalias %{a.name}" for a in routine.arrays]
        attribute = "#3" if len(self.lines) <= _MOST_INLINED else "#0"
        head = f"define internal void @{routine.name}({', '.join(scalars + arrays)}) {attribute} {{"
        return "\n".join([head, *self.head, self.body(), "ret void\n}"])
