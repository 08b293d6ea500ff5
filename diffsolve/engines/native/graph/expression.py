"""Scalar expressions as a directed acyclic graph, in which each distinct expression is one node.

A ``Pool`` makes the nodes of one right-hand side. It returns the same node for equal expressions
(hash-consing), folds constants, and applies a few identities that hold for every number, NaN and
infinities included. Matrices of expressions are NumPy object arrays of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np

from diffsolve.engines.declined import Declined

#: Most nodes of a right-hand side. More take a second or longer to compile, with the derivative.
MOST_NODES = 10_000

#: Operations on one number, with what folds constants.
UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "round": np.round,
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "erf": np.vectorize(math.erf, otypes=[float]),
    "erfc": np.vectorize(math.erfc, otypes=[float]),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "stop_gradient": lambda x: x,
}
#: Operations on two numbers.
BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "pow": np.power,
    "atan2": np.arctan2,
    "fmod": np.fmod,
    "max": np.maximum,
    "min": np.minimum,
}
#: Comparisons of two numbers, which give a truth value.
COMPARE = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
#: Operations on two truth values.
LOGICAL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_COMMUTATIVE = {"add", "mul", "eq", "ne", "and", "or", "xor"}


class Node:
    """One scalar expression; ``op`` applied to ``args``, or a constant, or an input.

    Attributes
    ----------
    op
        A key of ``UNARY``, ``BINARY``, ``COMPARE``, ``LOGICAL``, or one of ``"const"``,
        ``"input"``, ``"where"``, ``"not"``, ``"largest"``, ``"smallest"``.
    args
        Nodes; none for constants and inputs.
    data
        Value of a constant, ``(block, index)`` of an input, else None.
    index
        Position in the pool. Arguments have smaller ones than the nodes that use them.
    """

    __slots__ = ("args", "data", "index", "op", "pool")

    def __init__(self, pool: Pool, op: str, args: tuple[Node, ...], data: Any, index: int):
        self.pool, self.op, self.args, self.data, self.index = pool, op, args, data, index

    @property
    def is_const(self) -> bool:
        return self.op == "const"

    @property
    def is_bool(self) -> bool:
        if self.op == "const":
            return isinstance(self.data, bool)
        return self.op in COMPARE or self.op in LOGICAL or self.op == "not"

    def __add__(self, other: Any) -> Node:
        return self.pool.binary("add", self, other)

    def __radd__(self, other: Any) -> Node:
        return self.pool.binary("add", other, self)

    def __sub__(self, other: Any) -> Node:
        return self.pool.binary("sub", self, other)

    def __rsub__(self, other: Any) -> Node:
        return self.pool.binary("sub", other, self)

    def __mul__(self, other: Any) -> Node:
        return self.pool.binary("mul", self, other)

    def __rmul__(self, other: Any) -> Node:
        return self.pool.binary("mul", other, self)

    def __truediv__(self, other: Any) -> Node:
        return self.pool.binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Node:
        return self.pool.binary("div", other, self)

    def __neg__(self) -> Node:
        return self.pool.unary("neg", self)

    def __repr__(self) -> str:
        if self.op == "const":
            return repr(self.data)
        if self.op == "input":
            block, i = self.data
            return f"{block}[{i}]"
        return f"{self.op}({', '.join(map(repr, self.args))})"


class Pool:
    """Maker and owner of the nodes of one right-hand side.

    Parameters
    ----------
    dtype
        ``np.float64`` or ``np.float32``: constants are rounded to it, and folded in it.
    most
        Number of nodes beyond which ``Declined`` is raised.
    """

    def __init__(self, dtype: Any = np.float64, most: int = MOST_NODES):
        self.dtype = np.dtype(dtype).type
        self.most = most
        self.nodes: list[Node] = []
        self._table: dict[Any, Node] = {}

    def release(self) -> None:
        """Drop the nodes. They refer to the pool, and need not wait for the garbage collector."""
        self.nodes, self._table, self.most = [], {}, 0

    def _make(self, op: str, args: tuple[Node, ...], data: Any = None) -> Node:
        key = (op, *[a.index for a in args]) if data is None else (op, data)
        node = self._table.get(key)
        if node is None:
            if len(self.nodes) >= self.most:
                raise Declined(f"it is too large: more than {self.most:,} scalar operations")
            node = Node(self, op, args, data, len(self.nodes))
            self.nodes.append(node)
            self._table[key] = node
        return node

    def const(self, value: Any) -> Node:
        """A constant: a truth value, or a number rounded to the pool's dtype."""
        if isinstance(value, (bool, np.bool_)):
            return self._make_const(("b", bool(value)), bool(value))
        with np.errstate(all="ignore"):
            x = float(self.dtype(value))
        # by its bits: -0.0 is not 0.0, and NaN is itself
        return self._make_const(("f", math.copysign(1.0, x), "nan" if math.isnan(x) else x), x)

    def _make_const(self, key: Any, value: Any) -> Node:
        node = self._table.get(key)
        if node is None:
            node = Node(self, "const", (), value, len(self.nodes))
            self.nodes.append(node)
            self._table[key] = node
        return node

    def input(self, block: str, i: int) -> Node:
        return self._make("input", (), (block, i))

    def inputs(self, block: str, count: int) -> np.ndarray:
        return array([self.input(block, i) for i in range(count)])

    def node(self, x: Any) -> Node:
        return x if isinstance(x, Node) else self.const(x)

    def number(self, x: Any) -> Node:
        """``x`` as a number: a truth value becomes 0 or 1."""
        x = self.node(x)
        return self.where(x, 1.0, 0.0) if x.is_bool else x

    def truth(self, x: Any) -> Node:
        """``x`` as a truth value: a number is true where it is not zero."""
        x = self.node(x)
        return x if x.is_bool else self.binary("ne", x, 0.0)

    def _fold(self, f: Any, *args: Node) -> Node:
        with np.errstate(all="ignore"):
            values = [a.data if isinstance(a.data, bool) else self.dtype(a.data) for a in args]
            return self.const(f(*values))

    def again(self, node: Node, args: Sequence[Node]) -> Node:
        """The operation of a node on other arguments, without simplification."""
        return self._make(node.op, tuple(args), node.data)

    def unary(self, op: str, x: Any) -> Node:
        x = self.number(x)
        if x.is_const:
            return self._fold(UNARY[op], x)
        if op == "neg" and x.op == "neg":
            return x.args[0]
        if op == "abs" and x.op in ("neg", "abs"):
            return self.unary("abs", x.args[0])
        return self._make(op, (x,))

    def binary(self, op: str, a: Any, b: Any) -> Node:
        if op in LOGICAL:
            a, b = self.truth(a), self.truth(b)
        else:
            a, b = self.number(a), self.number(b)
        if a.is_const and b.is_const:
            table = BINARY if op in BINARY else COMPARE if op in COMPARE else LOGICAL
            return self._fold(table[op], a, b)
        if op in _SIMPLER:
            simpler = _SIMPLER[op](self, a, b)
            if simpler is not None:
                return simpler
        if op in _COMMUTATIVE and b.index < a.index:
            a, b = b, a
        return self._make(op, (a, b))

    def power(self, x: Any, y: Any) -> Node:
        """``x**y`` as torch computes it."""
        x, y = self.number(x), self.number(y)
        if y.is_const:
            c = y.data
            if c == 0:
                return self.const(1.0)  # for NaN too
            if c == -0.5:
                return self.const(1.0) / self.unary("sqrt", x)
            if c in (-1, -2, -3):  # the slopes of 1 / x overflow later than those of 1 / x**2
                return self.power(self.const(1.0) / x, -c)
            if c in (1, 2, 3, 4):
                square = x * x
                return {1: x, 2: square, 3: square * x, 4: square * square}[int(c)]
            if c == 0.5:
                return self.unary("sqrt", x)
        return self.binary("pow", x, y)

    def logical_not(self, x: Any) -> Node:
        x = self.truth(x)
        if x.is_const:
            return self.const(not x.data)
        return x.args[0] if x.op == "not" else self._make("not", (x,))

    def where(self, condition: Any, a: Any, b: Any) -> Node:
        condition, a, b = self.truth(condition), self.node(a), self.node(b)
        if a.is_bool and b.is_bool:
            chosen = self.binary("and", condition, a)
            return self.binary("or", chosen, self.binary("and", self.logical_not(condition), b))
        a, b = self.number(a), self.number(b)
        if condition.is_const:
            return a if condition.data else b
        return a if a is b else self._make("where", (condition, a, b))

    def extreme(self, op: str, xs: Sequence[Any]) -> Node:
        """The ``"largest"`` or ``"smallest"`` of some numbers; NaN if one of them is."""
        nodes = [self.number(x) for x in xs]
        return nodes[0] if len(nodes) == 1 else self._make(op, tuple(nodes))

    def sum(self, xs: Sequence[Any]) -> Node:
        """The sum, added up in pairs: more accurate, and few additions wait for another."""
        return self._reduce("add", xs, 0.0)

    def prod(self, xs: Sequence[Any]) -> Node:
        return self._reduce("mul", xs, 1.0)

    def _reduce(self, op: str, xs: Sequence[Any], empty: float) -> Node:
        level = [self.number(x) for x in xs]
        if not level:
            return self.const(empty)
        while len(level) > 1:
            paired = [self.binary(op, *level[i : i + 2]) for i in range(0, len(level) - 1, 2)]
            level = paired + level[len(paired) * 2 :]
        return level[0]


