"""The cache on disk: object files of compiled functions, and of the kernels.

Every file begins with a checksum. It is written under a temporary name and then renamed. So a file
that a killed process, a full disk or a damaged one left behind is recognised, and not used.
Processes need no locks between them: a file that disappears is compiled again.

What lies in the folder is run. SECURITY.md says what is checked before.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import os
import re
import stat
import sys
import tempfile
import time
from pathlib import Path

KERNEL = ".kernel"  # suffix of the names of kernels, which take seconds to build
_CHECKSUM = 32  # bytes of it before each object file
_PREFIX, _SUFFIX = "diffsolve_", ".tmp"  # of temporary files
_OURS = re.compile(rf"[0-9a-f]{{64}}({re.escape(KERNEL)})?")
_UNFINISHED = re.compile(rf"{_PREFIX}\w+{re.escape(_SUFFIX)}")
_PAGE = 4_096  # a file takes whole ones
_DEFAULT_SIZE = 250  # megabytes
_LEFT = 0.75  # part of the limit that files may take after cleaning
_HOUR = 3_600
_MONTH = 30 * 24 * _HOUR
_log = logging.getLogger("diffsolve")


@functools.cache
def cache_folder() -> Path | None:
    """Where compiled code is kept, or None where that cannot be written.

    ``DIFFSOLVE_CACHE_DIR`` if it is set, else the user's folder for caches. Only its owner may
    write there, because what lies there is run.
    """
    given = os.environ.get("DIFFSOLVE_CACHE_DIR")
    if given:
        folder = Path(given)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home())) / "diffsolve" / "cache"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "diffsolve"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffsolve"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = "" if os.access(folder, os.W_OK) else "it cannot be written"
        if not problem and not _is_private(folder.stat()):
            problem = "others than its owner may write there"
    except (OSError, RuntimeError) as error:
        problem = str(error)
    if problem:
        _log.warning(
            "diffsolve: compiled code is not kept in %s, and is made anew in each process: %s. "
            "Set DIFFSOLVE_CACHE_DIR to a folder of your own.",
            folder,
            problem,
        )
    return None if problem else folder


def _is_private(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, and nobody else may write to it."""
    if not hasattr(os, "getuid"):  # Windows, where the mode tells nothing
        return True
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


@functools.cache
def cache_size() -> float:
    """Most bytes that the files may take: ``DIFFSOLVE_CACHE_SIZE`` in megabytes, or the default."""
    given = os.environ.get("DIFFSOLVE_CACHE_SIZE")
    try:
        size = float(given) if given else _DEFAULT_SIZE
        if not size >= 0:
            raise ValueError
    except ValueError:
        _log.warning(
            "diffsolve: DIFFSOLVE_CACHE_SIZE must be a number of megabytes, or inf, not %r: "
            "%d are used",
            given,
            _DEFAULT_SIZE,
        )
        size = _DEFAULT_SIZE
    return 1e6 * size


def read(name: str) -> bytes | None:
    """The object file of this name; None where there is none, or one that is damaged."""
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / name
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())  # of what is read, whatever has its name by now
            if not _is_private(status):
                return None
            data = file.read()
        if status.st_mtime < time.time() - _HOUR:
            os.utime(path)  # it is in use: others are removed first
    except OSError:
        return None
    body = data[_CHECKSUM:]
    return body if hashlib.sha256(body).digest() == data[:_CHECKSUM] else None


class _Written:
    """Bytes that this process wrote since it last looked at the size of the folder."""

    size = 0


def write(name: str, body: bytes) -> None:
    """Keep an object file, where that is possible."""
    folder = cache_folder()
    if folder is None:
        return
    try:
        handle, path = tempfile.mkstemp(dir=folder, prefix=_PREFIX, suffix=_SUFFIX)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(path, folder / name)  # at once: another process may read
    except BaseException as error:  # a full disk, an interrupt
        with contextlib.suppress(OSError):
            os.unlink(path)
        if not isinstance(error, OSError):
            raise
        return
    _Written.size += _pages(len(body))
    # names are hashes, so that one file in 256 makes its process look
    if name.startswith("00") or _Written.size > cache_size() / 8:
        _Written.size = 0
        clean(folder, cache_size())


def _pages(size: int) -> int:
    return _PAGE * math.ceil(size / _PAGE)


def clean(folder: Path, limit: float) -> None:
    """If all files take more than ``limit`` bytes, remove the least recently used ones.

    Kernels count as used a month later than they were. Other processes may read, write and clean
    at the same time.
    """
    now, files, total = time.time(), [], 0
    for entry in _files(folder):
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:  # it is gone
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        if _OURS.fullmatch(entry.name):
            size = _pages(status.st_size)
            total += size
            last_use = status.st_mtime + (_MONTH if entry.name.endswith(KERNEL) else 0)
            files.append((last_use, entry.path, size))
        elif _UNFINISHED.fullmatch(entry.name) and status.st_mtime < now - _HOUR:
            _remove(entry.path)  # of a process that was killed
    if total <= limit:
        return
    for _, path, size in sorted(files):
        if total <= _LEFT * limit:
            return
        _remove(path)
        total -= size


def _files(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):  # another process was faster, or has it open
        os.unlink(path)
