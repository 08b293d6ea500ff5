"""A latent SDE fitted to one short, noisy time series: its paths, and an equation for them.

A damped oscillator that is kicked by noise is measured 41 times, with noise. A latent SDE explains
the series by hidden paths: under the prior they follow ``dz = h(z) dt + s dW``, linear here, and
under the posterior ``dz = (h(z) + s v(t, z)) dt + s dW``, where the network ``v`` bends them
towards the data. What is maximised is the evidence lower bound: the likelihood of the data, minus
the divergence of the posterior from the prior, which along a path is ``integral of 1/2 |v|^2 dt``
(``NeuralSDE(..., prior=...)``, ``logqp=True``) and at its start that of two normal distributions.

Two things are learned: the hidden paths of this series, and an equation that can go on without
data. Both have a truth here, made in this file. The first is measured by the distance of the
posterior's mean from the path without noise: at most half of what the measurements have, where the
best estimate that exists, which knows the true equation, has somewhat less. The second by the
period and the decay of the prior, and by its samples in the figure.

    python examples/latent_sde.py       # prints a table, writes examples/output/latent_sde.png

References
----------
Li, Wong, Chen, Duvenaud, Scalable gradients for stochastic differential equations, AISTATS 2020,
section 5 and figure 2.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffsolve import EM, SDEProblem, solve
from diffsolve.nn import NeuralSDE

END, POINTS, BETWEEN = 8.0, 41, 5  # time, measurements, finer times from one to the next
NOISE = 0.2  # standard deviation of a measurement
DT = 0.05
#: The truth: ``dx = A x dt + B dW``, of which the first component is measured.
A = torch.tensor([[0.0, 1.0], [-6.25, -0.5]], dtype=torch.float64)
B = torch.tensor([0.0, 0.8], dtype=torch.float64)
X0 = torch.tensor([1.5, 0.0], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# The data, and what the true equation knows of it
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Measurements ``y`` at the times ``t``, and the path ``x`` without noise at finer times."""

    t: Tensor
    y: Tensor
    fine_t: Tensor
    x: Tensor


def transition(h: float) -> tuple[Tensor, Tensor]:
    """``x(t + h) = F x(t) + normal(0, Q)``, exactly (Van Loan, IEEE TAC 23 (1978) 395)."""
    blocks = torch.zeros(4, 4, dtype=torch.float64)
    blocks[:2, :2], blocks[2:, 2:], blocks[:2, 2:] = -A, A.T, torch.outer(B, B)
    whole = torch.linalg.matrix_exp(h * blocks)
    F = whole[2:, 2:].T
    return F, F @ whole[:2, 2:]


def measure(seed: int = 0) -> Data:
    """Draw a path of the oscillator, and measure it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    t = torch.linspace(0, END, BETWEEN * (POINTS - 1) + 1, dtype=torch.float64)
    F, Q = transition(END / (len(t) - 1))
    root, path = torch.linalg.cholesky(Q), [X0]
    for _ in t[1:]:
        path.append(F @ path[-1] + root @ normal(2))
    x = torch.stack(path)[:, 0]
    return Data(t[::BETWEEN], x[::BETWEEN] + NOISE * normal(POINTS), t, x)


def true_law(times: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the true ``x`` at evenly spaced times."""
    F, Q = transition((times[1] - times[0]).item())
    n = len(times)
    means, spreads = [X0], [torch.zeros_like(Q)]
    for _ in range(n - 1):
        means.append(F @ means[-1])
        spreads.append(F @ spreads[-1] @ F.T + Q)
    covariance = torch.zeros(n, n, dtype=torch.float64)
    for i, spread in enumerate(spreads):
        for j in range(i, n):
            covariance[i, j] = covariance[j, i] = spread[0, 0]
            spread = F @ spread
    return torch.stack(means)[:, 0], covariance


def best_estimate(data: Data) -> Tensor:
    """Mean of the path given the measurements, by the true equation: no estimate is nearer."""
    mean, covariance = true_law(data.fine_t)
    seen = slice(None, None, BETWEEN)
    of_data = covariance[seen, seen] + NOISE**2 * torch.eye(POINTS, dtype=torch.float64)
    return mean + covariance[:, seen] @ torch.linalg.solve(of_data, data.y - mean[seen])


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


