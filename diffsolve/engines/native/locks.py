"""The locks of the native engine, which are held while the process forks.

A forked child has only the thread that forked. A lock that another thread held would never be
released in the child, and the data behind it could be half changed. So a fork takes all locks
first: it waits until no other thread holds one. Parent and child then release them.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

#: Held while expressions are differentiated, and while LLVM or Numba work.
compiling = threading.RLock()
#: Held while the tables of known functions and solves are read or changed.
tables = threading.RLock()


class _TakenForFork:
    """The locks that the forking thread has taken."""

    locks: list[AbstractContextManager[Any]] = []  # noqa: RUF012


def _all() -> list[AbstractContextManager[Any]]:
    """All locks in the order in which threads take them, with those of Numba and llvmlite."""
    numba: Any = sys.modules.get("numba.core.compiler_lock")
    ffi: Any = sys.modules.get("llvmlite.binding.ffi")
    of_libraries = (
        getattr(numba, "global_compiler_lock", None),
        getattr(getattr(ffi, "lib", None), "_lock", None),
    )
    return [compiling, *(x for x in of_libraries if x is not None), tables]


def _take() -> None:
    _TakenForFork.locks = _all()
    for lock in _TakenForFork.locks:
        lock.__enter__()


def _give_back() -> None:
    for lock in reversed(_TakenForFork.locks):
        lock.__exit__(None, None, None)
    _TakenForFork.locks = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take, after_in_parent=_give_back, after_in_child=_give_back)


def _stop_compiling() -> None:
    """At exit, keep daemon threads out of LLVM: Python aborts if it ends a thread inside of it.

    The lock is never released again. A thread that still solves waits for it before it compiles.
    """
    compiling.acquire()
    if threading.active_count() > 1:
        time.sleep(0.1)


atexit.register(_stop_compiling)
