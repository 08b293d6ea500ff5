"""Native solves in threads, beside other work, and under signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from gradients import DOUBLE
from native_runs import REVERSIBLE, ones

from diffsolve import (
    RK4,
    ODEProblem,
    Vern7,
    solve,
)
from diffsolve.engines.native.locks import compiling
from diffsolve.engines.native.tracing.trace import CompilerStance, without_compiler


def oscillator(t, u, p):
    return torch.stack([u[1], -p * u[0]])


def test_threads_solve_the_same_and_other_problems():
    u0 = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    shared = [ODEProblem(oscillator, u0, (0.0, 20.0), torch.tensor(k * 1.0)) for k in (1, 2)]
    shared = [x.remake(p=x.p.double()) for x in shared]
    wrong = []

    def work(index):
        try:
            for i in range(6):
                k = 1 + (index + i) % 2
                p = torch.tensor(float(k), dtype=DOUBLE, requires_grad=True)
                if i % 3 == 0:  # one more program
                    f = lambda t, u, p, n=index * 10 + i: oscillator(t, u, p) * (1 + 0 * n)  # noqa: E731
                else:
                    f = oscillator
                sol = solve(
                    shared[k - 1].remake(f=f, p=p), Vern7(), rtol=1e-9, atol=1e-9, saveat=[20.0],
                    sensealg=REVERSIBLE[i % 3],
                )  # fmt: skip
                assert sol.stats.engine == "native"
                sol.u[-1, 0].backward()
                w = k**0.5
                assert abs(float(sol.u[-1, 0].detach()) - np.cos(20 * w)) < 1e-6
                assert abs(float(p.grad) + 10 / w * np.sin(20 * w)) < 1e-4
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_read_the_same_solution():
    """Also the first to ask for values, when the extra stages are not there yet."""
    prob = ODEProblem(oscillator, torch.tensor([1.0, 0.0], dtype=DOUBLE), (0.0, 40.0), ones()[0])
    options = {"rtol": 1e-9, "atol": 1e-9, "engine": "native"}
    wrong = []

    def read(sol, seed):
        times = torch.linspace(0, 40, 301, dtype=DOUBLE)[torch.randperm(301)]
        try:
            for i in range(10):
                some = times[i * seed : 200 + i]
                assert float((sol(some)[:, 0] - torch.cos(some)).abs().max()) < 1e-6
        except BaseException as error:
            wrong.append(error)

    for _ in range(5):
        sol = solve(prob, Vern7(), **options)
        threads = [threading.Thread(target=read, args=(sol, i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_a_long_solve_does_not_hold_up_other_threads():
    u0 = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    prob = ODEProblem(oscillator, u0, (0.0, 1.0), torch.tensor(1e4, dtype=DOUBLE))
    options = {"adaptive": False, "engine": "native", "saveat": [1.0]}
    solve(prob, RK4(), dt=1e-3, **options)
    ends = []

    def long():
        solve(prob, RK4(), dt=1e-7 * 5, maxiters=10**9, **options)
        ends.append(time.perf_counter())

    thread = threading.Thread(target=long)
    beats = []
    started = time.perf_counter()
    thread.start()
    while thread.is_alive():
        time.sleep(0.002)
        beats.append(time.perf_counter())
    lasted = ends[0] - started
    assert lasted > 0.1
    gaps = np.diff([started, *beats])
    assert len(beats) > 5
    assert gaps.max() < max(0.5 * lasted, 0.1)


INTERRUPTED = """
import signal, time, torch
from diffsolve import *
# a job in the background, as CI may be, is started with this signal ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
def f(t, u):
    return torch.stack([u[1], -u[0]])
u0 = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
options = dict(adaptive=False, engine="native", saveat=[1.0])
sol = solve(ODEProblem(f, u0, (0.0, 1.0)), RK4(), dt=0.1, **options)
sol.u.sum().backward()
print("ready", flush=True)
started = time.perf_counter()
try:
    solve(ODEProblem(f, u0.detach(), (0.0, 1.0)), RK4(), dt=1e-12, maxiters=10**13, **options)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sol = solve(ODEProblem(f, u0, (0.0, 1.0)), RK4(), dt=0.1, **options)
    sol.u.sum().backward()
    print("fine", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
def test_interrupt():
    script = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True
    )
    try:
        assert script.stdout.readline() == "ready\n"
        time.sleep(0.5)
        assert script.poll() is None
        sent = time.perf_counter()
        script.send_signal(signal.SIGINT)
        assert script.stdout.readline() == "interrupted\n"
        assert time.perf_counter() - sent < 1.5
        assert script.stdout.readline() == "fine\n"
        assert script.wait(20) == 0
    finally:
        script.kill()
        script.wait()


FORKS = """
import os, random, signal, sys, threading, time, torch, warnings
warnings.simplefilter("ignore")
from diffsolve import *
def solves(seed):
    draw = random.Random(seed)
    for _ in range(2):
        a = draw.random()
        u0 = torch.ones(4, dtype=torch.float64, requires_grad=True)
        sol = solve(
            ODEProblem(lambda t, u: torch.sin(a * u) * torch.exp(-a * u.roll(1)), u0, (0.0, 0.1)),
            Tsit5(), engine="native",
        )
        sol.u[-1].sum().backward()
solves(0)
running = True
def compiles(seed):
    while running:
        solves(seed)
        seed += 1
threads = [threading.Thread(target=compiles, args=(i,), daemon=True) for i in (10**6, 10**7)]
for thread in threads:
    thread.start()
for i in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends it where it hangs
        solves(100 + i)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, i
running = False
for thread in threads:
    thread.join()
print("fine", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_forks_while_other_threads_compile():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORKS]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (0, "fine\n"), found.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_fork_waits_for_the_locks_and_restores_the_stance():
    import torch._dynamo  # which the stance is of

    inside, leave = threading.Event(), threading.Event()

    def f(t, u):
        inside.set()
        leave.wait(60)
        return -u

    def traces():
        with without_compiler():
            f(0.0, torch.ones(1))

    thread = threading.Thread(target=traces)
    thread.start()
    inside.wait(60)
    child = os.fork()
    if child == 0:
        free = CompilerStance.turn.acquire(timeout=1) and compiling.acquire(timeout=1)
        stance = torch._dynamo.eval_frame._stance.stance
        os._exit(0 if free and stance == "default" else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch._dynamo.eval_frame._stance.stance == "default"
