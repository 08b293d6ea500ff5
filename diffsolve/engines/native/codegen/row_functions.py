"""LLVM IR of row functions: a loop over a batch of any size, around a routine for a vector of rows.

The loop deinterleaves rows into vectors of their entries, calls the routine, and interleaves the
results. Rows that do not fill a vector are copied to a buffer first, so that nothing is read or
written behind the arrays. The number of rows stands in memory before the parameters (at
``p - 8 bytes``), so that one code serves every size of a batch.
"""

from __future__ import annotations

from diffsolve.engines.native.codegen.emitter import NEVER, declared_once, number
from diffsolve.engines.native.codegen.llvm import Code, cached_code
from diffsolve.engines.native.codegen.rows import Array, Routine, RoutineEmitter
from diffsolve.engines.native.codegen.vector_math import definitions

_MOST_SHUFFLED = 8  # entries of a row that are deinterleaved in registers
_MOST_STACK = 1_000_000  # bytes
_MOST_LOCAL_SUMS = 32  # vectors of an array of kind "lanes" that the loop sums up on its stack
_ATTRIBUTES = (
    "attributes #0 = { nounwind }\n"
    "attributes #1 = { nounwind willreturn memory(none) }\n"
    "attributes #2 = { nounwind willreturn memory(none) }\n"
    "attributes #3 = { nounwind alwaysinline }\n"
)


class TooWide(Exception):
    """The rows have more entries than fit on the stack."""


