"""From a right-hand side to its machine code: traces are kept, and checked before they are used."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.engines.native.compiled import Compiled
from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.expression import content, needed
from diffsolve.engines.native.fingerprint import Fingerprint
from diffsolve.engines.native.trace import Lifted, trace
from diffsolve.problems.autocast import Autocasting
from diffsolve.problems.capture import Probe, reachable_tensors, reached_leaves
from diffsolve.problems.vector_field import VectorField

_MOST_KEPT = 64  # compiled right-hand sides that nothing else holds on to
_lock = threading.RLock()
_by_function: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
_by_content: OrderedDict[Any, Compiled] = OrderedDict()


@dataclass
class _Entry:
    """What is remembered of a function: its machine code, or why there is none."""

    fingerprint: Fingerprint
    compiled: Compiled | None
    declined: str
    inputs: list[Lifted]
    constants: list[tuple[Tensor, int]]
    detached: str | None
    used: list[bool]
    dtype: torch.dtype
    reachable: list[Tensor] | None = None
    is_current: bool = True  # until it is traced again

    def __post_init__(self) -> None:
        found = [x.tensor for x in self.inputs if x.tensor is not None]
        self.captured = [(x, x.shape) for x in found]
        self.is_plain = not (found or self.constants)  # nothing but code and p

    def still_holds(self, f: Any, p: Any) -> bool:
        return self.is_current and self.holds(_around(f, p))

    def holds(self, around: Any) -> bool:
        """Whether all that a trace depends on is as it was."""
        if not self.fingerprint.still_holds(around):
            return False
        for x, shape in self.captured:
            if x.shape != shape or x.dtype is not self.dtype:
                return False
        return not self.constants or all(
            x.is_inference() or x._version == version for x, version in self.constants
        )


class _Again:
    """What was found for a problem, whose next solve asks for the same: it keeps its ``f``.

    Parameters
    ----------
    p
        Its parameters, a tensor or None.
    """

    __slots__ = ("_inference", "_shape", "entry")

    def __init__(self, entry: _Entry, p: Tensor | None):
        self.entry = entry
        self._shape = None if p is None else p.shape
        self._inference = torch.is_inference_mode_enabled()

    def holds(self, field: VectorField) -> bool:
        entry, p = self.entry, field.p
        if self._inference is not torch.is_inference_mode_enabled():
            return False
        if p is not None and not (p.shape == self._shape and p.dtype is entry.dtype and p.is_cpu):
            return False
        if entry.is_plain and entry.is_current and entry.fingerprint.is_where_it_was(field.f):
            return True
        return entry.still_holds(field.f, p)


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

    def __init__(self, entry: _Entry, leaves: list[Any], trace_s: float):
        assert entry.compiled is not None
        self.compiled = entry.compiled
        self._trace_s = trace_s - entry.compiled.compile_s
        self._entry = entry
        self.template: Any = None
        self._active: tuple[bool, ...] | None = None
        self.tensors: list[Tensor] = [
            leaves[x.p_position or 0] if x.tensor is None else x.tensor for x in entry.inputs
        ]
        flat = [x.detach() if x.dim() == 1 else x.detach().reshape(-1) for x in self.tensors]
        self._borrowed = len(flat) == 1 and flat[0].is_contiguous()
        self.params = flat[0] if self._borrowed else torch.cat(flat) if flat else _NOTHING

    def keep_params(self) -> None:
        if self._borrowed:
            self.params, self._borrowed = self.params.clone(), False

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
        if entry.reachable is None:
            entry.reachable = [x for x in reachable_tensors(field.f) if x.is_leaf]
        found = {id(x): x for x in (*self.tensors, *entry.reachable) if x.requires_grad}
        if (found or by_state) and entry.detached is not None:
            raise Declined(f"it switches gradients off by {entry.detached}")
        return list(found.values())


_NOTHING = torch.empty(0, dtype=torch.float64)
_MOST_OF_ONE = 32  # traces of one function
_MOST_NUMBERS = 8
_NUMBERS = "a number in p is another one at every solve: make it a tensor, which is an input"
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
        native = NativeField(again.entry, [p], 0.0)
        if not guard or _is_confirmed(field, native, t0, u0.detach(), direction):
            return native
    u0 = u0.detach()
    if isinstance(f, Autocasting):
        raise Declined("autocast is active")
    leaves = [p] if isinstance(p, Tensor) else pytree.tree_leaves(p)
    owner, key = _key(field, leaves)
    # nothing of the user's runs under the lock: f may wait for a thread that solves, too
    with _lock:
        known = _known(owner)
        entry = known.get(key)
    if entry is not None and entry.still_holds(f, field.p):
        native = _ready(entry, leaves, 0.0)
        if not guard or _is_confirmed(field, native, t0, u0, direction):
            if p is None or isinstance(p, Tensor):
                field.memo[_Again] = _Again(entry, p)
            return native
    if guard and _numbers_vary(known, key):
        raise Declined(_NUMBERS)
    t = field.after(t0, direction)
    started = time.perf_counter()
    entry = _traced(field, t, u0)
    if entry.compiled is not None:
        native = _ready(entry, leaves, time.perf_counter() - started)
        reason = _why_not_itself(field, native, t, u0, direction)
        if reason:
            entry.compiled, entry.declined = None, reason
    with _lock:
        while len(known) >= _MOST_OF_ONE:
            known.pop(next(iter(known)))
        if key in known:
            known[key].is_current = False
        known[key] = entry
    return _ready(entry, leaves, time.perf_counter() - started)


def _is_confirmed(
    field: VectorField, native: NativeField, t0: float, u0: Tensor, direction: float
) -> bool:
    """Whether one evaluation of ``f`` by torch is what was compiled, and uses the same tensors."""
    t = field.after(t0, direction)
    eager, foreign = _eager(field, t, u0, native.tensors)
    return _agrees(field, native, t, u0, eager) and native.holds_all(foreign)


def _numbers_vary(known: dict[Any, Any], key: Any) -> bool:
    """Whether so many solves differed in nothing but Python's numbers in ``p``, to no good end."""
    with _lock:  # another thread may add one
        return sum(1 for other in known if other[:-1] == key[:-1]) >= _MOST_NUMBERS


