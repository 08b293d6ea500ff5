"""What is kept of traces and compiled code, in memory and on disk."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from gradients import DOUBLE, Decay, leaf
from native_runs import ones, program_of, rate_of, run
from torch import nn

from diffsolve import AutoTsit5, KenCarp4, Rodas5P, Tsit5
from diffsolve.engines.native.codegen import cache, llvm
from diffsolve.engines.native.graph.expression import Pool
from diffsolve.engines.native.programs import traces
from diffsolve.engines.native.runtime.kernels import kernel

# -- caching -------------------------------------------------------------------------------------


def test_f_is_not_kept_alive():
    def make():
        captured, net = torch.full((1,), 0.7, dtype=DOUBLE), Decay(nn.Parameter(ones()))
        f = lambda t, u: net(t, u) * captured  # noqa: E731
        run(f).u[-1].sum().backward()
        return captured, [weakref.ref(x) for x in (f, net, net.a, captured)]

    captured, references = make()
    gc.collect()
    assert [r() for r in references] == [None, None, None, captured]
    del captured
    assert references[-1]() is None


def test_module_is_not_kept_alive():
    class F(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

        def forward(self, t, u):
            return self.net(u)

    f = F()
    run(f, u0=ones(2)).u.sum().backward()
    run(f.forward, u0=ones(2)).u.sum().backward()
    references = [weakref.ref(f), weakref.ref(f.net[0]), weakref.ref(f.net[0].weight)]
    del f
    gc.collect()
    assert [r() for r in references] == [None] * 3


def test_a_lambda_made_anew_is_not_compiled_again():
    net = nn.Linear(2, 2).double()
    found, seconds = set(), []
    for i in range(4):
        f = lambda t, u, i=i: torch.tanh(net(u)) * 0.37 + t  # noqa: E731
        sol = run(f, u0=leaf([1.0, 2.0]))
        sol.u.sum().backward()
        found.add(id(program_of(f, ones(2))))
        seconds.append(sol.stats.compile_s)
    assert len(found) == 1
    assert max(seconds[1:]) < 0.1  # a trace
    sol = run(f, u0=leaf([1.0, 2.0]))
    assert sol.stats.compile_s < 1e-3


def test_other_shapes_and_types_are_other_programs():
    def f(t, u, p):
        return -u * p.sum()

    for u0, p in (
        (ones(), ones()),
        (ones(2), ones()),
        (ones(2), ones(2) / 2),
        (ones(2).float(), ones(2).float() / 2),
        (ones(2).view(2, 1), ones(2) / 2),
        (ones(1), ones(4).view(2, 2) / 4),
    ):
        sol = run(f, u0=u0, p=p, rtol=1e-5, atol=1e-5)
        assert sol.u.dtype is u0.dtype
        assert sol.u.shape[1:] == u0.shape
        assert float(sol.u[-1].reshape(-1)[0]) == pytest.approx(np.exp(-1), rel=1e-4)

    def g(t, u, p):
        return -u * p["a"] * p["n"]

    for n in (1, 2.0, 3):
        for a in (ones(), 2 * ones()):
            sol = run(g, p={"a": a, "n": n})
            assert rate_of(sol) == pytest.approx(n * float(a), rel=1e-6)


def test_data_beside_f_is_not_gone_through():
    class Model:
        def __init__(self):
            self.rate = 1.0
            self.data = [[[float(i) for i in range(50)] for _ in range(100)] for _ in range(100)]

        def rhs(self, t, u):
            return -self.rate * u

    model = Model()
    assert rate_of(run(model.rhs)) == pytest.approx(1.0, rel=1e-6)
    started = time.perf_counter()
    run(model.rhs)
    assert time.perf_counter() - started < 0.05  # all of it would take a tenth of a second
    model.rate = 2.0
    assert rate_of(run(model.rhs)) == pytest.approx(2.0, rel=1e-6)


def test_traces_of_gone_functions_are_forgotten():
    before = traces.cache_sizes()["functions"]
    for i in range(5):
        run(lambda t, u, i=i: -u * i)
    gc.collect()
    assert traces.cache_sizes()["functions"] <= before
    for i in range(traces.MOST_PROGRAMS + 3):
        program_of(lambda t, u, i=i: -u * (i + 0.123))
    assert traces.cache_sizes()["programs"] <= traces.MOST_PROGRAMS


def test_what_was_compiled_is_freed_at_once():
    """Where nothing refers to it: Python's collector might run only after many more."""

    def codes():
        return sum(1 for x in gc.get_objects() if type(x) is llvm.Code)

    def several(method, first, count):
        for i in range(first, first + count):
            u0 = leaf([1.0, 2.0])
            sol = run(lambda t, u, i=i: -u.roll(1) * (i + 0.456), alg=method, u0=u0)
            sol.u.sum().backward()
            del sol

    before = traces.MOST_PROGRAMS
    gc.collect()
    gc.disable()
    try:
        traces.MOST_PROGRAMS = 2
        traces.clear_caches()
        for method in (Tsit5(), Rodas5P(), KenCarp4(), AutoTsit5()):
            several(method, 0, 3)
            few = codes()
            several(method, 3, 3)
            assert codes() == few
        for _ in range(3):
            several(Tsit5(), 9, 1)
        objects = len(gc.get_objects())
        for _ in range(10):  # traces of what is known
            several(Tsit5(), 9, 1)
        assert len(gc.get_objects()) < objects + 500
    finally:
        gc.enable()
        traces.MOST_PROGRAMS = before


