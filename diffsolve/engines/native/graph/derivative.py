"""Exact derivatives of expressions: products with the Jacobian, the Jacobian and its pattern.

A *cotangent* of a number is called its ``bar``, a *tangent* its ``dot``.

Where a function has no derivative, the conventions are those of torch's autograd: ``abs`` and
``sign`` have slope 0 at 0, equal arguments of ``max`` and ``min`` share the slope, and ``clamp``
has slope 1 at its bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffsolve.engines.native.graph.expression import Node, Pool, needed

Partial = Node | float
_SQRT_PI = math.sqrt(math.pi)
#: Operations with an infinite slope where their value is finite.
_INFINITE_SLOPE = {"sqrt", "pow", "asin", "acos", "acosh"}
_ZERO_SLOPE = {"sign", "floor", "ceil", "trunc", "round", "stop_gradient"}


def _d_pow(node: Node) -> list[tuple[int, Partial]]:
    pool = node.pool
    x, y = node.args
    slope: Partial = y * pool.power(x, y - 1.0)
    if y.is_const:
        return [(0, slope)]
    zero = pool.binary("eq", y, 0.0)
    by_x = pool.where(zero, 0.0, slope)
    flat = pool.binary("and", pool.binary("eq", x, 0.0), pool.binary("ge", y, 0.0))
    by_y = pool.where(flat, 0.0, node * pool.unary("log", x))
    return [(1, by_y)] if x.is_const else [(0, by_x), (1, by_y)]


def _d_binary_extreme(node: Node) -> list[tuple[int, Partial]]:
    pool = node.pool
    a, b = node.args
    loses, wins = ("lt", "gt") if node.op == "max" else ("gt", "lt")
    tie = pool.binary("eq", a, b)
    return [
        (i, pool.where(tie, 0.5, pool.where(pool.binary(op, a, b), 0.0, 1.0)))
        for i, op in enumerate((loses, wins))
    ]


def _d_extreme(node: Node) -> list[tuple[int, Partial]]:
    pool = node.pool
    hits = [pool.binary("eq", x, node) for x in node.args]
    share = 1.0 / pool.sum(hits)
    return [(i, pool.where(hit, share, 0.0)) for i, hit in enumerate(hits)]


def partials(node: Node) -> list[tuple[int, Partial]]:
    """The partial derivatives that are not zero, each with the position of its argument."""
    pool, op, args = node.pool, node.op, node.args
    if op in ("const", "input") or op in _ZERO_SLOPE or node.is_bool:
        return []
    if op == "add":
        return [(0, 1.0), (1, 1.0)]
    if op == "sub":
        return [(0, 1.0), (1, -1.0)]
    if op == "mul":
        return [(0, args[1]), (1, args[0])]
    if op == "div":
        _a, b = args
        if b.is_const:
            return [(0, 1.0 / b)]
        return [(0, 1.0 / b), (1, -(node / b))]
    if op == "neg":
        return [(0, -1.0)]
    if op == "where":
        c = args[0]
        return [(1, pool.where(c, 1.0, 0.0)), (2, pool.where(c, 0.0, 1.0))]
    if op == "pow":
        return _d_pow(node)
    if op in ("max", "min"):
        return _d_binary_extreme(node)
    if op in ("largest", "smallest"):
        return _d_extreme(node)
    if op == "atan2":
        y, x = args
        at_zero = pool.binary("and", pool.binary("eq", x, 0.0), pool.binary("eq", y, 0.0))
        square = pool.where(at_zero, 1.0, x * x + y * y)  # no slope there, as in torch
        return [(0, x / square), (1, -(y / square))]
    if op == "fmod":
        return [(0, 1.0), (1, -pool.unary("trunc", args[0] / args[1]))]
    return [(0, _slope(pool, node, args[0]))]


def _slope(pool: Pool, node: Node, x: Node) -> Partial:
    """Derivative of a function of one number; ``node`` is its value at ``x``."""

    def f(op: str, y: Any) -> Node:
        return pool.unary(op, y)

    match node.op:
        case "abs":
            return f("sign", x)
        case "exp":
            return node
        case "expm1":
            return node + 1.0
        case "log":
            return 1.0 / x
        case "log1p":
            return 1.0 / (x + 1.0)
        case "sqrt":
            return 0.5 / node
        case "sin":
            return f("cos", x)
        case "cos":
            return -f("sin", x)
        case "tan":
            return node * node + 1.0
        case "asin":
            return 1.0 / f("sqrt", 1.0 - x * x)
        case "acos":
            return -(1.0 / f("sqrt", 1.0 - x * x))
        case "atan":
            return 1.0 / (x * x + 1.0)
        case "sinh":
            return f("cosh", x)
        case "cosh":
            return f("sinh", x)
        case "tanh":
            return 1.0 - node * node
        case "asinh":
            return 1.0 / f("sqrt", x * x + 1.0)
        case "acosh":
            return 1.0 / f("sqrt", x * x - 1.0)
        case "atanh":
            return 1.0 / (1.0 - x * x)
        case "erf":
            return (2.0 / _SQRT_PI) * f("exp", -(x * x))
        case "erfc":
            return (-2.0 / _SQRT_PI) * f("exp", -(x * x))
        case "sigmoid":
            return node * (1.0 - node)
    raise NotImplementedError(f"no derivative of {node.op}")


def _times(partial: Partial, bar: Node) -> Node:
    """``partial * bar``; a branch 0 of a choice gives 0, even where ``bar`` is infinite."""
    if isinstance(partial, Node):
        if partial.is_const and partial.data == 1.0:
            return bar
        if partial.op == "where" and any(x.is_const and x.data == 0.0 for x in _choices(partial)):
            pool, (condition, *branches) = partial.pool, partial.args
            zeros = (x.is_const and x.data == 0.0 for x in branches)
            taken = (
                0.0 if zero else _times(x, bar) for x, zero in zip(branches, zeros, strict=True)
            )
            return pool.where(condition, *taken)
    return bar * partial


def _times_forward(node: Node, partial: Partial, dot: Node) -> Node:
    """``partial * dot`` for a forward product, where ``dot`` is the tangent of an argument.

    It is 0 where the tangent is 0, even if the slope is infinite. So are the products of torch's
    reverse pass, which masks before it multiplies.
    """
    if node.op in _INFINITE_SLOPE and not dot.is_const:
        pool = node.pool
        return pool.where(pool.binary("eq", dot, 0.0), 0.0, _times(partial, dot))
    return _times(partial, dot)


def _choices(node: Node) -> list[Node]:
    """The branches of a choice, and of the choices among them."""
    branches = []
    for x in node.args[1:]:
        branches += _choices(x) if x.op == "where" else [x]
    return branches


def _varying(nodes: Sequence[Node], wrt: Sequence[Node]) -> set[int]:
    """Indices of the nodes whose derivative by one of ``wrt`` may be other than zero."""
    varying = {x.index for x in wrt}
    for node in nodes:
        if node.is_bool or node.op in _ZERO_SLOPE:
            continue
        if any(a.index in varying for a in node.args):
            varying.add(node.index)
    return varying


def vjp(outputs: Sequence[Node], bars: Sequence[Node], wrt: Sequence[Node]) -> list[Node | None]:
    """``sum_i bars[i] d outputs[i] / d x`` for each ``x`` of ``wrt``; None where it is zero."""
    nodes = needed(outputs)
    varying = _varying(nodes, wrt)
    total: dict[int, list[Node]] = {}
    for y, bar in zip(outputs, bars, strict=True):
        if y.index in varying:
            total.setdefault(y.index, []).append(bar)
    bars_of_inputs: dict[int, Node] = {}
    wanted = {x.index for x in wrt}
    for node in reversed(nodes):
        terms = total.pop(node.index, None)
        if terms is None:
            continue
        bar = node.pool.sum(terms)
        if node.index in wanted:
            bars_of_inputs[node.index] = bar
        args = node.args
        for i, partial in partials(node):
            if args[i].index in varying:
                total.setdefault(args[i].index, []).append(_times(partial, bar))
    return [bars_of_inputs.get(x.index) for x in wrt]


def jvp(outputs: Sequence[Node], tangents: Mapping[Node, Any]) -> list[Node | None]:
    """``sum_x d outputs[i] / d x * tangents[x]`` for each output; None where it is zero."""
    nodes = needed(outputs)
    by_index = {x.index: x.pool.node(v) for x, v in tangents.items()}
    dots: dict[int, Node] = {}
    for node in nodes:
        terms = [by_index[node.index]] if node.index in by_index else []
        if any(a.index in dots for a in node.args):
            terms += [
                _times_forward(node, partial, dots[node.args[i].index])
                for i, partial in partials(node)
                if node.args[i].index in dots
            ]
        if terms:
            dots[node.index] = node.pool.sum(terms)
    return [dots.get(y.index) for y in outputs]


def jacobian(outputs: Sequence[Node], wrt: Sequence[Node]) -> dict[tuple[int, int], Node]:
    """Entries ``(i, j) -> d outputs[i] / d wrt[j]`` that are not zero by structure."""
    column = {x.index: j for j, x in enumerate(wrt)}
    rows: dict[int, dict[int, Node]] = {}
    nodes = needed(outputs)
    for node in nodes:
        terms: dict[int, list[Node]] = {}
        if node.index in column:
            terms[column[node.index]] = [node.pool.const(1.0)]
        if any(a.index in rows for a in node.args):
            for i, partial in partials(node):
                for j, entry in rows.get(node.args[i].index, {}).items():
                    terms.setdefault(j, []).append(_times_forward(node, partial, entry))
        row = {j: node.pool.sum(parts) for j, parts in terms.items()}
        row = {j: x for j, x in row.items() if not (x.is_const and x.data == 0)}
        if row:
            rows[node.index] = row
    return {(i, j): x for i, y in enumerate(outputs) for j, x in rows.get(y.index, {}).items()}


def sparsity(outputs: Sequence[Node], wrt: Sequence[Node]) -> set[tuple[int, int]]:
    """Entries ``(i, j)`` of the Jacobian that can be other than zero somewhere."""
    column = {x.index: j for j, x in enumerate(wrt)}
    reach: dict[int, frozenset[int]] = {}
    for node in needed(outputs):
        columns = frozenset([column[node.index]] if node.index in column else [])
        if not (node.is_bool or node.op in _ZERO_SLOPE):
            for i, a in enumerate(node.args):
                if a.index in reach and not annuls(node, i):
                    columns |= reach[a.index]
        if columns:
            reach[node.index] = columns
    return {(i, j) for i, y in enumerate(outputs) for j in reach.get(y.index, ())}


def annuls(node: Node, i: int) -> bool:
    """Whether a node is zero times its argument ``i``, and has no slope by it.

    Such a product is not folded, since it is NaN where the argument is NaN or infinite.
    """
    if node.op != "mul":
        return False
    other = node.args[1 - i]
    return other.is_const and other.data == 0
