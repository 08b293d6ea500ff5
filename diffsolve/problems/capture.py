"""Finding, and replacing, the tensors that a function uses besides its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffsolve.problems.solve_cache import SolveCache

_internals: Any = torch._C
_LEAF = _internals._functions.AccumulateGrad  # the node of a graph that stands for a leaf
# these hold no tensors of f
_PLAIN = (str, bytes, int, float, complex, type(None), np.ndarray, SolveCache)
_MOST_ITEMS = 10_000  # longer containers are data
_TORCHSCRIPT = (torch.jit.ScriptFunction, torch.jit.ScriptModule)
_DEPTH = 8  # how far to look into closures, containers and bound objects


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
        self.f = f
        self._table = table

    def __call__(self, *args: Any) -> Any:
        with _Swap(self._table):
            return self.f(*args)


def reachable_tensors(f: Any) -> list[Tensor]:
    """Tensors with ``requires_grad`` that ``f`` can reach through its closure, globals or object.

    It complements a run under ``Probe``, which sees only the branches taken.
    """
    return [x for x in reached_objects(f) if isinstance(x, Tensor)]


def is_torchscript(x: Any) -> bool:
    """Whether it is code that TorchScript compiled, which nothing here looks into."""
    return isinstance(x, _TORCHSCRIPT)


def reached_objects(f: Any) -> list[Any]:
    """What ``reachable_tensors`` finds, and code that TorchScript compiled."""
    objects: dict[int, Any] = {}
    _walk(f, objects, set(), _DEPTH)
    return list(objects.values())


def _walk(x: Any, objects: dict[int, Any], seen: set[int], depth: int) -> None:
    if depth < 0 or isinstance(x, _PLAIN) or id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        if x.requires_grad:
            objects[id(x)] = x
        return
    if isinstance(x, _TORCHSCRIPT):
        objects[id(x)] = x
    for child in _children(x):
        _walk(child, objects, seen, depth - 1)


def _children(x: Any) -> list[Any]:
    if isinstance(x, torch.nn.Module):
        # plain attributes too: a function or a tensor kept in one is not among the parameters
        plain = [v for m in x.modules() for k, v in vars(m).items() if not k.startswith("_")]
        kinds = {type(m): m for m in x.modules()}
        compiled = [m for m in kinds.values() if isinstance(m, torch.jit.ScriptModule)]
        forwards = [
            kind.forward
            for kind, m in kinds.items()
            if not (_is_of_torch(kind) or isinstance(m, torch.jit.ScriptModule))
        ]
        return [*x.parameters(), *plain, *forwards, *compiled]
    if isinstance(x, (list, tuple, dict)):
        items = list(x.values() if isinstance(x, dict) else x) if len(x) <= _MOST_ITEMS else []
        return [y for y in items if not isinstance(y, _PLAIN)]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if inspect.ismethod(x):
        return [x.__func__, x.__self__]
    if isinstance(x, torch.jit.ScriptFunction):
        return []
    if inspect.isfunction(x):
        return [] if _is_of_torch(x) else _used_by(x)
    if isinstance(x, type) or inspect.ismodule(x) or inspect.isbuiltin(x):
        return []
    slots = [s for c in type(x).__mro__ for s in _names(getattr(c, "__slots__", ()))]
    kept = [getattr(x, s) for s in slots if hasattr(x, s)]
    called = [type(x).__call__] if callable(x) else []
    return [*getattr(x, "__dict__", {}).values(), *kept, *called]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _used_by(f: Any) -> list[Any]:
    """Values in a function's closure, its defaults, and the globals that its code names."""
    cells = [c.cell_contents for c in f.__closure__ or () if _filled(c)]
    defaults = [*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()]
    codes, names = [f.__code__], set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [c for c in code.co_consts if inspect.iscode(c)]
    globals_ = [f.__globals__[n] for n in names if n in f.__globals__]
    wanted = (Tensor, torch.nn.Module, torch.jit.ScriptFunction, list, tuple, dict)
    # other global objects may lead anywhere; functions lead to what they use
    return [
        *cells,
        *defaults,
        *(v for v in globals_ if isinstance(v, wanted) or inspect.isfunction(v)),
    ]


def _is_of_torch(x: Any) -> bool:
    return (getattr(x, "__module__", None) or "").split(".")[0] == "torch"


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def nodes_of(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph that ``outputs`` have, each once."""
    nodes: list[Any] = [y.grad_fn for y in outputs if y.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:  # grows on the way
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


def reached_leaves(outputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """Leaves that the graph of ``outputs`` leads to, by identity."""
    leaves = (node.variable for node in nodes_of(outputs) if isinstance(node, _LEAF))
    return {id(x): x for x in leaves}


def refuse_unknown_leaves(leaves: dict[int, Tensor], known: Sequence[Tensor]) -> None:
    """Refuse a graph that leads to a leaf which gets no gradient otherwise.

    Raises
    ------
    RuntimeError
        If one of the ``leaves`` of a graph is not among ``known``.
    """
    of_known = {id(x) for x in known}
    for key, leaf in leaves.items():
        if key not in of_known:
            raise RuntimeError(
                f"f depends on a tensor of shape {tuple(leaf.shape)} in a way that would lose its "
                "gradient: it was not found when the solve began, or it is used through one "
                "computed from it inside a custom autograd function or another solve. Pass it in "
                "p, or use DiscreteAdjoint(tape=True)."
            )
