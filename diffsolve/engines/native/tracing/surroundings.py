"""What a function depends on besides its arguments, read where the code that ran looks.

A ``Survey`` follows the globals that the code names, the closures and defaults of the functions
that ran, and from every object on the way the attributes that any of that code names. Two surveys
with equal ``items`` tell of functions that compute the same of their arguments and of ``tensors``,
whichever objects these are. Where not all can be followed, ``unknown`` says why.
"""

from __future__ import annotations

import decimal
import enum
import functools
import importlib.util
import sys
import threading
import types
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.tracing.checks import Checks
from diffsolve.engines.native.tracing.code_reads import (
    BY_ANY_NAME,
    READERS,
    Plan,
    is_standard,
    is_trusted,
    with_inner,
)
from diffsolve.engines.native.tracing.objects import (
    ABSENT,
    BUILTINS,
    GENERATORS,
    HARMLESS,
    HOOKS,
    KNOWN,
    LIKE_PLAIN,
    MEMBERS,
    OF_CLASSES,
    OF_MODULES,
    PLAIN,
    PYTHONS,
    SEQUENCES,
    TRUSTED,
    VALUES,
    Values,
    as_plain,
    goes_by_name,
    has_own_getattr,
    holds_of_c,
    is_empty,
    is_function_of_c,
    root_of,
    slots_of,
    state_of,
)
from diffsolve.engines.native.tracing.tracer import Lifted
from diffsolve.problems.ode import PREPARED

_MOST = 20_000  # items
_DEPTH = 100
_MOST_BYTES = 1_000_000  # of an array


_modules: Any = torch.nn.modules.module


class _TooMuch(Exception):
    pass


@dataclass
class Source:
    """Where a block of the flat parameters comes from.

    Attributes
    ----------
    kind
        ``"p"``: a leaf of ``p``; ``"tensor"``: one of those of a survey; ``"numbers"``: these.
    index
        Which of them.
    numbers
        Values that are the same in all solves that the trace is for.
    """

    kind: str
    index: int
    numbers: Tensor | None = None


