"""The names that code looks up, found in its bytecode."""

from __future__ import annotations

import dis
import functools
import inspect
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch

_PACKAGE = str(Path(__file__).parents[4]) + os.sep
#: Parts of this package that are treated like a user's code: right-hand sides and layers.
_LIKE_A_USERS = tuple(os.path.join(_PACKAGE, *x) for x in (("problems", "library"), ("nn",)))
_TRUSTED = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(np.__file__) + os.sep,
    "<eval_with_key",  # code that torch.fx generates
)
_STANDARD = (sysconfig.get_paths()["stdlib"] + os.sep, "<frozen")
_INSTALLED = (sysconfig.get_paths()["purelib"] + os.sep, sysconfig.get_paths()["platlib"] + os.sep)
#: Code that calls or names one of these may read attributes whose names it does not show.
READS_ANY_ATTRIBUTE = {
    "getattr", "hasattr", "vars", "dir", "attrgetter", "asdict", "astuple", "getmembers", "dumps",
    "__dict__", "__getattribute__", "__getstate__", "__reduce__", "__reduce_ex__", "__match_args__",
}  # fmt: skip
#: Methods, and functions of modules, that may read anything: files, the network, other modules.
_METHODS_READING_ANYTHING = {
    "import_module", "read_text", "read_bytes", "fromfile", "memmap", "loadtxt", "genfromtxt",
    "urlopen", "check_output", "__annotations__", "__doc__", "__subclasses__",
}  # fmt: skip
#: The same with Python's own functions.
READS_ANYTHING = {
    "open", "eval", "exec", "globals", "__import__", "input", *_METHODS_READING_ANYTHING,
}  # fmt: skip
#: Functions of libraries that may read anything, looked for among the code that ran.
_RUN_READING_ANYTHING = {"open", "load", *_METHODS_READING_ANYTHING}
#: Files of Python's library whose functions read all attributes of an object.
_FILES_READING_ANY_ATTRIBUTE = {"dataclasses.py", "inspect.py", "copyreg.py", "pickle.py"}
_FIELD_OF_FORMAT = re.compile(r"\{([^{}!:]*)")
#: Code that names one of these may go through all children of a module.
_READS_ALL_CHILDREN = {
    "children", "modules", "parameters", "buffers", "named_children", "named_modules",
    "named_parameters", "named_buffers", "state_dict", "apply", "_modules", "_parameters",
    "_buffers", "__dict__", "get_submodule", "get_parameter", "get_buffer",
}  # fmt: skip


def is_trusted(code: CodeType) -> bool:
    """Whether it belongs to torch, NumPy or this package, whose reads need not be followed."""
    path = code.co_filename
    return path.startswith(_TRUSTED) or (
        path.startswith(_PACKAGE) and not path.startswith(_LIKE_A_USERS)
    )


def is_standard(code: CodeType) -> bool:
    """Whether it belongs to Python's own library."""
    path = code.co_filename
    return path.startswith(_STANDARD) and not path.startswith(_INSTALLED)


def _is_a_users(code: CodeType) -> bool:
    return not (is_trusted(code) or is_standard(code))


@dataclass(frozen=True)
class CodeReads:
    """The names that a piece of code, and the code of functions inside of it, looks up.

    Attributes
    ----------
    variables
        Names of globals.
    attributes
        Names of attributes, of whatever object.
    modules
        Modules that it imports, each with the level of a relative import.
    """

    variables: frozenset[str]
    attributes: frozenset[str]
    modules: frozenset[tuple[str, int]]


@functools.lru_cache(maxsize=2_000)
def reads_of(code: CodeType) -> CodeReads:
    """The names that a piece of code looks up."""
    variables, attributes, modules = _names_in_bytecode(code)
    texts = [x for x in code.co_consts if isinstance(x, str)]
    # a text may be the name of an attribute where one is read by getattr, or by a format
    if READS_ANY_ATTRIBUTE.isdisjoint(variables | attributes):
        formats = {"format", "format_map"} & attributes  # "{0.name}".format(x)
        texts = [y for x in texts if formats for y in _FIELD_OF_FORMAT.findall(x)]
    attributes.update(y for x in texts for y in x.split(".") if y.isidentifier())
    for inner in code.co_consts:
        if inspect.iscode(inner):
            reads = reads_of(inner)
            variables |= reads.variables
            attributes |= reads.attributes
            modules |= reads.modules
    return CodeReads(frozenset(variables), frozenset(attributes), frozenset(modules))


def _names_in_bytecode(code: CodeType) -> tuple[set[str], set[str], set[tuple[str, int]]]:
    """Globals, attributes and imported modules that the instructions name."""
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
    return variables, attributes, modules


def with_inner(code: CodeType) -> Iterator[CodeType]:
    """A piece of code, and that of the functions and classes inside of it."""
    yield code
    for inner in code.co_consts:
        if inspect.iscode(inner):
            yield from with_inner(inner)


class ReadPlan:
    """Where to look for what a function depends on, given the code that ran.

    Attributes
    ----------
    codes
        The code that ran, but for that of trusted packages.
    variables
        For each of these, the globals that it names.
    attributes
        All names of attributes in that code.
    any_attribute
        Whether attributes may be read whose names the code does not show.
    all_children
        Whether all children of a module may be read.
    modules
        Modules that the code imports.
    why_incomplete
        Why there may be reads that the code does not show; empty where there are none.
    """

    __slots__ = (
        "all_children", "any_attribute", "attributes", "codes", "modules", "variables",
        "why_incomplete",
    )  # fmt: skip

    def __init__(self, codes: Iterable[CodeType], why_incomplete: str = ""):
        codes = [*codes]
        self.codes = [x for x in codes if not is_trusted(x)]
        self.why_incomplete = why_incomplete
        self.variables: dict[CodeType, tuple[str, ...]] = {}
        attributes, modules, named = set[str](), set[tuple[str, int]](), set[str]()
        readers = {
            x.co_name for x in codes if x.co_name in _RUN_READING_ANYTHING and not _is_a_users(x)
        }
        any_attribute = False
        for code in self.codes:
            reads = reads_of(code)
            self.variables[code] = tuple(sorted(reads.variables))
            attributes |= reads.attributes | {code.co_name}
            if is_standard(code):
                file = os.path.basename(code.co_filename)
                any_attribute |= file in _FILES_READING_ANY_ATTRIBUTE
            else:
                modules |= reads.modules
                named |= reads.variables | reads.attributes
                readers |= reads.variables & READS_ANYTHING
                readers |= reads.attributes & _METHODS_READING_ANYTHING
        any_attribute |= not READS_ANY_ATTRIBUTE.isdisjoint(named)
        self.attributes = tuple(sorted(attributes))
        self.any_attribute = any_attribute
        self.all_children = any_attribute or not _READS_ALL_CHILDREN.isdisjoint(attributes)
        self.modules = tuple(sorted(modules))
        if readers and not why_incomplete:
            self.why_incomplete = f"it calls {min(readers)}"

    def equals(self, other: ReadPlan) -> bool:
        """Whether both lead to the same places."""
        return self.variables == other.variables and self.why_incomplete == other.why_incomplete