def _simpler_add(pool: Pool, a: Node, b: Node) -> Node | None:
    for x, y in ((a, b), (b, a)):
        if y.is_const and y.data == 0:
            return x
        if y.op == "neg":
            return pool.binary("sub", x, y.args[0])
    return None


def _simpler_sub(pool: Pool, a: Node, b: Node) -> Node | None:
    if b.is_const and b.data == 0:
        return a
    if b.op == "neg":
        return pool.binary("add", a, b.args[0])
    return None


def _simpler_mul(pool: Pool, a: Node, b: Node) -> Node | None:
    if a is b and a.op == "sub" and a.args[0].index > a.args[1].index:
        other = pool.binary("sub", a.args[1], a.args[0])  # the same square, to the last bit
        return pool._make("mul", (other, other))
    for x, y in ((a, b), (b, a)):
        if y.is_const and y.data == 1:
            return x
        if y.is_const and y.data == -1:
            return pool.unary("neg", x)
        if y.op == "neg" and x.op == "neg":
            return pool.binary("mul", x.args[0], y.args[0])
        if y.op == "neg" and x.is_const:
            return pool.binary("mul", -x.data, y.args[0])
    return None


def _simpler_div(pool: Pool, a: Node, b: Node) -> Node | None:
    if b.is_const and b.data == 1:
        return a
    if b.is_const and b.data == -1:
        return pool.unary("neg", a)
    if b.is_const and b.data != 0 and math.frexp(b.data)[0] in (0.5, -0.5):
        inverse = 1.0 / b.data  # a power of two: exact
        if math.isfinite(inverse) and float(pool.dtype(inverse)) == inverse:
            return pool.binary("mul", a, inverse)
    return None


