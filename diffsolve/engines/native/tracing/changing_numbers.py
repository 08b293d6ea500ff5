"""Numbers in the code of a right-hand side that change from solve to solve become its inputs.

Every trace has the numbers that Python computed as constants. Traces that differ in nothing but
constants share one code: where they differ, the code reads an input. Each solve was traced, so that
nothing is assumed of where its numbers come from; only compiling is saved.
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
#: For graphs that are equal but for their constants: these, and which of them have changed.
_families: OrderedDict[bytes, tuple[list[str], set[int]]] = OrderedDict()
_COMMON = {0.0, 0.5, 1.0, 2.0}  # as likely the code's own


def numbers_of(leaves: Sequence[Any], single: bool) -> set[float]:
    """Numbers among the leaves of ``p``, as constants of the code show them."""
    found: list[float] = []
    for x in leaves:
        if isinstance(x, (float, np.floating)):
            found.append(float(x))
        elif isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.size <= _MOST:
            found += x.reshape(-1).tolist()
    sizes = {abs(float(np.float32(x)) if single else x) for x in found if math.isfinite(x)}
    return sizes - _COMMON


def with_inputs(
    outputs: Sequence[Node], kind: Any, count: int, expected: set[float]
) -> tuple[list[Node], list[float]]:
    """The outputs with inputs for the constants that change, and the numbers that they stand for.

    Parameters
    ----------
    outputs
        What a trace found.
    kind
        What else tells graphs apart.
    count
        Entries of the flat parameters, behind which the numbers come.
    expected
        Sizes of constants that will change, it is to be expected.
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
    """What is equal for graphs that differ in constants alone."""
    position = {x.index: i for i, x in enumerate(order)}
    nodes = [
        (x.op, *[position[a.index] for a in x.args])
        if x.data is None
        else (x.op, repr(x.data) if x.is_bool or not x.is_const else "")
        for x in order
    ]
    whole = nodes, [position[y.index] for y in outputs], repr(kind)
    return blake2b(marshal.dumps(whole, 2), digest_size=16).digest()
