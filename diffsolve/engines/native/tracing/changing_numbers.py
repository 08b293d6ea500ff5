"""Constants of a trace that change from solve to solve become inputs of the compiled code.

A trace contains the numbers that Python computed as constants. Traces that differ only in constants
share one code, which reads an input where they differ. Every such solve is still traced, so that
nothing is assumed about where its numbers come from. Only compiling is saved.
"""

from __future__ import annotations

import marshal
import math
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from diffsolve.engines.native.graph.expression import Node, Pool, needed
from diffsolve.engines.native.locks import tables

_MOST = 1_000
#: For graphs that are equal but for constants: the first graph's constants, and which have changed.
_families: OrderedDict[bytes, tuple[list[str], set[int]]] = OrderedDict()
_COMMON = {0.0, 0.5, 1.0, 2.0}  # these are as likely written in the code of f


def numbers_of(leaves: Sequence[Any], is_float32: bool) -> set[float]:
    """Sizes of the numbers among the leaves of ``p``, as they appear among the constants."""
    numbers: list[float] = []
    for x in leaves:
        if isinstance(x, (float, np.floating)):
            numbers.append(float(x))
        elif isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.size <= _MOST:
            numbers += x.reshape(-1).tolist()
    finite = [x for x in numbers if math.isfinite(x)]
    sizes = {abs(float(np.float32(x)) if is_float32 else x) for x in finite}
    return sizes - _COMMON


def with_inputs(
    outputs: Sequence[Node], kind: Any, count: int, expected: set[float]
) -> tuple[list[Node], list[float]]:
    """The outputs with inputs in place of constants that change, and the values of these.

    Parameters
    ----------
    outputs
        Of a trace.
    kind
        Graphs of different kinds share no code.
    count
        Length of the flat parameters. The new inputs come behind them.
    expected
        Sizes of constants that are expected to change.
    """
    order = needed(outputs)
    constants = [x for x in order if x.is_const and not x.is_bool]
    if not constants:
        return list(outputs), []
    values = [repr(x.data) for x in constants]
    family = _family(order, outputs, kind)
    with tables:
        known = _families.get(family)
        if known is None:
            changing = {i for i, x in enumerate(constants) if abs(x.data) in expected}
            known = _families[family] = values, changing
            if len(_families) > _MOST:
                _families.popitem(last=False)
        else:
            _families.move_to_end(family)
            first, changing = known
            changing |= {i for i, (a, b) in enumerate(zip(values, first, strict=True)) if a != b}
        chosen = sorted(known[1])
    if not chosen:
        return list(outputs), []
    pool = Pool(outputs[0].pool.dtype, 2 * len(order) + len(chosen) + outputs[0].pool.most)
    place = {constants[i].index: count + k for k, i in enumerate(chosen)}
    made: dict[int, Node] = {}
    for x in order:
        if x.index in place:
            made[x.index] = pool.input("p", place[x.index])
        elif x.is_const:
            made[x.index] = pool.const(x.data)
        else:
            made[x.index] = pool.again(x, [made[a.index] for a in x.args])
    return [made[y.index] for y in outputs], [constants[i].data for i in chosen]


def _family(order: list[Node], outputs: Sequence[Node], kind: Any) -> bytes:
    """A key that is equal for graphs that differ only in constants."""
    position = {x.index: i for i, x in enumerate(order)}
    nodes = [
        (x.op, *[position[a.index] for a in x.args])
        if x.data is None
        else (x.op, repr(x.data) if x.is_bool or not x.is_const else "")
        for x in order
    ]
    whole = nodes, [position[y.index] for y in outputs], repr(kind)
    return blake2b(marshal.dumps(whole, 2), digest_size=16).digest()