def test_linkers_are_replaced_and_freed():
    text = llvm.function_ir("{name}", llvm.FIELD, [], False)
    linkers = []
    for i in range(5 * llvm.machine().linker.most):
        llvm.cached_code(text, lambda: text)  # which is not kept
        if i % llvm.machine().linker.most == 0:
            linkers.append(weakref.ref(llvm.machine().linker.jit))
    # the present one, and that of code which other tests keep
    assert 5 == len(linkers) >= sum(x() is not None for x in linkers) + 3


def test_unhashable_and_unreferable_callables():
    class Rates:
        __slots__ = ("rate",)

        def __call__(self, t, u):
            return -self.rate * u

    class NoHash:
        __hash__ = None
        rate = 1.0

        def __call__(self, t, u):
            return -self.rate * u

    for f in (Rates(), NoHash()):
        for engine in ("auto", "native"):
            for rate in (1.0, 2.0):
                f.rate = rate
                assert rate_of(run(f, engine)) == pytest.approx(rate, rel=1e-6)


# -- the cache on disk ---------------------------------------------------------------------------

CACHED = """
import sys, torch, diffsolve
from diffsolve import *
u0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
sol = solve(ODEProblem(lambda t, u: -u * 1.2345, u0, (0.0, 1.0)), Tsit5(), engine="native")
sol.u[-1].sum().backward()
assert abs(float(u0.grad[0]) - 2.718281828459045 ** -1.2345) < 1e-3
"""


