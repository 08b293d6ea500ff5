"""Kinds of objects that a right-hand side may read, and what of them it depends on."""

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

PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None)))
ABSENT = type("Absent", (), {"__repr__": lambda _: "absent"})()
#: What Python itself puts where it looks for what is no global.
PYTHONS = dict(vars(builtins))
SEQUENCES = (list, tuple, deque)
OF_MODULES = frozenset(vars(torch.nn.Module())) - {"training"}
HOOKS = tuple(sorted(name for name in OF_MODULES if name.endswith("_hooks")))
#: Objects that say all by being equal.
VALUES = (
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, np.dtype, range,
    slice, type(...), type(NotImplemented), decimal.Decimal, fractions.Fraction, datetime.date,
    datetime.time, datetime.timedelta, datetime.tzinfo, re.Pattern, uuid.UUID, pathlib.PurePath,
    types.CodeType, object,
)  # fmt: skip
#: Objects that have no part in what is computed.
HARMLESS = (
    type(threading.Lock()), type(threading.RLock()), logging.Logger, types.FrameType,
    types.TracebackType, torch.Generator, io.TextIOBase,
)  # fmt: skip
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_OF_TUPLES: Any = type(vars(namedtuple("_One", "x"))["x"])
MEMBERS = (types.MemberDescriptorType, types.GetSetDescriptorType, _OF_TUPLES)
TRUSTED = {"torch", "numpy", "builtins", "diffsolve", "typing", "abc"}
KNOWN = TRUSTED | sys.stdlib_module_names

_OF_C = (list, tuple, dict, set, frozenset, deque, defaultdict, OrderedDict, int, float, str, bytes)
_MADE_IN_C = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE: no class statement makes such a class
_SEEN_THROUGH = {*_OF_C, types.SimpleNamespace, threading.local, complex, bytearray}
LIKE_PLAIN = (np.generic, int, float, complex, str, bytes, bytearray)
OF_CLASSES = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slots__")
)


class Values:
    """Values of a dict, with a length."""

    __slots__ = ("_table",)

    def __init__(self, table: Any):
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Any:
        return iter(self._table.values())


def root_of(kind: Any) -> str:
    """The package of a class; the layers of this one are as a user's."""
    module: str = kind.__module__
    return "" if module.startswith("diffsolve.nn.") else module.partition(".")[0]


def as_plain(x: Any) -> Any:
    """The value of an object that is a number or a text of a kind of its own."""
    if isinstance(x, np.generic):
        return x.tobytes()
    if isinstance(x, bytearray):
        return bytes(x)
    kind: Any = next(k for k in (int, float, complex, str, bytes) if isinstance(x, k))
    return kind.__repr__(x)


def is_function_of_c(x: Any, kind: Any) -> bool:
    known = root_of(kind) in TRUSTED or "cython" in kind.__name__
    return known and callable(x) and not getattr(x, "__dict__", None)


def slots_of(base: Any) -> tuple[str, ...]:
    found = vars(base).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def is_empty(kind: Any) -> bool:
    """Whether objects of a class hold nothing but what a container of Python holds."""
    bases = [base for base in kind.__mro__[:-1] if base not in _OF_C]
    return kind in _OF_C or (bool(bases) and all("__slots__" in vars(base) for base in bases))


@functools.lru_cache(maxsize=1_000)
def holds_of_c(kind: Any) -> bool:
    """Whether a class of Python is made of one of C, whose objects hold what cannot be seen."""
    return any(
        base.__flags__ & _MADE_IN_C and base not in _SEEN_THROUGH for base in kind.__mro__[:-1]
    )


@functools.lru_cache(maxsize=1_000)
def has_own_getattr(kind: Any) -> bool:
    return any(
        name in vars(base)
        for base in kind.__mro__[:-1]
        for name in ("__getattr__", "__getattribute__")
    )


@functools.lru_cache(maxsize=1_000)
def goes_by_name(kind: Any) -> bool:
    """Whether a module's own code names the children that it uses."""
    bases = kind.__mro__[: kind.__mro__.index(torch.nn.Module)]
    return all(root_of(base) != "torch" for base in bases)


def state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return repr(generator.get_state(legacy=False))
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return repr(generator.state)


def outline(items: list[Any]) -> list[Any]:
    """The kinds of what was met, without the numbers."""
    found: list[Any] = []
    for x in items:
        if type(x) is tuple and len(x) == 2 and isinstance(x[0], type):
            found.append(x[0])
        elif type(x) is tuple and len(x) == 4 and type(x[3]) is bytes:
            found.append(x[:3])
        else:
            found.append(x)
    return found
