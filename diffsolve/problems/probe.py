"""What one run of a function under torch shows: what it uses, reads and compares."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffsolve.problems.capture import nodes_of, reached_leaves

TORCH = os.path.dirname(torch.__file__) + os.sep
PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LIBRARY = os.path.join(PACKAGE, "problems", "library")  # right-hand sides, as a user's
_PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.mv,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.mv,
}
# what makes numbers of a tensor, and tensors of numbers
_NUMBERS = {
    "item", "tolist", "numpy", "__float__", "__int__", "__complex__", "__array__", "__dlpack__",
}  # fmt: skip
_COPIES = {"tensor", "new_tensor", "linspace", "logspace"}
_FROM_LISTS = {*_COPIES, "as_tensor", "asarray", "new"}
# what a run may depend on without an operation of torch
_READS = _NUMBERS | {"__bool__", "__index__", "is_nonzero", "equal", "allclose"}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
#: Piecewise constant functions, whose derivative misses what their jumps do.
_STEPS = {
    "gt", "ge", "lt", "le", "eq", "ne", "isclose", "heaviside", "sign", "floor", "ceil", "round",
    "trunc", "floor_divide", "__floordiv__", "__rfloordiv__", "remainder", "fmod", "__mod__",
    "bucketize", "searchsorted",
}  # fmt: skip
_internals: Any = torch._C
_NOTHING_TO_DO = nullcontext()
_BACKWARD_HOOK: Any = torch.nn.modules._functions.BackwardHookFunction._backward_cls  # type: ignore[attr-defined]

CUT = (
    "{name} makes a number of a tensor whose gradient is wanted, by {how}: the gradient would stop "
    "there, and be wrong without a word. Compute with tensors: p[0] instead of float(p[0]), "
    "torch.stack([...], -1) instead of torch.tensor([...]), u > 3 for a branch. Where the gradient "
    "is to stop, say so: p[0].detach().item(), or solve under torch.no_grad()."
)
STOPPED = (
    "{name} keeps a gradient that is wanted from flowing, by {how}: the gradient would stop there, "
    "and be wrong without a word. Where it is to stop, say so: x.detach(), or solve under "
    "torch.no_grad()."
)


def tensors_in(args: Any) -> Iterator[Tensor]:
    """Tensors among arguments, and in lists of them."""
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_in(x)


def user_line(root: CodeType | None = None) -> str:
    """The line of the user's code that is running, in brackets; nothing where there is none.

    Parameters
    ----------
    root
        Code below which no line is the user's.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not root:
        path = frame.f_code.co_filename
        if not (_is_ours(path) or path.startswith((TORCH, "<frozen"))):
            line = linecache.getline(path, frame.f_lineno).strip()
            where = f"{os.path.basename(path)}:{frame.f_lineno}"
            return f' ({where}: "{line}")' if line else f" ({where})"
        frame = frame.f_back
    return ""


def _is_ours(path: str) -> bool:
    return path.startswith(PACKAGE) and not path.startswith(_LIBRARY)