_SIMPLER = {"add": _simpler_add, "sub": _simpler_sub, "mul": _simpler_mul, "div": _simpler_div}


def array(nodes: Iterable[Any], shape: tuple[int, ...] | None = None) -> np.ndarray:
    """An object array of nodes."""
    items = list(nodes)
    out = np.empty(len(items), dtype=object)
    out[:] = items
    return out if shape is None else out.reshape(shape)


def needed(outputs: Iterable[Node | None], known: Container[int] = ()) -> list[Node]:
    """The nodes that the outputs depend on, in topological order: arguments come first.

    Parameters
    ----------
    known
        Indices of nodes to leave out, with the nodes that only these depend on.
    """
    by_index: dict[int, Node] = {}
    stack = [y for y in outputs if y is not None]
    while stack:
        node = stack.pop()
        if node.index not in by_index and node.index not in known:
            by_index[node.index] = node
            stack.extend(node.args)
    return [by_index[i] for i in sorted(by_index)]


def substitute(outputs: Sequence[Node], table: dict[Any, Node], pool: Pool) -> list[Node]:
    """The outputs in another pool, with inputs replaced.

    Parameters
    ----------
    table
        For ``(block, index)`` of an input the node of ``pool`` that replaces it. Other inputs stay.
    """
    made: dict[int, Node] = {}
    for node in needed(outputs):
        if node.op == "input":
            made[node.index] = table.get(node.data) or pool.input(*node.data)
        elif node.op == "const":
            made[node.index] = pool.const(node.data)
        else:
            made[node.index] = _rebuilt(pool, node.op, [made[a.index] for a in node.args])
    return [made[y.index] for y in outputs]


def _rebuilt(pool: Pool, op: str, args: Sequence[Node]) -> Node:
    if op in UNARY:
        return pool.unary(op, args[0])
    if op in BINARY or op in COMPARE or op in LOGICAL:
        return pool.binary(op, *args)
    if op == "where":
        return pool.where(*args)
    if op == "not":
        return pool.logical_not(args[0])
    return pool.extreme(op, args)


def content(outputs: Sequence[Node]) -> tuple[Any, ...]:
    """A key of the graph: equal for equal graphs, whichever pools they are from."""
    order = needed(outputs)
    position = {node.index: i for i, node in enumerate(order)}
    nodes = tuple(
        (node.op, *[position[a.index] for a in node.args])
        if node.data is None
        else (node.op, repr(node.data))
        for node in order
    )
    return nodes, tuple(position[y.index] for y in outputs)


def evaluate(outputs: Sequence[Node], blocks: dict[str, Any], dtype: Any = np.float64) -> list[Any]:
    """Values of the outputs, computed by NumPy, for tests and checks.

    Parameters
    ----------
    blocks
        The values of each block of inputs.
    """
    kind = np.dtype(dtype).type
    values: dict[int, Any] = {}
    with np.errstate(all="ignore"):
        for node in needed(outputs):
            args = [values[a.index] for a in node.args]
            op = node.op
            if op == "const":
                value: Any = node.data if node.is_bool else kind(node.data)
            elif op == "input":
                block, i = node.data
                value = kind(blocks[block][i])
            elif op == "where":
                value = args[1] if args[0] else args[2]
            elif op == "not":
                value = not args[0]
            elif op in ("largest", "smallest"):
                value = (np.max if op == "largest" else np.min)(args)
            else:
                table = next(d for d in (UNARY, BINARY, COMPARE, LOGICAL) if op in d)
                value = table[op](*args)
                value = bool(value) if node.is_bool else kind(value)
            values[node.index] = value
    return [values[y.index] for y in outputs]
