"""From a right-hand side to its program: traces are kept, and checked before they are used."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.graph.expression import content
from diffsolve.engines.native.programs.base import Program
from diffsolve.engines.native.programs.bound import BoundProgram
from diffsolve.engines.native.programs.recipe import Recipe, is_container, note_gradients, roots_of
from diffsolve.engines.native.programs.traces import (
    CHANGED_UNSEEN,
    FunctionCache,
    TraceEntry,
    Traces,
    traces_of,
    why_drawn,
)
from diffsolve.engines.native.tracing.fingerprint.fingerprint import Fingerprint
from diffsolve.engines.native.tracing.fingerprint.kinds import PLAIN
from diffsolve.engines.native.tracing.fingerprint.recorder import CodeRecorder
from diffsolve.problems.autocast import Autocasting
from diffsolve.problems.capture import is_torchscript, reached_objects
from diffsolve.problems.vector_field import VectorField


class LastLookup:
    """What was found for a problem whose next solve may ask for the same.

    Parameters
    ----------
    leaves
        Those of the field's parameters.
    """

    __slots__ = ("_default", "_inference", "_leaves", "_program", "_shape", "entry", "fingerprint")

    def __init__(
        self, entry: TraceEntry, fingerprint: Fingerprint, field: VectorField, leaves: list[Any]
    ):
        self.entry, self.fingerprint = entry, fingerprint
        self._program = entry.program  # an entry alone does not keep it alive
        self._shape = field.p.shape if isinstance(field.p, Tensor) else None
        self._leaves = leaves
        self._inference = torch.is_inference_mode_enabled()
        self._default = torch.get_default_dtype()

    @staticmethod
    def suffices(fingerprint: Fingerprint, p: Any, leaves: list[Any]) -> bool:
        """Whether a fingerprint shows all that may change of such parameters."""
        if p is None or isinstance(p, Tensor):
            return True
        met = {id(x) for x in fingerprint.tensors}
        return is_container(p) and all(id(x) in met or type(x) in PLAIN for x in leaves)

    def holds(self, field: VectorField) -> bool:
        """Whether nothing has changed since."""
        entry, p = self.entry, field.p
        if self._inference is not torch.is_inference_mode_enabled() or not entry.is_current:
            return False
        if self._default is not torch.get_default_dtype():
            return False
        if self._shape is not None and not (
            p.shape == self._shape and p.dtype is entry.dtype and p.is_cpu
        ):
            return False
        return self.fingerprint.still_holds() and entry.holds_constants(self.fingerprint)

    def leaves(self, p: Any) -> list[Any]:
        return [p] if self._shape is not None else self._leaves


@dataclass
class _Lookup:
    """One lookup, and what it is given; see ``find``."""

    field: Any
    recipe: Recipe
    t: Tensor
    u0: Tensor
    direction: float
    verify: bool
    leaves: list[Any]
    roots: tuple[Any, ...]
    traces: Traces

    def run(self) -> BoundProgram:
        match = self.traces.match(self.roots)
        stale = None
        if match is not None:
            bound = self._known(*match)
            if bound is not None:
                return bound
            stale = match[0]
            stale.is_current = False
        if self.verify:
            self.traces.refuse_repeated(self.roots)
        return self._trace_anew(stale)

    def _known(self, entry: TraceEntry, fingerprint: Fingerprint) -> BoundProgram | None:
        """The program of an entry that seems to hold; None where torch gives other values."""
        field, recipe = self.field, self.recipe
        bound = recipe.bind(entry, fingerprint, field, self.leaves)
        why = recipe.judge_again(entry, field, bound, self.t, self.u0, self.direction)
        if why:
            raise Declined(why)
        if self.verify and not recipe.is_confirmed(field, bound, self.t, self.u0):
            return None
        FunctionCache.of(field.functions[0]).keep(entry.program)
        if LastLookup.suffices(fingerprint, field.p, self.leaves):
            field.memo.lookup = LastLookup(entry, fingerprint, field, self.leaves)
        return bound

    def _trace_anew(self, stale: TraceEntry | None) -> BoundProgram:
        """Trace the functions, and keep what came of it.

        ``stale``: an entry that seemed to hold, and does not.
        """
        field, recipe, traces = self.field, self.recipe, self.traces
        started = time.perf_counter()
        entry, fingerprint, _program = self._traced()
        why = ""
        if not entry.declined:
            bound = recipe.bind(entry, fingerprint, field, self.leaves)
            why = recipe.judge(entry, field, bound, self.t, self.u0, self.direction)
            final = (why if recipe.judges_once else "") or why_drawn(fingerprint)
            if final:
                entry.program, entry.declined = None, final
            entry.settle(self.roots)
            if stale is not None and stale.program is not entry.program:
                traces.doubt = CHANGED_UNSEEN
            entry.why_incomplete = entry.why_incomplete or traces.doubt
        traces.add(entry)
        FunctionCache.of(field.functions[0]).keep(entry.program)
        seconds = time.perf_counter() - started
        bound = recipe.bind(entry, fingerprint, field, self.leaves, seconds)
        if why:
            raise Declined(why)
        return bound

    def _traced(self) -> tuple[TraceEntry, Fingerprint, Program | None]:
        """An entry for what one run shows, its fingerprint, and its program to be kept alive."""
        field, recipe, traces, roots = self.field, self.recipe, self.traces, self.roots
        dtype, recorder = field.structure.dtype, CodeRecorder()
        try:
            _refuse_torchscript(roots)
            graph = recipe.graph(field, self.t, self.u0, self.leaves, recorder)
            key = (type(recipe), graph.is_float32, graph.kind, graph.blocks, content(graph.outputs))
            program = traces.program(key, lambda: recipe.program(graph), self.verify)
        except Declined as reason:
            plan = traces.plan_like(recorder.plan())
            fingerprint = Fingerprint(plan, roots)
            declined = TraceEntry(
                plan, fingerprint.items, fingerprint.why_incomplete, dtype, declined=str(reason)
            )
            return declined, fingerprint, None
        entry, fingerprint = graph.entry(traces.plan_like(recorder.plan()), roots, dtype)
        entry.program = program
        note_gradients(entry, field, self.t, self.u0)
        return entry, fingerprint, program


def _refuse_torchscript(roots: tuple[Any, ...]) -> None:
    """Decline code of TorchScript: numbers in it change unseen, and gradients stop unseen."""
    try:
        is_reached = any(map(is_torchscript, reached_objects(roots)))
    except Exception as error:  # of an object that cannot be looked into
        raise Declined(f"f raised {type(error).__name__}: {error}") from error
    if is_reached:
        raise Declined("it calls code of TorchScript")


def find(field: Any, recipe: Recipe, t0: float, u0: Tensor, direction: float, verify: bool) -> Any:
    """The program of a right-hand side with its tensors, made where it is not known yet.

    Parameters
    ----------
    field, recipe
        The right-hand side, and how such ones become programs.
    t0, u0, direction
        Start of the solve: the time, the flat state, and which way the time goes.
    verify
        Whether to compare a program that is known with one evaluation by torch, and to trace again
        where they differ.

    Raises
    ------
    Declined
        If it cannot be compiled.
    """
    u0 = u0.detach()
    last = field.memo.lookup
    if isinstance(last, LastLookup) and last.holds(field):
        bound = recipe.bind(last.entry, last.fingerprint, field, last.leaves(field.p))
        if not verify or recipe.is_confirmed(field, bound, field.after(t0, direction), u0):
            return bound
    if any(isinstance(f, Autocasting) for f in field.functions):
        raise Declined("autocast is active")
    leaves = [field.p] if isinstance(field.p, Tensor) else pytree.tree_leaves(field.p)
    # nothing of the user's runs under a lock: f may wait for a thread that solves, too
    traces, t = traces_of(recipe.key(field, leaves)), field.after(t0, direction)
    roots = roots_of(field, leaves)
    return _Lookup(field, recipe, t, u0, direction, verify, leaves, roots, traces).run()