def _is_called_by_user() -> bool:
    """Whether the operation that is about to run is one of the user's, not of a solve in ``f``."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and not path.startswith(TORCH):
            return not _is_ours(path)
        frame = frame.f_back
    return True


def cut_by(func: Any, args: tuple, kwargs: dict[str, Any]) -> str:
    """How a call makes a number of a tensor that is differentiated, in words; or ``""``.

    Whole numbers and truths have no derivative, so that nothing is lost with them.
    """
    name = getattr(func, "__name__", "")
    if name in _NUMBERS:
        in_words = name == "numpy" and kwargs.get("force")
        if args[0].requires_grad and _is_continuous(args[0]) and not in_words:
            return _spoken(name) if _is_called_by_user() else ""
    elif name in _FROM_LISTS:
        # as_tensor and asarray of a tensor are that tensor
        given = (*args, *kwargs.values())
        given = given if name in _COPIES else [x for x in given if not isinstance(x, Tensor)]
        given = given[1:] if name == "new_tensor" else given  # of which only the type is taken
        if any(x.requires_grad and _is_continuous(x) for x in tensors_in(given)):
            return _spoken(name) if _is_called_by_user() else ""
    return ""


def _is_continuous(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _spoken(name: str) -> str:
    if name in ("__float__", "__int__", "__complex__"):
        return f"{name.strip('_')}()"
    if name == "__array__":
        return "a function of NumPy"
    of_torch = name in _FROM_LISTS and not name.startswith("new")
    return f"torch.{name}" if of_torch else f"Tensor.{name.strip('_')}"


def unhooked() -> AbstractContextManager[Any]:
    """A block whose saved tensors do not reach the user's saved-tensor hooks.

    A checkpoint counts the tensors that are saved, and counts them again when it runs anew.
    """
    if _internals._autograd._top_saved_tensors_default_hooks(False) is None:
        return _NOTHING_TO_DO
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(x: Tensor) -> Tensor:
    return x


class Probe(TorchFunctionMode):
    """Record what a function does with its arguments, and with tensors from outside.

    Parameters
    ----------
    time, leaves
        Its arguments: the time, and the tensors of the state.

    Attributes
    ----------
    foreign
        Tensors with ``requires_grad`` that were neither given as arguments nor computed under the
        probe.
    saw_no_grad
        Whether an operation ran with gradients switched off.
    work
        Entries of all results, each counted with its sum's length in products of matrices: a
        rough measure of the arithmetic.
    cut
        How a gradient was cut that is wanted, with the line; empty where none was.
    stopped
        What else keeps gradients from flowing that are wanted: how, with the line.
    hook
        The same for a hook on a gradient.
    reads
        Whether values of tensors became Python's, so that another evaluation may do other things.
    compares
        Whether something was compared or rounded.
    switches
        What came of that where a tensor from outside with ``requires_grad`` had part in it, each
        with its line.
    """

    def __init__(self, time: Tensor, leaves: Sequence[Tensor]):
        super().__init__()
        self._known = {id(x): x for x in (time, *leaves)}
        self._foreign: dict[int, Tensor] = {}
        self._of_inputs: set[int] = set()  # what was computed from foreign tensors
        self.saw_no_grad = self.reads = self.compares = False
        self.work = 0
        self.cut = self.hook = ""
        self._stopped: dict[int, str] = {}  # by the tensor from which no gradient flows
        self._raw: set[int] = set()  # what Tensor.data gave
        self.switches: list[tuple[Tensor, str]] = []

    @property
    def foreign(self) -> list[Tensor]:
        return list(self._foreign.values())

    @property
    def stopped(self) -> str:
        return next(iter(self._stopped.values()), "")

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        of_inputs = self._enter(args, kwargs)
        self._look(name, func, args, kwargs)
        is_severed = name == "grad" and self._severs(func, args, kwargs)
        out = func(*args, **kwargs)
        if is_severed:
            how = "torch.autograd.grad without create_graph=True" + user_line()
            self._stopped |= {id(x): how for x in tensors_in(out)}
        # results are kept alive, so that no identity is used twice
        for x in tensors_in((out,)):
            length = args[0].shape[-1] if func in _PRODUCTS and args else 1
            self.work += x.numel() * length
            if id(x) not in self._foreign:
                self._known[id(x)] = x
            if of_inputs:
                self._of_inputs.add(id(x))
        if _is_data(name, func):
            self._raw.add(id(out))
        if name in _STEPS:
            self.compares = True
            if of_inputs and isinstance(out, Tensor):
                self.switches.append((out, user_line()))
        return out

    def _enter(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Note tensors from outside; tell whether an argument is one, or was computed from one."""
        of_inputs = False
        for x in tensors_in((*args, *kwargs.values())):
            if x.requires_grad and id(x) not in self._known:
                self._foreign[id(x)] = x
                of_inputs = True
            of_inputs |= id(x) in self._of_inputs
        return of_inputs

    def _look(self, name: str, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.reads |= name in _READS
        if not torch.is_grad_enabled():
            self.saw_no_grad = True
            return
        if not self.cut:
            how = cut_by(func, args, kwargs)
            self.cut = how and how + user_line()
        if name in ("detach", "detach_") or _is_data(name, func):
            self._stopped.pop(id(args[0]), None)
        elif name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            self._look_at_write(args, kwargs)
        reads_graph = name == "__get__" and getattr(func, "__self__", None) is Tensor.grad_fn
        if (name in _HOOKS or reads_graph) and not self.hook:
            self.hook = ("the graph" if reads_graph else f"Tensor.{name}") + user_line()

    def _look_at_write(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note a write that autograd does not see."""
        owners = (args[0], getattr(args[0], "_base", None)) if args else ()
        is_raw = any(id(x) in self._raw for x in owners if x is not None)
        written = tensors_in((*args[1:], *kwargs.values()))
        if is_raw and any(x.requires_grad for x in written) and _is_called_by_user():
            self._stopped[id(args[0])] = "writing into Tensor.data" + user_line()

    def _severs(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether derivatives by ``torch.autograd.grad`` would have gradients, if it kept them."""
        if func is not torch.autograd.grad or not torch.is_grad_enabled():
            return False
        if kwargs.get("create_graph") or any(args[4:5]) or not _is_called_by_user():
            return False
        try:
            derivatives = func(*args[:3], **{**kwargs, "retain_graph": True, "create_graph": True})
        except Exception:  # the call itself tells
            return False
        # a leaf that was made on the way is detached in words
        leaves = reached_leaves(list(tensors_in(derivatives)))
        return any(key not in self._known for key in leaves)


def _is_data(name: str, func: Any) -> bool:
    return name == "__get__" and getattr(func, "__self__", None) is Tensor.data


class Watched:
    """A function that refuses to cut a gradient, in runs that autograd records.

    It is for functions that read values: the first run shows one of their branches only.
    """

    def __init__(self, f: Callable[..., Any], name: str):
        self.f = f
        self._name = name

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.f(*args)
        with _Refusing(self._name, args[0]):
            return self.f(*args)


def may_be_read(time: Tensor) -> Tensor:
    """Mark a time that ``f`` may read as a number: differences give the derivative by it."""
    time._may_be_read = True  # type: ignore[attr-defined]
    return time


def was_read(time: Tensor) -> bool:
    """Whether something made a number of a time that may be read."""
    return getattr(time, "_was_read", False)


class _Refusing(TorchFunctionMode):
    def __init__(self, name: str, time: Tensor):
        super().__init__()
        self._name = name
        self._free = time if getattr(time, "_may_be_read", False) else None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        how = cut_by(func, args, kwargs or {}) if torch.is_grad_enabled() else ""
        if how:
            if not self._is_of_time((*args, *(kwargs or {}).values())):
                raise RuntimeError(CUT.format(name=self._name, how=how + user_line()))
            self._free._was_read = True  # type: ignore[union-attr]
            args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        return func(*args, **(kwargs or {}))

    def _is_of_time(self, args: tuple) -> bool:
        """Whether nothing but a time that may be read is made a number."""
        free = self._free
        if free is None:
            return False
        others = [x for x in tensors_in(args) if x.requires_grad and x is not free]
        nodes: list[Any] = [x.grad_fn for x in others]
        seen = {free.grad_fn, *nodes}
        for node in nodes:  # grows on the way
            if node is None or (hasattr(node, "variable") and node.variable is not free):
                return False  # another leaf
            following = [x for x, _ in node.next_functions if x is not None and x not in seen]
            seen.update(following)
            nodes += following
        return True


def has_module_hooks(outputs: Sequence[Tensor]) -> bool:
    """Whether the graph of ``outputs`` goes through a module's hooks on gradients."""
    return any(type(node) is _BACKWARD_HOOK for node in nodes_of(outputs))
