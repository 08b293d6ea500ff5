"""The locks of the native engine, which are held while the process forks.

A child has a copy of the thread that forked, and of no other. A lock that another thread held would
never be free again, and what it was changing would stay half done. So a fork waits until no
thread is in the middle of something, and its child begins with locks that nobody holds.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

#: To differentiate expressions, and to be inside of LLVM or Numba.
compiling = threading.RLock()
#: To change what is remembered of functions and solves.
tables = threading.RLock()


class _Held:
    """The locks that the thread that forks has taken."""

    locks: list[AbstractContextManager[Any]] = []  # noqa: RUF012


def _all() -> list[AbstractContextManager[Any]]:
    """In the order in which threads take them; those of libraries if these are loaded."""
    numba: Any = sys.modules.get("numba.core.compiler_lock")
    ffi: Any = sys.modules.get("llvmlite.binding.ffi")
    theirs = (
        getattr(numba, "global_compiler_lock", None),
        getattr(getattr(ffi, "lib", None), "_lock", None),
    )
    return [compiling, *(x for x in theirs if x is not None), tables]


def _take() -> None:
    _Held.locks = _all()
    for lock in _Held.locks:
        lock.__enter__()


def _give_back() -> None:
    for lock in reversed(_Held.locks):
        lock.__exit__(None, None, None)
    _Held.locks = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take, after_in_parent=_give_back, after_in_child=_give_back)


def _end() -> None:
    """Wait for daemon threads: Python aborts where it ends one inside of LLVM or PyTorch.

    One that solves on comes to the lock before it compiles again, and waits there.
    """
    compiling.acquire()
    if threading.active_count() > 1:
        time.sleep(0.1)


atexit.register(_end)
