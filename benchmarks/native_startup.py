"""What the first solves of a process cost, with the native engine: seconds on the clock.

Value and gradient of Lotka-Volterra (101 saves, 1e-8), and then of FitzHugh-Nagumo, in a process
that has done nothing but its imports. "Kernels cached" means the loops, which are built once on a
machine; the two right-hand sides are new to the cache. Importing is timed with Python's bytecode
written, as an installation leaves it. Every number is the median of three runs.

Run ``python benchmarks/native_startup.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from timing import Bar, arguments, finish, one_thread

PROCESSES = 3
SOLVED = ("lotka_volterra", "fitzhugh_nagumo")
IMPORT = """
import json, time, torch
start = time.perf_counter()
import diffsolve
print(json.dumps([time.perf_counter() - start]))
"""

# ---------------------------------------------------------------------------------------------
# In the new process
# ---------------------------------------------------------------------------------------------


def solves(*names: str) -> list[float]:
    """Seconds of value and gradient of problems of the library, one after the other."""
    import torch
    from native_cases import ENGINE

    from diffsolve import DiscreteAdjoint, Tsit5, solve
    from diffsolve.problems import library

    seconds = []
    for name in names:
        problem = getattr(library, name)()
        p = problem.p.clone().requires_grad_()
        times = torch.linspace(0, 10, 101, dtype=torch.float64)
        limits = {"rtol": 1e-8, "atol": 1e-8, "engine": ENGINE}
        start = time.perf_counter()
        solution = solve(
            problem.remake(p=p), Tsit5(), sensealg=DiscreteAdjoint(), saveat=times, **limits
        )
        solution.u[-1].sum().backward()
        seconds.append(time.perf_counter() - start)
    return seconds


def diffrax() -> list[float]:
    """The first of them with diffrax's default adjoint: trace, compilation and run."""
    from native_cases import saved_case
    from native_peers import diffrax_gradient, jax_modules

    case = saved_case()
    jax_modules()
    start = time.perf_counter()
    diffrax_gradient(case, "RecursiveCheckpointAdjoint")(1e-8)()
    return [time.perf_counter() - start]


# ---------------------------------------------------------------------------------------------
# The processes
# ---------------------------------------------------------------------------------------------


def process(
    *command: str, cache: Path | None = None, bytecode: Path | None = None
) -> tuple[list[float], str]:
    """The seconds that a process prints in its last line, and what else it says."""
    environment = dict(os.environ)
    if cache is not None:
        environment["DIFFSOLVE_CACHE_DIR"] = str(cache)
    if bytecode is not None:
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    *said, last = done.stdout.strip().splitlines()
    return json.loads(last), " ".join([*said, *done.stderr.split("\n")]).strip()


def medians(runs: list[list[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*runs, strict=True)]


def startup_bars() -> list[Bar]:
    child = (__file__, "--child")
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        ready.mkdir(mode=0o700)
        process(*child, "lorenz", cache=ready)  # builds the loops, and compiles what is not timed
        empty, fresh, again, imports, rival = [], [], [], [], []
        said, bytecode = "", Path(folder) / "bytecode"
        process("-c", IMPORT, bytecode=bytecode)  # writes it, as an installation does
        for i in range(PROCESSES):
            new, copied = Path(folder) / f"new{i}", Path(folder) / f"copy{i}"
            seconds, said = process(*child, *SOLVED, cache=new)
            empty.append(seconds)
            shutil.copytree(ready, copied)
            fresh.append(process(*child, *SOLVED, cache=copied)[0])
            again.append(process(*child, *SOLVED, cache=copied)[0])
            imports.append(process("-c", IMPORT, bytecode=bytecode)[0])
            if find_spec("diffrax"):
                rival.append(process(*child, "diffrax")[0])
    first, second = medians(fresh)
    compiled = ", ".join(f"{x:.3f}" for x in medians(again))
    theirs = f"; diffrax {medians(rival)[0]:.2f}" if rival else ""
    message = f"it says: {said[:60]}" if said else "NO MESSAGE"
    return [
        Bar(
            "first call, kernels cached, s",
            first,
            0.5,
            at_least=False,
            note=f"value and gradient; both right-hand sides cached too: {compiled}{theirs}",
        ),
        Bar("second new right-hand side, s", second, 0.15, at_least=False),
        Bar("first call ever, s", medians(empty)[0], 20, at_least=False, note=message),
        Bar("import diffsolve beyond torch, s", medians(imports)[0], 0.3, at_least=False),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--child", nargs="+", help="what the new processes are started with")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(diffrax() if args.child == ["diffrax"] else solves(*args.child)))
        return
    one_thread()
    finish(startup_bars(), args.json)


if __name__ == "__main__":
    main()
