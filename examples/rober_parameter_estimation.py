"""The rate constants of a stiff reaction from noisy data, under each sensealg.

Robertson's reaction (ROBER) has rate constants that span nine orders of magnitude. Its three
concentrations are measured with noise at times from 1e-5 to 1e5, and the rate constants are fitted
to that. What makes such a fit work:

- a stiff method, here ``Rodas5P``;
- the logarithms of the rates as unknowns: a rate stays positive, and all have one scale;
- residuals, and ``atol``, in units of each component's range: the second component stays below
  4e-5;
- a sensealg that does not integrate the fast reactions backward in time.

The second table shows the last point: it compares gradients over longer and longer intervals.
``BacksolveAdjoint`` reconstructs the solution backward in time from one saved state to the one
before. There everything that decayed grows, here at a rate of 2e3 to 1e4. Over intervals up to 0.02
that does no harm; over a little longer ones it warns, and over all others it fails.

    python examples/rober_parameter_estimation.py    # two tables, examples/output/rober.png
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffsolve import (
    BacksolveAdjoint,
    BacksolveWarning,
    DiscreteAdjoint,
    InterpolatingAdjoint,
    Rodas5P,
    Sensealg,
    SolveError,
    solve,
)
from diffsolve.problems import library

NOISE = 0.02  # standard deviation, relative to each component's range
START = (5.0, 0.2, 5.0)  # the first guess, as multiples of the true rates
RTOL = 1e-6
ENDS = (1e-4, 1e-3, 1e-2, 0.02, 0.025, 0.03, 0.1, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5)  # of intervals

PROBLEM = library.rober()
TRUE_RATES: Tensor = PROBLEM.p

SENSEALGS: tuple[Sensealg, ...] = (
    DiscreteAdjoint(),
    DiscreteAdjoint(checkpoints=16),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
)


@dataclass(frozen=True)
class Data:
    """Measured states ``u`` at the times ``t``, and the range of each component."""

    t: Tensor
    u: Tensor
    range: Tensor


@dataclass
class Fit:
    """What an estimation gave; ``message`` tells why it ended where it failed."""

    sensealg: Sensealg
    rates: Tensor
    loss: float = math.nan
    solves: int = 0
    forward_nf: int = 0
    reverse_nf: int = 0
    seconds: float = 0.0
    message: str = ""

    @property
    def percent(self) -> Tensor:
        """By how much each rate is off, in percent."""
        return 100 * (self.rates / TRUE_RATES - 1)


def measure(points: int = 41, seed: int = 0) -> Data:
    """Noisy states at times that are equidistant in their logarithm."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.logspace(-5, 5, points, dtype=torch.float64)
    u = solve(PROBLEM, Rodas5P(), saveat=t, rtol=1e-10, atol=1e-14).u
    spread = u.amax(0) - u.amin(0)
    noise = torch.randn(u.shape, generator=generator, dtype=u.dtype)
    return Data(t, u + NOISE * spread * noise, spread)


