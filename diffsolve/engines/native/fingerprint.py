"""What a function depends on besides its arguments, in a form that is compared quickly.

It notices that a variable of a closure, a global or an attribute is another object than before, or
another number. What it cannot see (deep inside of other objects) is left to the comparison of
values with an eager evaluation.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.ode import PREPARED

_DEPTH = 4
_MOST_ITEMS = 100
_MOST_IN_ALL = 5_000  # about a millisecond
_PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None)))
_MOST_BYTES = 4_096  # of an array
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_OF_MODULES = frozenset(vars(torch.nn.Module())) - {"training"}
_KINDS = (types.ModuleType, types.BuiltinFunctionType, type)
_EXACTLY = frozenset(_KINDS)


class Fingerprint:
    """State of a function's surroundings; ``still_holds`` tells whether they are the same."""

    __slots__ = ("_items", "_kept", "_moving", "_places", "_references")

    def __init__(self, f: Any):
        self._places = _places_of(f)
        self._items: list[Any] = []
        self._kept: list[Tensor] = []  # so that no identity is used twice
        self._references: list[Any] = []
        self._moving: list[int] = []
        _visit(f, self._items, self._note, _DEPTH)

    def settle(self, f: Any) -> None:
        """Leave out the numbers that ``f`` changed while it ran, such as counters of its calls."""
        items: list[Any] = []
        _visit(f, items, None, _DEPTH)
        if len(items) == len(self._items):
            pairs = zip(items, self._items, strict=True)
            self._moving = [i for i, (a, b) in enumerate(pairs) if a != b and type(a) is tuple]
            self._items = items

    def _note(self, x: Any) -> None:
        if isinstance(x, Tensor):
            self._kept.append(x)
        else:
            self._references.append(weakref.ref(x))

    def is_where_it_was(self, f: Any) -> bool:
        """Whether the places where a plain function looks tell that nothing was replaced."""
        return self._places is not None and _same_places(f, *self._places)

    def still_holds(self, f: Any) -> bool:
        if len(f) == 1 and self.is_where_it_was(f[0]):
            return True
        items: list[Any] = []
        _visit(f, items, None, _DEPTH)
        if len(items) == len(self._items):
            for i in self._moving:
                items[i] = self._items[i]
        return items == self._items and all(r() is not None for r in self._references)


# Most functions look up nothing but modules and what is in them. The places where they look then
# tell that nothing was replaced, in a third of the time.
_ABSENT = object()
_Places = tuple[Any, tuple[tuple[str, Any], ...], tuple[tuple[dict[str, Any], str, Any], ...]]


def _places_of(around: Any) -> _Places | None:
    """Code, globals and attributes of modules that a plain function reads; None: it reads more."""
    if not (type(around) is tuple and len(around) == 1):
        return None
    (f,) = around
    if (
        type(f) is not types.FunctionType
        or not _is_bare(f)
        or (f.__module__ or "").startswith("torch.")
    ):
        return None
    named = _named(f.__code__)
    outside, inside = [], []
    for name in named:
        x = f.__globals__.get(name, _ABSENT)
        outside.append((name, x))
        if type(x) is types.ModuleType:
            table = vars(x)
            found = [(table, key, table.get(key, _ABSENT)) for key in named]
            if not all(_stays_itself(x) or type(x) in _EXACTLY for _, _, x in found):
                return None
            inside += found
        elif not _stays_itself(x):
            return None
    return f.__code__, tuple(outside), tuple(inside)


def _is_bare(f: Any) -> bool:
    return not (f.__closure__ or f.__defaults__ or f.__kwdefaults__ or f.__dict__)


def _stays_itself(x: Any) -> bool:
    """Whether it is unchanged if it is the same object."""
    return x is _ABSENT or type(x) in _PLAIN or type(x) is types.BuiltinFunctionType


def _same_places(f: Any, code: Any, outside: Any, inside: Any) -> bool:
    if f.__code__ is not code or not _is_bare(f):
        return False
    names = f.__globals__
    for name, x in outside:
        if names.get(name, _ABSENT) is not x:
            return False
    for table, key, x in inside:  # noqa: SIM110  # in half of the time
        if table.get(key, _ABSENT) is not x:
            return False
    return True


