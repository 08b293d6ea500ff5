"""Controllers against numbers worked out by hand, and the properties that the loop relies on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffsolve as ds
from diffsolve import IController, PIController, PIDController
from diffsolve.solvers.controllers import Controller

CONTROLLERS = [
    IController(),
    IController.for_order(8),
    PIController(),
    PIController.for_order(3),
    PIDController(),
    PIDController.for_order(3),
]
NAMES = ["I", "I-order-8", "PI", "PI-order-3", "PID", "PID-order-3"]
each = pytest.mark.parametrize("controller", CONTROLLERS, ids=NAMES)


@pytest.mark.parametrize(
    ("controller", "error", "memory", "factor", "after"),
    [
        (IController(exponent=0.2), 0.5, (), 0.9 * 2**0.2, ()),
        (IController.for_order(8), 0.5, (), 0.9 * 2 ** (1 / 8), ()),
        (PIController.for_order(5), 0.5, (0.1,), 0.9 * 2**0.14 * 0.1**0.08, (0.5,)),
        # Hairer's dopri5, after a step with the smallest error that is remembered
        (PIController(beta1=0.17, beta2=0.04), 0.5, (1e-4,), 0.9 * 2**0.17 * 1e-4**0.04, (0.5,)),
        # an error below 1e-4 is remembered as 1e-4
        (PIController.for_order(5), 1e-5, (0.1,), 0.9 * 1e5**0.14 * 0.1**0.08, (1e-4,)),
        # x = 2**(1/90) * 4**(1/45) * 8**(1/90) = 2**(8/90)
        (
            PIDController(),
            0.5,
            (0.25, 0.125),
            0.9 * (1 + math.atan(2 ** (8 / 90) - 1)),
            (0.5, 0.25),
        ),
    ],
    ids=["I", "I-order-8", "PI", "dopri5", "PI-tiny-error", "PID"],
)
def test_accepted(
    controller: Controller, error: float, memory: tuple, factor: float, after: tuple
) -> None:
    accept, got, kept = controller.propose(error, memory)
    assert accept
    assert got == pytest.approx(factor, rel=1e-6)
    assert kept == after


@pytest.mark.parametrize(
    ("controller", "error", "memory", "factor"),
    [
        (IController(exponent=0.2), 2.0, (), 0.9 * 2**-0.2),
        # without the proportional part: what went before says nothing about this failure
        (PIController.for_order(5), 2.0, (0.1,), 0.9 * 2**-0.14),
        (PIDController(), 2.0, (1.0, 1.0), 0.9 * 2**-0.2),
    ],
    ids=["I", "PI", "PID"],
)
def test_rejected(controller: Controller, error: float, memory: tuple, factor: float) -> None:
    accept, got, kept = controller.propose(error, memory)
    assert not accept
    assert got == pytest.approx(factor, rel=1e-12)
    assert kept == memory  # a rejected step leaves no trace


@pytest.mark.parametrize(
    ("controller", "k"),
    [(PIController.for_order(3), 3), (PIController(beta1=0.17, beta2=0.04), 5)],
    ids=["PI", "dopri5"],
)
def test_first_step_is_judged_by_integral_control(controller: PIController, k: int) -> None:
    # there is no error before it to compare with
    _, factor, memory = controller.propose(0.5, controller.start())
    assert factor == pytest.approx(0.9 * 2 ** (1 / k))
    assert memory == (0.5,)


@pytest.mark.parametrize("order", [2, 3, 5, 8])
def test_pi_exponents(order: int) -> None:
    controller = PIController.for_order(order)
    assert controller.beta1 == pytest.approx(7 / (10 * order))
    assert controller.beta2 == pytest.approx(2 / (5 * order))


@pytest.mark.parametrize("name", ["Heun", "Ralston", "BS3", "Tsit5", "Vern6", "Vern7", "Vern9"])
def test_methods_default_to_pi(name: str) -> None:
    alg = getattr(ds, name)()
    assert alg.default_controller() == PIController.for_order(alg.order)


@each
@given(small=st.floats(1e-12, 1e6), large=st.floats(1e-12, 1e6))
def test_larger_error_gives_no_larger_step(
    controller: Controller, small: float, large: float
) -> None:
    small, large = sorted((small, large))
    memory = controller.start()
    assert controller.propose(large, memory)[1] <= controller.propose(small, memory)[1] * (
        1 + 1e-12
    )


@each
@given(
    error=st.one_of(st.floats(0, 1e300), st.just(math.inf), st.just(math.nan)),
    previous=st.lists(st.floats(0, 1), max_size=3),
    after_rejection=st.booleans(),
)
def test_factor_stays_within_limits(
    controller: Controller, error: float, previous: list[float], after_rejection: bool
) -> None:
    memory = controller.start()
    for e in previous:
        memory = controller.propose(e, memory)[2]
    accept, factor, _ = controller.propose(error, memory, after_rejection)
    assert accept == (error <= 1)
    assert controller.factor_min <= factor <= controller.factor_max
    if not accept or after_rejection:
        assert factor <= 1
    if not accept:
        assert factor < 1  # the same step would fail again


@each
def test_zero_error_grows_as_far_as_allowed(controller: Controller) -> None:
    memory = controller.start()
    assert controller.propose(0.0, memory) == (True, controller.factor_max, memory)
    assert controller.propose(0.0, memory, after_rejection=True)[1] == 1.0


@each
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_that_is_not_finite_shrinks_most(controller: Controller, bad: float) -> None:
    memory = controller.start()
    assert controller.propose(bad, memory) == (False, controller.factor_min, memory)


@pytest.mark.parametrize("cls", [IController, PIController, PIDController])
@pytest.mark.parametrize(
    "options",
    [
        {"safety": 0.0},
        {"safety": 1.1},
        {"safety": math.nan},
        {"factor_min": 0.0},
        {"factor_min": 1.0},
        {"factor_max": 1.0},
        {"factor_max": math.nan},
    ],
    ids=str,
)
def test_bad_options_are_refused(cls: type[Controller], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}.*safety.*factor_min.*factor_max"):
        cls(**options)


@each
@pytest.mark.parametrize("error", [0.3, 1.7])
def test_tensors_give_the_same_numbers(controller: Controller, error: float) -> None:
    # through_step_size=True puts the controller on the tape
    memory = controller.start()
    on_tape = torch.tensor(error, dtype=torch.float64, requires_grad=True)
    _, factor, _ = controller.propose(on_tape, memory)
    assert factor.item() == pytest.approx(controller.propose(error, memory)[1], rel=1e-12)


def test_controllers_are_values() -> None:
    assert IController() == IController()
    assert PIController.for_order(5) == PIController()
    assert PIController(safety=0.8) != PIController()
