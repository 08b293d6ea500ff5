"""Calls of one elementary function that can be made together, by a vector."""

from __future__ import annotations

from collections.abc import Sequence

from diffsolve.engines.native.graph.expression import Node

#: Functions that have a form for vectors, and how many calls make it worth while.
_BY_VECTORS = {"exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "sigmoid"}
_FEWEST = 4


def in_groups(nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes in an order in which they can be computed, those together that a vector function takes.

    Such are at least `_FEWEST` calls of one function, none of which needs another.
    """
    depth: dict[int, int] = {}  # calls in a row that a node waits for
    calls: dict[tuple[str, int], list[Node]] = {}
    for node in nodes:
        known = max((depth[x.index] for x in node.args), default=0)
        if node.op in _BY_VECTORS:
            known += 1
            calls.setdefault((node.op, known), []).append(node)
        depth[node.index] = known
    calls = {key: group for key, group in calls.items() if len(group) >= _FEWEST}
    if not calls:
        return [[node] for node in nodes]
    first = {group[0].index: group for group in calls.values()}
    grouped = {node.index for group in calls.values() for node in group}
    # the calls of a depth come before all else that has it
    ordered = sorted(nodes, key=lambda x: 2 * depth[x.index] - (x.op in _BY_VECTORS))
    found = []
    for node in ordered:
        if node.index in first:
            found.append(first[node.index])
        elif node.index not in grouped:
            found.append([node])
    return found
