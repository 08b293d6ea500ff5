"""How right-hand sides of one kind become programs: the contract with ``lookup.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.graph.expression import Node, Pool, needed
from diffsolve.engines.native.programs.base import Program
from diffsolve.engines.native.programs.bound import BoundProgram
from diffsolve.engines.native.programs.traces import TraceEntry, code_of
from diffsolve.engines.native.tracing.changing_numbers import numbers_of, with_inputs
from diffsolve.engines.native.tracing.fingerprint.code_reads import ReadPlan
from diffsolve.engines.native.tracing.fingerprint.fingerprint import Fingerprint, Source
from diffsolve.engines.native.tracing.fingerprint.recorder import CodeRecorder
from diffsolve.engines.native.tracing.trace import Trace
from diffsolve.problems.probe import Probe, has_module_hooks
from diffsolve.problems.structure import StateStructure
from diffsolve.problems.vector_field import VectorField

#: Why a trace can't be trusted.
FROZEN = "values of f go around torch's operations, so that the trace does not see them change"
DRAWN_ANEW = "f gives other values at each evaluation: random numbers, or the time of day"
_CONTAINERS = (dict, list, tuple)


@dataclass
class ProgramGraph:
    """What a program is made of.

    Attributes
    ----------
    trace
        What was found when ``f`` ran.
    outputs
        Expressions, with inputs for numbers that change from solve to solve.
    numbers
        What these are now; they come behind the other blocks.
    blocks
        First entry and length of each.
    kind
        What else tells programs apart.
    facts
        What the recipe wants to know of it at the next solve.
    """

    trace: Trace
    outputs: list[Node]
    numbers: list[float]
    blocks: tuple[tuple[int, int], ...]
    kind: tuple[Any, ...]
    facts: Any = field(default=None)

    @classmethod
    def of(
        cls,
        trace: Trace,
        outputs: list[Node],
        leaves: list[Any],
        kind: tuple[Any, ...],
        facts: Any = None,
    ) -> ProgramGraph:
        blocks = tuple((x.offset, x.count) for x in trace.inputs)
        count = sum(x.count for x in trace.inputs)
        is_float32 = trace.pool.dtype is np.float32
        expected = numbers_of(leaves, is_float32)
        outputs, numbers = with_inputs(outputs, (is_float32, blocks, kind), count, expected)
        if numbers:
            blocks = (*blocks, (count, len(numbers)))
        return cls(trace, outputs, numbers, blocks, kind, facts)

    @property
    def pool(self) -> Pool:
        return self.outputs[0].pool

    @property
    def is_float32(self) -> bool:
        return self.trace.pool.dtype is np.float32

    def entry(
        self, plan: ReadPlan, roots: Any, dtype: torch.dtype
    ) -> tuple[TraceEntry, Fingerprint]:
        """What is to be remembered of the trace, and the fingerprint that it goes by."""
        fingerprint = Fingerprint(plan, roots)
        fingerprint.note_generators()
        inputs = self.trace.inputs
        sources = [fingerprint.source_of(x) for x in inputs]
        if self.numbers:
            numbers = torch.tensor(self.numbers, dtype=dtype, device="cpu")
            sources.append(Source("numbers", 0, numbers))
        constants: list[tuple[int, Tensor]] = []
        for x, _ in self.trace.constants:
            place = fingerprint.index_of(x)
            if place is not None:
                constants.append((place, x.detach().clone()))
            elif not fingerprint.is_array(x):
                fingerprint.mark_incomplete("it uses a tensor that was not found")
        read = (node.data for node in needed(self.outputs) if node.op == "input")
        positions = {i for block, i in read if block == "p"}
        used = [not positions.isdisjoint(range(x.offset, x.offset + x.count)) for x in inputs]
        used += [False] * (len(sources) - len(used))  # numbers have no gradient
        entry = TraceEntry(
            plan,
            fingerprint.items,
            fingerprint.why_incomplete,
            dtype,
            sources=sources,
            constants=constants,
            detached=self.trace.detached,
            used=used,
            facts=self.facts,
        )
        return entry, fingerprint


class Recipe(ABC):
    """How right-hand sides of one kind are traced, compiled and compared with torch."""

    #: The programs of this kind, with the tensors of a solve.
    bound: ClassVar[type[BoundProgram]]
    #: Whether what ``judge`` finds is true for states of every shape.
    judges_once: ClassVar[bool] = True

    @abstractmethod
    def key(self, field: Any, leaves: list[Any]) -> Any:
        """What finds the traces: the code, and the kinds of what it is given."""

    @abstractmethod
    def graph(
        self, field: Any, t: Tensor, u0: Tensor, leaves: list[Any], recorder: CodeRecorder
    ) -> ProgramGraph:
        """Run the functions once.

        Raises
        ------
        Declined
            If they cannot be traced.
        """

    @abstractmethod
    def program(self, graph: ProgramGraph) -> Program:
        """The program of a graph that is new."""

    def bind(
        self,
        entry: TraceEntry,
        fingerprint: Fingerprint,
        field: Any,
        leaves: list[Any],
        trace_s: float = 0.0,
    ) -> Any:
        """The program of an entry with the tensors of this solve.

        Raises
        ------
        Declined
            If the entry has none.
        """
        if entry.declined:
            raise Declined(entry.declined)
        return self.bound(entry, fingerprint, leaves, trace_s)

    @abstractmethod
    def is_confirmed(self, field: Any, bound: Any, t: Tensor, u0: Tensor) -> bool:
        """Whether torch gives what the program gives at one state, and uses the same tensors."""

    @abstractmethod
    def judge(
        self, entry: TraceEntry, field: Any, bound: Any, t: Tensor, u0: Tensor, direction: float
    ) -> str:
        """Why the program of a new trace is not that of the functions; empty if it is."""

    def judge_again(
        self, entry: TraceEntry, field: Any, bound: Any, t: Tensor, u0: Tensor, direction: float
    ) -> str:
        """The same for a program that served before, maybe for states of another shape."""
        return ""


def roots_of(field: VectorField, leaves: list[Any]) -> tuple[Any, ...]:
    """What a fingerprint looks at: the functions, and all of ``p`` but tensors that are inputs."""
    p, dtype = field.p, field.structure.dtype
    if p is None or (isinstance(p, Tensor) and p.dtype is dtype):
        return field.functions
    if type(p) in _CONTAINERS:
        return (*field.functions, p)
    others = [x for x in leaves if not (isinstance(x, Tensor) and x.dtype is dtype)]
    return (*field.functions, p, others)


def is_container(p: Any) -> bool:
    """Whether a fingerprint goes through ``p`` as a whole."""
    return type(p) in _CONTAINERS


def key_of(f: Any, p: Any, structure: StateStructure, leaves: list[Any]) -> tuple[Any, ...]:
    """What finds the traces of a function: its code, and the kinds of what it is given."""
    state = (structure.dtype, *structure.shapes, None if structure.is_tensor else structure.spec)
    modes = torch.is_inference_mode_enabled(), torch.get_default_dtype()
    parts: list[Any] = [code_of(f), state, *modes]
    if isinstance(p, Tensor):
        parts.append(True)
    elif p is not None:
        parts.append(pytree.tree_structure(p))
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dtype is structure.dtype:
            parts += (leaf.shape, type(leaf), leaf.device)
        else:  # a fingerprint looks into it
            parts.append(type(leaf))
    return tuple(parts)


def note_gradients(entry: TraceEntry, field: VectorField, t: Tensor, u0: Tensor) -> None:
    """Note what a trace does not see, and a run that autograd records shows."""
    probe = None
    try:
        with torch.enable_grad():
            state = field.structure.unravel(u0.clone().requires_grad_().clone())
            probe = Probe(t, pytree.tree_leaves(state))
            with probe:
                results = [f(t, state, *field._args) for f in field.functions]
    except Exception:  # it has no gradient
        entry.compares = probe is not None and probe.compares
        return
    of_modules = has_module_hooks(pytree.tree_leaves(results))
    entry.hook = probe.hook or ("hooks of a module" if of_modules else "")
    entry.compares = probe.compares
