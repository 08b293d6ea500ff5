"""A neural ODE in training: DP5 against torchdiffeq's dopri5, both in eager PyTorch.

The cubic spiral of Chen et al. (2018), learnt by a 2-50-2 tanh network on ``u**3``: float32, a
batch of 20 initial states, 30 saved times in [0, 1.5], rtol 1e-7, atol 1e-9. Measured at three
moments of a training run, because the dynamics that a network has learnt cost more steps than those
it starts with: the forward solve, and a training step (forward, mean squared error, backward).

diffsolve runs with DP5's own controller, and with torchdiffeq's, so that both take the same steps.

Run ``python benchmarks/spiral_neural_ode.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from timing import Bar, Times, arguments, better, finish, in_turn, one_thread, ratio, table, total
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from diffsolve import DP5, DiscreteAdjoint, IController, ODEProblem, Solution, Vern7, solve
from diffsolve.problems.library import spiral
from diffsolve.solvers.controllers import Controller

RTOL, ATOL = 1e-7, 1e-9
LEAST_FORWARD, LEAST_STEP = 2.5, 2.0  # times faster
MOMENTS = (0, 50, 150)  # iterations of Adam
BATCH = 20
TIMES = torch.linspace(0, 1.5, 30, dtype=torch.float64)
CONTROLLERS: dict[str, Controller | None] = {
    "own control": None,
    "same control": IController.for_order(5),
}


class Dynamics(nn.Module):
    """``net(u**3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.1)
                nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.net(u**3)


def dataset() -> tuple[Tensor, Tensor]:
    """Initial states along the spiral, and the true solutions from them."""
    truth = spiral(tspan=(0.0, 10.0))
    start = solve(truth, Vern7(), saveat=torch.linspace(0, 10, BATCH), rtol=1e-10, atol=1e-10).u
    batch = truth.remake(u0=start, tspan=(0.0, 1.5))
    return start.float(), solve(batch, Vern7(), saveat=TIMES, rtol=1e-10, atol=1e-10).u.float()


def ours(f: Dynamics, u0: Tensor, controller: Controller | None) -> Solution:
    return solve(
        ODEProblem(f, u0, (0.0, 1.5)),
        DP5(),
        sensealg=DiscreteAdjoint() if torch.is_grad_enabled() else None,
        saveat=TIMES,
        rtol=RTOL,
        atol=ATOL,
        controller=controller,
        engine="torch",
    )


def theirs(f: Dynamics, u0: Tensor, integrate: Callable[..., Any] = odeint) -> Tensor:
    return integrate(f, u0, TIMES, rtol=RTOL, atol=ATOL, method="dopri5")


def training_step(f: Dynamics, run: Callable[[], Tensor], data: Tensor) -> Tensor:
    f.zero_grad()
    loss = (run() - data).square().mean()
    loss.backward()
    return loss.detach()


def models(u0: Tensor, data: Tensor) -> dict[int, Dynamics]:
    """The model at the moments of one training run."""
    f = Dynamics()
    optimizer = torch.optim.Adam(f.parameters(), lr=0.01)
    kept = {}
    for iteration in range(max(MOMENTS) + 1):
        if iteration in MOMENTS:
            kept[iteration] = copy.deepcopy(f)
        training_step(f, lambda: ours(f, u0, None).u, data)
        optimizer.step()
    return kept


def gradients(f: Dynamics) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in f.parameters() if p.grad is not None])