class Posterior(nn.Module):
    """Drift ``h(z) + s v(t, z)``: the prior's, and the diffusion times a network.

    The network sees the time as waves of up to ``waves / 2`` periods over the series.
    """

    def __init__(self, prior: Prior, diffusion: Diffusion, waves: int = 12, width: int = 32):
        super().__init__()
        self.prior, self.diffusion = prior, diffusion
        self.network = nn.Sequential(
            nn.Linear(2 + 2 * waves, width), nn.Tanh(), nn.Linear(width, 2)
        )
        self.waves = math.pi / END * torch.arange(1, waves + 1, dtype=torch.float64)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        phases = t * self.waves
        waves = torch.cat([phases.sin(), phases.cos()]).expand(*z.shape[:-1], -1)
        v = self.network(torch.cat([z, waves], -1))
        return self.prior(t, z) + self.diffusion(t, z) * v


class Prior(nn.Module):
    """Drift ``h(z)``, linear: it starts as a slow rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        nn.init.zeros_(self.linear.bias)
        self.linear.weight.data = torch.tensor([[-0.1, 1.0], [-1.0, -0.1]])

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.linear(z)


class Diffusion(nn.Module):
    """``s``, a positive number a component."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((2,), -1.0))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.log.exp().expand_as(z)


class LatentSDE(nn.Module):
    """Prior, posterior, normal distributions of their starts, and a linear decoder."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.prior, self.diffusion = Prior(), Diffusion()
        self.posterior = Posterior(self.prior, self.diffusion)
        self.starts = nn.Parameter(torch.zeros(2, 2, 2))  # of both: mean, logarithm of deviation
        self.decoder = nn.Linear(2, 1)
        self.double()
        self.sde = NeuralSDE(
            self.posterior,
            self.diffusion,
            (0.0, END),
            EM(),
            prior=self.prior,
            takes_time=True,
            dt=DT,
        )

    def start(self, which: int, paths: int) -> Tensor:
        """Draw ``z(0)`` from the posterior's distribution, 0, or the prior's, 1."""
        mean, log = self.starts[which]
        return mean + log.exp() * torch.randn(paths, 2, dtype=torch.float64)

    def divergence_at_start(self) -> Tensor:
        """Of the two normal distributions of ``z(0)``."""
        (m, a), (n, b) = self.starts
        return (b - a + 0.5 * ((2 * a).exp() + (m - n) ** 2) / (2 * b).exp() - 0.5).sum()

    def decode(self, z: Tensor) -> Tensor:
        """Values ``(T, paths)`` of hidden states ``(T, paths, 2)``."""
        return self.decoder(z)[..., 0]

    def terms(self, data: Data, paths: int) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood of the data, and divergence from the prior."""
        sol = self.sde.solve(self.start(0, paths), logqp=True, saveat=data.t)
        z, divergence = self.sde.split(sol.u)
        off = (self.decode(z) - data.y[:, None]) / NOISE
        likelihood = -0.5 * off**2 - math.log(NOISE * math.sqrt(2 * math.pi))
        return -likelihood.sum(0).mean(), divergence[-1].mean() + self.divergence_at_start()

    @torch.no_grad()
    def sample(self, times: Tensor, paths: int, from_prior: bool = False) -> Tensor:
        """Values ``(T, paths)`` along paths of the posterior, or of the prior."""
        if from_prior:
            prob = SDEProblem(self.prior, self.diffusion, self.start(1, paths), (0.0, END))
            return self.decode(solve(prob, EM(), dt=DT, saveat=times).u)
        return self.decode(self.sde.solve(self.start(0, paths), saveat=times).u)


def train(
    model: LatentSDE, data: Data, iterations: int, paths: int = 32, learning_rate: float = 0.02
) -> list[float]:
    """Maximise the evidence lower bound with Adam; its values.

    The divergence counts in full after the first fifth only: else the prior, which knows nothing
    yet, would hold the posterior back.
    """
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, iterations, eta_min=learning_rate / 20
    )
    bounds = []
    for i in range(iterations):
        off, divergence = model.terms(data, paths)
        loss = off + min(1.0, 5 * (i + 1) / iterations) * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bounds.append(-(off + divergence).item())
    return bounds


