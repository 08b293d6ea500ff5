"""Lotka-Volterra in double precision: DP5 against torchdiffeq's dopri5, both in eager PyTorch.

Forward, and forward with backward (the gradient of a loss by the four parameters), on [0, 10] with
101 saved times. torchdiffeq runs at rtol = atol = 1e-8. diffsolve runs at the same tolerance, and
at the loosest one where its largest error at the saved times is at most torchdiffeq's.

Run ``python benchmarks/lotka_volterra.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import Bar, arguments, better, finish, in_turn, one_thread, ratio, table
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from diffsolve import DP5, ExplicitRK, ODEProblem, Solution, Vern9, solve
from diffsolve.problems.library import lotka_volterra

TOLERANCE = 1e-8
LEAST = 3.0  # times faster, at equal error
CANDIDATES = [10 ** (-7 - 0.05 * i) for i in range(41)]  # from 1e-7 to 1e-9
TIMES = torch.linspace(0, 10, 101, dtype=torch.float64)


PROBLEM = lotka_volterra()
F, U0, P = PROBLEM.f, PROBLEM.u0, PROBLEM.p


def ours(p: Tensor, tolerance: float, alg: ExplicitRK | None = None) -> Solution:
    problem = ODEProblem(F, U0, (0.0, 10.0), p)
    limits = {"rtol": tolerance, "atol": tolerance}
    return solve(problem, alg or DP5(), saveat=TIMES, engine="torch", **limits)


def theirs(p: Tensor, adjoint: bool = False, f: Callable[..., Tensor] = F) -> Tensor:
    def rhs(t: Tensor, u: Tensor) -> Tensor:
        return f(t, u, p)

    integrate: Any = odeint_adjoint if adjoint else odeint
    options: dict[str, Any] = {"adjoint_params": (p,)} if adjoint else {}
    return integrate(rhs, U0, TIMES, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5", **options)


class Counted:
    """The right-hand side, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        self.calls += 1
        return F(t, u, p)


def loss_of(u: Tensor) -> Tensor:
    return u.square().mean()


def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
    p = P.clone().requires_grad_()
    loss_of(run(p)).backward()
    assert p.grad is not None
    return p.grad


def equal_error_tolerance(exact: Tensor, error: float) -> float:
    """The loosest candidate whose error, like that of all tighter ones, is at most ``error``."""
    chosen = None
    for tolerance in reversed(CANDIDATES):
        if float((ours(P, tolerance).u - exact).abs().max()) > error:
            break
        chosen = tolerance
    if chosen is None:
        raise SystemExit(f"no tolerance gives an error of {error:.2e}")
    return chosen


def print_errors(sides: dict[str, float], exact: Tensor, true_gradient: Tensor) -> None:
    """Evaluations and errors of diffsolve at tolerances, by name, and of torchdiffeq."""

    def errors(u: Tensor, g: Tensor | None) -> list[str]:
        assert g is not None
        of_gradient = float((g - true_gradient).norm() / true_gradient.norm())
        return [f"{float((u.detach() - exact).abs().max()):.2e}", f"{of_gradient:.1e}"]

    rows = []
    for name, x in sides.items():
        p = P.clone().requires_grad_()
        solution = ours(p, x)
        loss_of(solution.u).backward()
        assert solution.stats.adjoint is not None
        nf = [solution.stats.nf, solution.stats.adjoint.nf]
        rows.append([f"diffsolve {name}", *nf, *errors(solution.u, p.grad)])
    for name, adjoint in {"odeint": False, "odeint_adjoint": True}.items():
        p, f = P.clone().requires_grad_(), Counted()
        u = theirs(p, adjoint, f)
        forward = f.calls
        loss_of(u).backward()
        nf = [forward, f.calls - forward if adjoint else forward]
        rows.append([f"torchdiffeq {name}, {TOLERANCE:.1e}", *nf, *errors(u, p.grad)])
    print(
        "\nnf backward: differentiated or evaluated by the backward pass; error: largest at the "
        f"{len(TIMES)} saves;\nof gradient: relative error of the gradient by p"
    )
    print(table(("side", "nf", "nf backward", "error", "of gradient"), rows))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    one_thread()

    exact = ours(P, 1e-13, Vern9()).u
    true_gradient = gradient(lambda p: ours(p, 1e-13, Vern9()).u)
    with torch.no_grad():
        their_error = float((theirs(P) - exact).abs().max())
    tolerance = equal_error_tolerance(exact, their_error)
    same, equal = (f"DP5, {x:.1e}" for x in (TOLERANCE, tolerance))

    print_errors({same: TOLERANCE, equal: tolerance}, exact, true_gradient)
    with torch.no_grad():
        forward_times = in_turn(
            {
                same: lambda: ours(P, TOLERANCE),
                equal: lambda: ours(P, tolerance),
                "odeint": lambda: theirs(P),
            },
            args.rounds,
        )
    backward_times = in_turn(
        {
            same: lambda: gradient(lambda p: ours(p, TOLERANCE).u),
            equal: lambda: gradient(lambda p: ours(p, tolerance).u),
            "odeint": lambda: gradient(theirs),
            "odeint_adjoint": lambda: gradient(lambda p: theirs(p, adjoint=True)),
        },
        args.rounds,
    )
    rows, bars = [], []
    for work, times in {"forward": forward_times, "forward+backward": backward_times}.items():
        rival = better(times, [name for name in times if name.startswith("odeint")])
        rows += [[work, name, value] for name, value in times.items()]
        for name, side, limit in (("same tolerance", same, None), ("equal error", equal, LEAST)):
            found = ratio(times[rival], times[side])
            note = f"{found.spread}; against {rival}"
            bars.append(Bar(f"Lotka-Volterra, {work}, {name}", found.value, limit, note=note))
    print("\nmilliseconds of CPU time, medians")
    print(table(("work", "side", "ms"), rows, left=(0, 1)))
    finish(bars, args.json)


if __name__ == "__main__":
    main()