def estimate(data: Data, sensealg: Sensealg, iterations: int = 60) -> Fit:
    """Fit the rates by L-BFGS, with gradients from one sensealg."""
    guess = TRUE_RATES * torch.tensor(START, dtype=torch.float64)
    log_rates = guess.log().requires_grad_()
    fit = Fit(sensealg, guess)
    optimizer = torch.optim.LBFGS(
        [log_rates], max_iter=iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        sol = solve(
            PROBLEM.remake(p=log_rates.exp()),
            Rodas5P(),
            sensealg=sensealg,
            saveat=data.t,
            rtol=RTOL,
            atol=1e-2 * RTOL * data.range,
        )
        # one where the residuals are as large as the noise
        loss = ((sol.u - data.u) / (NOISE * data.range)).square().mean()
        fit.solves += 1
        fit.forward_nf += sol.stats.nf
        loss.backward()
        fit.reverse_nf += sol.stats.adjoint.nf if sol.stats.adjoint else 0
        fit.loss, fit.rates = loss.item(), log_rates.detach().exp()
        return loss

    started = time.perf_counter()
    try:
        optimizer.step(closure)
        closure()  # the line search may have tried another point last
    except SolveError as error:
        fit.message = str(error)
    fit.seconds = time.perf_counter() - started
    return fit


def gradient(sensealg: Sensealg, end: float, rtol: float = RTOL) -> Tensor:
    """Gradient by the logarithms of the rates, of a sum over times from 1e-6 to ``end``."""
    t = torch.logspace(-6, math.log10(end), 21, dtype=torch.float64)
    log_rates = TRUE_RATES.log().requires_grad_()
    prob = PROBLEM.remake(p=log_rates.exp(), tspan=(0.0, end))
    scale = torch.tensor([1.0, 4e-5, 1.0], dtype=torch.float64)
    sol = solve(prob, Rodas5P(), sensealg=sensealg, saveat=t, rtol=rtol, atol=1e-2 * rtol * scale)
    return torch.autograd.grad((sol.u / scale).square().sum(), log_rates)[0]


@dataclass(frozen=True)
class Gradient:
    """Relative error of a gradient, and ``""``, ``"warns"`` or ``"fails"``."""

    error: float
    trouble: str

    def __str__(self) -> str:
        return self.trouble if self.trouble == "fails" else f"{self.error:.0e} {self.trouble}"


def compare_gradients(ends: Sequence[float]) -> dict[str, list[Gradient]]:
    """For each sensealg, its gradients over the intervals up to each of ``ends``."""
    gradients: dict[str, list[Gradient]] = {}
    for end in ends:
        exact = gradient(DiscreteAdjoint(), end, rtol=1e-11)
        for sensealg in (DiscreteAdjoint(), InterpolatingAdjoint(), BacksolveAdjoint()):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", BacksolveWarning)
                try:
                    off = (gradient(sensealg, end) - exact).norm() / exact.norm()
                    result = Gradient(off.item(), "warns" if caught else "")
                except SolveError:
                    result = Gradient(math.nan, "fails")
            gradients.setdefault(type(sensealg).__name__, []).append(result)
    return gradients


def name_of(sensealg: Sensealg) -> str:
    """As in the table."""
    checkpoints = getattr(sensealg, "checkpoints", None)
    return type(sensealg).__name__ + (f", {checkpoints} checkpoints" if checkpoints else "")


def print_fits(fits: list[Fit]) -> None:
    """The table of estimates, and below it the messages of those that failed."""
    print(f"{'':<32}{'rates off by, percent':>24}{'':>9}{'':>8}{'evaluations':>18}")
    columns = ("k1", "k2", "k3", "loss", "solves", "forward", "reverse", "seconds")
    print(f"{'sensealg':<32}" + "".join(f"{c:>8}" for c in columns[:3]), end="")
    print("".join(f"{c:>9}" for c in columns[3:]))
    for fit in fits:
        if fit.message:
            print(f"{name_of(fit.sensealg):<32}{'fails in its first gradient':>33}", end="")
        else:
            print(f"{name_of(fit.sensealg):<32}", end="")
            print("".join(f"{off:>8.2f}" for off in fit.percent.tolist()), end="")
            print(f"{fit.loss:>9.3f}", end="")
        print(f"{fit.solves:>9}{fit.forward_nf:>9}{fit.reverse_nf:>9}{fit.seconds:>9.2f}")
    for fit in fits:
        if fit.message:
            print(f"\n{name_of(fit.sensealg)}: {fit.message}")


def print_gradients(ends: Sequence[float], gradients: dict[str, list[Gradient]]) -> None:
    """The table of gradient errors."""
    print(f"{'interval':<16}" + "".join(f"{name:>24}" for name in gradients))
    for i, end in enumerate(ends):
        cells = "".join(f"{results[i]!s:>24}" for results in gradients.values())
        print(f"0 to {end:<11g}{cells}")


def draw(
    path: Path, data: Data, fit: Fit, ends: Sequence[float], gradients: dict[str, list[Gradient]]
) -> None:
    """The data with the fitted solution, and the errors of the gradients."""
    import matplotlib.pyplot as plt
    from demo_figures import BLUE, GREEN, ORANGE, SENSEALG_STYLES, STYLE

    plt.switch_backend("Agg")
    path.parent.mkdir(parents=True, exist_ok=True)
    t = torch.logspace(-5, 5, 400, dtype=torch.float64)
    u = solve(PROBLEM.remake(p=fit.rates), Rodas5P(), saveat=t, rtol=RTOL, atol=1e-12).u
    with plt.rc_context(STYLE):
        figure, (states, errors) = plt.subplots(1, 2, figsize=(10, 4))
        for i, color in enumerate((BLUE, ORANGE, GREEN)):
            states.semilogx(data.t, data.u[:, i] / data.range[i], ".", color=color)
            states.semilogx(t, u[:, i] / data.range[i], color=color, label=f"$y_{i + 1}$")
        states.set(title="Data and fit", xlabel="t", ylabel="concentration / its range")
        states.legend()
        for (name, results), (color, style) in zip(gradients.items(), SENSEALG_STYLES, strict=True):
            off = [result.error for result in results]
            errors.loglog(ends, off, style, marker="o", markersize=4, color=color, label=name)
        backsolve = gradients["BacksolveAdjoint"]
        failed = [end for end, g in zip(ends, backsolve, strict=True) if g.trouble == "fails"]
        if failed:
            errors.axvspan(failed[0], ends[-1], color=GREEN, alpha=0.12, linewidth=0)
            errors.annotate(
                "BacksolveAdjoint fails",
                (1.5 * failed[0], 0.03),
                xycoords=("data", "axes fraction"),
                fontsize=9,
            )
        errors.set(title="Error of the gradient", xlabel="end of the interval")
        errors.set_ylabel("relative error")
        errors.legend()
        figure.savefig(path)
        plt.close(figure)


def main() -> None:
    """Estimate under each sensealg, compare gradients, print the tables, and draw."""
    parser = argparse.ArgumentParser(description="Estimate the rate constants of ROBER.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    torch.set_num_threads(1)  # three components: more threads only wait for each other
    data = measure()

    first = ", ".join(f"{factor:g}" for factor in START)
    print(f"1. Three rates from {data.u.numel()} numbers with {NOISE:.0%} of noise")
    print(f"   The first guess is the true rates times {first}.\n")
    estimate(data, DiscreteAdjoint(), iterations=1)  # compiles, so that no row pays for it
    fits = [estimate(data, sensealg) for sensealg in SENSEALGS]
    print_fits(fits)

    print(f"\n2. Relative error of the gradient, at rtol={RTOL:g}\n")
    gradients = compare_gradients(ENDS)
    print_gradients(ENDS, gradients)

    path = args.output / "rober.png"
    draw(path, data, fits[0], ENDS, gradients)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    main()