def in_process(script=CACHED, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def test_cache_folder(tmp_path):
    """What was compiled is found by the next process; damaged files are compiled again."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    run(lambda t, u: -u, u0=leaf([1.0])).u.sum().backward()
    for name in ("advance", "sweep"):  # which take long to build
        begin = kernel(name, Tsit5.family, False).code.name.removeprefix("diffsolve_")
        (path,) = cache.cache_folder().glob(f"{begin}*")
        shutil.copy(path, folder / path.name)
    kernels = {x.name for x in folder.iterdir()}
    first = in_process(DIFFSOLVE_CACHE_DIR=str(folder))
    assert "building" not in first.stderr
    files = {x.name: x.read_bytes() for x in folder.iterdir()}
    functions = sorted(files.keys() - kernels)
    assert len(functions) >= 2

    times = {x.name: x.stat().st_mtime_ns for x in folder.iterdir()}
    whole = files[functions[0]]
    (folder / functions[0]).write_bytes(whole[: len(whole) // 2])  # an interrupted write
    (folder / functions[1]).write_bytes(files[functions[1]][:-9] + b"x" + files[functions[1]][-8:])
    in_process(DIFFSOLVE_CACHE_DIR=str(folder))
    assert {x.name: x.read_bytes() for x in folder.iterdir()} == files
    for name in files.keys() - set(functions[:2]):
        assert (folder / name).stat().st_mtime_ns == times[name]


def test_cache_is_cleaned_by_least_use(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cache, "cache_size", lambda: 50 * 8192.0)
    names = [f"{i:064x}"[::-1] for i in range(1, 200)]
    kernel_name = "f" * 64 + cache.KERNEL
    (tmp_path / "notes.txt").write_text("of the user's" * 100_000)
    (tmp_path / "folder").mkdir()
    cache.write(kernel_name, b"k" * 8000)
    cache.write(names[0], b"0" * 8000)
    hours = [time.time() - 3600 * n for n in range(10)]
    for name, age in ((kernel_name, 9), (names[0], 8)):
        os.utime(tmp_path / name, (hours[age], hours[age]))
    unfinished = [tmp_path / f"{cache._PREFIX}{x}{cache._SUFFIX}" for x in ("old", "new")]
    for path, age in zip(unfinished, (2, 0), strict=True):
        path.write_bytes(b"half")
        os.utime(path, (hours[age], hours[age]))
    for i, name in enumerate(names[1:], 1):
        cache.write(name, bytes([i]) * 8000)
        os.utime(tmp_path / name, (hours[1] + i, hours[1] + i))
        if i % 10 == 0:
            assert cache.read(names[0]) == b"0" * 8000  # used again and again
            os.utime(tmp_path / names[0], (hours[1] + i, hours[1] + i))
        files = sum(1 for x in tmp_path.iterdir() if cache._OURS.fullmatch(x.name))
        assert files <= 50 * 9 / 8 + 2  # it is looked at after each eighth
    left = {x.name for x in tmp_path.iterdir()}
    assert {kernel_name, names[0], names[-1], "notes.txt", "folder", unfinished[1].name} <= left
    assert names[1] not in left and unfinished[0].name not in left
    kept = [i for i, name in enumerate(names) if i and name in left]
    assert kept == list(range(kept[0], len(names)))  # those that were used last
    cache.clean(tmp_path, 0.0)
    assert not [x for x in tmp_path.iterdir() if cache._OURS.fullmatch(x.name)]


def test_size_of_the_cache_is_read_from_the_environment(monkeypatch, caplog):
    try:
        for given, size in (("", 250e6), ("2", 2e6), ("0.5", 5e5), ("inf", np.inf), ("0", 0.0)):
            monkeypatch.setenv("DIFFSOLVE_CACHE_SIZE", given)
            cache.cache_size.cache_clear()
            assert cache.cache_size() == size
        assert not caplog.records
        for given in ("2 GB", "-1", "nan"):
            monkeypatch.setenv("DIFFSOLVE_CACHE_SIZE", given)
            cache.cache_size.cache_clear()
            assert cache.cache_size() == 250e6
            assert given in caplog.records[-1].getMessage()
    finally:
        cache.cache_size.cache_clear()


def test_files_that_are_used_are_marked_each_hour(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)
    cache.write("a" * 64, b"code")
    for age, marked in ((0.5, False), (2.0, True)):
        before = time.time() - age * 3600
        os.utime(tmp_path / ("a" * 64), (before, before))
        assert cache.read("a" * 64) == b"code"
        after = (tmp_path / ("a" * 64)).stat().st_mtime
        assert (after > before + 60) is marked


CLEANERS = """
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("cache", sys.argv[3])
cache = importlib.util.module_from_spec(spec)  # alone: the package takes seconds
spec.loader.exec_module(cache)
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
cache.cache_folder = lambda: folder
cache.cache_size = lambda: 20 * 4096.0
for i in range(500):
    k = (7 * i + 13 * seed) % 60
    name = f"{k:02x}" * 32
    found = cache.read(name)
    assert found is None or found == bytes([k]) * 3000, found[:20]
    if found is None:
        cache.write(name, bytes([k]) * 3000)
        if i % 5 == seed:
            cache.clean(folder, cache.cache_size())
"""


def test_processes_that_write_read_and_clean_at_once(tmp_path):
    command = [sys.executable, "-c", CLEANERS, str(tmp_path)]
    running = [subprocess.Popen([*command, str(i), cache.__file__]) for i in range(3)]
    running[2].kill()  # at any moment
    assert [x.wait(120) for x in running[:2]] == [0, 0]
    running[2].wait()
    cache.clean(tmp_path, 20 * 4096.0)
    assert len([x for x in tmp_path.iterdir() if cache._OURS.fullmatch(x.name)]) <= 20


def test_full_disk_and_interrupts_leave_nothing_behind(tmp_path, monkeypatch):
    run(lambda t, u: -u)
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)

    def refuse(error):
        def replace(*args):
            raise error

        monkeypatch.setattr(cache.os, "replace", replace)

    refuse(OSError(errno.ENOSPC, "No space left on device"))
    sol = run(lambda t, u: -u * 1.9182)  # compiled for this process
    assert rate_of(sol) == pytest.approx(1.9182, rel=1e-6)
    assert not list(tmp_path.iterdir())
    refuse(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        cache.write("a" * 64, b"code")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_files_that_cannot_be_written_whole(tmp_path):
    """A process may not write files of more than 100 bytes: no solve minds."""
    script = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
from diffsolve.engines.native.codegen import cache
from diffsolve.engines.native.codegen import llvm
from diffsolve.engines.native.graph.expression import Pool
pool = Pool()
out = [llvm.Output("out", 0, pool.input("u", 0) * 3.3)]
assert llvm.compile_function(llvm.FIELD, out, False).address
"""
    in_process(script, DIFFSOLVE_CACHE_DIR=str(tmp_path / "new"))
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="modes tell nothing here")
def test_a_file_that_others_may_write_is_not_used(tmp_path, monkeypatch):
    name, body = "ab" * 32, b"machine code"
    monkeypatch.setenv("DIFFSOLVE_CACHE_DIR", str(tmp_path / "cache"))
    cache.cache_folder.cache_clear()
    try:
        cache.write(name, body)
        path = tmp_path / "cache" / name
        assert path.stat().st_mode & 0o777 == 0o600
        for mode, expected in ((0o600, body), (0o620, None), (0o602, None), (0o644, body)):
            path.chmod(mode)
            assert cache.read(name) == expected
    finally:
        cache.cache_folder.cache_clear()


