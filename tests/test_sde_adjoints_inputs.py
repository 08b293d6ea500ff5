"""Adjoints of SDEs: every kind of state and parameter, and what is refused."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from gradients import assert_near, leaf
from torch import Tensor, nn

import diffsolve
from diffsolve import (
    EM,
    BacksolveAdjoint,
    BacksolveWarning,
    DiscreteAdjoint,
    EulerHeun,
    Heun,
    ImplicitEM,
    InterpolatingAdjoint,
    LambaEM,
    LambaEulerHeun,
    ODEProblem,
    ReversibleAdjoint,
    SDEProblem,
    SolveError,
    Tsit5,
)
from diffsolve.solvers.stochastic.reversible import ReversibleHeun

solve = functools.partial(diffsolve.solve, engine="torch")
DOUBLE = torch.float64
STRATONOVICH = "stratonovich"
CONTINUOUS = [BacksolveAdjoint(), InterpolatingAdjoint()]
each = pytest.mark.parametrize("sensealg", CONTINUOUS, ids=lambda x: type(x).__name__)


def compare(
    make: Callable[[], tuple[SDEProblem, list[Tensor]]],
    sensealg: Any,
    alg: Any = None,
    loss: Callable[[Any], Tensor] = lambda u: (u**2).sum(),
    rtol: float = 0.02,
    dt: float = 1 / 64,
) -> list[Tensor]:
    """Gradients near those of the discrete adjoint, in shape and dtype of their tensors."""
    found = []
    for x in (sensealg, DiscreteAdjoint()):
        prob, tensors = make()
        sol = solve(prob, alg or EulerHeun(), sensealg=x, dt=dt, saveat=[0.5, 1.0], seed=7)
        loss(sol.u).backward()
        found.append([x.grad for x in tensors])
    for got, expected in zip(*found, strict=True):
        assert got is not None
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert_near(got, expected, rtol)
    return found[0]


def stratonovich(f: Any, g: Any, u0: Any, p: Any = None, **options: Any) -> SDEProblem:
    return SDEProblem(f, g, u0, (0.0, 1.0), p, interpretation=STRATONOVICH, **options)


def one_rate(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[0] * torch.sin(u)


def another(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[1] * torch.cos(u)


# -- states ---------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 2), (2, 3, 2), (2, 1, 2, 1)], ids=str)
def test_shapes_of_the_state(shape, sensealg):
    def make():
        u0 = torch.full(shape, 0.7, dtype=DOUBLE, requires_grad=True)
        p = leaf([0.5, 0.4])
        return stratonovich(one_rate, another, u0, p), [u0, p]

    compare(make, sensealg)


@each
@pytest.mark.parametrize("noise", ["diagonal", "general", "scalar"])
def test_a_pytree_is_one_path(noise, sensealg):
    columns = {"diagonal": 0, "scalar": 1, "general": 2}[noise]

    def g(t, u, p):
        both = {"x": p["b"] * u["y"].sum() * torch.ones(2, dtype=DOUBLE), "y": p["b"] * u["y"]}
        if not columns:
            return both
        return {k: torch.stack([v * (i + 1) for i in range(columns)], -1) for k, v in both.items()}

    def make():
        u0 = {"x": leaf([0.5, 1.0]), "y": leaf([[0.3], [0.2], [0.1]])}
        p = {"a": leaf(0.5), "b": leaf(0.4)}

        def f(t, u, p):
            return {"x": p["a"] * u["x"], "y": -u["y"] * u["x"].sum()}

        prob = stratonovich(f, g, u0, p, noise=noise)
        return prob, [*u0.values(), *p.values()]

    compare(make, sensealg, loss=lambda u: (u["x"] ** 2).sum() + u["y"].sum(), dt=1 / 256)


@each
def test_single_precision(sensealg):
    def make():
        u0 = torch.full((5, 2), 0.7, requires_grad=True)
        p = leaf([0.5, 0.4], dtype=torch.float32)
        return stratonovich(one_rate, another, u0, p), [u0, p]

    compare(make, sensealg)
    compare(lambda: _with(make(), "ito"), sensealg, EM(), rtol=0.06)


@each
def test_autocast(sensealg):
    torch.manual_seed(2)
    body, g = (nn.Linear(3, 3) for _ in range(2))
    u0 = torch.randn(8, 3)
    prob = SDEProblem(
        lambda t, u: torch.tanh(body(u)).float(),
        lambda t, u: 0.3 * torch.tanh(g(u)).float(),
        u0,
        (0.0, 1.0),
    )
    tensors = [*body.parameters(), *g.parameters()]
    found = []
    for x in (sensealg, DiscreteAdjoint()):
        with torch.autocast("cpu", torch.bfloat16):
            sol = solve(prob, EM(), sensealg=x, dt=1 / 64, saveat=[1.0], seed=7)
        found.append(torch.autograd.grad((sol.u**2).mean(), tensors))
    for got, expected in zip(*found, strict=True):
        assert_near(got, expected, 0.1)


def _with(made: tuple[SDEProblem, list[Tensor]], interpretation: str) -> Any:
    prob, tensors = made
    return prob.remake(interpretation=interpretation), tensors


# -- parameters -----------------------------------------------------------------------------------


@each
def test_captured_tensors_of_both_functions(sensealg):
    def make():
        a, b, c = leaf(0.5), leaf([0.4, 0.3]), leaf(0.2)
        prob = stratonovich(
            lambda t, u: -a * u + c, lambda t, u: b * torch.sin(u) + c, torch.ones(4, 2).double()
        )
        return prob, [a, b, c]

    compare(make, sensealg)


@each
def test_modules(sensealg):
    class Rate(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, t, u):
            return torch.tanh(self.linear(u))

    def make():
        torch.manual_seed(3)
        f, g = Rate().double(), Rate().double()
        prob = stratonovich(f, g, torch.ones(4, 2).double())
        return prob, [*f.parameters(), *g.parameters()]

    compare(make, sensealg)


@each
def test_parameters_that_were_computed(sensealg):
    def make():
        raw = leaf([0.1, -0.3])
        p = raw.exp() / 2
        return stratonovich(one_rate, another, torch.ones(4, 2).double(), p), [raw]

    compare(make, sensealg)


@each
def test_a_complex_parameter(sensealg):
    def make():
        p = torch.tensor([0.3 + 0.4j, 0.2 - 0.1j], dtype=torch.complex128, requires_grad=True)
        prob = stratonovich(
            lambda t, u, p: (p[0] * u).real,
            lambda t, u, p: (p[1] * (1 + 1j) * u).imag,
            torch.ones(4, 2).double(),
            p,
        )
        return prob, [p]

    compare(make, sensealg)


@each
@pytest.mark.parametrize("unused", ["f", "g", "neither"])
def test_functions_without_gradients(unused, sensealg):
    # only one of them depends on what is differentiated
    def make():
        p = leaf([0.5, 0.4])
        q = p.detach()
        prob = stratonovich(
            lambda t, u: one_rate(t, u, q if unused == "f" else p),
            lambda t, u: another(t, u, q if unused == "g" else p),
            torch.ones(4, 2).double(),
        )
        return prob, [p]

    (grad,) = compare(make, sensealg)
    assert (grad[0] == 0, grad[1] == 0) == (unused == "f", unused == "g")


@each
def test_noise_that_is_a_constant(sensealg):
    def make():
        u0 = torch.ones(4, 2, dtype=DOUBLE, requires_grad=True)
        prob = SDEProblem(lambda t, u: -u, lambda t, u: torch.ones_like(u), u0, (0.0, 1.0))
        return prob, [u0]

    (grad,) = compare(make, sensealg, EM(), dt=1 / 256)
    # the flow's derivative, exp(-t), whatever the noise
    assert torch.isfinite(grad).all()


@each
def test_a_branch_that_uses_another_parameter_later(sensealg):
    def make():
        p, q = leaf(0.5), leaf(0.7)

        def f(t, u):
            return (p if t < 0.6 else q) * u

        return stratonovich(f, lambda t, u: 0.3 * u, torch.ones(4, 2).double()), [p, q]

    grads = compare(make, sensealg)
    assert all(g != 0 for g in grads)


@each
def test_a_new_parameter_of_the_noise_later(sensealg):
    def make():
        p, q = leaf(0.5), leaf(0.7)

        def g(t, u):
            return (p if t < 0.6 else q) * torch.sin(u)

        return stratonovich(lambda t, u: -u, g, torch.ones(4, 2).double()), [p, q]

    grads = compare(make, sensealg)
    assert all(g != 0 for g in grads)


@each
def test_nothing_of_the_loss(sensealg):
    prob = stratonovich(one_rate, another, torch.ones(4, 2).double(), leaf([0.5, 0.4]))
    sol = solve(prob, EulerHeun(), sensealg=sensealg, dt=0.1, seed=1)
    (0 * sol.u).sum().backward()
    assert torch.equal(prob.p.grad, torch.zeros(2, dtype=DOUBLE))


# -- what is refused ------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """``sin``, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return torch.sin(u)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        return bar * torch.cos(ctx.saved_tensors[0])


