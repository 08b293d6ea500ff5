"""What is remembered of right-hand sides, by their code: machine code, or why there is none."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.graph.expression import Node, Pool, needed
from diffsolve.engines.native.locks import tables
from diffsolve.engines.native.tracing.changing_numbers import numbers_of, with_inputs
from diffsolve.engines.native.tracing.fingerprint.code_reads import ReadPlan
from diffsolve.engines.native.tracing.fingerprint.fingerprint import Fingerprint, Source
from diffsolve.engines.native.tracing.fingerprint.kinds import without_numbers
from diffsolve.engines.native.tracing.fingerprint.recorder import CodeRecorder
from diffsolve.engines.native.tracing.trace import Trace
from diffsolve.problems.vector_field import VectorField

CONTAINERS = (dict, list, tuple)
_MOST_OF_ONE = 32  # traces of one piece of code
_MOST_CODES = 500
_MOST_SKIPPED = 64
_MOST_COMPILED = 24  # in a row, each used once
_OTHERS = (
    "it is another function at every solve, because of numbers that decide what it computes: "
    "make them tensors, or decide by torch.where"
)
_DRAWS = "f gives other values at each evaluation: it draws random numbers, and not by torch"
HIDDEN = "it changed in a way that could not be seen"
by_function: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


@dataclass
class Entry:
    """What is remembered of a function: its machine code, or why there is none.

    It holds no object of the user's, so that it serves every function with the same code that
    depends on the same things.
    """

    plan: ReadPlan
    items: list[Any]
    unknown: str
    dtype: torch.dtype
    declined: str = ""
    sources: list[Source] = field(default_factory=list)
    constants: list[tuple[int, Tensor]] = field(default_factory=list)
    detached: str | None = None
    hook: str = ""  # hooks on gradients, in words
    compares: bool = False  # whether anything is compared or rounded
    used: list[bool] = field(default_factory=list)
    moving: list[int] = field(default_factory=list)
    is_current: bool = True  # until it is traced again
    outline: list[Any] = field(init=False)
    refusals: int = 0  # in a row, each for a reason found by a trace
    to_skip: int = 0  # solves, before such a function is traced again
    _compiled: Any = None

    def __post_init__(self) -> None:
        self.outline = without_numbers(self.items)

    @property
    def compiled(self) -> Any:
        """Its functions; None where there are none, or nobody needs them any more."""
        return None if self._compiled is None else self._compiled()

    @compiled.setter
    def compiled(self, value: Any) -> None:
        self._compiled = None if value is None else weakref.ref(value)

    def settle(self, after: Fingerprint) -> None:
        """Leave out the numbers that ``f`` changed while it ran, such as counters of its calls."""
        if len(after.items) == len(self.items):
            pairs = enumerate(zip(after.items, self.items, strict=True))
            self.moving = [i for i, (a, b) in pairs if a != b and type(a) is tuple]
            self.items = after.items

    def holds(self, fingerprint: Fingerprint) -> bool:
        """Whether all that a trace depends on is as it was."""
        if self.unknown or fingerprint.why_incomplete or not self.is_current:
            return False
        if not self.declined and self.compiled is None:
            return False
        items = fingerprint.items
        if self.moving and len(items) == len(self.items):
            items = list(items)
            for i in self.moving:
                items[i] = self.items[i]
        return items == self.items and self.holds_constants(fingerprint)

    def holds_constants(self, fingerprint: Fingerprint) -> bool:
        return all(torch.equal(fingerprint.tensors[i], x) for i, x in self.constants)


class Known(list[Any]):
    """Entries of one piece of code, the latest first.

    Attributes
    ----------
    compiled
        How often in a row another function came of it, which had to be compiled.
    doubt
        Why its traces can't be trusted at the next solve, where that was found.
    """

    compiled = 0
    doubt = ""

    def must_compile(self, guard: bool) -> None:
        """Note it.

        Raises
        ------
        Declined
            If that happens at every solve.
        """
        self.compiled += 1
        if guard and self.compiled > _MOST_COMPILED:
            raise Declined(_OTHERS)


_by_code: OrderedDict[Any, Known] = OrderedDict()


def match(known: Known, around: Any) -> tuple[Any, Fingerprint] | None:
    """The entry that holds, and what was found around ``f``."""
    fingerprints: dict[int, Fingerprint] = {}
    with tables:
        entries = [x for x in known if not x.unknown]
    for entry in entries:
        fingerprint = fingerprints.get(id(entry.plan))
        if fingerprint is None:
            fingerprint = fingerprints[id(entry.plan)] = Fingerprint(entry.plan, around)
        if entry.holds(fingerprint):
            known.compiled = 0
            return entry, fingerprint
    return None


def settle(entry: Any, fingerprint: Fingerprint, around: Any, reason: str) -> None:
    """What the evaluations after a trace have shown."""
    if not reason and fingerprint.generators_advanced():
        reason = _DRAWS
    if reason:
        entry.compiled, entry.declined = None, reason
    entry.settle(Fingerprint(entry.plan, around))


def refuse_known(known: list[Any], around: Any) -> None:
    """Refuse a function that was declined again and again, but for the numbers that it reads."""
    with tables:
        refused = [x for x in known if x.declined and x.to_skip > 0]
    for entry in refused:
        if entry.outline == without_numbers(Fingerprint(entry.plan, around).items):
            entry.to_skip -= 1
            raise Declined(entry.declined)


def remember(known: list[Any], entry: Any) -> None:
    with tables:
        if entry.declined:
            before = [x for x in known if x.declined and x.outline == entry.outline]
            entry.refusals = 1 + max((x.refusals for x in before), default=0)
            if entry.refusals > 1:
                entry.to_skip = min(2**entry.refusals, _MOST_SKIPPED)
            replaced = before
        else:
            replaced = [x for x in known if not x.is_current or x.items == entry.items]
        for x in replaced:
            if x in known:
                known.remove(x)
            x.is_current = False
        del known[_MOST_OF_ONE - 1 :]
        if entry.declined or not entry.unknown:  # else it is traced at each solve
            known.insert(0, entry)


def known_of(key: Any) -> Known:
    """What is remembered of a piece of code, the latest first."""
    with tables:
        known = _by_code.get(key)
        if known is None:
            known = _by_code[key] = Known()
            if len(_by_code) > _MOST_CODES:
                _by_code.popitem(last=False)
        else:
            _by_code.move_to_end(key)
        return known


def lasting(f: Any) -> dict[Any, Any]:
    """What lives as long as a function; nothing where no weak reference to it can be made."""
    owner = getattr(f, "__self__", f)
    try:
        known = by_function.get(owner)
        return by_function.setdefault(owner, {}) if known is None else known
    except TypeError:
        return {}


def keep(f: Any, entry: Any) -> None:
    """Keep the machine code of ``f`` as long as ``f``."""
    compiled = entry.compiled
    kept = lasting(f).setdefault("compiled", [])
    if compiled is not None and compiled not in kept:
        kept.append(compiled)
        del kept[:-_MOST_OF_ONE]


def key_of(right: VectorField, leaves: list[Any]) -> Any:
    """What finds the traces of a right-hand side: its code, and the kinds of what it is given."""
    structure = right.structure
    state = (structure.dtype, *structure.shapes, None if structure.is_tensor else structure.spec)
    modes = torch.is_inference_mode_enabled(), torch.get_default_dtype()
    parts: list[Any] = [code_of(right.f), state, *modes]
    if isinstance(right.p, Tensor):
        parts.append(True)
    elif right.p is not None:
        parts.append(pytree.tree_structure(right.p))
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dtype is structure.dtype:
            parts += (leaf.shape, type(leaf), leaf.device)
        else:  # a fingerprint looks into it
            parts.append(type(leaf))
    return tuple(parts)


def code_of(f: Any) -> Any:
    """What two functions have in common that may have one trace."""
    if isinstance(f, types.FunctionType):
        return f.__code__
    if isinstance(f, types.MethodType):
        return code_of(f.__func__), type(f.__self__)
    if isinstance(f, functools.partial):
        return functools.partial, code_of(f.func)
    return type(f)


def around_of(p: Any, leaves: list[Any], dtype: torch.dtype) -> list[Any]:
    """What of ``p`` a fingerprint looks at: all but a tensor that is an input."""
    if p is None or (isinstance(p, Tensor) and p.dtype is dtype):
        return []
    if type(p) in CONTAINERS:
        return [p]
    return [p, [x for x in leaves if not (isinstance(x, Tensor) and x.dtype is dtype)]]


@dataclass
class Graph:
    """What is compiled of a trace.

    Attributes
    ----------
    outputs
        Expressions, with inputs for numbers that change from solve to solve.
    numbers
        What these are now; they come behind the other blocks.
    blocks
        First entry and length of each.
    """

    outputs: list[Node]
    numbers: list[float]
    blocks: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, found: Trace, outputs: list[Node], leaves: list[Any], kind: Any) -> Graph:
        blocks = tuple((x.offset, x.count) for x in found.inputs)
        count = sum(x.count for x in found.inputs)
        single = found.pool.dtype is np.float32
        expected = numbers_of(leaves, single)
        outputs, numbers = with_inputs(outputs, (single, blocks, kind), count, expected)
        if numbers:
            blocks = (*blocks, (count, len(numbers)))
        return cls(outputs, numbers, blocks)

    @property
    def pool(self) -> Pool:
        return self.outputs[0].pool


def refused(
    kind: Any,
    recorder: CodeRecorder,
    around: Any,
    known: list[Any],
    dtype: torch.dtype,
    reason: str,
) -> tuple[Any, Fingerprint]:
    """The entry of a function that was declined."""
    plan = _plan_of(recorder, known)
    fingerprint = Fingerprint(plan, around)
    return kind(
        plan, fingerprint.items, fingerprint.why_incomplete, dtype, declined=reason
    ), fingerprint


def described(
    kind: Any,
    recorder: CodeRecorder,
    around: Any,
    known: list[Any],
    dtype: torch.dtype,
    found: Trace,
    graph: Graph,
    compiled: Any,
) -> tuple[Any, Fingerprint]:
    """The entry of a function that was traced, and whose ``graph`` was compiled."""
    plan = _plan_of(recorder, known)
    fingerprint = Fingerprint(plan, around)
    fingerprint.note_generators()
    sources = [fingerprint.source_of(x) for x in found.inputs]
    if graph.numbers:
        sources.append(Source("numbers", 0, torch.tensor(graph.numbers, dtype=dtype, device="cpu")))
    constants: list[tuple[int, Tensor]] = []
    for x, _ in found.constants:
        place = fingerprint.index_of(x)
        if place is not None:
            constants.append((place, x.detach().clone()))
        elif not fingerprint.is_array(x):
            fingerprint.mark_incomplete("it uses a tensor that was not found")
    inputs = (node.data for node in needed(graph.outputs) if node.op == "input")
    positions = {i for block, i in inputs if block == "p"}
    used = [not positions.isdisjoint(range(x.offset, x.offset + x.count)) for x in found.inputs]
    used += [False] * (len(sources) - len(used))  # numbers have no gradient
    entry = kind(
        plan,
        fingerprint.items,
        fingerprint.why_incomplete,
        dtype,
        sources=sources,
        constants=constants,
        detached=found.detached,
        used=used,
    )
    entry.compiled = compiled
    return entry, fingerprint


def _plan_of(recorder: CodeRecorder, known: list[Any]) -> ReadPlan:
    """Where to look; the same for all traces in which the same code ran."""
    plan = recorder.plan()
    with tables:
        return next((x.plan for x in known if x.plan.equals(plan)), plan)
