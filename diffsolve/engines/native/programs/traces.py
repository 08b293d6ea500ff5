"""The traces that are known of each piece of code: its programs, or why there are none."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.locks import tables
from diffsolve.engines.native.programs.base import Program
from diffsolve.engines.native.tracing.fingerprint.code_reads import ReadPlan
from diffsolve.engines.native.tracing.fingerprint.fingerprint import Fingerprint, Source
from diffsolve.engines.native.tracing.fingerprint.kinds import without_numbers

_MOST_OF_ONE = 32  # traces of one piece of code
_MOST_CODES = 500
_MOST_SKIPPED = 64
_MOST_COMPILED = 24  # in a row, each used once
MOST_PROGRAMS = 64  # that nothing else holds on to
_OTHERS = (
    "it is another function at every solve, because of numbers that decide what it computes: "
    "make them tensors, or decide by torch.where"
)
_DRAWS = "f gives other values at each evaluation: it draws random numbers, and not by torch"
CHANGED_UNSEEN = "it changed in a way that could not be seen"


@dataclass
class TraceEntry:
    """What one trace of a function has shown: its program, or why there is none.

    It holds no object of the user's, so that it serves every function with the same code that
    depends on the same things.

    Attributes
    ----------
    plan
        Where to look for what the function depends on.
    items, outline
        What that was, and the same without numbers.
    why_incomplete
        Why it may depend on more; empty where it does not.
    dtype
        Of the state.
    declined
        Why there is no program.
    sources
        Where each block of the flat parameters comes from.
    constants
        Tensors whose values are part of the program, by their position in a fingerprint.
    detached, hook
        Where it cuts gradients off, and hooks on gradients, in words.
    compares
        Whether anything is compared or rounded.
    used
        For each block of parameters, whether the program reads it.
    counters
        Positions in ``items`` of numbers that the function changes while it runs.
    is_current
        False once it was traced again.
    refusals, to_skip
        How often in a row it was declined, and how many solves go by before the next trace.
    facts
        What the recipe notes besides; see ``Recipe``.
    """

    plan: ReadPlan
    items: list[Any]
    why_incomplete: str
    dtype: torch.dtype
    declined: str = ""
    sources: list[Source] = field(default_factory=list)
    constants: list[tuple[int, Tensor]] = field(default_factory=list)
    detached: str | None = None
    hook: str = ""
    compares: bool = False
    used: list[bool] = field(default_factory=list)
    counters: list[int] = field(default_factory=list)
    is_current: bool = True
    outline: list[Any] = field(init=False)
    refusals: int = 0
    to_skip: int = 0
    facts: Any = None
    _program: weakref.ref[Program] | None = None

    def __post_init__(self) -> None:
        self.outline = without_numbers(self.items)

    @property
    def program(self) -> Program | None:
        """Its program; None where there is none, or nobody needs it any more."""
        return None if self._program is None else self._program()

    @program.setter
    def program(self, value: Program | None) -> None:
        self._program = None if value is None else weakref.ref(value)

    def settle(self, roots: Any) -> None:
        """Leave out the numbers that the function changed while it ran, such as call counters."""
        after = Fingerprint(self.plan, roots)
        if len(after.items) == len(self.items):
            pairs = enumerate(zip(after.items, self.items, strict=True))
            self.counters = [i for i, (a, b) in pairs if a != b and type(a) is tuple]
            self.items = after.items

    def holds(self, fingerprint: Fingerprint) -> bool:
        """Whether all that the trace depends on is as it was."""
        if self.why_incomplete or fingerprint.why_incomplete or not self.is_current:
            return False
        if not self.declined and self.program is None:
            return False
        items = fingerprint.items
        if self.counters and len(items) == len(self.items):
            items = list(items)
            for i in self.counters:
                items[i] = self.items[i]
        return items == self.items and self.holds_constants(fingerprint)

    def holds_constants(self, fingerprint: Fingerprint) -> bool:
        return all(torch.equal(fingerprint.tensors[i], x) for i, x in self.constants)


class Traces:
    """The traces of one piece of code, the latest first.

    Attributes
    ----------
    doubt
        Why traces can't be trusted at the next solve, where one was found to be stale.
    """

    def __init__(self) -> None:
        self.entries: list[TraceEntry] = []
        self.doubt = ""
        self._compiled = 0  # traces in a row that needed a program of their own

    def match(self, roots: Any) -> tuple[TraceEntry, Fingerprint] | None:
        """The entry that holds, and what was found around the function."""
        fingerprints: dict[int, Fingerprint] = {}
        with tables:
            entries = [x for x in self.entries if not x.why_incomplete]
        for entry in entries:
            fingerprint = fingerprints.get(id(entry.plan))
            if fingerprint is None:
                fingerprint = fingerprints[id(entry.plan)] = Fingerprint(entry.plan, roots)
            if entry.holds(fingerprint):
                self._compiled = 0
                return entry, fingerprint
        return None

    def refuse_repeated(self, roots: Any) -> None:
        """Decline what was declined again and again, and differs by numbers only.

        Raises
        ------
        Declined
            If it is such a function.
        """
        with tables:
            refused = [x for x in self.entries if x.declined and x.to_skip > 0]
        for entry in refused:
            if entry.outline == without_numbers(Fingerprint(entry.plan, roots).items):
                entry.to_skip -= 1
                raise Declined(entry.declined)

    def add(self, entry: TraceEntry) -> None:
        """Put an entry first, in the place of those that it makes obsolete."""
        with tables:
            if entry.declined:
                obsolete = [x for x in self.entries if x.declined and x.outline == entry.outline]
                entry.refusals = 1 + max((x.refusals for x in obsolete), default=0)
                if entry.refusals > 1:
                    entry.to_skip = min(2**entry.refusals, _MOST_SKIPPED)
            else:
                obsolete = [x for x in self.entries if not x.is_current or x.items == entry.items]
            for x in obsolete:
                if x in self.entries:
                    self.entries.remove(x)
                x.is_current = False
            del self.entries[_MOST_OF_ONE - 1 :]
            if entry.declined or not entry.why_incomplete:  # else it is traced at each solve
                self.entries.insert(0, entry)

    def plan_like(self, plan: ReadPlan) -> ReadPlan:
        """The plan of an earlier trace in which the same code ran; else this one."""
        with tables:
            return next((x.plan for x in self.entries if x.plan.equals(plan)), plan)

    def program(self, key: Any, make: Callable[[], Program], verify: bool) -> Program:
        """The program of a graph, by the graph's content.

        Raises
        ------
        Declined
            If another one has to be compiled at every solve.
        """
        with tables:
            program = _programs.get(key)
            if program is not None:
                self._compiled = 0
                _programs.move_to_end(key)
                return program
            self._compiled += 1
            if verify and self._compiled > _MOST_COMPILED:
                raise Declined(_OTHERS)
            program = _programs[key] = make()
            if len(_programs) > MOST_PROGRAMS:
                _programs.popitem(last=False)
            return program


_by_code: OrderedDict[Any, Traces] = OrderedDict()
_programs: OrderedDict[Any, Program] = OrderedDict()
_by_function: weakref.WeakKeyDictionary[Any, FunctionCache] = weakref.WeakKeyDictionary()


def traces_of(key: Any) -> Traces:
    """The traces of a piece of code; see ``Recipe.key``."""
    with tables:
        traces = _by_code.get(key)
        if traces is None:
            traces = _by_code[key] = Traces()
            if len(_by_code) > _MOST_CODES:
                _by_code.popitem(last=False)
        else:
            _by_code.move_to_end(key)
        return traces


@dataclass(eq=False)
class FunctionCache:
    """What is kept as long as a function of the user's, or the object that its method is of.

    Attributes
    ----------
    programs
        Its machine code.
    reachable
        Tensors that a fingerprint met, and the leaves that were reachable then. The key tells
        methods of one object apart, and the functions that this one was looked at with.
    """

    programs: list[Program] = field(default_factory=list)
    reachable: dict[Any, tuple[Sequence[Tensor], list[Tensor]]] = field(default_factory=dict)

    @classmethod
    def of(cls, f: Any) -> FunctionCache:
        """That of a function; a new one where no weak reference to it can be made."""
        owner = getattr(f, "__self__", f)
        try:
            known = _by_function.get(owner)
            return _by_function.setdefault(owner, cls()) if known is None else known
        except TypeError:
            return cls()

    def keep(self, program: Program | None) -> None:
        """Keep a program."""
        if program is not None and program not in self.programs:
            self.programs.append(program)
            del self.programs[:-_MOST_OF_ONE]

    def note_reachable(self, key: Any, met: Sequence[Tensor], leaves: list[Tensor]) -> None:
        if len(self.reachable) >= _MOST_OF_ONE:
            self.reachable.clear()
        self.reachable[key] = met, leaves


def why_drawn(fingerprint: Fingerprint) -> str:
    """Whether evaluations since the fingerprint have drawn random numbers, in words."""
    return _DRAWS if fingerprint.generators_advanced() else ""


def code_of(f: Any) -> Any:
    """What two functions have in common that may have one trace."""
    if isinstance(f, types.FunctionType):
        return f.__code__
    if isinstance(f, types.MethodType):
        return code_of(f.__func__), type(f.__self__)
    if isinstance(f, functools.partial):
        return functools.partial, code_of(f.func)
    return type(f)


def cache_sizes() -> dict[str, int]:
    """How many programs, pieces of code and functions are known; see ``clear_caches``."""
    return {"programs": len(_programs), "codes": len(_by_code), "functions": len(_by_function)}


def clear_caches() -> None:
    """Forget all traces and programs that nothing else holds on to."""
    with tables:
        _by_code.clear()
        _programs.clear()
