"""The reversible Heun method, whose steps can be undone algebraically."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.structure import Number
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Step
from diffsolve.solvers.stochastic.method import (
    ANY_NOISE,
    PathInterpolant,
    StochasticMethod,
    add_scaled,
    register,
    scaled,
)


class ReversibleState(NamedTuple):
    """State ``u``, a second one ``v`` beside it, and drift and diffusion at ``(t, v)``."""

    u: Tensor
    v: Tensor
    f: Tensor
    G: Tensor


class ReversibleHeun(StochasticMethod):
    """The reversible Heun method, for any noise of Stratonovich equations.

    With a second state ``v`` beside ``u``, and ``f``, ``G`` the drift and diffusion at ``(t, v)``::

        v_new = 2 u - v + h f + G W
        u_new = u + h/2 (f + f_new) + 1/2 (G + G_new) W

    Given its end, the start of a step follows by the same operations (``inverse``), so that a
    reverse pass needs no stored states. Strong order 1/2, and 1 where the noise is additive; weak
    order 1. One evaluation of ``f`` and of ``g`` a step. It is as stable as the leapfrog scheme:
    where solutions contract, errors in ``u - v`` grow with long steps.

    The error estimate is the distance from Euler's step, ``h/2 |f_new - f| + 1/2 |(G_new - G) W|``.

    References
    ----------
    Kidger, Foster, Li, Lyons, Efficient and accurate gradients for neural SDEs, NeurIPS (2021),
    algorithms 1 and 2.
    """

    noise_types = ANY_NOISE
    interpretation = frozenset({"stratonovich"})
    strong_order = 0.5
    weak_order = 1.0
    adaptive = True
    carries_derivative = True
    is_one_step = False  # v does not follow from u

    def init(
        self, field: VectorField, t: Number, u: Tensor, du: Tensor | None = None
    ) -> ReversibleState:
        assert isinstance(field, SDEField)
        now = field.time(t)
        return ReversibleState(u, u, field(now, u) if du is None else du, field.diffusion(now, u))

    def step(self, field: Any, t: Number, h: Number, state: tuple[Tensor, ...]) -> Step:
        u, v, f, G = state
        _, then = field.both_ends(t, h)
        W = field.increment(t, h).W
        v_new = field.add_noise(add_scaled(2 * u - v, f, h), G, W)
        f_new, G_new = field(then, v_new), field.diffusion(then, v_new)
        new = _trapezoidal(field, u, h, f, f_new, G, G_new, W)
        change = f_new - f
        error = scaled(change, 0.5 * h).abs() + field.product(G_new - G, 0.5 * W).abs()
        dense = PathInterpolant(field, t, h, u, new, G)
        return Step(ReversibleState(new, v_new, f_new, G_new), error, (change, v_new - v), dense)

    def inverse(
        self, field: SDEField, t: Number, h: Number, state: tuple[Tensor, ...]
    ) -> ReversibleState:
        """State at the start of a step, from that at its end.

        Parameters
        ----------
        field, t, h
            The step, as it was taken.
        state
            State at ``t + h``.
        """
        u_new, v_new, f_new, G_new = state
        now, _ = field.both_ends(t, h)
        W = field.increment(t, h).W
        v = field.add_noise(add_scaled(2 * u_new - v_new, f_new, -h), G_new, -W)
        f, G = field(now, v), field.diffusion(now, v)
        u = _trapezoidal(field, u_new, -h, f, f_new, G, G_new, -W)
        return ReversibleState(u, v, f, G)


def _trapezoidal(
    field: SDEField,
    u: Tensor,
    h: Number,
    f: Tensor,
    f_new: Tensor,
    G: Tensor,
    G_new: Tensor,
    W: Tensor,
) -> Tensor:
    return field.add_noise(add_scaled(u, f + f_new, 0.5 * h), G + G_new, 0.5 * W)


register(ReversibleHeun())
