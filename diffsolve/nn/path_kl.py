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


class PathKL:
    """An SDE with the divergence from a prior so far as one more component, without noise.

    A state ``(..., d)`` gets a component more, ``(..., d + 1)``; any other state becomes the pair
    of it and a tensor ``(1,)``.

    Parameters
    ----------
    f, g, noise
        Of the SDE whose paths are drawn, the posterior, as in ``SDEProblem``; called as
        ``f(t, u)``.
    prior
        Drift ``h(t, u)`` of the other one.

    Notes
    -----
    ``v`` is ``(f - h) / g`` for diagonal noise, and the least-squares solution of ``g v = f - h``
    for any other. Where there is none (``g`` is zero, or ``f - h`` is no combination of its
    columns), the paths of one equation are impossible for the other, and the divergence is
    infinite. Where ``f - h`` and ``g`` are both zero, nothing is added.
    """

    def __init__(
        self, f: Callable[..., Any], g: Callable[..., Any], noise: str, prior: Callable[..., Any]
    ):
        self.f, self.g, self.noise, self.prior = f, g, noise, prior

    def start(self, u0: Any) -> Any:
        """The larger state at the start."""
        if _in_rows(u0):
            return torch.cat([u0, u0.new_zeros(*u0.shape[:-1], 1)], -1)
        return u0, pytree.tree_leaves(u0)[0].new_zeros(1)

    def drift(self, t: Tensor, u: Any) -> Any:
        """Drift of the larger state."""
        inner = split(u)[0]
        f = self.f(t, inner)
        rate = self._rate(f, t, inner)[..., None]
        return torch.cat([f, rate], -1) if isinstance(u, Tensor) else (f, rate)

    def diffusion(self, t: Tensor, u: Any) -> Any:
        """Diffusion of the larger state."""
        inner = split(u)[0]
        g = self.g(t, inner)
        first: Tensor = pytree.tree_leaves(g)[0]
        if isinstance(u, Tensor):
            along = -1 if self._is_vector(first, inner) else -2
            return torch.cat([g, torch.zeros_like(g.narrow(along, 0, 1))], along)
        shape = (1,) if self._is_vector(first, inner) else (1, first.shape[-1])
        return g, first.new_zeros(shape)

    def rate(self, t: Tensor, u: Any) -> Tensor:
        """``1/2 |v|^2`` of each path at a state of the posterior."""
        return self._rate(self.f(t, u), t, u)

    def _rate(self, f: Any, t: Tensor, u: Any) -> Tensor:
        h, g = self.prior(t, u), self.g(t, u)
        if _in_rows(u):
            apart = f - h
        else:
            f, h, g = pytree.tree_leaves(f), pytree.tree_leaves(h), pytree.tree_leaves(g)
            apart = torch.cat([(x - y).reshape(-1) for x, y in zip(f, h, strict=True)])
            columns = [x.reshape(-1) if self._is_vector(g[0], u) else x.flatten(0, -2) for x in g]
            g = torch.cat(columns)
        if g.shape != apart.shape:
            v = _least_squares(g, apart)
        elif self.noise == "scalar":
            v = _least_squares(g[..., None], apart)
        else:
            v = _quotient(apart, g)
        return 0.5 * (v * v).sum(-1)

    def _is_vector(self, g: Tensor, u: Any) -> bool:
        """Whether ``g``, or its first leaf, has the shape of the state."""
        return g.shape == pytree.tree_leaves(u)[0].shape and self.noise != "general"


def _in_rows(u: Any) -> bool:
    return isinstance(u, Tensor) and u.ndim > 0


def split(u: Any) -> tuple[Any, Tensor]:
    """States of the posterior, and the divergence of each path, from the larger states."""
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