class _Loop:
    """Writes the IR of a row function around a routine."""

    def __init__(self, routine: Routine, kind: str, lanes: int):
        self.routine, self.kind, self.lanes = routine, kind, lanes
        self.vector = kind if lanes == 1 else f"<{lanes} x {kind}>"
        self.truth = f"<{lanes} x i1>"
        self.size = 8 if kind == "double" else 4
        self.lines: list[str] = []
        self.count = 0
        self.rows = [a for a in routine.arrays if a.kind in ("in", "bar", "out") and a.width]
        #: Arrays that the routine gets in a buffer, with a vector for each entry.
        self.pieces = [a for a in routine.arrays if a.kind != "shared" and not self.is_long(a)]
        stack = sum(2 * a.width for a in self.pieces)
        stack += sum(routine.locals.values())
        if stack * lanes * self.size > _MOST_STACK:
            raise TooWide

    @staticmethod
    def is_long(a: Array) -> bool:
        """Whether an array of kind "lanes" is added to in the caller's memory at each vector."""
        return a.kind == "lanes" and a.width > _MOST_LOCAL_SUMS

    def fresh(self, text: str) -> str:
        """Emit an instruction; the name of its result."""
        self.count += 1
        self.lines.append(f"%x{self.count} = {text}")
        return f"%x{self.count}"

    def add(self, *lines: str) -> None:
        self.lines += lines

    def at(self, base: str, index: str | int, kind: str | None = None) -> str:
        """The address of an entry."""
        return self.fresh(f"getelementptr inbounds {kind or self.kind}, ptr {base}, i64 {index}")

    def text(self) -> str:
        lanes, add = self.lanes, self.add
        arrays = self.routine.arrays
        for a in arrays:
            if a in self.pieces:
                add(f"%{a.name}.v = alloca [{max(a.width, 1)} x {self.vector}], align 64")
            if a in self.rows and lanes > 1:
                add(f"%{a.name}.t = alloca [{a.width * lanes} x {self.kind}], align 64")
            if a.kind == "sums":
                add(f"%{a.name}.s = alloca [{max(a.width, 1)} x {self.vector}], align 64")
        place = self.fresh("getelementptr i8, ptr %p, i64 -8")
        add(f"%rows = load i64, ptr {place}")
        add(f"%rest = and i64 %rows, {lanes - 1}", "%whole = sub i64 %rows, %rest")
        for a in arrays:
            suffix = {"lanes": "v", "sums": "s"}.get(a.kind)
            if suffix and not self.is_long(a):
                for i in range(a.width):
                    to = self.at(f"%{a.name}.{suffix}", i, self.vector)
                    add(f"store {self.vector} zeroinitializer, ptr {to}")
        add("%ragged = icmp ne i64 %rest, 0", "br i1 %ragged, label %fill, label %start", "fill:")
        if lanes > 1:
            self.fill_tails()
        add("br label %start", "start:", "br label %loop", "loop:")
        add("%i = phi i64 [0, %start], [%next, %loop]")
        self.body()
        add(f"%next = add i64 %i, {lanes}", "%more = icmp ult i64 %next, %rows")
        add("br i1 %more, label %loop, label %after", "after:")
        self.finish()
        scalars = [f"{self.kind} %{s}" for s in self.routine.scalars]
        given = [a for a in arrays if a.kind != "mask"]
        heads = ", ".join(scalars + [f"ptr noalias %{a.name}" for a in given])
        return "\n".join([f"define void @{{name}}({heads}) #0 {{", *self.lines, "ret void\n}"])

    def fill_tails(self) -> None:
        """Copy the rows behind the last full vector to buffers, for the arrays that are read."""
        for a in self.rows:
            if a.kind == "out":
                continue
            first = self.fresh(f"mul i64 %whole, {a.width}")
            source = self.at(f"%{a.name}", first)
            self.add(
                f"call void @{'pad_zero' if a.kind == 'bar' else 'pad'}"
                f"(ptr %{a.name}.t, ptr {source}, i64 %rest, i64 {a.width * self.size})"
            )

    def body(self) -> None:
        """One vector of rows: deinterleave, call the routine, interleave."""
        lanes = self.lanes
        places = {}
        in_batch = self.mask()
        self.add("%is_whole = icmp ult i64 %i, %whole")
        for a in self.rows:
            offset = self.fresh(f"mul i64 %i, {a.width}")
            places[a.name] = self.at(f"%{a.name}", offset)
            if lanes > 1:
                places[a.name] = self.fresh(
                    f"select i1 %is_whole, ptr {places[a.name]}, ptr %{a.name}.t"
                )
        passed = [f"{self.kind} %{s}" for s in self.routine.scalars]
        for a in self.routine.arrays:
            passed.append(f"ptr %{a.name}.v" if a in self.pieces else f"ptr %{a.name}")
            if a.kind == "mask":
                one, zero = self.splat(1.0), self.splat(0.0)
                x = one
                if lanes > 1:
                    x = f"select {self.truth} {in_batch}, {self.vector} {one}, {self.vector} {zero}"
                    x = self.fresh(x)
                self.add(f"store {self.vector} {x}, ptr %{a.name}.v")
            if a in self.rows and a.kind != "out":
                self.deinterleave(a, places[a.name])
        self.add(f"call void @{self.routine.name}({', '.join(passed)})")
        for a in self.routine.arrays:
            if a in self.rows and a.kind == "out":
                if self.is_wide(a):
                    to = places[a.name]
                    self.add(f"call void @together(ptr {to}, ptr %{a.name}.v, i64 {a.width})")
                else:
                    self.interleave(self.loaded(f"%{a.name}.v", a.width), places[a.name])
            elif a.kind == "sums":
                self.sum_up(a, in_batch)

    def loaded(self, base: str, count: int) -> list[str]:
        places = [self.at(base, c, self.vector) for c in range(count)]
        return [self.fresh(f"load {self.vector}, ptr {place}") for place in places]

    def is_wide(self, a: Array) -> bool:
        """Whether rows are too wide to be deinterleaved in registers: a loop does it."""
        return a.width > _MOST_SHUFFLED

    def deinterleave(self, a: Array, place: str) -> None:
        if self.is_wide(a):
            self.add(f"call void @apart(ptr %{a.name}.v, ptr {place}, i64 {a.width})")
            return
        for c, x in enumerate(self.deinterleaved(place, a.width)):
            to = self.at(f"%{a.name}.v", c, self.vector)
            self.add(f"store {self.vector} {x}, ptr {to}")

    def mask(self) -> str:
        """Which rows of the current vector belong to the batch."""
        if self.lanes == 1:
            return "true"
        left = self.fresh("sub i64 %rows, %i")
        kind = f"<{self.lanes} x i64>"
        one = self.fresh(f"insertelement {kind} poison, i64 {left}, i32 0")
        all_left = self.fresh(
            f"shufflevector {kind} {one}, {kind} poison, <{self.lanes} x i32> zeroinitializer"
        )
        indices = ", ".join(f"i64 {i}" for i in range(self.lanes))
        return self.fresh(f"icmp ugt {kind} {all_left}, <{indices}>")

    def splat(self, x: float) -> str:
        if self.lanes == 1:
            return number(x)
        return "<" + ", ".join([f"{self.kind} {number(x)}"] * self.lanes) + ">"

    def sum_up(self, a: Array, in_batch: str) -> None:
        """Add the values of the rows to the sums, but for those that fill up the last vector."""
        for i, x in enumerate(self.loaded(f"%{a.name}.v", a.width)):
            if self.lanes > 1:
                chosen = f"select {self.truth} {in_batch}, {self.vector} {x}, {self.vector} "
                x = self.fresh(f"{chosen}zeroinitializer")
            place = self.at(f"%{a.name}.s", i, self.vector)
            before = self.fresh(f"load {self.vector}, ptr {place}")
            total = self.fresh(f"fadd {self.vector} {before}, {x}")
            self.add(f"store {self.vector} {total}, ptr {place}")

    def deinterleaved(self, place: str, width: int) -> list[str]:
        """Load a vector of rows: a vector for each entry."""
        lanes, kind, align = self.lanes, self.kind, f"align {self.size}"
        if lanes == 1 or width == 1:
            return [
                self.fresh(f"load {self.vector}, ptr {self.at(place, c)}, {align}")
                for c in range(width)
            ]
        wide = f"<{lanes * width} x {kind}>"
        x = self.fresh(f"load {wide}, ptr {place}, {align}")
        return [
            self.fresh(
                f"shufflevector {wide} {x}, {wide} poison, <{lanes} x i32> "
                f"<{', '.join(f'i32 {i * width + c}' for i in range(lanes))}>"
            )
            for c in range(width)
        ]

    def interleave(self, values: list[str], place: str) -> None:
        """Store a vector of rows: the reverse of ``deinterleaved``."""
        lanes, kind, align, width = self.lanes, self.kind, f"align {self.size}", len(values)
        if lanes == 1 or width == 1:
            for c, x in enumerate(values):
                self.add(f"store {self.vector} {x}, ptr {self.at(place, c)}, {align}")
            return
        joined, length = list(values), lanes
        while len(joined) > 1:
            if len(joined) % 2:
                joined.append("poison")
            vector, twice = f"<{length} x {kind}>", f"<{2 * length} x i32>"
            indices = ", ".join(f"i32 {i}" for i in range(2 * length))
            joined = [
                self.fresh(f"shufflevector {vector} {a}, {vector} {b}, {twice} <{indices}>")
                for a, b in zip(joined[::2], joined[1::2], strict=True)
            ]
            length *= 2
        order = [c * lanes + i for i in range(lanes) for c in range(width)]
        x = self.fresh(
            f"shufflevector <{length} x {kind}> {joined[0]}, <{length} x {kind}> poison, "
            f"<{lanes * width} x i32> <{', '.join(f'i32 {i}' for i in order)}>"
        )
        self.add(f"store <{lanes * width} x {kind}> {x}, ptr {place}, {align}")

    def finish(self) -> None:
        """After the loop: store the sums, and the rows behind the last full vector."""
        for a in self.routine.arrays:
            if a.kind == "lanes" and not self.is_long(a):
                for i, x in enumerate(self.loaded(f"%{a.name}.v", a.width)):
                    place = self.at(f"%{a.name}", i, self.vector)
                    before = self.fresh(f"load {self.vector}, ptr {place}, align {self.size}")
                    total = self.fresh(f"fadd {self.vector} {before}, {x}")
                    self.add(f"store {self.vector} {total}, ptr {place}, align {self.size}")
            elif a.kind == "sums":
                for i, x in enumerate(self.loaded(f"%{a.name}.s", a.width)):
                    place = self.at(f"%{a.name}", i)
                    self.add(f"store {self.kind} {self.sum_of_lanes(x)}, ptr {place}")
        outs = [a for a in self.rows if a.kind == "out"]
        if self.lanes == 1 or not outs:
            return
        self.add("br i1 %ragged, label %copy, label %end", "copy:")
        for a in outs:
            place = self.at(f"%{a.name}", self.fresh(f"mul i64 %whole, {a.width}"))
            size = self.fresh(f"mul i64 %rest, {a.width * self.size}")
            self.add(
                f"call void @llvm.memcpy.p0.p0.i64(ptr {place}, ptr %{a.name}.t, i64 {size}, i1 0)"
            )
        self.add("br label %end", "end:")

    def sum_of_lanes(self, x: str) -> str:
        lanes = self.lanes
        while lanes > 1:
            vector, half = f"<{lanes} x {self.kind}>", lanes // 2
            parts = []
            for begin in (0, half):
                indices = ", ".join(f"i32 {begin + i}" for i in range(half))
                parts.append(
                    self.fresh(
                        f"shufflevector {vector} {x}, {vector} poison, <{half} x i32> <{indices}>"
                    )
                )
            x = self.fresh(f"fadd <{half} x {self.kind}> {parts[0]}, {parts[1]}")
            lanes = half
        if self.lanes > 1:
            x = self.fresh(f"extractelement <1 x {self.kind}> {x}, i32 0")
        return x


