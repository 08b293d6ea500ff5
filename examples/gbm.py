"""Geometric Brownian motion against its closed form: how fast methods for SDEs converge.

``du = mu u dt + sigma u dW`` is solved by ``u(t) = u(0) exp((mu - sigma^2/2) t + sigma W(t))``,
path by path. So the error of each path is known, and the root of its mean square at the end, the
strong error, should fall with the step size as the order of the method says. All methods and step
sizes follow the same Brownian paths: those of the first solve, ``noise=sol.noise``.

    python examples/gbm.py              # prints three tables, writes examples/output/gbm.png

References
----------
Kloeden, Platen, Numerical Solution of Stochastic Differential Equations (1992), sections 4.4 and
9.3 (closed form, strong convergence); Rößler, SIAM J. Numer. Anal. 48 (2010) 922 (order 1.5).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsolve import EM, SOSRI, SRIW1, LambaEM, RKMil, SDEProblem, Solution, solve

PATHS = 1000
FINEST = 512  # steps of the solve whose noise the others follow
FIXED = (EM(), RKMil(), SRIW1(), SOSRI())
STEPS = (8, 16, 32, 64, 128)
ADAPTIVE = (LambaEM(), SOSRI())

TOLERANCES = {"LambaEM": (0.1, 0.03, 0.01, 3e-3, 1e-3), "SOSRI": (0.03, 0.01, 3e-3, 1e-3, 3e-4)}


def drift(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[0] * u


def diffusion(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[1] * u


def gbm(paths: int = PATHS) -> SDEProblem:
    """So many independent paths from ``u(0) = 1``, with ``mu = 0.5`` and ``sigma = 0.5``."""
    u0 = torch.ones(paths, 1, dtype=torch.float64)
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    return SDEProblem(drift, diffusion, u0, (0.0, 1.0), p)


def closed_form(prob: SDEProblem, t: Tensor, W: Tensor) -> Tensor:
    """The solution at the times ``t``, whose Brownian motion is ``W``."""
    mu, sigma = prob.p
    t = t.reshape(-1, 1, 1)
    return prob.u0 * ((mu - sigma**2 / 2) * t + sigma * W).exp()


def exact(prob: SDEProblem, sol: Solution) -> Tensor:
    """The closed form along the path of a solution, at its saved times."""
    return closed_form(prob, sol.t, sol.noise.at(sol.t.tolist()))


@dataclass
class Convergence:
    """Strong errors of a method at mean step sizes ``h``, and the slope of their line."""

    name: str
    order: float
    h: Tensor
    error: Tensor

    @property
    def slope(self) -> float:
        """Of the least squares line through the logarithms."""
        x, y = self.h.log(), self.error.log()
        x = x - x.mean()
        return ((x * y).sum() / (x * x).sum()).item()


def measure(prob: SDEProblem, alg: Any, noise: Any, options: list[dict[str, Any]]) -> Convergence:
    """Solve along ``noise`` with each of the options."""
    h, error = [], []
    for chosen in options:
        sol = solve(prob, alg, noise=noise, save_everystep=False, **chosen)
        h.append(1 / sol.stats.naccept)
        error.append((sol.u - exact(prob, sol))[-1].square().mean().sqrt())
    return Convergence(alg.name, alg.strong_order, torch.tensor(h), torch.stack(error))


def fixed_steps(prob: SDEProblem, noise: Any) -> list[Convergence]:
    """Every method of ``FIXED`` at every number of steps."""
    options = [{"dt": 1 / n, "adaptive": False} for n in STEPS]
    return [measure(prob, alg, noise, options) for alg in FIXED]


def adaptive(prob: SDEProblem, noise: Any) -> list[Convergence]:
    """The adaptive methods at every tolerance."""
    convergences = []
    for alg in ADAPTIVE:
        options = [{"rtol": tol, "atol": tol} for tol in TOLERANCES[alg.name]]
        convergences.append(measure(prob, alg, noise, options))
    return convergences


def gradients(prob: SDEProblem, noise: Any) -> tuple[Tensor, Tensor]:
    """Of the mean terminal value by ``mu`` and ``sigma``: through the solver, and exact."""
    p = prob.p.clone().requires_grad_()
    sol = solve(prob.remake(p=p), SOSRI(), noise=noise, rtol=1e-4, atol=1e-4, save_everystep=False)
    (solver,) = torch.autograd.grad(sol.u[-1].mean(), p)
    again = prob.remake(p=p)
    (closed,) = torch.autograd.grad(exact(again, sol)[-1].mean(), p)
    return solver, closed


def print_fixed(convergences: list[Convergence]) -> None:
    """A line a method: its errors, the slope and the order that it should be near."""
    print(f"{'':<10}" + "".join(f"{f'{n} steps':>12}" for n in STEPS) + f"{'slope':>9}{'order':>7}")
    for c in convergences:
        errors = "".join(f"{x:>12.2e}" for x in c.error.tolist())
        print(f"{c.name:<10}{errors}{c.slope:>9.2f}{c.order:>7g}")


def print_adaptive(convergences: list[Convergence]) -> None:
    """Tolerances, steps and errors of each adaptive method."""
    for c in convergences:
        cells = zip(TOLERANCES[c.name], (1 / c.h).tolist(), c.error.tolist(), strict=True)
        print(f"{c.name:<10}slope {c.slope:.2f}, order {c.order:g}")
        for tol, steps, error in cells:
            print(f"{'':<10}tolerance {tol:<8g}{steps:>6.0f} steps{error:>12.2e}")


def draw(path: Path, prob: SDEProblem, noise: Any, convergences: list[Convergence]) -> None:
    """Some paths with their closed form, and the strong-order plot."""
    import matplotlib.pyplot as plt
    from demo_figures import BLUE, GREEN, GREY, ORANGE, STYLE

    plt.switch_backend("Agg")
    path.parent.mkdir(parents=True, exist_ok=True)
    sol = solve(prob, SOSRI(), noise=noise, saveat=1 / FINEST, rtol=1e-3, atol=1e-3)
    coarse = solve(prob, EM(), noise=noise, dt=1 / 16)
    truth = exact(prob, sol)
    purple, red = "#cc79a7", "#e69f00"
    with plt.rc_context(STYLE):
        figure, (paths, orders) = plt.subplots(1, 2, figsize=(11, 4.6))
        for i, color in enumerate((BLUE, ORANGE, GREEN)):
            first = i == 0
            label = "closed form" if first else None
            paths.plot(sol.t, truth[:, i], color=color, linewidth=1, label=label)
            label = "SOSRI" if first else None
            paths.plot(sol.t, sol.u[:, i], "--", color=GREY, linewidth=1, label=label)
            label = "EM, 16 steps" if first else None
            paths.plot(coarse.t, coarse.u[:, i], ".:", color=color, linewidth=1, label=label)
        paths.set(title="Three paths", xlabel="t", ylabel="u")
        paths.legend()
        colors = {"EM": ORANGE, "RKMil": GREEN, "SRIW1": purple, "SOSRI": BLUE, "LambaEM": red}
        for k, c in enumerate(convergences):
            fixed = k < len(FIXED)
            style = "o-" if fixed else "s--"
            label = f"{c.name}{'' if fixed else ', adaptive'}: {c.slope:.2f}"
            orders.loglog(c.h, c.error, style, color=colors[c.name], markersize=4, label=label)
        orders.set(title="Strong error and its slope", xlabel="mean step size")
        orders.set_ylabel("root mean square error at the end")
        orders.legend()
        figure.savefig(path)
        plt.close(figure)


def main() -> None:
    """Measure the orders, print the tables, and draw."""
    parser = argparse.ArgumentParser(description="Geometric Brownian motion, and its closed form.")
    parser.add_argument("--paths", type=int, default=PATHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    prob = gbm(args.paths)
    noise = solve(prob, EM(), dt=1 / FINEST, save_everystep=False, seed=args.seed).noise

    print(f"1. Strong errors of {args.paths} paths with fixed steps\n")
    fixed = fixed_steps(prob, noise)
    print_fixed(fixed)

    print("\n2. The same with adaptive steps\n")
    chosen = adaptive(prob, noise)
    print_adaptive(chosen)

    print("\n3. Gradient of the mean terminal value\n")
    solver, closed = gradients(prob, noise)
    for name, x, y in zip(("mu", "sigma"), solver.tolist(), closed.tolist(), strict=True):
        print(f"by {name:<7}{x:>10.6f} through the solver,{y:>10.6f} by the closed form")

    path = args.output / "gbm.png"
    draw(path, prob, noise, [*fixed, *chosen])
    print(f"\nFigure: {path}\nDone in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
