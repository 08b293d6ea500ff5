"""The dispatch mode under which ``trace`` runs a right-hand side: expressions for its tensors.

Memory of a tensor is in one of these states, by the address of its storage:

- symbolic: it depends on inputs, and has an array of expressions (``_cells``);
- constant: its values are those of the trace (``_constant``);
- blank: no operation has written it (``_blank``);
- unknown: it holds a result that has no expressions (``_unknown``);
- not met so far: a tensor from outside of ``f``. It becomes an input, or a constant.
"""

from __future__ import annotations

import sys
from array import array as array_of_c
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Number
from types import CodeType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.graph.expression import Node, Pool, array
from diffsolve.engines.native.tracing.fingerprint.recorder import CodeRecorder
from diffsolve.engines.native.tracing.operations import Rule, Unsupported, rule_of
from diffsolve.problems.probe import tensors_in, user_line

_PLAIN = (Tensor, torch.nn.Parameter)
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_internals: Any = torch._C
_LIFT_FRESH = torch.ops.aten.lift_fresh.default
_LISTS = (list, tuple, deque)
#: Kinds of objects that hold no tensors.
_WITHOUT_TENSORS = (Number, str, bytes, bytearray, memoryview, range, array_of_c, np.ndarray)
_GIVES_INTEGERS = {"Tensor.to", "torch.count_nonzero"}  # by their rules


@dataclass
class Lifted:
    """A tensor that became an input, besides ``t`` and ``u``: a block of the flat parameters.

    Attributes
    ----------
    tensor
        The captured tensor; None for a leaf of ``p``.
    p_position
        Its position in ``tree_leaves(p)``; None for a captured tensor.
    offset, count
        Its entries, in C order, are the inputs ``("p", offset)`` to ``("p", offset + count - 1)``.
    """

    tensor: Tensor | None
    p_position: int | None
    offset: int
    count: int


class _Cells:
    """The expressions of one piece of memory; ``is_input`` if ``f`` did not make it."""

    __slots__ = ("is_input", "nodes")

    def __init__(self, nodes: np.ndarray, is_input: bool):
        self.nodes, self.is_input = nodes, is_input


