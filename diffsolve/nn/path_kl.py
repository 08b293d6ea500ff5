"""The divergence of two SDEs with one diffusion, as a component of the state.

Paths of ``du = f dt + g dW`` and of ``du = h dt + g dW`` from one initial state have the
Kullback-Leibler divergence ``E integral of 1/2 |v|^2 dt`` with ``g v = f - h`` along the first, by
Girsanov's theorem. Both drifts belong to the same kind of integral, Ito or Stratonovich: what they
would be corrected by is the same.

References
----------
Li, Wong, Chen, Duvenaud, Scalable gradients for stochastic differential equations, AISTATS 2020,
section 5; Tzen, Raginsky, Neural stochastic differential equations (2019), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.problems.sde import SDEProblem


class PathKL:
    """An SDE with the divergence from a prior so far as one more component, without noise.

    Parameters
    ----------
    prob
        The SDE whose paths are drawn, the posterior.
    prior
        Drift ``h`` of the other one, called as ``prob.f`` is.

    Attributes
    ----------
    prob
        The larger problem. A state ``(..., d)`` gets a component more, ``(..., d + 1)``; any other
        state becomes the pair of it and a tensor ``(1,)``.

    Notes
    -----
    ``v`` is ``(f - h) / g`` for diagonal noise, and the least-squares solution of ``g v = f - h``
    for any other. Where there is none (``g`` is zero, or ``f - h`` is no combination of its
    columns), the paths of one equation are impossible for the other, and the divergence is
    infinite. Where ``f - h`` and ``g`` are both zero, nothing is added.
    """

    def __init__(self, prob: SDEProblem, prior: Callable[..., Any]):
        self.posterior, self.prior = prob, prior
        u0 = prob.u0
        self.in_rows = isinstance(u0, Tensor) and u0.ndim > 0
        self.prob = prob.remake(f=self._drift, g=self._diffusion, u0=self._extended(u0))

    def rate(self, t: Tensor, u: Any, *args: Any) -> Tensor:
        """``1/2 |v|^2`` of each path at a state of ``posterior``."""
        return self._rate(self.posterior.f(t, u, *args), t, u, *args)

    def _rate(self, f: Any, t: Tensor, u: Any, *args: Any) -> Tensor:
        h, g = self.prior(t, u, *args), self.posterior.g(t, u, *args)
        if self.in_rows:
            apart = f - h
        else:
            f, h, g = pytree.tree_leaves(f), pytree.tree_leaves(h), pytree.tree_leaves(g)
            apart = torch.cat([(x - y).reshape(-1) for x, y in zip(f, h, strict=True)])
            columns = [x.reshape(-1) if self._is_vector(g[0], u) else x.flatten(0, -2) for x in g]
            g = torch.cat(columns)
        noise = self.posterior.noise
        if g.shape != apart.shape:
            v = _least_squares(g, apart)
        elif noise == "scalar":
            v = _least_squares(g[..., None], apart)
        else:
            v = _quotient(apart, g)
        return 0.5 * (v * v).sum(-1)

    def _drift(self, t: Tensor, u: Any, *args: Any) -> Any:
        inner = split(u)[0]
        f = self.posterior.f(t, inner, *args)
        rate = self._rate(f, t, inner, *args)[..., None]
        return torch.cat([f, rate], -1) if self.in_rows else (f, rate)

    def _diffusion(self, t: Tensor, u: Any, *args: Any) -> Any:
        inner = split(u)[0]
        g = self.posterior.g(t, inner, *args)
        first: Tensor = pytree.tree_leaves(g)[0]
        if self.in_rows:
            along = -1 if self._is_vector(first, inner) else -2
            return torch.cat([g, torch.zeros_like(g.narrow(along, 0, 1))], along)
        shape = (1,) if self._is_vector(first, inner) else (1, first.shape[-1])
        return g, first.new_zeros(shape)

    def _extended(self, u0: Any) -> Any:
        if self.in_rows:
            return torch.cat([u0, u0.new_zeros(*u0.shape[:-1], 1)], -1)
        return u0, pytree.tree_leaves(u0)[0].new_zeros(1)

    def _is_vector(self, g: Tensor, u: Any) -> bool:
        """Whether ``g``, or its first leaf, has the shape of the state."""
        return g.shape == pytree.tree_leaves(u)[0].shape and self.posterior.noise != "general"


def split(u: Any) -> tuple[Any, Tensor]:
    """States of the posterior, and the divergence of each path, from states of ``PathKL.prob``."""
    if isinstance(u, Tensor):
        return u[..., :-1], u[..., -1]
    return u[0], u[1][..., 0]


def _quotient(x: Tensor, g: Tensor) -> Tensor:
    """``x / g``, and zero where both are."""
    nothing = (g == 0) & (x == 0)
    return torch.where(nothing, 0.0, x / torch.where(nothing, 1.0, g))


def _least_squares(g: Tensor, x: Tensor) -> Tensor:
    """``v`` ``(..., m)`` with the smallest ``|g v - x|``; infinite where that is not zero."""
    if g.shape[-1] == 1:
        column = g[..., 0]
        v = _quotient((column * x).sum(-1), (column * column).sum(-1))[..., None]
    else:
        v = (torch.linalg.pinv(g) @ x[..., None])[..., 0]
    missed = ((g @ v[..., None])[..., 0] - x).detach().norm(dim=-1)
    allowed = torch.finfo(x.dtype).eps ** 0.25 * x.detach().norm(dim=-1)
    return torch.where((missed <= allowed)[..., None], v, torch.inf)