def _ready(entry: _Entry, leaves: list[Any], trace_s: float) -> NativeField:
    if entry.compiled is None:
        raise Declined(entry.declined)
    return NativeField(entry, leaves, trace_s)


def _known(owner: Any) -> dict[Any, Any]:
    """What is remembered of a function; nothing where no weak reference to it can be made."""
    try:
        known = _by_function.get(owner)
        return _by_function.setdefault(owner, {}) if known is None else known
    except TypeError:
        return {}


def _key(field: VectorField, leaves: list[Any]) -> tuple[Any, Any]:
    f, structure = field.f, field.structure
    owner, part = getattr(f, "__self__", f), getattr(f, "__func__", None)
    state = (structure.dtype, *structure.shapes, None if structure.is_tensor else structure.spec)
    parts: list[Any] = [part, state, torch.is_inference_mode_enabled()]
    numbers: list[Any] = []
    if isinstance(field.p, Tensor):
        parts.append(True)
    elif field.p is not None:
        parts.append(pytree.tree_structure(field.p))
    for leaf in leaves:
        if isinstance(leaf, (int, float, complex, str, bytes, type(None))):
            numbers.append((type(leaf), repr(leaf)))
        elif not isinstance(leaf, Tensor):
            parts.append(type(leaf))  # the fingerprint looks into it
        elif leaf.dtype is structure.dtype:
            parts += (leaf.shape, type(leaf), leaf.device)
        else:  # taken as it is: the trace keeps it, so that its identity stays taken
            numbers += (id(leaf), leaf._version, leaf.requires_grad)
    return owner, (*parts, tuple(numbers))


def _around(f: Any, p: Any) -> tuple[Any, ...]:
    """What a fingerprint is taken of: ``f``, and what of ``p`` is no tensor or plain value."""
    if p is None or isinstance(p, Tensor):
        return (f,)
    plain = (Tensor, int, float, complex, str, bytes, type(None))
    return f, [leaf for leaf in pytree.tree_leaves(p) if not isinstance(leaf, plain)]


def _traced(field: VectorField, t: Tensor, u0: Tensor) -> _Entry:
    around = _around(field.f, field.p)
    fingerprint = Fingerprint(around)
    dtype = field.structure.dtype
    try:
        found = trace(field.f, field.structure, field.p, t, u0)
    except Declined as reason:
        return _Entry(fingerprint, None, str(reason), [], [], None, [], dtype)
    except Exception as error:  # f's own, which the torch engine reports as it is
        reason = f"f raised {type(error).__name__}: {error}"
        return _Entry(fingerprint, None, reason, [], [], None, [], dtype)
    fingerprint.settle(around)
    blocks = tuple((x.offset, x.count) for x in found.inputs)
    single = field.structure.dtype is torch.float32
    graph = (single, blocks, content(found.outputs))
    with _lock:
        compiled = _by_content.get(graph)
        if compiled is None:
            compiled = _by_content[graph] = Compiled(found.pool, found.outputs, blocks, single)
            if len(_by_content) > _MOST_KEPT:
                _by_content.popitem(last=False)
        else:
            _by_content.move_to_end(graph)
    inputs = (node.data for node in needed(found.outputs) if node.op == "input")
    positions = {i for block, i in inputs if block == "p"}
    used = [not positions.isdisjoint(range(x.offset, x.offset + x.count)) for x in found.inputs]
    return _Entry(
        fingerprint,
        compiled,
        "",
        found.inputs,
        found.constants,
        found.detached,
        used,
        dtype,
    )


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
        probe = Probe([t, *pytree.tree_leaves(state)])
        with probe:
            du = f(t, state, *field._args)
        return structure.ravel(du).clone(), probe.foreign


def _agrees(field: VectorField, native: NativeField, t: Tensor, u0: Tensor, eager: Tensor) -> bool:
    """Whether the compiled function gives what ``f`` gives now."""
    from diffsolve.engines.native.engine import evaluate

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
    from diffsolve.engines.native.engine import evaluate

    off = (evaluate(native, float(beside[0]), beside[1]) - eager).abs().max()
    roughly = 1e-6 if native.compiled.single is False else 1e-3
    return _FROZEN if float(off) > roughly * max(float(eager.abs().max()), 1e-3) else ""
