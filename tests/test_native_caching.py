"""What is kept of traces and compiled code, in memory and on disk."""

from __future__ import annotations

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
from native_runs import compiled_of, ones, rate_of, run
from torch import nn

from diffsolve.engines.native import field as field_module
from diffsolve.engines.native import llvm, remembered
from diffsolve.engines.native.kernels import kernel

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
        found.add(id(compiled_of(f, ones(2))))
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
    before = len(remembered.by_function)
    for i in range(5):
        run(lambda t, u, i=i: -u * i)
    gc.collect()
    assert len(remembered.by_function) <= before
    for i in range(field_module._MOST_KEPT + 3):
        compiled_of(lambda t, u, i=i: -u * (i + 0.123))
    assert len(field_module._by_content) <= field_module._MOST_KEPT


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
        begin = kernel(name, "explicit_rk", False).code.name.removeprefix("diffsolve_")
        (path,) = llvm.cache_folder().glob(f"{begin}*")
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
            llvm.cache_folder.cache_clear()
            assert llvm.cache_folder() is None
            sol = run(lambda t, u, i=i: -u * (i + 1.7654))
            assert rate_of(sol) == pytest.approx(i + 1.7654, rel=1e-6)
        assert not list(shared.iterdir())
        monkeypatch.setenv("DIFFSOLVE_CACHE_DIR", str(tmp_path / "new" / "folder"))
        llvm.cache_folder.cache_clear()
        assert llvm.cache_folder() == tmp_path / "new" / "folder"
        assert llvm.cache_folder().stat().st_mode & 0o777 == 0o700
        assert blocked.read_text() == "no folder"
    finally:
        llvm.cache_folder.cache_clear()
