"""The cubic spiral of the neural ODE literature: data, model and training, for the examples.

References
----------
Chen, Rubanova, Bettencourt, Duvenaud, Neural Ordinary Differential Equations, NeurIPS 2018; the
same problem motivates Pal, Ma, Shah, Rackauckas, Opening the Blackbox, ICML 2021.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffsolve import ODEProblem, Sensealg, Solution, Tsit5, solve
from diffsolve.nn import NeuralODE

TSPAN = (0.0, 1.5)
U0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
MATRIX = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)

#: What is added to the loss, from the solution and the number of the iteration.
Regularizer = Callable[[Solution, int], Tensor]


@dataclass(frozen=True)
class Data:
    """States ``u`` of the spiral at the times ``t``."""

    t: Tensor
    u: Tensor


@dataclass
class History:
    """What a training did, one entry an iteration.

    ``loss`` is without the regularizer. ``seconds`` is the processor time of the whole training,
    which other programs on the machine disturb less than the time on the clock.
    """

    loss: list[float] = field(default_factory=list)
    forward_nf: list[int] = field(default_factory=list)
    reverse_nf: list[int] = field(default_factory=list)
    seconds: float = 0.0


class Cube(nn.Module):
    """``u**3``, what the network sees of the state."""

    def forward(self, u: Tensor) -> Tensor:
        return u**3


def spiral_data(points: int = 30) -> Data:
    """Accurate states of ``du/dt = u**3 @ MATRIX`` at equidistant times."""
    t = torch.linspace(*TSPAN, points, dtype=torch.float64)
    prob = ODEProblem(lambda t, u: u**3 @ MATRIX, U0, TSPAN)
    return Data(t, solve(prob, Tsit5(), saveat=t, rtol=1e-10, atol=1e-10).u)


def neural_spiral(
    data: Data, seed: int, sensealg: Sensealg | None = None, rtol: float = 1e-7, atol: float = 1e-9
) -> NeuralODE:
    """A neural ODE with one hidden layer, 2-50-2, its weights drawn from ``seed``."""
    torch.manual_seed(seed)
    network = nn.Sequential(Cube(), nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2)).double()
    return NeuralODE(network, TSPAN, Tsit5(), sensealg, saveat=data.t, rtol=rtol, atol=atol)


def mean_squared_error(sol: Solution, data: Data) -> Tensor:
    """The loss: the mean over times and components."""
    return (sol.u - data.u).square().mean()


def train(
    model: NeuralODE,
    data: Data,
    iterations: int,
    learning_rate: float = 0.05,
    regularizer: Regularizer | None = None,
) -> History:
    """Fit the model to the data with Adam, whose learning rate falls along a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, iterations, eta_min=learning_rate / 100
    )
    history = History()
    started = time.process_time()
    for i in range(iterations):
        sol = model.solve(U0)
        mse = mean_squared_error(sol, data)
        loss = mse if regularizer is None else mse + regularizer(sol, i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        history.loss.append(mse.item())
        history.forward_nf.append(sol.stats.nf)
        history.reverse_nf.append(sol.stats.adjoint.nf if sol.stats.adjoint else 0)
    history.seconds = time.process_time() - started
    return history


@torch.no_grad()
def predict(model: NeuralODE) -> Solution:
    """The solution, without a tape."""
    return model.solve(U0)


def prediction_seconds(model: NeuralODE, repeats: int = 20) -> float:
    """Processor time of a prediction: the least of several, which is the one least disturbed."""

    def once() -> float:
        started = time.process_time()
        predict(model)
        return time.process_time() - started

    return min(once() for _ in range(repeats))