def _visit(x: Any, items: list[Any], note: Any, depth: int) -> None:
    kind = type(x)
    if kind in _PLAIN:
        items.append((kind, x))
    elif kind is types.FunctionType:
        _visit_function(x, items, note, depth)
    elif kind in _EXACTLY:  # most often, and found sooner than by isinstance
        items.append(id(x))
    elif isinstance(x, Tensor):
        items.append((id(x), x.shape, x.dtype))
        if note is not None:
            note(x)
    elif isinstance(x, _KINDS):
        items.append(id(x))  # these live as long as the process
    elif depth <= 0:
        _identify(x, items, note)
    elif isinstance(x, torch.nn.Module):
        for module in x.modules():
            _identify(module, items, note)
            _visit_items(module._parameters.values(), items, note, depth - 1)
            _visit_items(module._buffers.values(), items, note, depth - 1)
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                _visit_items(hooks.values(), items, note, depth - 1)
            plain = [v for k, v in vars(module).items() if k not in _OF_MODULES]
            _visit_items(plain, items, note, depth - 1)
            _visit(type(module).forward, items, note, depth - 1)
    elif isinstance(x, _CONTAINERS):
        items.append(len(x))
        if len(x) <= _MOST_ITEMS:
            _visit_items(x, items, note, depth - 1)
            if isinstance(x, dict):
                _visit_items(x.values(), items, note, depth - 1)
    elif kind is np.ndarray and x.nbytes <= _MOST_BYTES and not x.dtype.hasobject:
        items.append((x.shape, x.dtype.str, x.tobytes()))
    elif kind is types.MethodType:
        _visit(x.__func__, items, note, depth)
        _visit(x.__self__, items, note, depth)
    elif kind is functools.partial:
        _visit(x.func, items, note, depth)
        _visit_items([*x.args, *x.keywords.values()], items, note, depth - 1)
    else:
        _identify(x, items, note)
        own = [v for k, v in getattr(x, "__dict__", {}).items() if k != PREPARED]
        _visit_items(own, items, note, depth - 1)
        for slots in (getattr(base, "__slots__", ()) for base in kind.__mro__):
            names = (slots,) if isinstance(slots, str) else slots
            _visit_items([getattr(x, n) for n in names if hasattr(x, n)], items, note, depth - 1)
        call = getattr(kind, "__call__", None)  # noqa: B004  # what it is matters
        if type(call) is types.FunctionType:
            _visit(call, items, note, depth - 1)


def _visit_items(xs: Any, items: list[Any], note: Any, depth: int) -> None:
    for x in xs:
        if len(items) >= _MOST_IN_ALL:
            return
        _visit(x, items, note, depth)


def _visit_function(f: Any, items: list[Any], note: Any, depth: int) -> None:
    if note is not None:
        note(f)
    items += (id(f.__code__), id(f))
    if depth <= 0 or (f.__module__ or "").startswith("torch."):
        return
    named = _named(f.__code__)
    for cell in f.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        _visit(content, items, note, depth - 1)
        _visit_attributes(content, named, items, note, depth - 1)
    if f.__defaults__:
        _visit_items(f.__defaults__, items, note, depth - 1)
    if f.__kwdefaults__:
        _visit_items(f.__kwdefaults__.values(), items, note, depth - 1)
    if f.__dict__:
        _visit_items(f.__dict__.values(), items, note, depth - 1)
    names = f.__globals__
    for name in named:
        if name in names:
            _visit(names[name], items, note, depth - 2)
            _visit_attributes(names[name], named, items, note, depth - 2)


def _visit_attributes(x: Any, named: Any, items: list[Any], note: Any, depth: int) -> None:
    """What a function that uses these names could read of a module or a class."""
    if isinstance(x, (types.ModuleType, type)):
        inside = vars(x)
        _visit_items([inside[name] for name in named if name in inside], items, note, depth)


@functools.lru_cache(maxsize=1000)
def _named(code: Any) -> tuple[str, ...]:
    """Names that a function's code, and that of functions inside of it, looks up."""
    inner = [_named(c) for c in code.co_consts if inspect.iscode(c)]
    return tuple({*code.co_names, *(name for names in inner for name in names)})


def _identify(x: Any, items: list[Any], note: Any) -> None:
    try:
        if note is not None:
            note(x)
        items.append(id(x))
    except TypeError:  # no weak reference can be made of it: its identity would prove nothing
        items.append(type(x))
