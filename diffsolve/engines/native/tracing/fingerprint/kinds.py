"""The kinds of objects that a right-hand side may read, and what it depends on in each."""

from __future__ import annotations

import builtins
import datetime
import decimal
import fractions
import functools
import io
import logging
import pathlib
import random
import re
import sys
import threading
import types
import uuid
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import torch

#: Kinds whose objects are told by their value alone.
PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None)))
#: Stands for what is not there.
ABSENT = type("Absent", (), {"__repr__": lambda _: "absent"})()
#: The built-in names of Python as they were when this module was imported.
PYTHON_BUILTINS = dict(vars(builtins))
SEQUENCES = (list, tuple, deque)
#: What PyTorch itself keeps in the ``__dict__`` of every module.
MODULE_INTERNALS = frozenset(vars(torch.nn.Module())) - {"training"}
MODULE_HOOKS = tuple(sorted(name for name in MODULE_INTERNALS if name.endswith("_hooks")))
#: Kinds whose objects cannot change, and compute the same where they are equal.
IMMUTABLE = (
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, np.dtype, range,
    slice, type(...), type(NotImplemented), decimal.Decimal, fractions.Fraction, datetime.date,
    datetime.time, datetime.timedelta, datetime.tzinfo, re.Pattern, uuid.UUID, pathlib.PurePath,
    types.CodeType, object,
)  # fmt: skip
#: Kinds whose objects have no part in what is computed.
IRRELEVANT = (
    type(threading.Lock()), type(threading.RLock()), logging.Logger, types.FrameType,
    types.TracebackType, torch.Generator, io.TextIOBase,
)  # fmt: skip
#: Generators of random numbers.
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
C_FUNCTIONS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_TUPLE_GETTER: Any = type(vars(namedtuple("_One", "x"))["x"])
#: Descriptors of entries that are stored in the object itself, where they are read.
SLOT_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType, _TUPLE_GETTER)
#: Packages whose classes are not looked into.
TRUSTED_PACKAGES = {"torch", "numpy", "builtins", "diffsolve", "typing", "abc"}
#: The same with Python's own library.
KNOWN_PACKAGES = TRUSTED_PACKAGES | sys.stdlib_module_names
#: Kinds whose subclasses have a value like a plain object's, and may have attributes besides.
LIKE_PLAIN = (np.generic, int, float, complex, str, bytes, bytearray)
#: What Python puts into the ``__dict__`` of every class.
CLASS_INTERNALS = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slots__")
)
#: Objects of Python that stand for a function.
FUNCTION_WRAPPERS = (
    functools.partial, staticmethod, classmethod, property, types.DynamicClassAttribute,
    functools.cached_property, functools._lru_cache_wrapper,
)  # fmt: skip

_C_CONTAINERS = (
    list, tuple, dict, set, frozenset, deque, defaultdict, OrderedDict, int, float, str, bytes,
)  # fmt: skip
_IMMUTABLE_CLASS = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE: no class statement makes such a class
#: Classes made in C whose objects are read in full.
_READ_IN_FULL = {*_C_CONTAINERS, types.SimpleNamespace, threading.local, complex, bytearray}


class DictValues:
    """The values of a dict, with a length."""

    __slots__ = ("_table",)

    def __init__(self, table: Any):
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Any:
        return iter(self._table.values())


def package_of(kind: Any) -> str:
    """The package of a class; none for this package's layers, which are treated like a user's."""
    module: str = kind.__module__
    return "" if module.startswith("diffsolve.nn.") else module.partition(".")[0]


def plain_value(x: Any) -> Any:
    """The value of an object whose class is derived from one of numbers or texts."""
    if isinstance(x, np.generic):
        return x.tobytes()
    if isinstance(x, bytearray):
        return bytes(x)
    kind: Any = next(k for k in (int, float, complex, str, bytes) if isinstance(x, k))
    return kind.__repr__(x)


def is_c_function(x: Any, kind: Any) -> bool:
    """Whether ``x`` is a function of a trusted package, or of Cython, without attributes."""
    known = package_of(kind) in TRUSTED_PACKAGES or "cython" in kind.__name__
    return known and callable(x) and not getattr(x, "__dict__", None)


def slots_of(base: Any) -> tuple[str, ...]:
    slots = vars(base).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def is_container_only(kind: Any) -> bool:
    """Whether objects of a class hold nothing but what a container of Python holds."""
    bases = [base for base in kind.__mro__[:-1] if base not in _C_CONTAINERS]
    return kind in _C_CONTAINERS or (
        bool(bases) and all("__slots__" in vars(base) for base in bases)
    )


@functools.lru_cache(maxsize=1_000)
def has_opaque_base(kind: Any) -> bool:
    """Whether a class has a base made in C, whose objects may hold what cannot be read."""
    return any(
        base.__flags__ & _IMMUTABLE_CLASS and base not in _READ_IN_FULL
        for base in kind.__mro__[:-1]
    )


@functools.lru_cache(maxsize=1_000)
def has_own_getattr(kind: Any) -> bool:
    """Whether a class computes attributes, so that the names in code do not tell what is read."""
    return any(
        name in vars(base)
        for base in kind.__mro__[:-1]
        for name in ("__getattr__", "__getattribute__")
    )


@functools.lru_cache(maxsize=1_000)
def names_its_children(kind: Any) -> bool:
    """Whether the code of a module's class names the children that it uses."""
    bases = kind.__mro__[: kind.__mro__.index(torch.nn.Module)]
    return all(package_of(base) != "torch" for base in bases)


def state_of(generator: Any) -> Any:
    """The state of a generator of random numbers, in a form that can be compared."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return repr(generator.get_state(legacy=False))
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return repr(generator.state)


def without_numbers(items: list[Any]) -> list[Any]:
    """The items of a fingerprint with the kind of each number in its place."""
    kinds: list[Any] = []
    for x in items:
        if type(x) is tuple and len(x) == 2 and isinstance(x[0], type):
            kinds.append(x[0])
        elif type(x) is tuple and len(x) == 4 and type(x[3]) is bytes:  # an array
            kinds.append(x[:3])
        else:
            kinds.append(x)
    return kinds
