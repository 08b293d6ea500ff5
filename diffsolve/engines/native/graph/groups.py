"""Calls of one elementary function that can be made together, by a vector."""

from __future__ import annotations

from collections.abc import Sequence

from diffsolve.engines.native.graph.expression import Node

#: Functions that have a form for vectors, which pays from `_FEWEST` calls on.
_BY_VECTORS = {"exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "sigmoid"}
_FEWEST = 4


def in_groups(nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes in an order in which they can be computed, in groups.

    A group is a single node, or calls of one function that a vector function computes together: at
    least `_FEWEST`, none of which depends on another.
    """
    depth: dict[int, int] = {}  # the longest chain of such calls that a node depends on
    calls: dict[tuple[str, int], list[Node]] = {}
    for node in nodes:
        own_depth = max((depth[x.index] for x in node.args), default=0)
        if node.op in _BY_VECTORS:
            own_depth += 1
            calls.setdefault((node.op, own_depth), []).append(node)
        depth[node.index] = own_depth
    calls = {key: group for key, group in calls.items() if len(group) >= _FEWEST}
    if not calls:
        return [[node] for node in nodes]
    first = {group[0].index: group for group in calls.values()}
    grouped = {node.index for group in calls.values() for node in group}
    # calls come before the other nodes of the same depth, which may depend on them
    ordered = sorted(nodes, key=lambda x: 2 * depth[x.index] - (x.op in _BY_VECTORS))
    groups = []
    for node in ordered:
        if node.index in first:
            groups.append(first[node.index])
        elif node.index not in grouped:
            groups.append([node])
    return groups
