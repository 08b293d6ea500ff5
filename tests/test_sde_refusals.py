"""What is refused of SDEs, before any step: one table of cases and the error each must give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sdes import DOUBLE, linear, two_noises
from torch import Tensor

from diffsolve import (
    EM,
    SOSRA,
    SOSRI,
    DiscreteAdjoint,
    EulerHeun,
    LambaEM,
    LambaEulerHeun,
    ODEProblem,
    RKMil,
    Rodas5P,
    SDEProblem,
    Tsit5,
    VirtualBrownianTree,
    solve,
)


@dataclass(frozen=True)
class Case:
    """Input that is refused: what was passed, the error, and words that its message must hold."""

    what: str
    error: type[Exception]
    words: str
    problem: dict[str, Any]
    options: dict[str, Any]


def bad_problem(what: str, error: type[Exception], words: str, **changes: Any) -> Case:
    return Case(what, error, words, changes, {})


def bad_option(what: str, error: type[Exception], words: str, **options: Any) -> Case:
    return Case(what, error, words, {}, options)


def for_noise(what: str, alg: Any, noise: str, interpretation: str, words: str) -> Case:
    """A method for another noise or integral; the message names what fits."""
    shapes: dict[str, Callable] = {
        "general": two_noises,
        "additive": lambda t, u, p: torch.ones_like(u),
    }
    changes: dict[str, Any] = {"noise": noise, "interpretation": interpretation}
    if noise in shapes:
        changes["g"] = shapes[noise]
    return Case(what, ValueError, words, changes, {"alg": alg})


def leaf(x: Any) -> Tensor:
    return torch.tensor(x, dtype=DOUBLE, requires_grad=True)


def returning(x: Any) -> Callable:
    return lambda t, u, p: x(u) if callable(x) else x


CASES = [
    # the problem
    bad_problem("g not callable", TypeError, "g callable g(t, u, p) int", g=3),
    bad_problem("unknown noise", ValueError, 'noise "diagonal" "general" white', noise="white"),
    bad_problem("unknown integral", ValueError, 'interpretation "ito" Ito', interpretation="Ito"),
    bad_problem("NaN in u0", ValueError, "u0 NaN", u0=torch.tensor([math.nan])),
    bad_problem("complex u0", ValueError, "u0 complex real view_as_real",
                u0=torch.ones(1, dtype=torch.complex64)),
    bad_problem("three times", ValueError, "tspan two", tspan=(0.0, 1.0, 2.0)),
    # what g returns
    bad_problem("g of no p", TypeError, "g callable g(t, u, p)", g=lambda t, u: u),
    bad_problem("g gives None", ValueError, "g(t, u, p) None tensor", g=returning(None)),
    bad_problem("g gives a float", ValueError, "g(t, u, p) float tensor", g=returning(0.1)),
    bad_problem("wrong dtype", ValueError, "g(t, u, p) float32 float64",
                g=returning(lambda u: u.float())),
    bad_problem("wrong device", ValueError, "g(t, u, p) meta cpu",
                g=returning(lambda u: torch.empty_like(u, device="meta"))),
    bad_problem("number for diagonal", ValueError, "g(t, u, p) shape () (2, 3) diagonal",
                g=returning(lambda u: u.sum())),
    bad_problem("matrix for diagonal", ValueError, 'g(t, u, p) (2, 3, 2) diagonal "general"',
                g=two_noises),
    bad_problem("vector for general", ValueError, 'g(t, u, p) general (*u.shape, m) "diagonal"',
                noise="general"),
    bad_problem("no batch for general", ValueError, "g(t, u, p) (3, 2) (2, 3) (*u.shape, m)",
                noise="general", g=returning(torch.ones(3, 2, dtype=DOUBLE))),
    bad_problem("two motions for scalar", ValueError, "g(t, u, p) scalar (2, 3, 2)",
                noise="scalar", g=two_noises),
    bad_problem("no motions", ValueError, "g(t, u, p) (2, 3, 0)",
                noise="general", g=returning(lambda u: u[..., None][..., :0])),
    bad_problem("additive of the state", ValueError, 'additive depends state "diagonal" "general"',
                noise="additive"),
    bad_problem("additive matrix of the state", ValueError, "additive depends state",
                noise="additive", g=two_noises),
    bad_problem("tensor for a dict", ValueError, "g(t, u, p) Tensor structure",
                u0={"a": torch.ones(2)}, f=returning(lambda u: u), g=returning(torch.ones(2))),
    bad_problem("unlike leaves", ValueError, "g(t, u, p) general m",
                u0=[torch.ones(1), torch.ones(1)], noise="general", f=returning(lambda u: u),
                g=returning([torch.ones(1, 2), torch.ones(1, 3)])),
    bad_problem("g changes u", ValueError, "g state u in place copy", g=lambda t, u, p: u.mul_(2)),
    bad_problem("g raises", ZeroDivisionError, "", g=lambda t, u, p: u / (1 // 0)),
    # methods
    bad_option("class for alg", TypeError, "alg LambaEM() SOSRI()", alg=EM),
    bad_option("name for alg", TypeError, "alg SOSRI() 'euler'", alg="euler"),
    bad_option("ODE method", ValueError, "Tsit5() ODEs Ito diagonal SOSRI() EM()", alg=Tsit5()),
    bad_option("implicit ODE method", ValueError, "Rodas5P() ODEs SOSRI()", alg=Rodas5P()),
    bad_option("fixed step of no size", ValueError, "EM error dt=", alg=EM()),
    for_noise("Ito method", EM(), "diagonal", "stratonovich", "EM() Ito LambaEulerHeun() RKMil"),
    for_noise("Stratonovich method", EulerHeun(), "diagonal", "ito", "EulerHeun() LambaEM() SOSRI"),
    for_noise("diagonal method", SOSRI(), "general", "ito", "SOSRI() diagonal general LambaEM()"),
    for_noise("additive method", SOSRA(), "diagonal", "ito", "SOSRA() additive SOSRI()"),
    for_noise("Milstein", RKMil(), "general", "ito", "RKMil general LambaEM()"),
    for_noise("Milstein's integral", RKMil("ito"), "diagonal", "stratonovich", "RKMil"),
    for_noise("Lamba's integral", LambaEM(), "general", "stratonovich", "LambaEM() EulerHeun()"),
    for_noise("Heun's integral", LambaEulerHeun(), "general", "ito", "LambaEulerHeun() LambaEM()"),
    # noise
    bad_option("float seed", TypeError, "seed integer 1.5", seed=1.5),
    bad_option("boolean seed", TypeError, "seed integer True", seed=True),
    bad_option("float seeds", TypeError, "seed integers float64", seed=torch.ones(2, dtype=DOUBLE)),
    bad_option("seeds of another batch", ValueError, "seed (3,) (2,)", seed=torch.arange(3)),
    bad_option("seed of 65 bits", ValueError, "seed 64", seed=1 << 64),
    bad_option("noise and seed", ValueError, "noise seed drop", seed=1,
               noise=solve(linear(2, 3), EM(), dt=1.0, seed=0).noise),
    bad_option("noise of another batch", ValueError, "4 paths 3 Brownian 2 paths",
               noise=solve(linear(4, 3), EM(), dt=1.0, seed=0).noise),
    bad_option("a tree that is too short", ValueError, "covers 0.5 t = 1",
               noise=VirtualBrownianTree(1, 0.0, 0.5, rows=2, m=3)),
    bad_option("noise that is a tensor", TypeError, "noise sol.noise", noise=torch.randn(3)),
    # gradients
    Case("gradient by tspan", ValueError, "tspan saveat gradient Brownian detach",
         {"tspan": (0.0, leaf(1.0))}, {}),
    bad_option("gradient by saveat", ValueError, "tspan saveat gradient Brownian detach",
               saveat=leaf([0.5, 1.0])),
    bad_option("step size on the tape", ValueError, "through_step_size DiscreteAdjoint()",
               sensealg=DiscreteAdjoint(through_step_size=True)),
    bad_option("name for sensealg", TypeError, "sensealg 'adjoint'", sensealg="adjoint"),
    bad_option("first step with a gradient", ValueError, "dt gradient", dt=leaf(0.1)),
    # engines
    bad_option("given path on the native engine", ValueError, 'engine="native" cannot',
               engine="native", noise=solve(linear(2, 3), EM(), dt=1.0, seed=0).noise),
    bad_option("unknown engine", ValueError, "engine auto torch 'fast'", engine="fast"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_refused(case: Case) -> None:
    options = {"maxiters": 1000, "alg": None, **case.options}
    with pytest.raises(case.error) as caught:
        solve(linear(2, 3, **case.problem), **options)
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    missing = [w for w in case.words.split() if w.lower() not in said.lower()]
    assert not missing, f"{said!r} does not mention {missing}"


def test_wrong_methods_are_refused_before_any_work() -> None:
    def never(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        raise AssertionError("f or g was called")

    for alg in (Tsit5(), EulerHeun(), SOSRA()):
        with pytest.raises(ValueError):
            solve(linear(f=never, g=never), alg, dt=0.1)


@pytest.mark.parametrize("option", [{"seed": 1}, {"noise": "path"}], ids=["seed", "noise"])
def test_an_ode_has_no_noise(option) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} is for an SDEProblem"):
        solve(ODEProblem(lambda t, u: -u, torch.ones(1), (0.0, 1.0)), **option)


@pytest.mark.parametrize("alg", [EM(), SOSRI(), LambaEulerHeun()], ids=repr)
def test_an_ode_refuses_methods_for_sdes(alg) -> None:
    with pytest.raises(ValueError, match=r"is a method for SDEs.*Tsit5\(\)"):
        solve(ODEProblem(lambda t, u: -u, torch.ones(1), (0.0, 1.0)), alg, dt=0.1)


def test_problem_must_be_one() -> None:
    with pytest.raises(TypeError, match="ODEProblem or an SDEProblem"):
        solve(3)  # type: ignore[arg-type]


def test_a_shape_that_changes_on_the_way_is_refused() -> None:
    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return u if t < 0.5 else u[..., None].expand(*u.shape, 2)

    with pytest.raises(ValueError, match=r"\(2, 3, 2\).*was.*\(2, 3\).* at first"):
        solve(linear(2, 3, g=g), EM(), dt=0.1)


def test_gradients_off_inside_g() -> None:
    def g(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        with torch.no_grad():
            return p[1] * u

    with pytest.raises(RuntimeError, match="g switches them off"):
        solve(linear(p=leaf([0.1, 0.2]), g=g), EM(), dt=0.1)


def test_times_may_have_gradients_where_none_are_recorded() -> None:
    prob = linear(tspan=(0.0, leaf(1.0)))
    with torch.no_grad():
        sol = solve(prob, EM(), dt=0.1, saveat=leaf([0.5, 1.0]))
    assert sol.success and not sol.u.requires_grad


def test_dense_output_has_no_derivative() -> None:
    sol = solve(linear(), LambaEM(), rtol=0.1, atol=0.1, seed=0)
    with pytest.raises(ValueError, match="no derivative by time"):
        sol(0.5, derivative=1)
    with pytest.raises(ValueError, match="no derivative by time"):
        sol(leaf(0.5))


@pytest.mark.parametrize("name", ["error", "error_norm", "stiffness"])
def test_estimates_that_a_method_lacks_refuse_gradients(name) -> None:
    prob = linear(p=leaf([0.1, 0.2]))
    sol = solve(prob, EM(), dt=0.1, seed=0)
    with pytest.raises(RuntimeError, match=rf"steps\.{name} has no gradient.*EM.*LambaEM"):
        getattr(sol.steps, name).sum().backward()


def test_second_derivatives_need_the_tape() -> None:
    p = leaf([0.1, 0.2])
    sol = solve(linear(p=p), EM(), dt=0.1, seed=0)
    (grad,) = torch.autograd.grad(sol.u.sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="tape=True"):
        grad.sum().backward()


def test_problem_is_frozen_and_remade() -> None:
    prob = linear()
    with pytest.raises(AttributeError):
        prob.noise = "general"  # type: ignore[misc]
    other = prob.remake(noise="scalar")
    assert (other.noise, prob.noise, other.f) == ("scalar", "diagonal", prob.f)
    with pytest.raises(TypeError):
        SDEProblem(prob.f, prob.g, prob.u0, prob.tspan, prob.p, "scalar")  # type: ignore[misc]
