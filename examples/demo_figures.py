"""The figures of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from spiral import U0, Data, spiral_data

STYLE: Any = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
GREY, BLUE, ORANGE, GREEN = "0.25", "#0072b2", "#d55e00", "#009e73"
SENSEALG_STYLES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, ":"))
RUN_STYLES = {"vanilla": ("vanilla", ORANGE), "error": ("error-regularized", BLUE)}


def draw(folder: Path, data: Data, fits: list[Any], runs: dict[str, list[Any]]) -> list[Path]:
    """Write every figure into the folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.switch_backend("Agg")
    first = {name: results[0] for name, results in runs.items()}
    paths = []
    with plt.rc_context(STYLE):
        for name, figure in {
            "fit": fit_figure(data, fits),
            "evaluations": evaluations_figure(first),
            "steps": steps_figure(data, first),
        }.items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
            plt.close(figure)
    return paths


def fit_figure(data: Data, fits: list[Any]) -> Figure:
    """The fitted spirals and the losses of the three sensealgs."""
    figure, (plane, losses) = plt.subplots(1, 2, figsize=(10, 4.4))
    draw_data(plane, data)
    for fit, (color, style) in zip(fits, SENSEALG_STYLES, strict=True):
        u = predict_finely(fit.model)
        plane.plot(u[:, 0], u[:, 1], color=color, linestyle=style, label=fit.name)
        losses.semilogy(fit.history.loss, color=color, linestyle=style, label=fit.name)
    label_plane(plane, f"The spiral after {len(fits[0].history.loss)} iterations")
    losses.set(title="Loss during training", xlabel="iteration", ylabel="mean squared error")
    losses.legend()
    return figure


def evaluations_figure(runs: dict[str, Any]) -> Figure:
    """Cost and loss over the training, with and without the regularizer."""
    figure, (cost, losses) = plt.subplots(1, 2, figsize=(10, 4))
    for name, result in runs.items():
        label, color = RUN_STYLES[name]
        cost.plot(result["history"].forward_nf, color=color, label=label)
        losses.semilogy(result["history"].loss, color=color, label=label)
    cost.set(
        title="Cost of a forward solve", xlabel="iteration", ylabel="evaluations of the network"
    )
    cost.set_ylim(bottom=0)
    cost.legend(loc="lower right")
    losses.set(title="Loss, without the regularizer", xlabel="iteration")
    losses.set_ylabel("mean squared error")
    losses.legend()
    return figure


def steps_figure(data: Data, runs: dict[str, Any]) -> Figure:
    """Where the solver steps along the trained solutions, and what it estimates there."""
    figure = plt.figure(figsize=(10, 5))
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.15))
    plane, sizes = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    errors = figure.add_subplot(grid[1, 1], sharex=sizes)
    draw_data(plane, data)
    for name, result in runs.items():
        label, color = RUN_STYLES[name]
        path = predict_finely(result["model"])
        steps = result["solution"].steps
        label = f"{label}: {len(steps)} steps"
        plane.plot(path[:, 0], path[:, 1], color=color, label=label)
        sizes.step(steps.t, steps.h, where="post", color=color, label=label)
        errors.plot(steps.t, steps.error, ".-", color=color, linewidth=0.8, markersize=4)
    label_plane(plane, "The trained models")
    sizes.set(title="Step size", ylabel="h")
    sizes.set_ylim(bottom=0)
    sizes.tick_params(labelbottom=False)
    sizes.legend()
    errors.axhline(1, color=GREY, linewidth=1, linestyle="--")
    errors.annotate(
        "accepted up to here",
        (0.99, 1),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=GREY,
    )
    errors.set(
        title="Error estimate, in units of the tolerance", xlabel="t", ylabel="E", ylim=(0, 1.25)
    )
    return figure


def draw_data(ax: Axes, data: Data) -> None:
    """The true spiral, and the points of it that the training sees."""
    truth = spiral_data(400).u
    ax.plot(truth[:, 0], truth[:, 1], color="0.75", linewidth=4, label="truth", zorder=1)
    ax.plot(data.u[:, 0], data.u[:, 1], "o", color=GREY, markersize=4, label="data", zorder=3)


def label_plane(ax: Axes, title: str) -> None:
    """Title, axes and legend of a phase plane."""
    ax.set(title=title, xlabel="$u_0$", ylabel="$u_1$", aspect="equal")
    ax.legend(loc="center")


def predict_finely(model: Any) -> torch.Tensor:
    """The model's solution at many times, for a smooth curve."""
    with torch.no_grad():
        return model.solve(U0, saveat=spiral_data(400).t).u