def _pads(lanes: int) -> str:
    """IR of functions that fill up a vector of rows, with zeros or with copies of the last row."""
    return f"""
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
define internal void @pad_zero(ptr %to, ptr %from, i64 %rest, i64 %row) #0 {{
%all = mul i64 %row, {lanes}
%some = mul i64 %row, %rest
call void @llvm.memset.p0.i64(ptr %to, i8 0, i64 %all, i1 0)
call void @llvm.memcpy.p0.p0.i64(ptr %to, ptr %from, i64 %some, i1 0)
ret void
}}
define internal void @pad(ptr %to, ptr %from, i64 %rest, i64 %row) #0 {{
entry:
%some = mul i64 %row, %rest
call void @llvm.memcpy.p0.p0.i64(ptr %to, ptr %from, i64 %some, i1 0)
%before = sub i64 %some, %row
%last = getelementptr i8, ptr %to, i64 %before
%end = mul i64 %row, {lanes}
br label %loop
loop:
%place = phi i64 [%some, %entry], [%next, %loop]
%at = getelementptr i8, ptr %to, i64 %place
call void @llvm.memcpy.p0.p0.i64(ptr %at, ptr %last, i64 %row, i1 0)
%next = add i64 %place, %row
%more = icmp ult i64 %next, %end
br i1 %more, label %loop, label %done
done:
ret void
}}
"""


