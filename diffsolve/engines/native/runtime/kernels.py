"""The compiled kernels: built once on a machine, then loaded from disk."""

from __future__ import annotations

import ctypes
import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.codegen import llvm
from diffsolve.engines.native.locks import compiling
from diffsolve.solvers.kernels.family import Family, KernelSet

_log = logging.getLogger("diffsolve")
Kernel = Callable[[int, int], int]
_FOLDER = Path(__file__).parents[3]  # of the package
_RUNTIME = "diffsolve.engines.native.runtime"
#: What calls the functions of a family, and what makes machine code of all kernels.
LOOPS = (f"{_RUNTIME}.loop", f"{_RUNTIME}.saving", f"{_RUNTIME}.sweep")
_BUILD = f"{_RUNTIME}.build"
_FROM = r"from (diffsolve[\w.]*) import (\([^)]*\)|.*)"
_IMPORT = re.compile(rf"^(?:{_FROM}|import (diffsolve[\w.]*))", re.M)


def _file(module: str) -> Path:
    return _FOLDER.joinpath(*module.split(".")[1:]).with_suffix(".py")


@functools.cache
def _text(module: str) -> str:
    return _file(module).read_text()


@functools.cache
def _imports(module: str) -> tuple[str, ...]:
    """Modules of this package that a module imports at its top."""
    modules: dict[str, None] = {}
    for package, names, whole in _IMPORT.findall(_text(module)):
        for name in re.findall(r"(\w+)(?: as \w+)?,?", names) if package else ():
            inner = f"{package}.{name}"
            modules[inner if _file(inner).exists() else package] = None
        if whole:
            modules[whole] = None
    return tuple(x for x in modules if _file(x).exists())


def sources(kernels: KernelSet) -> list[str]:
    """The modules that kernels are made of: they are built again where one of these was changed.

    They follow from the imports, so that none can be forgotten.
    """
    waiting = [kernels.root, *(LOOPS if isinstance(kernels, Family) else ())]
    modules = {_BUILD}
    while waiting:
        module = waiting.pop()
        if module not in modules:
            modules.add(module)
            waiting += _imports(module)
    return sorted(modules)


@functools.cache
def _source(kernels: KernelSet) -> str:
    return "\n".join(map(_text, sources(kernels)))


@functools.cache
def kernel(name: str, kernels: KernelSet, single: bool) -> Kernel:
    """A kernel by its name: of a family ``"advance"``, ``"sweep"``, ``"read"`` or ``"replay"``.

    ``single``: for float32 states rather than float64 ones. It is called with the addresses of
    the two arrays of ``solvers/kernels/layout.py``, runs without Python's lock, and returns one
    of the codes that are listed there.
    """
    try:
        with compiling:
            code = llvm.cached_code(
                f"{name} {kernels.name} {single}\n{_source(kernels)}",
                lambda: _build(name, kernels, single),
                is_kernel=True,
            )
    except Exception as error:  # a Numba or an LLVM that this was not written for
        reason = f"{type(error).__name__}: {error}"
        _log.warning("diffsolve: its kernel %r could not be made: %s", name, reason)
        raise Declined(f"its kernels could not be made, {reason}") from error
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    function = prototype(code.address)
    function.code = code  # type: ignore[attr-defined]  # loaded as long as the function lives
    return function


def _build(name: str, kernels: KernelSet, single: bool) -> str:
    _log.warning(
        "diffsolve: building its kernel %r of %s methods, once on this machine (some seconds)",
        name,
        kernels.name,
    )
    from diffsolve.engines.native.runtime.build import kernel_ir

    return kernel_ir(name, kernels, single)


def _kernel_or_none(name: str, kernels: KernelSet) -> Kernel | None:
    try:
        return kernel(name, kernels, False)
    except Declined:
        return None


KernelSet.loader = _kernel_or_none
