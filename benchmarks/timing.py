"""Shared by the benchmarks: timing in turn, tables, and the bars with their verdicts.

A machine that does other work as well makes single timings worthless. Here all sides of a
comparison run in turn in one process, round after round, so that a slow minute slows all of them;
what is timed is the process's CPU time, which leaves out the time given to others (with one thread
and nothing to wait for, it is the wall time of a quiet machine); what is reported are ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

OUTPUT = Path(__file__).parent / "output"


@dataclass(frozen=True)
class Times:
    """Seconds of CPU time of one side, one entry a round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} (best {1e3 * self.best:.1f})"


@dataclass(frozen=True)
class Ratio:
    """How many times the first side's time is the second's.

    Attributes
    ----------
    value
        Ratio of the medians over the rounds.
    best
        Ratio of the shortest times.
    low, high
        Quartiles of the ratios within the rounds: how noisy the machine was.
    """

    value: float
    best: float
    low: float
    high: float

    @property
    def spread(self) -> str:
        return f"best times {self.best:.2f}, quartiles {self.low:.2f} to {self.high:.2f}"


def in_turn(
    sides: Mapping[str, Callable[[], object]],
    rounds: int = 9,
    least: float = 0.2,
    warmup: int = 1,
) -> dict[str, Times]:
    """Time every side once a round, each round starting with another one.

    Parameters
    ----------
    sides
        Name and what to run; nothing is shared between the calls but what they close over.
    rounds
        Timed rounds.
    warmup
        Runs of each side before them.
    least
        A side that takes less than these seconds is run more than once a round, and its mean kept:
        the first run after the garbage collection that starts every turn is slow.
    """
    names = list(sides)
    repeats = dict.fromkeys(names, 1)
    for name in names:
        for _ in range(warmup):
            sides[name]()
        if least > 0:
            start = time.process_time()
            sides[name]()
            repeats[name] = max(1, round(least / max(time.process_time() - start, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            start = time.process_time()
            for _ in range(repeats[name]):
                sides[name]()
            seconds[name].append((time.process_time() - start) / repeats[name])
    return {name: Times(values) for name, values in seconds.items()}


def ratio(slow: Times, fast: Times) -> Ratio:
    """``slow`` over ``fast``; both of the same `in_turn`."""
    within = [a / b for a, b in zip(slow.rounds, fast.rounds, strict=True)]
    low, _, high = statistics.quantiles(within, n=4) if len(within) > 1 else within * 3
    return Ratio(slow.median / fast.median, slow.best / fast.best, low, high)


def total(parts: Sequence[Times]) -> Times:
    """Sum of parts, round by round."""
    return Times([sum(values) for values in zip(*(part.rounds for part in parts), strict=True)])


def better(times: Mapping[str, Times], names: Sequence[str]) -> str:
    """The side with the least median."""
    return min(names, key=lambda name: times[name].median)


# ---------------------------------------------------------------------------------------------
# Bars
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A claim with a number to it.

    Attributes
    ----------
    work
        What was measured.
    measured, limit
        The number, and what it must reach; None: shown without a verdict.
    at_least
        Whether ``measured`` must not be below ``limit``, or not above it.
    note
        Anything else that belongs beside the number.
    """

    work: str
    measured: float
    limit: float | None = None
    at_least: bool = True
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.limit is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def cells(self) -> list[str]:
        limit = "" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[self.met]
        return [self.work, limit, f"{self.measured:.3g}", verdict, self.note]


def bar_table(bars: Sequence[Bar]) -> str:
    header = ("work", "bar", "measured", "", "note")
    return table(header, [bar.cells() for bar in bars], left=(0, 3, 4))


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)
) -> str:
    """Text table; the columns ``left`` are left-justified, the others right-justified."""
    cells = [[str(x) for x in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        padded = [
            x.ljust(width) if i in left else x.rjust(width)
            for i, (x, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Parser with what every benchmark takes."""
    first = (description or "").strip().splitlines()[0]
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument("--json", type=Path, help="also write the bars to this file")
    return parser


def finish(bars: Sequence[Bar], json_file: Path | None) -> None:
    """Print the bars, and write them where they are wanted."""
    print()
    print(bar_table(bars), flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(bar) for bar in bars]))


def machine() -> str:
    """The machine and the versions, in a line."""
    packages = ("torch", "torchdiffeq", "scipy", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}), load {load}, "
        f"{torch.get_num_threads()} thread, Python {platform.python_version()}, {versions}"
    )


def one_thread() -> None:
    """What every benchmark starts with: states are small, and threads would only add noise."""
    torch.set_num_threads(1)
    print(machine(), flush=True)
