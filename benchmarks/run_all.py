"""Run every benchmark, one after the other, and print what was claimed and what was measured.

Run ``python benchmarks/run_all.py``, or with the names of some: ``run_all.py memory``. The exit
code is 0 also where a bar was missed, which is said at the end; it is 1 where a benchmark failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import Bar, bar_table, one_thread

HERE = Path(__file__).parent
ALL = (
    "lotka_volterra",
    "spiral_neural_ode",
    "memory",
    "regularization",
    "work_precision",
    "native",
    "native_work_precision",
    "stable_steps",
    "stiff",
    "stiff_work_precision",
    "stiff_batch",
    "sde",
    "sde_noise",
    "sde_regularization",
)


def run(name: str, json_file: Path) -> list[Bar] | None:
    """The bars of a benchmark, run in a process of its own; None where it failed."""
    # one thread from the start: a process must not begin with the pool of a larger number
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(json_file)]
    if subprocess.run(command, env=environment).returncode:
        return None
    return [Bar(**fields) for fields in json.loads(json_file.read_text())]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"default: {', '.join(ALL)}")
    names = parser.parse_args().names or list(ALL)
    if unknown := [name for name in names if name not in ALL]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}")

    bars: list[Bar] = []
    failed = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"\n=== {name} ===", flush=True)
            start = time.perf_counter()
            results = run(name, Path(folder) / f"{name}.json")
            print(f"({time.perf_counter() - start:.0f} s)", flush=True)
            if results is None:
                failed.append(name)
            else:
                bars += results

    print(f"\n=== summary, after {time.perf_counter() - begin:.0f} s ===")
    one_thread()
    print(bar_table(bars))
    missed = [bar.work for bar in bars if bar.met is False]
    if missed:
        print(f"\n!!! {len(missed)} BARS MISSED: {'; '.join(missed)}")
    if failed:
        print(f"\n!!! BENCHMARKS THAT FAILED: {', '.join(failed)}")
    if not missed and not failed:
        print("\nevery bar is met")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
