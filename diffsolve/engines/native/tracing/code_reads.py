"""What runs while a right-hand side is traced, and which names its code looks up."""

from __future__ import annotations

import dis
import functools
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

_HERE = os.path.dirname(__file__)
_PACKAGE = os.path.dirname(os.path.dirname(_HERE)) + os.sep
#: Right-hand sides and layers, which are as a user's.
_LIKE_A_USERS = tuple(os.path.join(_PACKAGE, *x) for x in (("problems", "library"), ("nn",)))
_TRUSTED = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(np.__file__) + os.sep,
    "<eval_with_key",  # what torch.fx writes
)
_STANDARD = (sysconfig.get_paths()["stdlib"] + os.sep, "<frozen")
_PACKAGES = (sysconfig.get_paths()["purelib"] + os.sep, sysconfig.get_paths()["platlib"] + os.sep)
#: What reads attributes whose names the code does not show, called or named anywhere.
BY_ANY_NAME = {
    "getattr", "hasattr", "vars", "dir", "attrgetter", "asdict", "astuple", "getmembers", "dumps",
    "__dict__", "__getattribute__", "__getstate__", "__reduce__", "__reduce_ex__", "__match_args__",
}  # fmt: skip
#: Methods, and functions of modules, that may read anything.
_METHODS = {
    "import_module", "read_text", "read_bytes", "fromfile", "memmap", "loadtxt", "genfromtxt",
    "urlopen", "check_output", "__annotations__", "__doc__", "__subclasses__",
}  # fmt: skip
#: Functions that may: globals, or objects of whatever name.
READERS = {"open", "eval", "exec", "globals", "__import__", "input", *_METHODS}
#: Functions of libraries that may, seen as they run.
_RUN = {"open", "load", *_METHODS}
_TO_DLPACK: Any = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]
#: Python's own modules whose functions read all attributes of an object.
_GENERAL = {"dataclasses.py", "inspect.py", "copyreg.py", "pickle.py"}
_IN_FORMAT = re.compile(r"\{([^{}!:]*)")
#: Methods that go through all children of a module.
_ALL_CHILDREN = {
    "children", "modules", "parameters", "buffers", "named_children", "named_modules",
    "named_parameters", "named_buffers", "state_dict", "apply", "_modules", "_parameters",
    "_buffers", "__dict__", "get_submodule", "get_parameter", "get_buffer",
}  # fmt: skip


def is_trusted(code: CodeType) -> bool:
    """Whether it belongs to torch, NumPy or this package: what it reads is known otherwise."""
    path = code.co_filename
    return path.startswith(_TRUSTED) or (
        path.startswith(_PACKAGE) and not path.startswith(_LIKE_A_USERS)
    )


def is_standard(code: CodeType) -> bool:
    """Whether it belongs to Python's own library."""
    path = code.co_filename
    return path.startswith(_STANDARD) and not path.startswith(_PACKAGES)


def _is_a_users(code: CodeType) -> bool:
    return not (is_trusted(code) or is_standard(code))


@dataclass(frozen=True)
class CodeReads:
    """Names that a piece of code, and the code of functions inside of it, looks up.

    Attributes
    ----------
    variables
        Globals.
    attributes
        Attributes of whatever it meets.
    modules
        Those that it imports.
    """

    variables: frozenset[str]
    attributes: frozenset[str]
    modules: frozenset[tuple[str, int]]


