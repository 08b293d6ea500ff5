"""From a right-hand side to its machine code: traces are kept, and checked before they are used."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.graph.expression import content
from diffsolve.engines.native.locks import tables
from diffsolve.engines.native.programs.remembered import (
    CONTAINERS,
    HIDDEN,
    Entry,
    Graph,
    Known,
    around_of,
    described,
    keep,
    key_of,
    known_of,
    lasting,
    match,
    refuse_known,
    refused,
    remember,
    settle,
)
from diffsolve.engines.native.programs.scalar import Compiled
from diffsolve.engines.native.tracing.fingerprint.fingerprint import Fingerprint
from diffsolve.engines.native.tracing.fingerprint.kinds import PLAIN
from diffsolve.engines.native.tracing.fingerprint.recorder import CodeRecorder
from diffsolve.engines.native.tracing.trace import trace
from diffsolve.problems.autocast import Autocasting
from diffsolve.problems.capture import (
    is_torchscript,
    reachable_tensors,
    reached_leaves,
    reached_objects,
)
from diffsolve.problems.probe import Probe, has_module_hooks
from diffsolve.problems.vector_field import VectorField

_MOST_KEPT = 64  # compiled right-hand sides that nothing else holds on to
_by_content: OrderedDict[Any, Compiled] = OrderedDict()


class _Again:
    """What was found for a problem, whose next solve asks for the same: it keeps its ``f``.

    Parameters
    ----------
    leaves
        Those of its parameters.
    """

    __slots__ = ("_compiled", "_default", "_inference", "_leaves", "_shape", "entry", "fingerprint")

    def __init__(
        self, entry: Entry, fingerprint: Fingerprint, field: VectorField, leaves: list[Any]
    ):
        self.entry, self.fingerprint = entry, fingerprint
        self._compiled = entry.compiled  # so that it stays
        self._shape = field.p.shape if isinstance(field.p, Tensor) else None
        self._leaves = leaves
        self._inference = torch.is_inference_mode_enabled()
        self._default = torch.get_default_dtype()

    @staticmethod
    def serves(fingerprint: Fingerprint, p: Any, leaves: list[Any]) -> bool:
        """Whether a fingerprint shows all that may change of such parameters."""
        if p is None or isinstance(p, Tensor):
            return True
        found = {id(x) for x in fingerprint.tensors}
        return type(p) in CONTAINERS and all(id(x) in found or type(x) in PLAIN for x in leaves)

    def holds(self, field: VectorField) -> bool:
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


class NativeField:
    """The machine code of a right-hand side with the tensors of one solve.

    Attributes
    ----------
    compiled
        Its functions.
    tensors
        What it uses besides ``t`` and ``u``, one tensor a block of the flat parameters.
    params
        Those numbers, flat. They are the tensor's own until ``keep_params`` makes a copy, for what
        reads them after the solve.
    template
        What the kernels are given in such solves, filled in by the engine.
    """

    def __init__(self, entry: Entry, fingerprint: Fingerprint, leaves: list[Any], trace_s: float):
        self.compiled = entry.compiled
        assert self.compiled is not None
        self._trace_s = trace_s - self.compiled.compile_s
        self._entry = entry
        self._fingerprint: Fingerprint | None = fingerprint
        self.template: Any = None
        self._active: tuple[bool, ...] | None = None
        self.tensors: list[Tensor] = [fingerprint.tensor_of(x, leaves) for x in entry.sources]
        flat = [x.detach() if x.dim() == 1 else x.detach().reshape(-1) for x in self.tensors]
        self._borrowed = len(flat) == 1 and flat[0].is_contiguous()
        self.params = flat[0] if self._borrowed else torch.cat(flat) if flat else _NOTHING

    def keep_params(self) -> None:
        if self._borrowed:
            self.params, self._borrowed = self.params.clone(), False

    def forget_functions(self) -> None:
        """Let go of what looked at ``f``: what is kept for a reverse pass must not refer to it."""
        self._fingerprint = None

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeField:
        return self  # nothing changes it, and machine code has no copies

    def compile_s(self) -> float:
        """Seconds spent on tracing and compiling since this was made."""
        return self._trace_s + self.compiled.compile_s

    @property
    def active(self) -> tuple[bool, ...]:
        """Which of the tensors require a gradient, and have one that is not zero."""
        found = self._active
        if found is None:
            pairs = zip(self.tensors, self._entry.used, strict=True)
            found = self._active = tuple([x.requires_grad and used for x, used in pairs])
        return found

    def holds_all(self, used: list[Tensor]) -> bool:
        """Whether the tensors that ``f`` was seen to use are those that get gradients."""
        if not used:
            return True
        mine = {id(x) for x in self.tensors}
        return all(id(x) in mine for x in used)

    def differentiable(self, field: VectorField, by_state: bool) -> list[Tensor]:
        """Every tensor with ``requires_grad`` that ``f`` uses, or could use.

        Parameters
        ----------
        by_state
            Whether the gradient by the initial state is wanted.

        Raises
        ------
        Declined
            If ``f`` keeps gradients from flowing somewhere.
        """
        entry = self._entry
        found = {id(x): x for x in (*self.tensors, *self._reachable(field)) if x.requires_grad}
        if (found or by_state) and entry.detached is not None:
            raise Declined(f"it switches gradients off by {entry.detached}")
        if (found or by_state) and entry.hook:
            raise Declined(f"it has hooks on gradients: {entry.hook}")
        field.compares = entry.compares
        return list(found.values())

    def _reachable(self, field: VectorField) -> list[Tensor]:
        """Tensors that ``f`` could use, looked for where those that it uses are others."""
        assert self._fingerprint is not None  # the solve has not begun
        mine, part = self._fingerprint.tensors, getattr(field.f, "__func__", None)
        cache = lasting(field.f)
        known = cache.get(("reachable", part))
        if known is not None and len(known[0]) == len(mine) and all(map(is_, known[0], mine)):
            return known[1]
        found = [x for x in self._reachable_anew(field) if x.is_leaf]
        cache["reachable", part] = mine, found
        return found

    def _reachable_anew(self, field: Any) -> list[Tensor]:
        return reachable_tensors(field.f)


_NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")
_FROZEN = "values of f go around torch's operations, so that the trace does not see them change"
_NOT_ITSELF = "f gives other values at each evaluation: random numbers, or the time of day"


def find(field: VectorField, t0: float, u0: Tensor, direction: float, guard: bool) -> NativeField:
    """The machine code of a right-hand side, made where it is not known yet.

    Parameters
    ----------
    field, t0, u0, direction
        Right-hand side, flat state at the start, and which way the time goes.
    guard
        Whether to compare what was compiled before with one evaluation of ``f`` by torch, and to
        trace again where they differ.

    Raises
    ------
    Declined
        If it cannot be compiled.
    """
    f, p = field.f, field.p
    again: _Again | None = field.memo.get(_Again)
    if again is not None and again.holds(field):
        native = NativeField(again.entry, again.fingerprint, again.leaves(p), 0.0)
        if not guard or _is_confirmed(field, native, t0, u0.detach(), direction):
            return native
    u0 = u0.detach()
    if isinstance(f, Autocasting):
        raise Declined("autocast is active")
    leaves = [p] if isinstance(p, Tensor) else pytree.tree_leaves(p)
    key, around = key_of(field, leaves), (f, *around_of(p, leaves, field.structure.dtype))
    # nothing of the user's runs under the lock: f may wait for a thread that solves, too
    known = known_of(key)
    found = match(known, around)
    doubtful = None
    if found is not None:
        entry, fingerprint = found
        native = _ready(entry, fingerprint, leaves, 0.0)
        if not guard or _is_confirmed(field, native, t0, u0, direction):
            keep(f, entry)
            if _Again.serves(fingerprint, p, leaves):
                field.memo[_Again] = _Again(entry, fingerprint, field, leaves)
            return native
        doubtful, entry.is_current = entry, False
    if guard:
        refuse_known(known, around)
    t = field.after(t0, direction)
    started = time.perf_counter()
    entry, fingerprint = _traced(field, t, u0, around, known, guard)
    if not entry.declined:
        native = _ready(entry, fingerprint, leaves, time.perf_counter() - started)
        reason = _why_not_itself(field, native, t, u0, direction)
        settle(entry, fingerprint, around, reason)
        if doubtful is not None and doubtful.compiled is not entry.compiled:
            known.doubt = HIDDEN
        entry.unknown = entry.unknown or known.doubt
    remember(known, entry)
    keep(f, entry)
    return _ready(entry, fingerprint, leaves, time.perf_counter() - started)


def _is_confirmed(
    field: VectorField, native: NativeField, t0: float, u0: Tensor, direction: float
) -> bool:
    """Whether one evaluation of ``f`` by torch is what was compiled, and uses the same tensors."""
    t = field.after(t0, direction)
    eager, foreign = _eager(field, t, u0, native.tensors)
    return _agrees(field, native, t, u0, eager) and native.holds_all(foreign)


def _ready(
    entry: Entry, fingerprint: Fingerprint, leaves: list[Any], trace_s: float
) -> NativeField:
    if entry.declined:
        raise Declined(entry.declined)
    return NativeField(entry, fingerprint, leaves, trace_s)


def _traced(
    field: VectorField, t: Tensor, u0: Tensor, around: Any, known: Known, guard: bool
) -> tuple[Entry, Fingerprint]:
    dtype, recorder = field.structure.dtype, CodeRecorder()
    try:
        refuse_torchscript(around)
        found = trace(field.f, field.structure, field.p, t, u0, recorder=recorder)
    except Declined as reason:
        return refused(Entry, recorder, around, known, dtype, str(reason))
    except Exception as error:  # f's own, which the torch engine reports as it is
        reason = f"f raised {type(error).__name__}: {error}"
        return refused(Entry, recorder, around, known, dtype, reason)
    single = dtype is torch.float32
    graph = Graph.of(found, found.outputs, pytree.tree_leaves(field.p), "ode")
    key = (single, graph.blocks, content(graph.outputs))
    try:
        compiled = _compiled(key, graph, single, known, guard)
    except Declined as reason:
        return refused(Entry, recorder, around, known, dtype, str(reason))
    entry, fingerprint = described(Entry, recorder, around, known, dtype, found, graph, compiled)
    entry.hook, entry.compares = look(field, [field.f], t, u0)
    return entry, fingerprint


def _compiled(key: Any, graph: Graph, single: bool, known: Known, guard: bool) -> Compiled:
    with tables:
        compiled = _by_content.get(key)
        if compiled is None:
            known.must_compile(guard)
            compiled = _by_content[key] = Compiled(graph.pool, graph.outputs, graph.blocks, single)
            if len(_by_content) > _MOST_KEPT:
                _by_content.popitem(last=False)
        else:
            known.compiled = 0
            _by_content.move_to_end(key)
        return compiled


def refuse_torchscript(around: Any) -> None:
    """Decline what TorchScript compiled: numbers in it change unseen, and gradients stop unseen.

    Raises
    ------
    Declined
        If it is reached.
    """
    if any(map(is_torchscript, reached_objects(around))):
        raise Declined("it calls code of TorchScript")


def look(
    field: VectorField, functions: Sequence[Callable[..., Any]], t: Tensor, u0: Tensor
) -> tuple[str, bool]:
    """What a trace does not see, and a run that autograd records shows.

    Returns
    -------
    tuple
        Hooks on gradients, in words, and whether anything is compared.
    """
    probe = None
    try:
        with torch.enable_grad():
            state = field.structure.unravel(u0.clone().requires_grad_().clone())
            probe = Probe(t, pytree.tree_leaves(state))
            with probe:
                found = [f(t, state, *field._args) for f in functions]
    except Exception:  # it has no gradient
        return "", probe is not None and probe.compares
    of_modules = has_module_hooks(pytree.tree_leaves(found))
    return probe.hook or ("hooks of a module" if of_modules else ""), probe.compares


def _eager(
    field: VectorField, t: Tensor, u0: Tensor, known: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """``f(t, u0)`` by torch, and the tensors it used whose gradient is wanted.

    Those are looked for if one of the ``known`` tensors requires a gradient.
    """
    f, structure = field.f, field.structure
    state = structure.unravel(u0)
    wanted = [x for x in known if x.requires_grad] if torch.is_grad_enabled() else []
    if not wanted:
        with torch.no_grad():
            return structure.ravel(f(t, state, *field._args)).clone(), []
    if all(x.is_leaf for x in wanted):  # the graph tells, in a fifth of the time
        du = structure.ravel(f(t, state, *field._args))
        return du.detach().clone(), list(reached_leaves([du]).values())
    with torch.no_grad():
        probe = Probe(t, pytree.tree_leaves(state))
        with probe:
            du = f(t, state, *field._args)
        return structure.ravel(du).clone(), probe.foreign


def _agrees(field: VectorField, native: NativeField, t: Tensor, u0: Tensor, eager: Tensor) -> bool:
    """Whether the compiled function gives what ``f`` gives now."""
    from diffsolve.engines.native.runtime.solve import evaluate

    if eager.shape != u0.shape or eager.dtype is not u0.dtype:
        return False
    ours = evaluate(native, float(t), u0)
    return torch.equal(ours, eager) or bool(field.rounding_error(ours, eager) <= 1)


def _why_not_itself(
    field: VectorField, native: NativeField, t: Tensor, u0: Tensor, direction: float
) -> str:
    """Why a trace that was just made is not that of ``f``; empty if it is.

    At the start, where it was made, a difference beyond rounding shows numbers that ``f`` draws.
    Beside it one shows values that went around torch, and are frozen in the trace.
    """
    eager, _ = _eager(field, t, u0)
    if not _agrees(field, native, t, u0, eager):
        again, _ = _eager(field, t, u0)
        if not (torch.equal(eager, again) or bool((eager.isnan() & again.isnan()).any())):
            return _NOT_ITSELF
    beside = t + math.copysign(1e-3 * max(1.0, abs(float(t))), direction), u0 * 1.001 + 1e-3
    try:
        eager, _ = _eager(field, *beside)
    except Exception:  # outside of where f is defined
        return ""
    if not bool(eager.isfinite().all()):
        return ""
    from diffsolve.engines.native.runtime.solve import evaluate

    off = (evaluate(native, float(beside[0]), beside[1]) - eager).abs().max()
    roughly = 1e-6 if native.compiled.single is False else 1e-3
    return _FROZEN if float(off) > roughly * max(float(eager.abs().max()), 1e-3) else ""