def nf_table(f: Dynamics, u0: Tensor, data: Tensor) -> list[list[object]]:
    """What each side evaluates, and how far its gradient is from one in double precision."""
    precise = copy.deepcopy(f).double()
    run = ODEProblem(precise, u0.double(), (0.0, 1.5))
    training_step(
        precise, lambda: solve(run, Vern7(), saveat=TIMES, rtol=1e-11, atol=1e-11).u, data.double()
    )
    truth = gradients(precise)

    def error() -> str:
        return f"{float((gradients(f).double() - truth).norm() / truth.norm()):.1e}"

    rows: list[list[object]] = []
    for name, controller in CONTROLLERS.items():
        f.zero_grad()
        solution = ours(f, u0, controller)
        (solution.u - data).square().mean().backward()
        stats = solution.stats
        assert stats.adjoint is not None
        counts = [stats.naccept, stats.nreject, stats.nf, stats.adjoint.nf]
        rows.append([f"diffsolve, {name}", *counts, error()])
    calls = []
    hook = f.register_forward_hook(lambda *_: calls.append(1))
    for integrate in (odeint, odeint_adjoint):
        f.zero_grad()
        calls.clear()
        u = theirs(f, u0, integrate)
        forward = len(calls)
        (u - data).square().mean().backward()
        backward = len(calls) - forward if integrate is odeint_adjoint else forward
        rows.append([f"torchdiffeq {integrate.__name__}", "", "", forward, backward, error()])
    hook.remove()
    return rows


def bars_of(forwards: dict[str, list[Times]], steps: dict[str, list[Times]]) -> list[Bar]:
    bars = []
    for what, kept, limit in (
        ("forward", forwards, LEAST_FORWARD),
        ("training step", steps, LEAST_STEP),
    ):
        for name in CONTROLLERS:
            each = [ratio(a, b).value for a, b in zip(kept["rival"], kept[name], strict=True)]
            overall = ratio(total(kept["rival"]), total(kept[name]))
            moments = ", ".join(f"{x:.2f}" for x in each)
            note = f"at iterations {', '.join(map(str, MOMENTS))}: {moments}; {overall.spread}"
            label = f"spiral neural ODE, {what}, {name}"
            bars.append(Bar(label, overall.value, limit, note=note))
    return bars


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    u0, data = dataset()

    forwards: dict[str, list[Times]] = {}
    steps: dict[str, list[Times]] = {}
    work: list[list[object]] = []
    shown: list[list[object]] = []

    def add(kept: dict[str, list[Times]], moment: int, what: str, times: dict[str, Times]) -> None:
        rivals = [name for name in times if name not in CONTROLLERS]
        rival = times[better(times, rivals)]
        for name, value in {**times, "rival": rival}.items():
            kept.setdefault(name, []).append(value)
        for name, value in times.items():
            faster = f"{ratio(rival, value).value:.2f}" if name in CONTROLLERS else ""
            shown.append([moment, what, name, value, faster])

    for moment, f in models(u0, data).items():
        work += [[moment, *row] for row in nf_table(f, u0, data)]

        def run(controller: Controller | None, f: Dynamics = f) -> Tensor:
            return ours(f, u0, controller).u

        def step(make: Callable[[], Tensor], f: Dynamics = f) -> Tensor:
            return training_step(f, make, data)

        def rival(integrate: Callable[..., Any], f: Dynamics = f) -> Tensor:
            return theirs(f, u0, integrate)

        with torch.no_grad():
            times = in_turn(
                {
                    **{name: lambda c=c: run(c) for name, c in CONTROLLERS.items()},
                    "odeint": lambda: rival(odeint),
                },
                args.rounds,
            )
        add(forwards, moment, "forward", times)
        times = in_turn(
            {
                **{name: lambda c=c: step(lambda: run(c)) for name, c in CONTROLLERS.items()},
                "odeint": lambda: step(lambda: rival(odeint)),
                "odeint_adjoint": lambda: step(lambda: rival(odeint_adjoint)),
            },
            args.rounds,
        )
        add(steps, moment, "training step", times)

    print("\nof gradient: relative error, against Vern7 at 1e-11 in float64")
    header = ("iteration", "side", "steps", "rejected", "nf", "nf backward", "of gradient")
    print(table(header, work, left=(1,)))
    print("\nmilliseconds of CPU time, medians")
    header = ("iteration", "work", "side", "ms", "times faster")
    print(table(header, shown, left=(1, 2)))

    finish(bars_of(forwards, steps), args.json)


if __name__ == "__main__":
    main()
