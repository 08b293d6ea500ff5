"""Finding, and replacing, the tensors that a function uses besides its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
_DEPTH = 4  # how far to look into closures, containers and bound objects


def _tensors_in(args: Any) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors_in(x)


class Probe(TorchFunctionMode):
    """Record the tensors with ``requires_grad`` that enter operations from outside.

    Attributes
    ----------
    foreign
        Tensors that were neither given as arguments nor computed under the probe.
    saw_no_grad
        Whether an operation ran with gradients switched off.
    work
        Entries of all results, each counted with its sum's length in products of matrices: a
        rough measure of the arithmetic.
    """

    def __init__(self, arguments: list[Any]):
        super().__init__()
        self._known = {id(x): x for x in arguments}
        self._foreign: dict[int, Tensor] = {}
        self.saw_no_grad = False
        self.work = 0

    @property
    def foreign(self) -> list[Tensor]:
        return list(self._foreign.values())

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.saw_no_grad |= not torch.is_grad_enabled()
        for x in _tensors_in((*args, *kwargs.values())):
            if x.requires_grad and id(x) not in self._known:
                self._foreign[id(x)] = x
        out = func(*args, **kwargs)
        # results are kept alive, so that no identity is used twice
        for x in _tensors_in((out,)):
            self.work += x.numel() * (args[0].shape[-1] if func in _PRODUCTS else 1)
            if id(x) not in self._foreign:
                self._known[id(x)] = x
        return out


class _Swap(TorchFunctionMode):
    def __init__(self, table: dict[int, tuple[Tensor, Tensor]]):
        super().__init__()
        self._table = table

    def _swapped(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._table[id(x)][1] if id(x) in self._table else x
        if type(x) in (list, tuple):
            return type(x)(self._swapped(y) for y in x)
        return x

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {key: self._swapped(x) for key, x in (kwargs or {}).items()}
        return func(*self._swapped(args), **kwargs)


class Substitute:
    """``f`` with some tensors replaced wherever it uses them.

    Parameters
    ----------
    f
        The function.
    table
        ``id`` of the tensor to its original (kept alive) and its replacement.
    """

    def __init__(self, f: Callable[..., Any], table: dict[int, tuple[Tensor, Tensor]]):
        self._f = f
        self._table = table

    def __call__(self, *args: Any) -> Any:
        with _Swap(self._table):
            return self._f(*args)


def reachable_tensors(f: Any) -> list[Tensor]:
    """Tensors with ``requires_grad`` that ``f`` can reach through its closure, globals or object.

    It complements a run under ``Probe``, which sees only the branches taken.
    """
    found: dict[int, Tensor] = {}
    _walk(f, found, set(), _DEPTH)
    return list(found.values())


def _walk(x: Any, found: dict[int, Tensor], seen: set[int], depth: int) -> None:
    if depth < 0 or id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        if x.requires_grad:
            found[id(x)] = x
        return
    for child in _children(x):
        _walk(child, found, seen, depth - 1)


def _children(x: Any) -> list[Any]:
    if isinstance(x, torch.nn.Module):
        # plain attributes too: a function or a tensor kept in one is not among the parameters
        plain = [v for k, v in vars(x).items() if not k.startswith("_")]
        return [*x.parameters(), *plain]
    if isinstance(x, (list, tuple)):
        return list(x)
    if isinstance(x, dict):
        return list(x.values())
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if inspect.ismethod(x):
        return [x.__func__, x.__self__]
    if inspect.isfunction(x):
        cells = [c.cell_contents for c in x.__closure__ or () if _filled(c)]
        names = [x.__globals__[n] for n in x.__code__.co_names if n in x.__globals__]
        wanted = (Tensor, torch.nn.Module, list, tuple, dict)
        own = x.__module__ if isinstance(x.__module__, str) else ""
        helpers = [
            v for v in names if inspect.isfunction(v) and v.__module__.split(".")[0] != "torch"
        ]
        values = [v for v in names if isinstance(v, wanted)]
        return [*cells, *values, *helpers, *(x.__defaults__ or ())] if own else cells
    if hasattr(x, "__dict__") and not isinstance(x, type) and not inspect.ismodule(x):
        return [*vars(x).values(), *([type(x).__call__] if callable(x) else [])]
    return []


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