# ---------------------------------------------------------------------------------------------
# What it learned
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Distances from the path without noise, root mean square, and other measures of success.

    ``covered`` is the share of times at which that path is within the middle 95 % of the
    posterior's samples; ``period`` and ``decay`` are those of the prior's mean.
    """

    measurements: float
    posterior: float
    best: float
    covered: float
    period: float
    decay: float


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def oscillation(matrix: Tensor) -> tuple[float, float]:
    """Period, infinite where there is none, and rate of decay of ``dz/dt = matrix z``."""
    value = torch.linalg.eigvals(matrix.detach())[0]
    turn = abs(value.imag.item())
    return (2 * math.pi / turn if turn else math.inf), -value.real.item()


def judge(model: LatentSDE, data: Data, paths: int = 1000) -> Result:
    """Compare the model with the truth."""
    values = model.sample(data.fine_t, paths)
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 1)
    period, decay = oscillation(model.prior.linear.weight)
    return Result(
        measurements=rms(data.y - data.x[::BETWEEN]),
        posterior=rms(values.mean(1) - data.x),
        best=rms(best_estimate(data) - data.x),
        covered=((low <= data.x) & (data.x <= high)).double().mean().item(),
        period=period,
        decay=decay,
    )


def draw(path: Path, model: LatentSDE, data: Data, paths: int = 500) -> None:
    """The reconstruction, and samples from the prior beside the law of the truth."""
    import matplotlib.pyplot as plt
    from demo_figures import BLUE, GREY, ORANGE, STYLE

    plt.switch_backend("Agg")
    path.parent.mkdir(parents=True, exist_ok=True)
    t = data.fine_t
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
        titles = ("Reconstruction", "Samples from the prior")
        for ax, title, from_prior in zip(axes, titles, (False, True), strict=True):
            values = model.sample(t, paths, from_prior)
            low, high = values.quantile(ends, 1)
            ax.fill_between(t, low, high, color=BLUE, alpha=0.18, linewidth=0, label="95 % of all")
            ax.plot(t, values[:, :4], color=BLUE, linewidth=0.7, alpha=0.8)
            ax.set(title=title, xlabel="t")
        axes[0].plot(t, data.x, color=GREY, label="without noise")
        axes[0].plot(data.t, data.y, "o", color=ORANGE, markersize=4, label="measured")
        mean, covariance = true_law(t)
        reach = 1.96 * covariance.diagonal().clamp_min(0).sqrt()
        for i, edge in enumerate((mean - reach, mean + reach)):
            label = None if i else "95 % of the true equation"
            axes[1].plot(t, edge, "--", color=GREY, linewidth=1, label=label)
        for ax in axes:
            ax.legend(loc="upper right")
        axes[0].set_ylabel("x")
        figure.savefig(path)
        plt.close(figure)


def main() -> None:
    """Fit, print what was learned, and draw."""
    parser = argparse.ArgumentParser(description="Fit a latent SDE to a short time series.")
    parser.add_argument("--quick", action="store_true", help="a few iterations of everything")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the network is small: more threads only wait for each other
    started = time.perf_counter()
    data, model = measure(), LatentSDE(args.seed)

    iterations = 20 if args.quick else args.iterations
    bounds = train(model, data, iterations)
    last = bounds[-100:]
    print(f"Evidence lower bound after {iterations} iterations: {sum(last) / len(last):.1f}")

    scores = judge(model, data)
    period, decay = oscillation(A)
    print("\nDistance from the path without noise, root mean square")
    print(f"  measurements                    {scores.measurements:.3f}")
    print(f"  mean of the latent SDE          {scores.posterior:.3f}")
    print(f"  best, knows the true equation   {scores.best:.3f}")
    print(f"It is within the posterior's 95 % at {scores.covered:.0%} of the times.")
    print("\nThe prior's equation    learned    true")
    print(f"  period                {scores.period:>7.2f}{period:>8.2f}")
    print(f"  decay                 {scores.decay:>7.2f}{decay:>8.2f}")
    success = scores.posterior <= 0.5 * scores.measurements
    print(f"\nAt most half of the distance of the measurements: {'yes' if success else 'NO'}")

    path = args.output / "latent_sde.png"
    draw(path, model, data)
    print(f"\nFigure: {path}\nDone in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
