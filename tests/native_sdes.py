"""What the tests of SDEs on the native engine share: problems, and both engines on one path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    SRA1,
    SRIW1,
    EulerHeun,
    LambaEM,
    LambaEulerHeun,
    RKMil,
    RKMilCommute,
    RKMilGeneral,
    SDEProblem,
    solve,
)

DOUBLE = torch.float64
RATES = (0.7, 0.3)


def drift(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[0] * u * torch.cos(t) - 0.1 * torch.sin(u.roll(1, -1))


def diagonal(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[1] * torch.sin(u) + 0.1 * t * u


def scalar(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[1] * u


def column(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return (p[1] * u)[..., None]


def additive(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[1] * (1 + t) * torch.ones_like(u)


def additive_matrix(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    columns = torch.stack([p[1], 0.2 * p[0] * t, p[1] * t * t])
    return torch.ones_like(u)[..., None] * columns


def matrix(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return torch.stack([p[1] * u.roll(1, -1), 0.2 * torch.cos(u), 0.1 * t + 0 * u], -1)


NOISES: dict[str, tuple[Any, str]] = {
    "diagonal": (diagonal, "diagonal"),
    "scalar": (scalar, "scalar"),
    "column": (column, "scalar"),
    "additive": (additive, "additive"),
    "additive matrix": (additive_matrix, "additive"),
    "matrix": (matrix, "general"),
}
#: Every compiled method with every shape of noise that it takes.
CASES = [
    *[(EM(), name) for name in NOISES],
    *[(LambaEM(), name) for name in NOISES],
    *[(EulerHeun(), name) for name in ("diagonal", "matrix")],
    *[(LambaEulerHeun(), name) for name in ("diagonal", "scalar", "matrix")],
    *[(RKMil(kind), name) for kind in ("ito", "stratonovich") for name in ("diagonal", "column")],
    *[(RKMilCommute(kind), "matrix") for kind in ("ito", "stratonovich")],
    *[(RKMilCommute(), name) for name in ("additive", "scalar")],
    (RKMilGeneral(), "diagonal"),
    *[(alg, name) for alg in (SRA1(), SOSRA()) for name in ("additive", "additive matrix")],
    *[(alg, name) for alg in (SRIW1(), SOSRI()) for name in ("diagonal", "scalar", "column")],
]


def label(x: Any) -> str:
    return x if isinstance(x, str) else repr(x)


def batch(rows: int, d: int = 2, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.linspace(0.5, 1.5, rows * d, dtype=dtype).view(rows, d)


def problem(noise: str = "diagonal", alg: Any = None, rows: int = 13, **changes: Any) -> SDEProblem:
    """With noise of a shape, in the sense that a method solves it."""
    g, kind = NOISES[noise]
    u0 = batch(rows)
    sense = "ito" if alg is None else min(alg.interpretation)
    p = torch.tensor(RATES, dtype=DOUBLE)
    prob = SDEProblem(drift, g, u0, (0.0, 1.0), p, noise=kind, interpretation=sense)
    return prob.remake(**changes) if changes else prob


def both(prob: SDEProblem, alg: Any, **options: Any) -> tuple[Any, Any]:
    """The solutions of the torch engine and of the native one."""
    options = {"seed": 5, **options}
    reference, got = (solve(prob, alg, engine=e, **options) for e in ("torch", "native"))
    assert got.stats.engine == "native"
    return reference, got


def off(got: Any, reference: Any) -> float:
    """Largest difference, relative to the largest entry."""
    if isinstance(got, dict):
        return max(off(got[key], reference[key]) for key in reference)
    got, reference = (x.detach().double() for x in (got, reference))
    assert got.shape == reference.shape
    if not got.numel():
        return 0.0
    return float((got - reference).abs().max()) / (float(reference.abs().max()) or 1.0)


def assert_same(got: Any, reference: Any, within: float = 1e-12) -> None:
    """The same steps, values, estimates and path; ``within`` is what rounding may have grown to."""
    assert got.retcode is reference.retcode
    for name in ("naccept", "nreject", "ng"):
        assert getattr(got.stats, name) == getattr(reference.stats, name), name
    assert off(got.t, reference.t) <= within
    assert off(got.u, reference.u) <= within
    for name in ("t", "h", "error", "error_norm", "stiffness"):
        assert off(getattr(got.steps, name), getattr(reference.steps, name)) <= 100 * within, name
    mine, theirs = got.noise, reference.noise
    assert mine.serial == theirs.serial and mine.pieces == theirs.pieces
    assert len(mine.divisions) == len(theirs.divisions)
    times = (torch.tensor(x.times, dtype=DOUBLE) for x in (mine, theirs))
    assert off(*times) <= within
