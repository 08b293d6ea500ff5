"""What the tests of whole native solves share: how they are run, and compared with torch."""

from __future__ import annotations

import pytest
import torch
from gradients import CONTINUOUS, DOUBLE, STEPWISE, label
from torch import nn

from diffsolve import (
    BS3,
    DP5,
    DP8,
    RK4,
    Euler,
    Heun,
    Midpoint,
    ODEProblem,
    Ralston,
    Tsit5,
    Vern6,
    Vern7,
    Vern9,
    solve,
)
from diffsolve.engines.native.programs.lookup import find
from diffsolve.engines.native.programs.recipes import recipe_of
from diffsolve.problems import library
from diffsolve.problems.vector_field import VectorField

REVERSIBLE = [*STEPWISE, *CONTINUOUS]
ENGINES = pytest.mark.parametrize("engine", ["auto", "native"])


def ones(n=1):
    return torch.ones(n, dtype=DOUBLE)


def rate_of(sol):
    """The rate of decay that a solution over [0, 1] shows."""
    return -float(torch.log(sol.u[-1, 0] / sol.u[0, 0]).detach())


def run(f, engine="native", u0=None, p=None, alg=None, **options):
    options = {"rtol": 1e-8, "atol": 1e-8, **options}
    prob = ODEProblem(f, ones() if u0 is None else u0, (0.0, 1.0), p)
    return solve(prob, alg or Vern7(), engine=engine, **options)


def program_of(f, u0=None, p=None):
    field = VectorField.of(ODEProblem(f, ones() if u0 is None else u0, (0.0, 1.0), p))
    return find(
        field, recipe_of(field), 0.0, ones() if u0 is None else u0, 1.0, verify=False
    ).program


# -- beside torch ----------------------------------------------------------------------------------

EPS = 2.0**-52
FIXED = [Euler(), Midpoint(), RK4()]
ADAPTIVE = [Heun(), Ralston(), BS3(), DP5(), Tsit5(), Vern6(), Vern7(), DP8(), Vern9()]
METHODS = [*FIXED, *ADAPTIVE]
# shorter than the problems' own, so that rounding is not magnified by what they are
SPANS = {
    "arenstorf": (0.0, 0.4),
    "fitzhugh_nagumo": (0.0, 4.0),
    "henon_heiles": (0.0, 6.0),
    "linear": (0.0, 3.0),
    "lorenz": (0.0, 1.0),
    "lotka_volterra": (0.0, 3.0),
    "lotka_volterra_time": (0.0, 3.0),
    "pleiades": (0.0, 0.6),
    "rigid_body": (0.0, 4.0),
    "spiral": (0.0, 0.6),
}
STEPS = 40

each_method = pytest.mark.parametrize("alg", METHODS, ids=label)


def named(name, span=None, **changes):
    """A problem of the library over a short span."""
    prob = getattr(library, name)(tspan=span or SPANS[name])
    return prob.remake(**changes) if changes else prob


def both(prob, alg, **options):
    """The solutions of the torch engine and of the native one."""
    reference, got = (solve(prob, alg, engine=e, **options) for e in ("torch", "native"))
    assert got.stats.engine == "native"
    return reference, got


def assert_same_counts(got, reference):
    for name in ("naccept", "nreject", "nf"):
        assert getattr(got.stats, name) == getattr(reference.stats, name), name
    assert got.retcode is reference.retcode
    assert got.t.shape == reference.t.shape
    assert len(got.steps.t) == len(reference.steps.t) == got.stats.naccept


def off(got, reference):
    """Largest difference, relative to the largest entry."""
    got, reference = (x.detach().double() for x in (got, reference))
    assert got.shape == reference.shape
    size = float(reference.abs().max())
    return float((got - reference).abs().max()) / (size or 1.0)


def spread(got, reference):
    """How far apart the steps of two solves are, in step sizes."""
    moved = (got.steps.t - reference.steps.t).abs().max()
    return float(moved / reference.steps.h.abs().min())


def fixed_options(prob, alg, steps=STEPS):
    t0, t1 = (float(t) for t in prob.tspan)
    return {"adaptive": False, "dt": abs(t1 - t0) / steps}


def largest_slope(prob, sol):
    """Largest entry of ``f`` on the way."""
    with torch.no_grad():
        args = () if prob.p is None else (prob.p,)
        return max(
            float(prob.f(t, u, *args).abs().max()) for t, u in zip(sol.t, sol.u, strict=True)
        )


def rounding_of(alg, weights):
    """What rounding of the stages does to a sum with these weights, per unit of ``h f``.

    A stage is a sum with the coefficients of its row, 429 of them in Vern6: ``f`` sees the
    rounding of that (times ``h`` and its slope, together about one), and the weights magnify it.
    """
    rows = abs(alg.tableau.stages.a).sum(1)
    weights = abs(weights)
    return EPS * float(weights.sum() + (weights * (1 + rows)).sum())


def switching(t, u, p):
    return torch.where(t < 0.5, p[0] * u, p[1] * u.roll(1)) + torch.where(t < 0.8, 0 * u, 1.0)


def piecewise(u0, p, span, times):
    """The solution of the switching problem by matrix exponentials."""
    direction = 1.0 if span[1] > span[0] else -1.0
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE)

    def flow(u, start, end):
        middle = (start + end) / 2
        matrix = p[0] * torch.eye(2, dtype=DOUBLE) if middle < 0.5 else p[1] * swap
        full = torch.zeros(3, 3, dtype=DOUBLE)
        full[:2, :2] = matrix
        full[:2, 2] = 0.0 if middle < 0.8 else 1.0
        return (torch.linalg.matrix_exp(full * (end - start)) @ torch.cat([u, u.new_ones(1)]))[:2]

    found, at, u = [], span[0], u0
    for t in sorted({*times, 0.5, 0.8}, reverse=direction < 0):
        u = flow(u, at, t)
        at = t
        if t in times:
            found.append(u)
    return torch.stack(found)


class Tree(nn.Module):
    """A pair of coupled blocks of a dict state."""

    def forward(self, t, u, p):
        x, (y, z) = u["x"], u["yz"]
        return {
            "x": -p["a"] * x + y.sum() * torch.sin(t),
            "yz": (p["b"][0] * y - z * x[0, :2], -z * p["b"][1]),
        }


def tree_problem(span=(0.0, 1.0), requires_grad=False):
    state = {
        "x": torch.tensor([[1.0, 2.0, 3.0]], dtype=DOUBLE),
        "yz": (torch.tensor([0.5, -0.5], dtype=DOUBLE), torch.tensor(2.0, dtype=DOUBLE)),
    }
    p = {"a": torch.tensor(0.8, dtype=DOUBLE), "b": torch.tensor([0.3, 0.9], dtype=DOUBLE)}
    tensors = [state["x"], *state["yz"], p["a"], p["b"]]
    for x in tensors:
        x.requires_grad_(requires_grad)
    return ODEProblem(Tree(), state, span, p), tensors


def find_program(prob):
    field = VectorField.of(prob)
    u0 = field.structure.ravel(prob.u0)
    return find(field, recipe_of(field), float(prob.tspan[0]), u0, 1.0, verify=False).program
