"""What an SDE's solve needs before its first step: a method, and a Brownian path."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffsolve.problems.sde import SDEProblem
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.structure import outside_transforms
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.stochastic.low_order import LambaEM, LambaEulerHeun
from diffsolve.solvers.stochastic.method import StochasticMethod, check_method
from diffsolve.solvers.stochastic.milstein import RKMil
from diffsolve.solvers.stochastic.noise.base import Noise, draw_seed, from_numpy
from diffsolve.solvers.stochastic.noise.path import BrownianPath
from diffsolve.solvers.stochastic.srk import SOSRA, SOSRI

_MOST_EXPECTED = 1e9  # largest number of steps that a path is told to expect


def stochastic_method(alg: Algorithm | None, prob: SDEProblem) -> StochasticMethod:
    """The method of a solve; None: what suits the noise and the integral."""
    return check_method(_default(prob) if alg is None else alg, prob.noise, prob.interpretation)


def _default(prob: SDEProblem) -> StochasticMethod:
    ito = prob.interpretation == "ito"
    if prob.noise == "additive":
        return SOSRA()
    if prob.noise == "general":
        return LambaEM() if ito else LambaEulerHeun()
    return SOSRI() if ito else RKMil("stratonovich")


def refuse_noise(field: VectorField, seed: Any, noise: Any) -> None:
    """Refuse what only an SDE's solve can use.

    Raises
    ------
    ValueError
        If either is given, and the field is that of an ODE.
    """
    if field.is_stochastic:
        return
    for name, value in (("seed", seed), ("noise", noise)):
        if value is not None:
            raise ValueError(f"{name} is for an SDEProblem: an ODE has no noise")


def prepare_path(
    field: VectorField, alg: Algorithm, seed: Any, noise: Any, span: tuple[float, float], dt: Any
) -> None:
    """Give the field of an SDE the Brownian path that it follows; see ``brownian_path``."""
    if isinstance(field, SDEField):
        field.path = brownian_path(field, alg, seed, noise, span, dt)


def brownian_path(
    field: SDEField,
    alg: Algorithm,
    seed: Any,
    noise: Any,
    span: tuple[float, float],
    dt: float | None = None,
) -> Noise:
    """The Brownian path of a solve.

    Parameters
    ----------
    field, alg
        The problem, whose shapes are known, and the method.
    seed
        An integer; an integer tensor of the batch shape, a seed a path; a ``torch.Generator`` to
        draw one from; None: drawn from torch's default generator.
    noise
        A path to follow instead, which stays as it is.
    span
        Times of the solve.
    dt
        Size of its steps where they are all the same.

    Raises
    ------
    TypeError, ValueError
        If ``seed`` or ``noise`` is none of these, both are given, or ``noise`` is for other shapes
        or times.
    """
    assert isinstance(alg, StochasticMethod)
    kind: Any = {
        "dtype": field.dtype,
        "device": field.device,
        "levy_area": alg.needs_levy_area,
    }
    with outside_transforms():
        if noise is None:
            seed = _checked_seed(seed, field)
            path: Noise = BrownianPath(seed, field.rows, field.m, span[0], **kind)
        elif seed is not None:
            raise ValueError("noise is a path already: drop seed, or noise")
        elif not isinstance(noise, Noise):
            raise TypeError(
                "noise must be a Brownian path such as sol.noise or a VirtualBrownianTree, "
                f"got {noise!r}"
            )
        else:
            noise.check(field.rows, field.m, *span)
            path = noise.fork(**kind)
        if dt is not None:
            path.expect(math.ceil(min(abs(span[1] - span[0]) / dt, _MOST_EXPECTED)))
    return path


def _checked_seed(seed: Any, field: SDEField) -> Any:
    if seed is None:
        return draw_seed()
    if isinstance(seed, torch.Generator):
        return int(torch.randint(1 << 62, (), generator=seed, device=seed.device))
    seed = from_numpy(seed)
    if isinstance(seed, Tensor) and seed.ndim:
        shape = field.structure.shapes[0] if field.structure.is_tensor else torch.Size([1])
        if seed.shape != shape[:-1]:
            raise ValueError(
                f"seed has shape {tuple(seed.shape)}, the paths have {tuple(shape[:-1])}: give an "
                "integer, or one for each path"
            )
    return seed