def test_a_file_under_another_name_is_not_run(tmp_path, monkeypatch):
    """The name of a file is part of what is in it."""
    monkeypatch.setenv("DIFFSOLVE_CACHE_DIR", str(tmp_path / "cache"))
    cache.cache_folder.cache_clear()
    try:
        u = Pool().inputs("u", 2)
        outputs = [[llvm.Output("out", 0, y)] for y in (u[0] + u[1], u[0] - u[1])]
        llvm.compile_function(llvm.FIELD, outputs[0], False)
        (first,) = (tmp_path / "cache").iterdir()
        llvm.compile_function(llvm.FIELD, outputs[1], False)
        (second,) = set((tmp_path / "cache").iterdir()) - {first}
        shutil.copy(first, second)
        with pytest.raises(RuntimeError, match="Symbols not found"):
            llvm.compile_function(llvm.FIELD, outputs[1], False)
    finally:
        cache.cache_folder.cache_clear()


def test_no_folder_for_the_cache(tmp_path, monkeypatch):
    """Compiled for this process alone where nothing can be written, or others could write."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    try:
        for i, given in enumerate((blocked, blocked / "under", shared)):
            monkeypatch.setenv("DIFFSOLVE_CACHE_DIR", str(given))
            cache.cache_folder.cache_clear()
            assert cache.cache_folder() is None
            sol = run(lambda t, u, i=i: -u * (i + 1.7654))
            assert rate_of(sol) == pytest.approx(i + 1.7654, rel=1e-6)
        assert not list(shared.iterdir())
        monkeypatch.setenv("DIFFSOLVE_CACHE_DIR", str(tmp_path / "new" / "folder"))
        cache.cache_folder.cache_clear()
        assert cache.cache_folder() == tmp_path / "new" / "folder"
        assert cache.cache_folder().stat().st_mode & 0o777 == 0o700
        assert blocked.read_text() == "no folder"
    finally:
        cache.cache_folder.cache_clear()