class Tracer(TorchDispatchMode):
    """Keeps expressions for every tensor that depends on an input, as operations run.

    Attributes
    ----------
    pool
        Owner of the nodes.
    dtype
        Of the state.
    inputs
        Tensors that became inputs, in the order of their first use.
    constants
        Tensors from outside whose values became constants, each with its version.
    detached
        How gradients are kept from flowing, if they are.
    declined
        Why the run cannot be compiled, once that is known. It is kept because ``f`` may catch the
        exception.
    busy
        Whether the tracer itself works: calls of torch are then not those of ``f``.
    call
        The function of torch that runs, and its arguments.
    """

    supports_higher_order_operators = True  # they are declined here, with a reason

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import it, which takes a second

    def __init__(self, pool: Pool, dtype: torch.dtype, root: CodeType, recorder: CodeRecorder):
        super().__init__()
        self.pool, self.dtype, self._recorder = pool, dtype, recorder
        self._root = root  # frames below this code are not the user's
        self.inputs: list[Lifted] = []
        self.constants: list[tuple[Tensor, int]] = []
        self.detached: str | None = None
        self.declined: Declined | None = None
        self.busy = False
        self.call: tuple[str, tuple] = "", ()
        self._count = 0  # of the flat parameters so far
        self._cells: dict[int, _Cells] = {}
        self._constant: set[int] = set()
        self._blank: set[int] = set()
        self._unknown: dict[int, str] = {}  # with the operation that made it
        self._known: dict[int, Tensor] = {}  # tensors by identity; alive, so that it is not reused
        self._inference = torch.is_inference_mode_enabled()

    # -- bookkeeping ---------------------------------------------------------------------------

    def add_input(self, x: Tensor, nodes: Iterable[Node]) -> None:
        """Make ``x`` an input with these nodes."""
        self._cells[_memory(x)] = _Cells(array(nodes), True)

    def keep_alive(self, tensors: Any) -> None:
        """Note tensors that were made under the trace."""
        for x in tensors:
            self._known[id(x)] = x

    def lift(self, x: Tensor, p_position: int | None = None) -> None:
        """Make ``x`` an input: a leaf of ``p``, or a captured tensor."""
        count = x.numel()
        if count > self.pool.most:
            self.decline(f"it uses a tensor of {count:,} numbers")
        cells = self._cells.get(_memory(x))
        if cells is None:
            size = x.untyped_storage().nbytes() // x.element_size()
            cells = self._cells[_memory(x)] = _Cells(np.empty(size, dtype=object), True)
        view = _strided(cells.nodes, x)
        is_taken = [y is not None for y in view.reshape(-1)]
        if any(is_taken):
            has_gradient = x.requires_grad or any(y.requires_grad for y in self._captured_beside(x))
            if has_gradient or not all(is_taken):
                self.decline("two of the tensors that it uses share memory")
        else:
            nodes = [self.pool.input("p", self._count + k) for k in range(count)]
            _fill(view, nodes)
            captured = x if p_position is None else None
            self.inputs.append(Lifted(captured, p_position, self._count, count))
            self._count += count
        self._known[id(x)] = x

    def _captured_beside(self, x: Tensor) -> list[Tensor]:
        """Captured tensors with the memory of ``x``."""
        memory = _memory(x)
        captured = [y.tensor for y in self.inputs if y.tensor is not None]
        return [y for y in captured if _memory(y) == memory]

    def check_plain(self, x: Tensor) -> None:
        """Decline tensors that have no plain memory of real numbers on the CPU."""
        if type(x) not in _PLAIN:
            self.decline(f"it uses a {type(x).__name__}, not a plain tensor")
        if x.layout is not torch.strided or x.is_quantized:
            self.decline("it uses a sparse or quantised tensor")
        if x.device.type != "cpu":
            self.decline(f"it uses a tensor on {x.device}, not on the CPU")
        if x.is_complex():
            self.decline("it uses complex numbers")

    def meets(self, x: Tensor) -> bool:
        """Whether ``x`` is symbolic. A tensor from outside first becomes an input or a constant."""
        if x.layout is not torch.strided:
            self.check_plain(x)
        memory = _memory(x)
        cells = self._cells.get(memory)
        if cells is not None:
            if cells.is_input and id(x) not in self._known:
                self.lift(x)
            return True
        if memory in self._constant or x.device.type == "meta":  # without values
            return False
        if memory in self._unknown:
            self.decline(f"it uses a result of {self._unknown[memory]} that it can't compile")
        self.check_plain(x)
        if x.dtype is self.dtype:
            self.lift(x)
            return True
        if x.requires_grad:
            self.decline(f"it uses a tensor of {x.dtype}, while the state is {self.dtype}")
        self._constant.add(memory)
        self._known[id(x)] = x
        self.constants.append((x, 0 if x.is_inference() else x._version))
        return False

    def nodes(self, x: Tensor) -> np.ndarray:
        """The expressions of ``x`` if it is symbolic, else its values."""
        memory = _memory(x)
        cells = self._cells.get(memory)
        if cells is not None:
            return _strided(cells.nodes, x)
        if memory in self._blank:
            self.decline("it reads memory that no operation wrote")
        try:
            return x.detach().numpy()
        except (TypeError, RuntimeError):
            self.decline(f"it uses a tensor of {x.dtype}, while the state is {self.dtype}")

    # -- operations ----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.busy = True
        self._recorder.pause()
        try:
            return self._run(func, args, kwargs or {})
        except Declined as reason:
            self.declined = self.declined or reason
            raise
        finally:
            self.busy = False
            self._recorder.resume()

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not isinstance(func, torch._ops.OpOverload):
            self.decline(f"{func} is not among the operations it can compile")
        rule = rule_of(func)
        if rule.is_random:
            self.decline(f"{rule.name} draws random numbers")
        if func is _LIFT_FRESH and _memory(args[0]) not in self._cells:
            # torch.tensor([...]) is a constant of the code; an array of NumPy may change
            if args[0].untyped_storage().resizable():
                self._check_constant()
                self._note_results(args)
            else:
                self.meets(args[0])
            return func(*args)
        symbolic = False
        for x in tensors_in((*args, *kwargs.values())):
            symbolic |= self.meets(x)
        for i, name in rule.writes:
            self._check_write(args[i] if i < len(args) else kwargs[name])
        if not symbolic or rule.is_shape_only:
            out = func(*args, **kwargs)
            self._note_results(out)
            memories = map(_memory, tensors_in((out,)))
            if rule.is_unwritten:
                self._blank.update(memories)
            elif rule.writes:
                self._blank.difference_update(memories)
            return out
        self._note_gradients()
        if rule.is_view:
            out = func(*args, **kwargs)
            if any(x.dtype is not args[0].dtype for x in tensors_in((out,))):
                self.decline(f"{rule.name} reads numbers as of another type")
            self.keep_alive(tensors_in((out,)))
            return out
        arrays = self._arrays(func, rule, args, kwargs)
        out = func(*args, **kwargs)
        outs = out if isinstance(out, (list, tuple)) else (out,)
        types = {x.dtype for x in tensors_in((*args, *kwargs.values()))}
        for x, result in zip(outs, arrays, strict=True):
            if not isinstance(x, Tensor):  # one that was not asked for
                continue
            if result is None:
                self._unknown[_memory(x)] = rule.name
            else:
                self._write(rule, x, result, types)
        self.keep_alive(tensors_in(outs))
        return out

    def _arrays(self, func: Any, rule: Rule, args: tuple, kwargs: dict[str, Any]) -> Any:
        if rule.is_data_dependent:
            self.decline(f"{rule.name} needs values that are known only while solving")
        if rule.handler is None:
            self.decline(f"{rule.name} is not among the operations it can compile")
        written = {name for _, name in rule.writes}
        values = [self._value(x) for x in args[rule.overwrites :]]
        if rule.overwrites:  # the rule does not look at what was there
            values.insert(0, np.empty(tuple(args[0].shape), dtype=object))
        named = {k: self._value(x) for k, x in kwargs.items() if k not in written}
        try:
            arrays = rule.handler(self.pool, *values, **named)
        except Declined as reason:
            self.decline(str(reason))
        except Unsupported as reason:
            self.decline(f"{rule.name} {reason} is not among the operations it can compile")
        except Exception:
            func(*args, **kwargs)  # wrong arguments raise torch's own error
            self.decline(f"{rule.name} is not among the operations it can compile in this form")
        return arrays if isinstance(arrays, (list, tuple)) else (arrays,)

    def _value(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.nodes(x)
        if isinstance(x, (list, tuple)):
            return [self._value(y) for y in x]
        return x

    def _write(self, rule: Rule, x: Tensor, result: Any, types: set[torch.dtype]) -> None:
        """Note the expressions that an operation on tensors of these types wrote to ``x``."""
        pool = self.pool
        if x.dtype is not self.dtype and x.dtype is not torch.bool:
            rounds = self.dtype in types and rule.name not in _GIVES_INTEGERS
            is_switch = types <= {torch.bool, x.dtype} and _is_exact_switch(x, result)
            if rounds or ((x.is_floating_point() or x.is_complex()) and not is_switch):
                self.decline(f"{rule.name} gives {x.dtype}, while the state is {self.dtype}")
        result = np.asarray(result, dtype=object)
        if result.shape != x.shape:
            self.decline(f"{rule.name} is not among the operations it can compile in this form")
        kind = pool.truth if x.dtype is torch.bool else pool.node
        if torch.bool in types and x.dtype is not torch.bool:
            kind = pool.number
        memory = _memory(x)
        cells = self._cells.get(memory)
        if cells is None:
            cells = self._cells[memory] = _Cells(self._memory_nodes(x, rule), False)
        elif len(cells.nodes) * x.element_size() != x.untyped_storage().nbytes():
            self.decline(f"{rule.name} resizes a tensor")
        _strided(cells.nodes, x)[...] = np.frompyfunc(kind, 1, 1)(result)
        self._blank.discard(memory)

    def _memory_nodes(self, x: Tensor, rule: Rule) -> np.ndarray:
        """Expressions of the memory of ``x``, from what it held before."""
        memory, storage = _memory(x), x.untyped_storage()
        size = storage.nbytes() // x.element_size()
        if size > self.pool.most:
            self.decline(f"{rule.name} gives a tensor of {size:,} numbers")
        nodes = np.empty(size, dtype=object)
        if memory in self._blank:
            nodes[:] = self.pool.const(float("nan"))
        elif memory in self._constant:
            values = torch.empty(0, dtype=x.dtype, device="cpu").set_(storage).tolist()
            nodes[:] = [self.pool.const(v) for v in values]
            self._constant.discard(memory)
        return nodes

    def _note_results(self, out: Any) -> None:
        for x in tensors_in((out,)):
            if x.layout is not torch.strided:
                self.check_plain(x)
            self._known[id(x)] = x
            memory = _memory(x)
            if memory not in self._cells:
                self._constant.add(memory)

    def _check_write(self, written: Any) -> None:
        """Decline to write to a tensor from outside."""
        for x in tensors_in((written,)):
            memory = _memory(x)
            cells = self._cells.get(memory)
            is_outside = any(_memory(y) == memory for y, _ in self.constants)
            if is_outside or (cells is not None and cells.is_input):
                self.decline("it changes a tensor in place that it did not make")

    def _check_constant(self) -> None:
        """Decline a new tensor that torch may make from tensors in a list: it reads them unseen."""
        name, args = self.call
        if torch._C._is_torch_function_all_disabled():
            self.decline("it makes a tensor where torch does not tell of what")
        if any(self._holds_values(x) for x in args if not isinstance(x, Tensor)):
            name = f"Tensor.{name}" if name.startswith("new") else f"torch.{name}"
            self.decline(f"{name} of values that are known only while solving")

    def _holds_values(self, x: Any) -> bool:
        if isinstance(x, Tensor):
            return self.meets_symbolic(x)
        if isinstance(x, _LISTS):
            return any(map(self._holds_values, x))
        if isinstance(x, _WITHOUT_TENSORS):
            return False
        return hasattr(x, "__getitem__") or hasattr(x, "__float__")

    # -- what the expressions do not show --------------------------------------------------------

    def note_detached(self, how: str) -> None:
        """Note that gradients do not flow here. The first place stays."""
        if self.detached is None:
            self.detached = how + self.line()

    def _note_gradients(self) -> None:
        """Note where autograd would not record the operation that runs."""
        if self.detached is not None:
            return
        if torch.is_inference_mode_enabled() and not self._inference:
            self.note_detached("torch.inference_mode")
        if torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled():
            self.note_detached("torch.autograd.grad without create_graph=True")
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code is not self._root:
            if frame.f_code is _APPLY:
                self.note_detached("a custom torch.autograd.Function")
            frame = frame.f_back

    def meets_symbolic(self, x: Any) -> bool:
        """Whether ``x`` is a tensor that depends on an input."""
        return isinstance(x, Tensor) and (is_wrapped(x) or self.meets(x))

    def read_raw(self, name: str, args: tuple) -> None:
        """Decline a method that is about to read the memory of a symbolic tensor."""
        for x in tensors_in(args[:1]):
            if self.meets_symbolic(x):
                self.decline(f"Tensor.{name} needs values that are known only while solving")

    def line(self) -> str:
        """The line of the user's code that is running, in brackets."""
        return user_line(self._root)

    def decline(self, reason: str) -> NoReturn:
        raise Declined(reason + self.line())


def _is_exact_switch(x: Tensor, result: Any) -> bool:
    """Whether ``x`` is a choice between constants that float32 holds exactly.

    ``torch.where(t < 1, 0.0, 1.0)`` has torch's default type, also in a float64 problem.
    """
    if x.dtype is not torch.float32:
        return False
    nodes = np.asarray(result, dtype=object).reshape(-1)
    nodes = [node.args[0] if node.op == "neg" else node for node in nodes]
    chosen = [a for node in nodes for a in (node.args[1:] if node.op == "where" else (node,))]
    return all(a.is_const and float(np.float32(a.data)) == a.data for a in chosen)


def _memory(x: Tensor) -> int:
    """What tells the memory of a tensor from all other."""
    return x.untyped_storage()._cdata


def _strided(nodes: np.ndarray, x: Tensor) -> np.ndarray:
    """The expressions of ``x`` as a view of those of its memory."""
    strides = tuple([8 * s for s in x.stride()])
    return np.ndarray(tuple(x.shape), object, nodes, 8 * x.storage_offset(), strides)


def _fill(view: np.ndarray, nodes: list[Node]) -> None:
    view[...] = array(nodes, view.shape)


def is_wrapped(x: Tensor) -> bool:
    """Whether ``x`` stands for another tensor in a transform of ``torch.func``."""
    return _internals._functorch.is_functorch_wrapped_tensor(x)