class Survey:
    """State of a function's surroundings.

    Parameters
    ----------
    plan
        Where to look.
    roots
        The function, and other objects it is given.

    Attributes
    ----------
    items
        What it depends on, but for the numbers of tensors.
    tensors, arrays
        Those that were met, in the order of being met.
    generators
        Of random numbers.
    unknown
        Why there may be more than was seen; empty where there is not.
    """

    def __init__(self, plan: Plan, roots: Any):
        self.items: list[Any] = []
        self.tensors: list[Tensor] = []
        self.arrays: list[np.ndarray] = []
        self.generators: list[Any] = []
        self.unknown = plan.blind
        self._plan, self._names = plan, plan.names
        self._seen: dict[int, int] = {}
        self._held: list[Any] = []  # so that no identity is used twice
        self._entered: set[types.CodeType] = set()
        self._classes: dict[Any, list[str]] = {}
        self._storages: dict[int, int] = {}
        self._depth = 0
        self._states: list[Any] = []
        self._checks = Checks()
        try:
            for x in roots:
                self._visit(x)
            for name, level in plan.modules:
                self._visit_import(name, level)
        except _TooMuch:
            self.give_up("it reaches too many objects")
        except Exception as error:  # of an object that does not want to be looked at
            self.give_up(f"what it reads raised {type(error).__name__}: {error}")
        self._check_complete()

    def give_up(self, why: str) -> None:
        self.unknown = self.unknown or why

    def _check_complete(self) -> None:
        """Give up where code ran whose function was not found."""
        known = {inner for code in self._entered for inner in with_inner(code)}
        for code in self._plan.codes:
            if code not in known and not (code.co_name == "<module>" or is_standard(code)):
                self.give_up(f"it runs {code.co_name}, and how it gets there cannot be seen")

    def still_holds(self) -> bool:
        """Whether every place that was read holds the same object; quickly."""
        return self._checks.hold()

    # -- what was found where --------------------------------------------------------------------

    def place_of(self, x: Tensor) -> int | None:
        """Which of the tensors ``x`` is."""
        return next((i for i, y in enumerate(self.tensors) if y is x), None)

    def array_with(self, x: Tensor) -> int | None:
        """Which of the arrays has the memory of ``x``."""
        if not x.is_cpu:
            return None
        where = x.untyped_storage().data_ptr()
        found = ((i, y.ctypes.data, y.nbytes) for i, y in enumerate(self.arrays))
        return next((i for i, start, size in found if start <= where < start + size), None)

    def source_of(self, x: Lifted) -> Source:
        """Where a block of parameters comes from; gives up where that was not found."""
        if x.tensor is None:
            return Source("p", x.p_position or 0)
        place = self.place_of(x.tensor)
        if place is not None:
            return Source("tensor", place)
        place = self.array_with(x.tensor)
        if place is not None:  # its numbers are among the items
            return Source("numbers", 0, x.tensor.detach().clone())
        self.give_up("it uses a tensor that was not found")
        return Source("numbers", 0, x.tensor)

    def tensor(self, source: Source, leaves: list[Any]) -> Tensor:
        if source.kind == "p":
            return leaves[source.index]
        if source.kind == "tensor":
            return self.tensors[source.index]
        assert source.numbers is not None
        return source.numbers

    def note_generators(self) -> None:
        self._states = [state_of(x) for x in self.generators]

    def generators_moved(self) -> bool:
        """Whether random numbers were drawn since they were noted."""
        return self._states != [state_of(x) for x in self.generators]

    # -- going through ----------------------------------------------------------------------------

    def _visit(self, x: Any) -> None:
        kind, items = type(x), self.items
        if kind in PLAIN:
            # by its sign, too: -0.0 is not 0.0
            items.append((kind, x) if x or kind is not float else (kind, repr(x)))
            return
        known = self._seen.get(id(x))
        if known is not None:
            items.append(known)
            return
        self._seen[id(x)] = len(self._seen)
        self._held.append(x)
        if len(items) > _MOST or self._depth > _DEPTH:
            raise _TooMuch
        self._depth += 1
        if kind is types.FunctionType:
            self._visit_function(x)
        elif isinstance(x, Tensor):
            self._visit_tensor(x)
        elif isinstance(x, torch.nn.Module):
            self._visit_module(x)
        elif isinstance(x, type):
            items.append(x)
            self._visit_class(x)
            if x is decimal.Decimal:
                self._note_decimals()
        elif kind is types.ModuleType or isinstance(x, types.ModuleType):
            items.append(x)
            self._visit_names(vars(x))
            if kind is not types.ModuleType:
                self._checks.kind(x, kind)
                self._visit_class(kind, vars(x))
        else:
            self._visit_other(x, kind)
        self._depth -= 1

    def _note_decimals(self) -> None:
        """How numbers of ``decimal`` are rounded now."""
        how = repr(decimal.getcontext())
        self.items.append(how)
        self._checks.state(lambda: repr(decimal.getcontext()), how)

    def _visit_all(self, xs: Any) -> None:
        for x in xs:
            self._visit(x)

    def _visit_function(self, f: Any) -> None:
        code = f.__code__
        self.items.append(code)
        variables = self._plan.variables.get(code)
        if variables is None and not (f.__closure__ and is_trusted(code)):
            return  # it did not run, or is known
        self._entered.add(code)
        self._checks.function(f)
        for cell in f.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                self.items.append(ABSENT)
                continue
            self._checks.cell(cell, content)
            self._visit(content)
        if f.__defaults__:
            self._visit_all(f.__defaults__)
        if f.__kwdefaults__:
            self._visit(f.__kwdefaults__)
        if f.__dict__:
            self._visit_names(f.__dict__)
            if "__wrapped__" in f.__dict__:
                self._visit(f.__wrapped__)
        get, note = f.__globals__.get, self._checks.entry
        of_python = f.__builtins__.get  # type: ignore[attr-defined]
        for name in variables or ():
            x = get(name, ABSENT)
            note(get, name, x)
            if x is ABSENT:
                x = of_python(name, ABSENT)
                note(of_python, name, x)
                if x is not ABSENT and x is PYTHONS.get(name):
                    self.items.append(name)
                    continue
            if x is ABSENT:
                self.items.append(ABSENT)
            else:
                self._visit(x)

    def _visit_import(self, name: str, level: int) -> None:
        if level:
            packages = {f.__globals__.get("__package__") for f, *_ in self._checks.functions}
            found = [importlib.util.resolve_name("." * level + name, p) for p in packages if p]
        else:
            found = [name]
        for full in found:
            parts = full.split(".")
            for i in range(1, len(parts) + 1):
                module = ".".join(parts[:i])
                if module in sys.modules:
                    self._checks.entry(sys.modules.get, module, sys.modules[module])
                    self._visit(sys.modules[module])

    def _visit_tensor(self, x: Tensor) -> None:
        shape, dtype, grad = x.shape, x.dtype, x.requires_grad
        self.items.append(
            ("tensor", type(x), shape, dtype, grad, *self._lies_at(x), x.is_inference())
        )
        if x._backward_hooks:  # what they do is not known
            self.items.append(object())
        self._checks.form(x)
        self.tensors.append(x)
        if type(x) not in (Tensor, torch.nn.Parameter) or x.__dict__:
            self._visit_names(x.__dict__)

    def _lies_at(self, x: Tensor) -> tuple[Any, ...]:
        """How a tensor lies in memory, and whether others lie there, too."""
        if x.layout is not torch.strided or not x.is_cpu:
            return (x.layout, x.device)
        memory = x.untyped_storage()._cdata
        known = self._storages.get(memory)
        if known is None:
            self._storages[memory] = len(self._storages)
            return (x.stride(),)
        return x.stride(), known, x.storage_offset()

    def _visit_module(self, module: torch.nn.Module) -> None:
        kind = type(module)
        own = vars(module)
        self.items += (kind, module.training)
        self._checks.kind(module, kind)
        self._checks.entry(own.get, "training", module.training)
        every = self._plan.all_children or not goes_by_name(kind)
        for table in (module._parameters, module._buffers, module._modules):
            if every:
                self._visit_dict(table)
            elif table:
                self._visit_names(table)
        if every:
            for name in own:
                if name not in OF_MODULES and name != "training" and name != PREPARED:
                    self.items.append(name)
                    self._checks.entry(own.get, name, own[name])
                    self._visit(own[name])
            self._checks.length(own)
        else:
            self._visit_names(own, OF_MODULES)
        for name in HOOKS:
            hooks = own.get(name)
            if hooks is not None:
                self._checks.contents(hooks, tuple(hooks))
                if hooks:
                    self._visit_all(hooks.values())
        if self._checks.global_hooks():
            for hooks in (
                *(_modules._global_forward_pre_hooks, _modules._global_forward_hooks),
                *(_modules._global_backward_pre_hooks, _modules._global_backward_hooks),
            ):
                self._visit_dict(hooks)
        self._visit_class(kind, own)

    def _visit_names(self, table: Any, besides: Any = ()) -> None:
        """Entries of a dict of attributes that the code names."""
        items, note, get = self.items, self._checks.entry, table.get
        for name in self._names:
            if name in table and name not in besides:
                x = table[name]
                items.append(name)
                note(get, name, x)
                self._visit(x)

    def _visit_class(self, kind: Any, own: Any = None) -> None:
        """What attributes of a class the code names; ``own`` are those of an object of it."""
        if kind in self._classes:
            self._hide(own, self._classes[kind])
            return
        found = self._classes[kind] = []
        self._checks.order(kind)
        if root_of(type(kind)) not in KNOWN:
            self._visit_class(type(kind))
        if issubclass(kind, torch.nn.Module):  # what it runs, also where it is torch's
            for name in ("__call__", "forward"):
                method = getattr(kind, name, ABSENT)
                self._checks.attribute(kind, name, method)
                self._visit(method)
        if isinstance(kind, enum.EnumMeta):
            self._visit_all(kind)
        for base in kind.__mro__:
            root = root_of(base)
            if root in TRUSTED:
                continue
            table = vars(base)
            get = table.get
            every = self._plan.by_any_name and root not in KNOWN
            for name in [*table] if every else self._names:
                x = get(name, ABSENT)
                if x is ABSENT or isinstance(x, MEMBERS) or name in OF_CLASSES:
                    continue
                self._checks.entry(get, name, x)
                self.items.append(name)
                found.append(name)
                self._visit(x)
        self._hide(own, found)

    def _hide(self, own: Any, names: list[str]) -> None:
        """An attribute of the object's own would hide that of the class."""
        if own is not None:
            get = own.get
            for name in names:
                if name not in own:
                    self._checks.entry(get, name, ABSENT)

    def _visit_dict(self, x: Any) -> None:
        values = list(x.values())
        self._checks.contents(x, tuple(x))
        self._checks.contents(Values(x), tuple(values))
        self.items.append(len(values))
        self._visit_all(x)
        self._visit_all(values)

    def _visit_other(self, x: Any, kind: Any) -> None:
        items = self.items
        if isinstance(x, (*SEQUENCES, dict, set, frozenset)):
            items.append(kind)
            self._visit_container(x, kind)
        elif isinstance(x, np.ndarray):
            self._visit_array(x)
        elif isinstance(x, LIKE_PLAIN):
            items.append((kind, as_plain(x)))
            if isinstance(x, bytearray):
                self._checks.contents(x, tuple(x))
            if not isinstance(x, np.generic):
                self._visit_object(x, kind)
        elif kind is types.MethodType:
            self._visit(x.__func__)
            self._visit(x.__self__)
        elif kind in BUILTINS or is_function_of_c(x, kind):
            name = getattr(x, "__name__", None)
            items += (kind, name)
            if name in READERS or (name in BY_ANY_NAME and not self._plan.by_any_name):
                self.give_up(f"it calls {name}")
            owner = getattr(x, "__self__", None)
            if owner is not None and not isinstance(owner, (type, types.ModuleType)):
                self._visit(owner)
        elif isinstance(x, functools.partial):
            items.append(kind)
            self._visit(x.func)
            self._visit_all(x.args)
            self._visit_dict(x.keywords)
        elif isinstance(x, (staticmethod, classmethod)):
            self._visit(x.__func__)
        elif isinstance(x, (property, types.DynamicClassAttribute)):
            self._visit(x.fget)
        elif isinstance(x, functools.cached_property):
            self._visit(x.func)
        elif isinstance(x, functools._lru_cache_wrapper):
            if root_of(x) not in KNOWN:
                self.give_up("it calls a function that keeps its results")
            self._visit(x.__wrapped__)
        elif isinstance(x, types.MappingProxyType):
            items.append(kind)
            self._visit_dict(x)
        elif isinstance(x, enum.Enum):
            items += (kind, x._name_)
            self._visit(x._value_)
            self._visit_object(x, kind)
        elif isinstance(x, GENERATORS):
            items.append(kind)
            self.generators.append(x)
        elif kind in VALUES or isinstance(x, VALUES[:-1]):
            items.append((kind, x))
            if isinstance(x, decimal.Decimal):
                self._note_decimals()
        elif isinstance(x, HARMLESS):
            items.append(kind)
        elif isinstance(x, weakref.ref):
            items.append(kind)
            self._visit(x())
        else:
            items.append(kind)
            self._visit_object(x, kind)

    def _visit_container(self, x: Any, kind: Any) -> None:
        self.items.append(len(x))
        if len(x) > _MOST:
            raise _TooMuch
        if isinstance(x, dict):
            self._visit_dict(x)
            if isinstance(x, defaultdict):
                self._visit(x.default_factory)
        elif isinstance(x, SEQUENCES):
            if not isinstance(x, tuple):
                self._checks.contents(x, tuple(x))
            self._visit_all(x)
        else:  # a set: its order means nothing
            if not PLAIN.issuperset(map(type, x)):
                self.give_up(f"it reads a {kind.__name__} of objects")
            self._checks.contents(x, tuple(x))
            self.items.append(frozenset(x))
        if kind not in (list, tuple, dict, set, frozenset, deque):
            self._visit_object(x, kind)

    def _visit_array(self, x: np.ndarray) -> None:
        if type(x) is not np.ndarray or x.dtype.hasobject or x.nbytes > _MOST_BYTES:
            self.give_up("it reads an array that is large, or of objects")
            return
        data = x.tobytes()
        self.items.append((x.shape, x.dtype.str, x.strides, data))
        self._checks.array(x, data)
        self.arrays.append(x)

    def _visit_object(self, x: Any, kind: Any) -> None:
        own = getattr(x, "__dict__", None)
        slots = [s for base in kind.__mro__ for s in slots_of(base)]
        self._checks.kind(x, kind)
        holds_more = holds_of_c(kind) if own is not None or slots else not is_empty(kind)
        if holds_more:
            self.give_up(f"it reads an object of {kind.__name__}, which is not Python's")
        # what code of torch and NumPy reads is not known by name
        every = self._plan.by_any_name or root_of(kind) in TRUSTED
        if isinstance(x, threading.local):  # it has another dict in each thread
            self._checks.attribute(x, "__dict__", own)
        if type(own) is dict:
            if every or has_own_getattr(kind):
                self._visit_dict({k: v for k, v in own.items() if k != PREPARED})
                self._checks.contents(own, tuple(own))
                self._checks.contents(Values(own), tuple(own.values()))
            else:
                self._visit_names(own)
        for name in slots:
            if every or name in self._names:
                value = getattr(x, name, ABSENT)
                self._checks.attribute(x, name, value)
                self.items.append(name)
                self._visit(value)
        self._visit_class(kind, own if type(own) is dict else None)
