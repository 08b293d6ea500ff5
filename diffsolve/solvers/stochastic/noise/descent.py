"""The way down a virtual tree with tensors; ``kernel_bridges.py`` does the same on the CPU.

Node 0 gives the normals of the whole, and node 1 those that divide it; the halves of node ``k`` are
divided by ``2 k`` and ``2 k + 1``. A leaf is divided where a time lies in it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from diffsolve.solvers.stochastic.noise.bridge import divide
from diffsolve.solvers.stochastic.noise.draws import Draws
from diffsolve.solvers.stochastic.noise.philox import TREE


class Node(NamedTuple):
    """An interval: its number and level in the tree, its length, ``W`` and ``H``."""

    number: int
    level: int
    length: float
    W: Tensor
    H: Tensor

    @property
    def sums(self) -> tuple[float, Tensor, Tensor]:
        """Length, ``W``, and the integral of the path from its value at the start on."""
        return self.length, self.W, self.length * (0.5 * self.W + self.H)


class Descent:
    """A tree of this depth over an interval of this length."""

    def __init__(self, draws: Draws, depth: int, length: float):
        self.draws, self.depth, self.length = draws, depth, length

    def between(self, s: int, s_part: float, t: int, t_part: float) -> tuple[Tensor, Tensor]:
        """``W`` and the integral between two times.

        Parameters
        ----------
        s, s_part
            Leaf of the first time, and the part of that which lies before it, ``[0, 1)``.
        t, t_part
            Those of the second time; the part in ``(0, 1]``.
        """
        node = Node(1, 0, self.length, *(self._normals(0) * math.sqrt(self.length)))
        while True:
            if self._is_start(node, s, s_part) and self._is_end(node, t, t_part):
                return node.sums[1:]
            if node.level == self.depth:
                return self._within(node, s_part, t_part)
            if self._side(node, s) != self._side(node, t):
                break
            node = self._halves(node)[self._side(node, s)]
        first, second = self._halves(node)
        nodes = [*self._right_of(first, s, s_part), *self._left_of(second, t, t_part)]
        _, W, area = nodes[0].sums
        for part in nodes[1:]:
            length, w, own = part.sums
            W, area = W + w, area + own + length * W
        return W, area

    def _normals(self, number: int) -> Tensor:
        return self.draws(TREE | number, 1, True)[:, 0]

    def _side(self, node: Node, leaf: int) -> int:
        """Which half of the node a leaf is in."""
        return leaf >> (self.depth - 1 - node.level) & 1

    def _is_start(self, node: Node, leaf: int, part: float) -> bool:
        """Whether a time is the start of a node that it is in."""
        return part == 0 and leaf & (1 << (self.depth - node.level)) - 1 == 0

    def _is_end(self, node: Node, leaf: int, part: float) -> bool:
        return part == 1 and (leaf + 1) & (1 << (self.depth - node.level)) - 1 == 0

    def _halves(self, node: Node, part: float = 0.5) -> tuple[Node, Node]:
        """The halves of a node; or both parts of a leaf."""
        left, right = part * node.length, (1 - part) * node.length
        divided = divide(node.W, node.H, self._normals(node.number), left, right)
        number, level = 2 * node.number, node.level + 1
        return Node(number, level, left, *divided[:2]), Node(number + 1, level, right, *divided[2:])

    def _right_of(self, node: Node, leaf: int, part: float) -> list[Node]:
        """What lies right of a time in a node."""
        nodes: list[Node] = []
        while node.level < self.depth and not self._is_start(node, leaf, part):
            halves, side = self._halves(node), self._side(node, leaf)
            if side == 0:
                nodes.insert(0, halves[1])
            node = halves[side]
        return [self._halves(node, part)[1] if part else node, *nodes]

    def _left_of(self, node: Node, leaf: int, part: float) -> list[Node]:
        """What lies left of a time in a node."""
        nodes: list[Node] = []
        while node.level < self.depth and not self._is_end(node, leaf, part):
            halves, side = self._halves(node), self._side(node, leaf)
            if side == 1:
                nodes.append(halves[0])
            node = halves[side]
        return [*nodes, self._halves(node, part)[0] if part < 1 else node]

    def _within(self, leaf: Node, s_part: float, t_part: float) -> tuple[Tensor, Tensor]:
        """Between two times of one leaf, where the path is the bridge of a single pair of normals.

        It is what lies before the second less what lies before the first, which moves the rest.
        """
        until = self._halves(leaf, t_part)[0] if t_part < 1 else leaf
        length, W, area = until.sums
        if s_part:
            before, w, own = self._halves(leaf, s_part)[0].sums
            W, area = W - w, area - own - (length - before) * w
        return W, area