def once(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[1] * Once.apply(u)


def of_others(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p[1] * (u + u.flip(0))


def backward(sol: Any) -> None:
    (sol.u**2).sum().backward()


@dataclass(frozen=True)
class Refused:
    """A solve that is refused, or its gradient: the error, and words of its message."""

    what: str
    error: type[Exception]
    words: str
    sensealg: Any
    alg: Any = field(default_factory=EM)
    problem: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=lambda: {"dt": 0.1})
    then: Callable[[Any], Any] | None = None


BACK, ALONG = CONTINUOUS
OF_STRATONOVICH = {"interpretation": STRATONOVICH}
LOOSE = {"rtol": 0.1, "atol": 0.1}
REFUSED = [
    # the solver's own numbers belong to its steps
    *(
        Refused(
            f"gradient of steps.{name}, {type(x).__name__}", RuntimeError,
            f"sol.steps.{name} no gradient DiscreteAdjoint", x, LambaEM(), options=LOOSE,
            then=lambda sol, name=name: getattr(sol.steps, name).sum().backward(),
        )
        for x in CONTINUOUS
        for name in ("error", "error_norm", "stiffness")
    ),
    *(
        Refused(
            f"gradient of sol(t), {type(x).__name__}", RuntimeError, "sol(t) no gradient saveat",
            x, then=lambda sol: sol(0.5).sum().backward(),
        )
        for x in [*CONTINUOUS, DiscreteAdjoint()]
    ),
    Refused(
        "gradient of sol(t), reversible", RuntimeError, "sol(t) no gradient saveat",
        ReversibleAdjoint(), ReversibleHeun(), OF_STRATONOVICH,
        then=lambda sol: sol(0.5).sum().backward(),
    ),
    # methods
    Refused(
        "reverse steps of an Ito method", ValueError,
        "EM() Stratonovich EulerHeun() LambaEulerHeun()", BacksolveAdjoint(alg=EM()),
    ),
    Refused(
        "reverse steps of an ODE method", ValueError, "Tsit5() EulerHeun()",
        InterpolatingAdjoint(alg=Tsit5()),
    ),
    Refused(
        "fixed reverse steps behind adaptive ones", ValueError,
        "EulerHeun no error estimate adaptive", BacksolveAdjoint(alg=EulerHeun()), LambaEM(),
        options={},
    ),
    Refused(
        "explicit steps of the size of implicit ones", ValueError, "ImplicitEM() explicit Discrete",
        ALONG, ImplicitEM(), options={"dt": 0.1, "adaptive": False},
    ),
    Refused(
        "reversible adjoint, another method", ValueError, "EM() ReversibleHeun() checkpoints",
        ReversibleAdjoint(),
    ),
    # functions
    *(
        Refused(
            f"rows that depend on each other, {type(x).__name__}", ValueError,
            "noise of a path another path DiscreteAdjoint() general", x,
            problem={"g": of_others}, then=backward,
        )
        for x in CONTINUOUS
    ),
    Refused(
        "no second derivative of g", RuntimeError,
        "lose gradient second derivatives of g DiscreteAdjoint()", ALONG, problem={"g": once},
        then=backward,
    ),
    # losses
    Refused(
        "NaN in the loss", RuntimeError, "NaN cotangent loss", BACK,
        then=lambda sol: (sol.u.sum() * float("nan")).backward(),
    ),
    Refused(
        "second derivatives", RuntimeError, "second derivatives tape=True", ALONG,
        then=lambda sol: torch.autograd.grad(
            torch.autograd.grad((sol.u**2).sum(), sol.p, create_graph=True)[0].sum(), sol.p
        ),
    ),
    # engines
    *(
        Refused(
            f"native engine, {x!r}", ValueError, "native cannot", x, alg,
            {} if alg.interpretation == {"ito"} else OF_STRATONOVICH,
            {"dt": 0.1, "engine": "native", "adaptive": False},
        )
        for x, alg in ((BACK, EM()), (ReversibleAdjoint(), ReversibleHeun()))
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.what)
def test_refused(case):
    p = leaf([0.4, 0.5])
    options = {"f": one_rate, "g": another, **case.problem}
    f, g = options.pop("f"), options.pop("g")
    prob = SDEProblem(f, g, torch.ones(4, 2).double(), (0.0, 1.0), p, **options)
    with pytest.raises(case.error) as caught:
        sol = solve(prob, case.alg, sensealg=case.sensealg, seed=1, **case.options)
        assert case.then is not None
        sol.p = p
        case.then(sol)
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    missing = [word for word in case.words.split() if word not in said]
    assert not missing, f"{missing} not in {said!r}"


ODE_REFUSED = [
    (BacksolveAdjoint(alg=EulerHeun()), "EulerHeun() SDEs"),
    (InterpolatingAdjoint(alg=LambaEulerHeun()), "LambaEulerHeun() SDEs"),
    (ReversibleAdjoint(), "ReversibleHeun() Heun()"),
]


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("sensealg, words", ODE_REFUSED, ids=lambda x: repr(x))
def test_refused_of_odes(sensealg, words, engine):
    prob = ODEProblem(lambda t, u: -u, leaf([1.0]), (0.0, 1.0))
    with pytest.raises(ValueError) as caught:
        solve(prob, Heun(), sensealg=sensealg, engine=engine, dt=0.1, adaptive=False)
    assert all(word in str(caught.value) for word in words.split())


@pytest.mark.parametrize("which", ["f", "g"])
@pytest.mark.parametrize("sensealg", CONTINUOUS, ids=repr)
def test_functions_that_changed(which, sensealg):
    scale = {"f": 1.0, "g": 1.0}
    p = leaf([0.4, 0.5])
    prob = SDEProblem(
        lambda t, u, p: scale["f"] * one_rate(t, u, p),
        lambda t, u, p: scale["g"] * another(t, u, p),
        torch.ones(4, 2).double(),
        (0.0, 1.0),
        p,
    )
    sol = solve(prob, EM(), sensealg=sensealg, dt=0.1, seed=1)
    scale[which] = 1.001
    with pytest.raises(RuntimeError, match=rf"^{which} gives other values"):
        backward(sol)


# -- reconstructions ------------------------------------------------------------------------------


def contracting(rate: float) -> SDEProblem:
    u0 = torch.ones(4, 1, dtype=DOUBLE, requires_grad=True)

    def g(t, u):
        return 0.3 * torch.ones_like(u)

    return SDEProblem(lambda t, u: -rate * u, g, u0, (0.0, 1.0), noise="additive")


def test_a_bad_reconstruction_is_told():
    sol = solve(contracting(20.0), EM(), sensealg=BacksolveAdjoint(), dt=0.01, saveat=[1.0], seed=1)
    with pytest.warns(BacksolveWarning, match="reconstructed .* tolerances"):
        backward(sol)


@pytest.mark.parametrize("sensealg", [BacksolveAdjoint(), InterpolatingAdjoint()], ids=repr)
def test_a_good_one_is_not(sensealg):
    prob = contracting(20.0) if sensealg == ALONG else contracting(1.0)
    sol = solve(prob, EM(), sensealg=sensealg, dt=0.01, saveat=[1.0], seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BacksolveWarning)
        backward(sol)


@pytest.mark.parametrize("sensealg", CONTINUOUS, ids=repr)
def test_a_reverse_solve_that_fails(sensealg):
    prob = SDEProblem(one_rate, another, torch.ones(4, 2).double(), (0.0, 1.0), leaf([0.4, 0.5]))
    strict = replace(sensealg, rtol=1e-12, atol=1e-12)
    sol = solve(prob, LambaEM(), sensealg=strict, seed=1, rtol=1e-1, atol=1e-1, dtmin=1e-3)
    with pytest.raises(SolveError, match=f"reverse solve of {type(sensealg).__name__} failed"):
        backward(sol)
