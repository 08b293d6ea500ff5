"""The program kernels: built once on a machine, then loaded from disk."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import diffsolve
from diffsolve.engines.native.codegen import llvm
from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.locks import compiling

_log = logging.getLogger("diffsolve")
_ROOT = Path(diffsolve.__file__).parent
#: What the kernels are made of: they are built again where one of these was changed.
_SOURCES = (
    "solvers/kernels/layout.py",
    "solvers/kernels/memory.py",
    "solvers/kernels/norms.py",
    "solvers/kernels/rows.py",
    "solvers/kernels/estimates.py",
    "solvers/kernels/stable_steps.py",
    "solvers/stable_steps.py",
    "engines/native/runtime/loop.py",
    "engines/native/runtime/sweep.py",
    "engines/native/runtime/build.py",
)
_OF_IMPLICIT = ("solvers/kernels/linear.py", "solvers/kernels/implicit.py")
Kernel = Callable[[int, int], int]


@functools.cache
def _source(family: str) -> str:
    own = sorted((_ROOT / "solvers" / family).glob("kernel*.py"))
    shared = [*_SOURCES, *(_OF_IMPLICIT if family in ("rosenbrock", "sdirk") else ())]
    return "\n".join(path.read_text() for path in [*(_ROOT / name for name in shared), *own])


@functools.cache
def kernel(name: str, family: str, single: bool) -> Kernel:
    """One of the kernels ``"advance"``, ``"sweep"``, ``"read"`` and ``"replay"`` of a family.

    ``single``: for float32 states rather than float64 ones. It is called with the addresses of
    the two arrays of ``solvers/kernels/layout.py``, runs without Python's lock, and returns one
    of the codes that are listed there.
    """
    try:
        with compiling:
            code = llvm.cached_code(
                f"{name} {family} {single}\n{_source(family)}",
                lambda: _build(name, family, single),
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


def _build(name: str, family: str, single: bool) -> str:
    _log.warning(
        "diffsolve: building its kernel %r of %s methods, once on this machine (some seconds)",
        name,
        family,
    )
    from diffsolve.engines.native.runtime.build import kernel_ir

    return kernel_ir(name, family, single)
