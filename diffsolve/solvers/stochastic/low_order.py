"""Methods of strong order 1/2: Euler-Maruyama and Euler-Heun, with fixed and adaptive steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffsolve.solvers.algorithm import Step
from diffsolve.solvers.stochastic.method import (
    ANY_NOISE,
    PathInterpolant,
    StochasticMethod,
    register,
)


class EM(StochasticMethod):
    """The Euler-Maruyama method, for any noise of an Ito equation, with fixed steps.

    ``u_new = u + h f(t, u) + g(t, u) W``. Strong order 1/2 (1 where the noise is additive), weak
    order 1.

    References
    ----------
    Maruyama, Rend. Circ. Mat. Palermo 4 (1955) 48; Kloeden, Platen, Numerical Solution of
    Stochastic Differential Equations (1992), section 10.2.
    """

    noise_types = ANY_NOISE
    interpretation = frozenset({"ito"})
    strong_order = 0.5
    weak_order = 1.0
    adaptive = False

    def step(self, field: Any, t: Any, h: Any, state: tuple[Tensor, ...]) -> Step:
        (u,) = state
        now = field.after(t, h)
        G = field.diffusion(now, u)
        drifted = u.add(field(now, u), alpha=h)
        new = field.add_noise(drifted, G, field.increment(t, h).W)
        return Step((new,), None, field.zero, PathInterpolant(field, t, h, u, new, G))


register(EM())
