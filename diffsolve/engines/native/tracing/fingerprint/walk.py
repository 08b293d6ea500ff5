"""Visits every object that a function may read, as far as the code that ran leads to it.

The walk starts from the function. It follows the globals that its code names, closures and
defaults, and from every object on the way the attributes that any of the code names.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.tracing.fingerprint.code_reads import (
    READS_ANY_ATTRIBUTE,
    READS_ANYTHING,
    ReadPlan,
    is_standard,
    is_trusted,
    with_inner,
)
from diffsolve.engines.native.tracing.fingerprint.guards import Guards
from diffsolve.engines.native.tracing.fingerprint.kinds import (
    ABSENT,
    C_FUNCTIONS,
    CLASS_INTERNALS,
    FUNCTION_WRAPPERS,
    GENERATORS,
    IMMUTABLE,
    IRRELEVANT,
    KNOWN_PACKAGES,
    LIKE_PLAIN,
    MODULE_HOOKS,
    MODULE_INTERNALS,
    PLAIN,
    PYTHON_BUILTINS,
    SEQUENCES,
    SLOT_DESCRIPTORS,
    TRUSTED_PACKAGES,
    DictValues,
    has_opaque_base,
    has_own_getattr,
    is_c_function,
    is_container_only,
    names_its_children,
    package_of,
    plain_value,
    slots_of,
)
from diffsolve.problems.solve_cache import SolveCache

_MOST_ITEMS = 20_000
_MOST_DEPTH = 100
_MOST_BYTES = 1_000_000  # of an array

_torch_modules: Any = torch.nn.modules.module


class _TooMuch(Exception):
    """The walk has met too many objects."""


class Walk:
    """One walk from a function through all that it may read.

    Parameters
    ----------
    plan
        Where to look.
    roots
        The function, and other objects it is given.

    Attributes
    ----------
    items
        What was read, in order, but for the numbers of tensors. An object that was met before
        stands there by its number.
    tensors, arrays
        Those that were met, in order.
    generators
        Generators of random numbers.
    alive
        Every object that was met.
    guards
        The places that were read.
    why_incomplete
        Why there may be more than was read; empty where there is not.
    """

    def __init__(self, plan: ReadPlan, roots: Any):
        self.items: list[Any] = []
        self.tensors: list[Tensor] = []
        self.arrays: list[np.ndarray] = []
        self.generators: list[Any] = []
        self.guards = Guards()
        self.why_incomplete = plan.why_incomplete
        self._plan, self._attributes = plan, plan.attributes
        self._numbers: dict[int, int] = {}  # of the objects that were met, by identity
        self.alive: list[Any] = []  # else an identity could be used again
        self._entered: set[types.CodeType] = set()
        self._class_attributes: dict[Any, list[str]] = {}  # that were read, by class
        self._memories: dict[int, int] = {}  # numbers of the tensors' memories
        self._depth = 0
        try:
            for x in roots:
                self._visit(x)
            for name, level in plan.modules:
                self._visit_import(name, level)
        except _TooMuch:
            self.mark_incomplete("it reaches too many objects")
        except Exception as error:  # of an object that does not want to be looked at
            self.mark_incomplete(f"what it reads raised {type(error).__name__}: {error}")
        self._check_complete()

    def mark_incomplete(self, why: str) -> None:
        """Note that there may be more than was read. The first reason stays."""
        self.why_incomplete = self.why_incomplete or why

    def _check_complete(self) -> None:
        """Mark the walk incomplete where code ran whose function was not met."""
        met = {inner for code in self._entered for inner in with_inner(code)}
        for code in self._plan.codes:
            if code not in met and not (code.co_name == "<module>" or is_standard(code)):
                self.mark_incomplete(
                    f"it runs {code.co_name}, and how it gets there cannot be seen"
                )

    def _visit(self, x: Any) -> None:
        kind, items = type(x), self.items
        if kind in PLAIN:
            # repr tells -0.0 from 0.0, which are equal
            items.append((kind, x) if x or kind is not float else (kind, repr(x)))
            return
        number = self._numbers.get(id(x))
        if number is not None:  # it was met before
            items.append(number)
            return
        self._numbers[id(x)] = len(self._numbers)
        self.alive.append(x)
        if len(items) > _MOST_ITEMS or self._depth > _MOST_DEPTH:
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
                self.guards.add_class(x, kind)
                self._visit_class(kind, vars(x))
        else:
            self._visit_other(x, kind)
        self._depth -= 1

    def _note_decimals(self) -> None:
        """Note how numbers of ``decimal`` are rounded now."""
        context = repr(decimal.getcontext())
        self.items.append(context)
        self.guards.add_result(lambda: repr(decimal.getcontext()), context)

    def _visit_all(self, xs: Any) -> None:
        for x in xs:
            self._visit(x)

    def _visit_function(self, f: Any) -> None:
        code = f.__code__
        self.items.append(code)
        variables = self._plan.variables.get(code)
        if variables is None and not (f.__closure__ and is_trusted(code)):
            return  # it did not run, or is trusted
        self._entered.add(code)
        self.guards.add_function(f)
        for cell in f.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                self.items.append(ABSENT)
                continue
            self.guards.add_cell(cell, content)
            self._visit(content)
        if f.__defaults__:
            self._visit_all(f.__defaults__)
        if f.__kwdefaults__:
            self._visit(f.__kwdefaults__)
        if f.__dict__:
            self._visit_names(f.__dict__)
            if "__wrapped__" in f.__dict__:
                self._visit(f.__wrapped__)
        get, note = f.__globals__.get, self.guards.add_entry
        of_python = f.__builtins__.get  # type: ignore[attr-defined]
        for name in variables or ():
            x = get(name, ABSENT)
            note(get, name, x)
            if x is ABSENT:
                x = of_python(name, ABSENT)
                note(of_python, name, x)
                if x is not ABSENT and x is PYTHON_BUILTINS.get(name):
                    self.items.append(name)
                    continue
            if x is ABSENT:
                self.items.append(ABSENT)
            else:
                self._visit(x)

    def _visit_import(self, name: str, level: int) -> None:
        if level:
            packages = {f.__globals__.get("__package__") for f, *_ in self.guards.functions}
            modules = [importlib.util.resolve_name("." * level + name, p) for p in packages if p]
        else:
            modules = [name]
        for full_name in modules:
            parts = full_name.split(".")
            for i in range(1, len(parts) + 1):
                module = ".".join(parts[:i])
                if module in sys.modules:
                    self.guards.add_entry(sys.modules.get, module, sys.modules[module])
                    self._visit(sys.modules[module])

    def _visit_tensor(self, x: Tensor) -> None:
        shape, dtype, grad = x.shape, x.dtype, x.requires_grad
        self.items.append(
            ("tensor", type(x), shape, dtype, grad, *self._layout_of(x), x.is_inference())
        )
        if x._backward_hooks:  # what they do is not known
            self.items.append(object())
        self.guards.add_tensor(x)
        self.tensors.append(x)
        if type(x) not in (Tensor, torch.nn.Parameter) or x.__dict__:
            self._visit_names(x.__dict__)

    def _layout_of(self, x: Tensor) -> tuple[Any, ...]:
        """How a tensor lies in memory, and which tensor before it has the same memory, if any."""
        if x.layout is not torch.strided or not x.is_cpu:
            return (x.layout, x.device)
        memory = x.untyped_storage()._cdata
        number = self._memories.get(memory)
        if number is None:
            self._memories[memory] = len(self._memories)
            return (x.stride(),)
        return x.stride(), number, x.storage_offset()

    def _visit_module(self, module: torch.nn.Module) -> None:
        kind = type(module)
        own = vars(module)
        self.items += (kind, module.training)
        self.guards.add_class(module, kind)
        self.guards.add_entry(own.get, "training", module.training)
        reads_all = self._plan.all_children or not names_its_children(kind)
        for table in (module._parameters, module._buffers, module._modules):
            if reads_all:
                self._visit_dict(table)
            elif table:
                self._visit_names(table)
        if reads_all:
            for name in own:
                if name not in MODULE_INTERNALS and name != "training":
                    self.items.append(name)
                    self.guards.add_entry(own.get, name, own[name])
                    self._visit(own[name])
            self.guards.add_length(own)
        else:
            self._visit_names(own, MODULE_INTERNALS)
        for name in MODULE_HOOKS:
            hooks = own.get(name)
            if hooks is not None:
                self.guards.add_contents(hooks, tuple(hooks))
                if hooks:
                    self._visit_all(hooks.values())
        if self.guards.add_global_hooks():
            self._visit_dict(_torch_modules._global_forward_pre_hooks)
            self._visit_dict(_torch_modules._global_forward_hooks)
            self._visit_dict(_torch_modules._global_backward_pre_hooks)
            self._visit_dict(_torch_modules._global_backward_hooks)
        self._visit_class(kind, own)

    def _visit_names(self, table: Any, besides: Any = ()) -> None:
        """Visit the entries of a dict of attributes that the code names, ``besides`` these."""
        items, note, get = self.items, self.guards.add_entry, table.get
        for name in self._attributes:
            if name in table and name not in besides:
                x = table[name]
                items.append(name)
                note(get, name, x)
                self._visit(x)

    def _visit_class(self, kind: Any, own: Any = None) -> None:
        """Visit the attributes of a class that the code names.

        ``own`` is the ``__dict__`` of an object of the class.
        """
        if kind in self._class_attributes:
            self._guard_against_hiding(own, self._class_attributes[kind])
            return
        names = self._class_attributes[kind] = []
        self.guards.add_mro(kind)
        if package_of(type(kind)) not in KNOWN_PACKAGES:
            self._visit_class(type(kind))
        if issubclass(kind, torch.nn.Module):  # what it runs, also where it is torch's
            for name in ("__call__", "forward"):
                method = getattr(kind, name, ABSENT)
                self.guards.add_attribute(kind, name, method)
                self._visit(method)
        if isinstance(kind, enum.EnumMeta):
            self._visit_all(kind)
        for base in kind.__mro__:
            package = package_of(base)
            if package in TRUSTED_PACKAGES:
                continue
            table = vars(base)
            get = table.get
            reads_all = self._plan.any_attribute and package not in KNOWN_PACKAGES
            for name in [*table] if reads_all else self._attributes:
                x = get(name, ABSENT)
                if x is ABSENT or isinstance(x, SLOT_DESCRIPTORS) or name in CLASS_INTERNALS:
                    continue
                self.guards.add_entry(get, name, x)
                self.items.append(name)
                names.append(name)
                self._visit(x)
        self._guard_against_hiding(own, names)

    def _guard_against_hiding(self, own: Any, names: list[str]) -> None:
        """Guard that an object has no attributes of its own by names that its class has."""
        if own is not None:
            get = own.get
            for name in names:
                if name not in own:
                    self.guards.add_entry(get, name, ABSENT)

    def _visit_dict(self, x: Any) -> None:
        values = list(x.values())
        self.guards.add_contents(x, tuple(x))
        self.guards.add_contents(DictValues(x), tuple(values))
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
            items.append((kind, plain_value(x)))
            if isinstance(x, bytearray):
                self.guards.add_contents(x, tuple(x))
            if not isinstance(x, np.generic):
                self._visit_object(x, kind)
        elif kind is types.MethodType:
            self._visit(x.__func__)
            self._visit(x.__self__)
        elif kind in C_FUNCTIONS or is_c_function(x, kind):
            self._visit_c_function(x, kind)
        elif isinstance(x, FUNCTION_WRAPPERS):
            self._visit_wrapper(x, kind)
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
        elif kind in IMMUTABLE or isinstance(x, IMMUTABLE[:-1]):
            items.append((kind, x))
            if isinstance(x, decimal.Decimal):
                self._note_decimals()
        elif isinstance(x, IRRELEVANT):
            items.append(kind)
        elif isinstance(x, weakref.ref):
            items.append(kind)
            self._visit(x())
        else:
            items.append(kind)
            self._visit_object(x, kind)

    def _visit_c_function(self, x: Any, kind: Any) -> None:
        name = getattr(x, "__name__", None)
        self.items += (kind, name)
        if name in READS_ANYTHING or (name in READS_ANY_ATTRIBUTE and not self._plan.any_attribute):
            self.mark_incomplete(f"it calls {name}")
        owner = getattr(x, "__self__", None)
        if owner is not None and not isinstance(owner, (type, types.ModuleType)):
            self._visit(owner)

    def _visit_wrapper(self, x: Any, kind: Any) -> None:
        if isinstance(x, functools.partial):
            self.items.append(kind)
            self._visit(x.func)
            self._visit_all(x.args)
            self._visit_dict(x.keywords)
        elif isinstance(x, (staticmethod, classmethod)):
            self._visit(x.__func__)
        elif isinstance(x, (property, types.DynamicClassAttribute)):
            self._visit(x.fget)
        elif isinstance(x, functools.cached_property):
            self._visit(x.func)
        else:  # of functools.lru_cache
            if package_of(x) not in KNOWN_PACKAGES:
                self.mark_incomplete("it calls a function that keeps its results")
            self._visit(x.__wrapped__)

    def _visit_container(self, x: Any, kind: Any) -> None:
        self.items.append(len(x))
        if len(x) > _MOST_ITEMS:
            raise _TooMuch
        if isinstance(x, dict):
            self._visit_dict(x)
            if isinstance(x, defaultdict):
                self._visit(x.default_factory)
        elif isinstance(x, SEQUENCES):
            if not isinstance(x, tuple):
                self.guards.add_contents(x, tuple(x))
            self._visit_all(x)
        else:  # a set: its order means nothing
            if not PLAIN.issuperset(map(type, x)):
                self.mark_incomplete(f"it reads a {kind.__name__} of objects")
            self.guards.add_contents(x, tuple(x))
            self.items.append(frozenset(x))
        if kind not in (list, tuple, dict, set, frozenset, deque):
            self._visit_object(x, kind)

    def _visit_array(self, x: np.ndarray) -> None:
        if type(x) is not np.ndarray or x.dtype.hasobject or x.nbytes > _MOST_BYTES:
            self.mark_incomplete("it reads an array that is large, or of objects")
            return
        data = x.tobytes()
        self.items.append((x.shape, x.dtype.str, x.strides, data))
        self.guards.add_array(x, data)
        self.arrays.append(x)

    def _visit_object(self, x: Any, kind: Any) -> None:
        own = getattr(x, "__dict__", None)
        slots = [s for base in kind.__mro__ for s in slots_of(base)]
        self.guards.add_class(x, kind)
        if own is not None or slots:
            is_opaque = has_opaque_base(kind)
        else:
            is_opaque = not is_container_only(kind)
        if is_opaque:
            self.mark_incomplete(f"it reads an object of {kind.__name__}, which is not Python's")
        # the attributes that code of torch and NumPy names are not known
        reads_all = self._plan.any_attribute or package_of(kind) in TRUSTED_PACKAGES
        if isinstance(x, threading.local):  # it has another dict in each thread
            self.guards.add_attribute(x, "__dict__", own)
        if type(own) is dict:
            if reads_all or has_own_getattr(kind):
                self._visit_dict({k: v for k, v in own.items() if type(v) is not SolveCache})
                self.guards.add_contents(own, tuple(own))
                self.guards.add_contents(DictValues(own), tuple(own.values()))
            else:
                self._visit_names(own)
        for name in slots:
            if reads_all or name in self._attributes:
                value = getattr(x, name, ABSENT)
                self.guards.add_attribute(x, name, value)
                self.items.append(name)
                self._visit(value)
        self._visit_class(kind, own if type(own) is dict else None)
