"""Traces a right-hand side: runs it once, and notes an expression for each number it computes.

``f`` runs under a dispatch mode of torch (``tracer.py``), with real values. For each piece of
memory that depends on the inputs the tracer keeps an array of expressions of the same length. Views
need no rules: a view reads that array through its own strides.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.graph.expression import MOST_NODES, Node, Pool
from diffsolve.engines.native.tracing.fingerprint.recorder import CodeRecorder
from diffsolve.engines.native.tracing.tracer import Lifted, Tracer, is_wrapped
from diffsolve.problems.probe import TORCH
from diffsolve.problems.structure import StateStructure

_NUMPY = {torch.float64: np.float64, torch.float32: np.float32}
_GRAD_MODE: str = os.path.join(TORCH, "autograd", "grad_mode.py")
#: Methods of tensors that read or write memory without an operation that the dispatcher sees.
_RAW_ACCESS = {
    "tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "const_data_ptr", "mutable_data_ptr",
    "untyped_storage", "storage", "_typed_storage", "apply_", "map_", "map2_", "__deepcopy__",
    "__reduce_ex__", "__repr__", "share_memory_",
}  # fmt: skip


#: Methods by which torch.DoubleTensor([u[0]]) reads a number; float(u[0]) reaches the dispatcher.
_RAW_NUMBERS = {"__float__", "__int__", "__index__", "__complex__"}


@dataclass
class Trace:
    """The expressions of what ``f`` computes.

    Attributes
    ----------
    pool
        Owner of the nodes.
    t, u
        Inputs: the time, and the flat state.
    inputs
        Further inputs: the leaves of ``p``, then captured tensors in the order of their first use.
    outputs
        The flat derivative.
    constants
        Tensors whose values became constants, each with its version at the trace.
    detached
        How ``f`` keeps gradients from flowing, if it does. The expressions do not show it.
    """

    pool: Pool
    t: Node
    u: list[Node]
    inputs: list[Lifted] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    constants: list[tuple[Tensor, int]] = field(default_factory=list)
    detached: str | None = None


def trace(
    f: Callable[..., Any],
    structure: StateStructure,
    p: Any,
    t0: Any,
    u0: Tensor,
    most: int = MOST_NODES,
    flat: Callable[[Any, StateStructure, Tracer], list[Node]] | None = None,
    recorder: CodeRecorder | None = None,
) -> Trace:
    """Run ``f(t0, u0, p)`` once, and return expressions for what it computes.

    Parameters
    ----------
    f
        Right-hand side, called as ``f(t, u)`` where ``p`` is None.
    structure
        Of the state.
    u0
        Flat state; it is not changed.
    most
        Largest number of operations.
    flat
        Makes the outputs from what ``f`` returned. Default: the flat derivative.
    recorder
        Records the code that runs.

    Raises
    ------
    Declined
        If ``f`` does something that cannot be written as an expression of its inputs; the reason
        names the operation and the line of the user's code. An error of ``f`` itself is raised as
        it is.
    """
    if structure.dtype not in _NUMPY:
        raise Declined(f"the state is {structure.dtype}, not float64 or float32")
    if structure.device.type != "cpu":
        raise Declined(f"the state is on {structure.device}, not on the CPU")
    if torch.is_autocast_enabled("cpu"):
        raise Declined("autocast is active")
    pool = Pool(_NUMPY[structure.dtype], most)
    recorder = recorder or CodeRecorder()
    tracer = Tracer(pool, structure.dtype, trace.__code__, recorder)
    with torch.no_grad():
        t = torch.as_tensor(t0, dtype=structure.time_dtype, device="cpu").detach().clone()
        u = u0.detach().clone()
        t_node, u_nodes = pool.input("t", 0), list(pool.inputs("u", structure.size))
        tracer.add_input(t, [t_node])
        tracer.add_input(u, u_nodes)
        state = structure.unravel(u)
        tracer.keep_alive([t, u, *pytree.tree_leaves(state)])
        args = () if p is None else (_copied(p, tracer),)
        try:
            with without_compiler(), _RawAccess(tracer), tracer, recorder:
                du = f(t, state, *args)
        except Exception as error:
            if tracer.declined is not None:
                raise tracer.declined from None
            if type(error).__module__.startswith("torch._dynamo"):
                raise Declined(f"it compiles itself: {error}") from error
            raise
        if tracer.declined is not None:  # f caught the exception
            raise tracer.declined
        if recorder.exported_memory:
            raise Declined("torch.to_dlpack needs values that are known only while solving")
        outputs = (flat or flat_result)(du, structure, tracer)
    return Trace(pool, t_node, u_nodes, tracer.inputs, outputs, tracer.constants, tracer.detached)


@contextmanager
def without_compiler() -> Iterator[None]:
    """A block in which functions compiled by ``torch.compile`` run as they were written."""
    # set_stance would load the compiler, which takes a second; a compiled function has loaded it
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with CompilerStance.turn:
        stance = torch.compiler.set_stance("force_eager")
        CompilerStance.taken.append((threading.get_ident(), stance))
        try:
            with stance:
                yield
        finally:
            CompilerStance.taken.pop()


class CompilerStance:
    """The stance of ``torch.compile``, which is one for all threads: they take turns to change it.

    Attributes
    ----------
    turn
        Held by the thread that has changed the stance.
    taken
        The changes that are to be undone, each with its thread.
    """

    turn = threading.RLock()
    taken: list[tuple[int, Any]] = []  # noqa: RUF012


def _restore_for_others() -> None:
    """Restore the stance in a forked child, which has no copy of the thread that changed it."""
    others = [stance for thread, stance in CompilerStance.taken if thread != threading.get_ident()]
    if others:
        CompilerStance.turn, CompilerStance.taken = threading.RLock(), []
        for stance in reversed(others):
            stance.__exit__(None, None, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_for_others)


def _copied(p: Any, tracer: Tracer) -> Any:
    """``p`` with copies of its tensors as inputs, which share no memory with any other tensor."""
    leaves, spec = pytree.tree_flatten(p)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.dtype is tracer.dtype:
            tracer.check_plain(leaf)
            leaves[i] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
            tracer.lift(leaves[i], i)
    return pytree.tree_unflatten(leaves, spec)


def flat_result(du: Any, structure: StateStructure, tracer: Tracer) -> list[Node]:
    """The expressions of what ``f`` returned, in the order of the flat state."""
    mismatch = structure.describe_mismatch(du)
    if mismatch is not None:
        raise Declined(mismatch)
    leaves = structure.spec.flatten_up_to(du)
    nodes: list[Node] = []
    for leaf in leaves:
        tracer.meets(leaf)
        nodes += [tracer.pool.number(x) for x in tracer.nodes(leaf).reshape(-1)]
    return nodes


class _RawAccess(TorchFunctionMode):
    """Sees calls of torch that the dispatcher does not: raw access to memory, detached tensors."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tracer = self._tracer
        if tracer.busy:
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        try:
            self._check(name, func, args)
        except Declined as reason:
            tracer.declined = tracer.declined or reason
            raise
        before, tracer.call = tracer.call, (name, (*args, *(kwargs or {}).values()))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            tracer.call = before

    def _check(self, name: str, func: Any, args: tuple) -> None:
        tracer = self._tracer
        if name in _RAW_ACCESS:
            tracer.read_raw(name, args)
        elif name in _RAW_NUMBERS:
            tracer.read_raw("item", args)
        elif name in ("detach", "detach_") or (name == "__get__" and func.__self__ is Tensor.data):
            if is_wrapped(args[0]) or tracer.meets(args[0]):
                tracer.note_detached("Tensor.detach")
        elif name in ("tensor", "new_tensor") and any(map(tracer.meets_symbolic, args)):
            tracer.note_detached(f"torch.{name} of a tensor")
        elif name == "__set__" and func.__self__ is Tensor.data:
            tracer.decline("it sets the data of a tensor")
        elif name == "_set_grad_enabled" and not args[0] and not _leaves_grad_mode():
            tracer.note_detached("torch.no_grad")


def _leaves_grad_mode() -> bool:
    """Whether the call comes from the end of a block of ``torch.no_grad`` or the like."""
    frame: Any = sys._getframe(3)
    while frame is not None and frame.f_code.co_filename == _GRAD_MODE:
        if frame.f_code.co_name == "__exit__":
            return True
        frame = frame.f_back
    return False