@functools.lru_cache(maxsize=2_000)
def reads_of(code: CodeType) -> CodeReads:
    variables, attributes, modules = set[str](), set[str](), set[tuple[str, int]]()
    constant: Any = None
    level = 0
    for step in dis.get_instructions(code):
        name = step.opname
        if name == "MATCH_CLASS" and isinstance(constant, tuple):
            attributes.update(constant)
            if step.arg:  # by position
                attributes.add("__match_args__")
        if name in ("LOAD_CONST", "LOAD_SMALL_INT"):
            constant = step.argval
            level = constant if type(constant) is int else level  # of an import
            continue
        if step.opcode not in dis.hasname or name.startswith(("STORE_", "DELETE_")):
            continue
        if name == "IMPORT_NAME":
            modules.add((step.argval, level))
        elif name in ("LOAD_GLOBAL", "LOAD_NAME"):
            variables.add(step.argval)
        else:
            attributes.add(step.argval)
    texts = [x for x in code.co_consts if isinstance(x, str)]
    if BY_ANY_NAME.isdisjoint(variables | attributes):
        formats = {"format", "format_map"} & attributes  # "{0.name}".format(x)
        texts = [y for x in texts if formats for y in _IN_FORMAT.findall(x)]
    attributes.update(y for x in texts for y in x.split(".") if y.isidentifier())
    for inner in code.co_consts:
        if inspect.iscode(inner):
            found = reads_of(inner)
            variables |= found.variables
            attributes |= found.attributes
            modules |= found.modules
    return CodeReads(frozenset(variables), frozenset(attributes), frozenset(modules))


def with_inner(code: CodeType) -> Iterator[CodeType]:
    """A piece of code, and that of the functions and classes inside of it."""
    yield code
    for inner in code.co_consts:
        if inspect.iscode(inner):
            yield from with_inner(inner)


class Plan:
    """Where to look for what a function depends on, from the code that ran.

    Attributes
    ----------
    variables
        For each function's code that ran, the globals that it names.
    names
        Attributes that any of that code names.
    by_any_name
        Whether attributes may be read whose names the code does not show.
    all_children
        Whether modules may be gone through as a whole.
    modules
        Those imported by the code.
    blind
        Why the reads cannot all be known; empty where they can.
    """

    __slots__ = ("all_children", "blind", "by_any_name", "codes", "modules", "names", "variables")

    def __init__(self, codes: Iterable[CodeType], blind: str = ""):
        codes = [*codes]
        self.codes = [x for x in codes if not is_trusted(x)]
        self.blind = blind
        self.variables: dict[CodeType, tuple[str, ...]] = {}
        names, modules, named = set[str](), set[tuple[str, int]](), set[str]()
        readers = {x.co_name for x in codes if x.co_name in _RUN and not _is_a_users(x)}
        by_any_name = False
        for code in self.codes:
            found = reads_of(code)
            self.variables[code] = tuple(sorted(found.variables))
            names |= found.attributes | {code.co_name}
            if is_standard(code):
                by_any_name |= os.path.basename(code.co_filename) in _GENERAL
            else:
                modules |= found.modules
                named |= found.variables | found.attributes
                readers |= found.variables & READERS | found.attributes & _METHODS
        by_any_name |= not BY_ANY_NAME.isdisjoint(named)
        self.names = tuple(sorted(names))
        self.by_any_name = by_any_name
        self.all_children = by_any_name or not _ALL_CHILDREN.isdisjoint(names)
        self.modules = tuple(sorted(modules))
        if readers and not blind:
            self.blind = f"it calls {min(readers)}"

    def is_that_of(self, other: Plan) -> bool:
        return self.variables == other.variables and self.blind == other.blind


class Watch:
    """Notes the code of all functions of Python that run.

    Attributes
    ----------
    codes
        By identity.
    is_blind
        Whether another profiler is there, which is left alone.
    shares_memory
        Whether memory of a tensor went to another library, which torch does not tell of.
    """

    def __init__(self) -> None:
        self.codes: dict[int, CodeType] = {}
        self.is_blind = self.shares_memory = False

    def __enter__(self) -> Watch:
        self.is_blind = sys.getprofile() is not None
        if not self.is_blind:
            sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_blind:
            sys.setprofile(None)

    def _note(self, frame: Any, event: str, called: Any) -> None:
        if event == "call":
            code = frame.f_code
            self.codes[id(code)] = code
        elif called is _TO_DLPACK and event == "c_call":
            self.shares_memory = True

    def pause(self) -> None:
        """What runs now is not the function's own work."""
        if not self.is_blind:
            sys.setprofile(None)

    def go_on(self) -> None:
        if not self.is_blind:
            sys.setprofile(self._note)

    def plan(self) -> Plan:
        blind = "a profiler looks on, so that its reads could not be noted" if self.is_blind else ""
        return Plan(self.codes.values(), blind)