def _transpositions(lanes: int, kind: str) -> str:
    """IR of functions that deinterleave and interleave wide rows, in a loop over their entries."""
    size, vector = 8 if kind == "double" else 4, kind if lanes == 1 else f"<{lanes} x {kind}>"

    def looped(name: str, lines: list[str]) -> str:
        body = "\n".join(lines)
        return (
            f"define internal void @{name}(ptr noalias %to, ptr noalias %from, i64 %width) #0 {{\n"
            "entry:\nbr label %loop\nloop:\n%c = phi i64 [0, %entry], [%next, %loop]\n"
            f"{body}\n%next = add i64 %c, 1\n%more = icmp ult i64 %next, %width\n"
            "br i1 %more, label %loop, label %end\nend:\nret void\n}"
        )

    def place(i: int, base: str) -> list[str]:
        before = "%c" if i == 0 else f"%k{i - 1}"
        index = [f"%k{i} = add i64 {before}, {0 if i == 0 else '%width'}"]
        return [*index, f"%at{i} = getelementptr inbounds {kind}, ptr {base}, i64 %k{i}"]

    x, apart, together = "poison", [], [f"%v = getelementptr inbounds {vector}, ptr %from, i64 %c"]
    together.append(f"%x = load {vector}, ptr %v")
    for i in range(lanes):
        apart += [*place(i, "%from"), f"%one{i} = load {kind}, ptr %at{i}, align {size}"]
        together += place(i, "%to")
        one = "%x"
        if lanes > 1:
            apart.append(f"%x{i} = insertelement {vector} {x}, {kind} %one{i}, i32 {i}")
            together.append(f"%one{i} = extractelement {vector} %x, i32 {i}")
            x, one = f"%x{i}", f"%one{i}"
        together.append(f"store {kind} {one}, ptr %at{i}, align {size}")
    x = x if lanes > 1 else "%one0"
    apart.append(f"%v = getelementptr inbounds {vector}, ptr %to, i64 %c")
    apart.append(f"store {vector} {x}, ptr %v")
    return looped("apart", apart) + "\n" + looped("together", together)


def row_function_ir(routine: Routine, lanes: int, is_float32: bool) -> str:
    """IR of the row function of a routine, in which its name stands as ``{name}``.

    Raises
    ------
    TooWide
        If the rows have more entries than fit on the stack.
    """
    kind = "float" if is_float32 else "double"
    parts = [_Loop(routine, kind, lanes).text()]
    declared: list[str] = []
    functions: dict[str, tuple[str, int, str]] = {}
    for each in routine.routines():
        emitter = RoutineEmitter(each, kind, lanes)
        parts.append(emitter.text())
        declared += emitter.declarations()
        functions |= emitter.functions
    if any(a.width > _MOST_SHUFFLED for a in routine.arrays):
        parts.append(_transpositions(lanes, kind))
    if lanes > 1:
        parts.append(_pads(lanes))
        for op, arguments, library in functions.values():
            parts += definitions(op, arguments, library, lanes, is_float32)
    text = "\n".join([*parts, *declared, _ATTRIBUTES])
    return declared_once(text)


def compile_rows(routine: Routine, lanes: int, is_float32: bool) -> Code:
    """Machine code of the row function of a routine, from the cache if it is there."""
    text = row_function_ir(routine, lanes, is_float32)
    return cached_code(text, lambda: text, NEVER not in text)
