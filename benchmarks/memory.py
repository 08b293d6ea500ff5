"""Memory of the discrete adjoint: states kept and steps run again, against plain autograd.

1,000 fixed steps of Tsit5 through a 64-256-64 tanh network, batch of 128, float32: 6,000
evaluations, then the gradient by the weights. Each variant runs in processes of its own and is
measured twice: by the largest resident set of the process beyond that before the solve, and, in
another run, by the bytes of tensors that PyTorch's profiler sees alive at once. The small solve
before the measurement loads what is loaded on first use.

Run ``python benchmarks/memory.py``; about 2 GB are needed.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from timing import Bar, arguments, finish, one_thread, table
from torch import Tensor, nn
from torch.autograd.profiler import profile

from diffsolve import DiscreteAdjoint, ODEProblem, Tsit5, solve

STEPS = 1000
BATCH, WIDTH, HIDDEN = 128, 64, 256
MOST = 0.1  # of the tape's memory
TAPE, STATES, CHECKPOINTS = "tape=True", "", "checkpoints=32"
VARIANTS = {
    TAPE: DiscreteAdjoint(tape=True),
    STATES: DiscreteAdjoint(),
    CHECKPOINTS: DiscreteAdjoint(checkpoints=32),
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH))
        self.net = nn.Sequential(*layers)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.net(u)


def gradient(model: Network, u0: Tensor, sensealg: DiscreteAdjoint, steps: int) -> Tensor:
    model.zero_grad()
    solution = solve(
        ODEProblem(model, u0, (0.0, 1.0)),
        Tsit5(),
        sensealg=sensealg,
        adaptive=False,
        dt=1.0 / steps,
        save_everystep=False,
        engine="torch",
    )
    solution.u[-1].square().mean().backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def resident() -> tuple[int, int]:
    """Resident bytes now, and the most so far."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, this peak is not inherited from the parent process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(1024 * int(fields[key].split()[0]) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak, peak) if sys.platform == "darwin" else (1024 * peak, 1024 * peak)


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew


def most_alive(profiled: profile) -> int:
    """The most bytes of tensors alive at once, beyond those at the start."""
    assert profiled.kineto_results is not None
    events = [e for e in profiled.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most


def child(variant: str, tracked: bool) -> None:
    """Measure one variant in this process; prints JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, u0 = Network(), torch.randn(BATCH, WIDTH)
    gradient(model, u0, VARIANTS[variant], steps=3)
    if tracked:
        with profile(profile_memory=True, use_cpu=True) as profiled:
            gradient(model, u0, VARIANTS[variant], STEPS)
        print(json.dumps({"bytes": most_alive(profiled)}))
        return
    reset_peak()
    before, _ = resident()
    wall, cpu = time.perf_counter(), time.process_time()
    g = gradient(model, u0, VARIANTS[variant], STEPS)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resident()[1] - before
    norm = float(g.double().norm())
    print(json.dumps({"bytes": peak, "wall": wall, "cpu": cpu, "norm": norm}))


def measured(variant: str, tracked: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", variant, *(["--tracked"] if tracked else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def expected_tape() -> float:
    """Bytes of the tape, roughly: of each evaluation its input, the activations and its value."""
    stages = 6
    return STEPS * stages * 4 * BATCH * (HIDDEN + 2 * WIDTH)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--child", choices=VARIANTS)
    parser.add_argument("--tracked", action="store_true")
    args = parser.parse_args()
    if args.child is not None:
        return child(args.child, args.tracked)
    one_thread()
    print(f"\n{STEPS} steps; the tape should take about {expected_tape() / 1e9:.1f} GB")
    resident_set = {name: measured(name, tracked=False) for name in VARIANTS}
    alive = {name: measured(name, tracked=True) for name in VARIANTS}
    rows = [
        [
            f"DiscreteAdjoint({name})",
            f"{resident_set[name]['bytes'] / 2**20:.1f}",
            f"{alive[name]['bytes'] / 2**20:.1f}",
            f"{resident_set[name]['wall']:.1f}",
            f"{resident_set[name]['cpu']:.1f}",
            f"{resident_set[name]['norm']:.10g}",
        ]
        for name in VARIANTS
    ]
    header = ("sensealg", "resident MiB", "tensors MiB", "wall s", "CPU s", "norm of the gradient")
    print(table(header, rows), flush=True)

    bars = []
    for name in (STATES, CHECKPOINTS):
        shares = [x[name]["bytes"] / x[TAPE]["bytes"] for x in (resident_set, alive)]
        slower = resident_set[name]["cpu"] / resident_set[TAPE]["cpu"]
        note = (
            f"resident set {shares[0]:.4f}, tensors {shares[1]:.4f} of the tape's; "
            f"{slower:.2f} times its CPU time"
        )
        work = f"memory, DiscreteAdjoint({name})"
        bars.append(Bar(work, max(shares), MOST, at_least=False, note=note))
    finish(bars, args.json)
    return None


if __name__ == "__main__":
    main()
