"""Drift and diffusion, normalised: what steps and adjoints of SDEs call.

``SDEField`` is the ``VectorField`` of the drift that knows the diffusion and the Brownian path as
well. A step asks it for the increment of the path over ``(t, h)``; asking twice gives the same
numbers, so that a step can be run again.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.autocast import under_current_autocast
from diffsolve.problems.first_call import call_first, learn_from
from diffsolve.problems.jumps import refuse_moving_jumps
from diffsolve.problems.sde import SDEProblem
from diffsolve.problems.structure import (
    Number,
    StateStructure,
    advice_for,
    detached,
    outside_transforms,
    under_transform,
)
from diffsolve.problems.vector_field import CHANGED, VectorField, base_tensor, no_buffer, unchanged

_ENDS = np.array([0.0, 1.0])
_SHAPES = {
    "diagonal": "the shape of u",
    "scalar": "the shape of u, or (*u.shape, 1)",
    "general": "(*u.shape, m), with m Brownian motions a path",
    "additive": "the shape of u, or (*u.shape, m)",
}

NOT_ADDITIVE = (
    'noise="additive", but g depends on the state u: say noise="diagonal" where g has the shape '
    'of u, else noise="general"'
)


class Increment(NamedTuple):
    """What a step needs of a Brownian path, ``(R, m)`` each.

    Attributes
    ----------
    W
        ``W(t + h) - W(t)``.
    H
        Space-time Levy area ``1/h * integral of (W(s) - W(t) - (s - t)/h W) ds``, normal with
        variance ``|h|/12`` and independent of ``W``; None where the path has none.
    """

    W: Tensor
    H: Tensor | None = None


class NoisePath(Protocol):
    """A Brownian path, as fields ask for it: the same numbers whenever they are asked for."""

    def increment(self, s: float, t: float, /) -> Increment:
        """From ``s`` to ``t``."""
        ...

    def at(self, times: Sequence[float], since: float | None = None) -> Tensor:
        """``W`` at times, from ``since`` on: ``(len(times), R, m)``."""
        ...


class GivenNoise(NamedTuple):
    """Noise of a step, or of a batch of steps, which is then the first axis of each entry.

    Attributes
    ----------
    bridges, W, H
        ``SDEField.bridges`` and the increment; without ``H`` where the path has none.
    """

    bridges: Tensor
    W: Tensor
    H: Tensor | None = None


class SDEField(VectorField):
    """Drift, diffusion and path over a flat state of ``N = rows * d`` entries.

    Attributes
    ----------
    g
        Diffusion, as the user gave it.
    noise, interpretation
        As in ``SDEProblem``.
    rows, d
        Number of paths, and of components of each.
    m
        Brownian motions of each path. Filled by ``discover``.
    is_diagonal
        Whether ``g`` has the shape of the state and each component its own Brownian motion. Filled
        by ``discover``.
    ng
        Evaluations of ``g`` so far.
    path
        The Brownian path; set before a step is taken.
    span
        Length of the problem's time span.
    """

    changed = re.sub(r"\bf\b", "f or g", CHANGED)
    path: NoisePath | None

    is_stochastic = True

    def __init__(
        self,
        f: Callable[..., Any],
        g: Callable[..., Any],
        p: Any,
        structure: StateStructure,
        noise: str,
        interpretation: str,
    ):
        super().__init__(f, p, structure)
        self.g = g
        self.noise, self.interpretation = noise, interpretation
        shape = structure.shapes[0] if structure.is_tensor else torch.Size([structure.size])
        self.d: int = shape[-1] if shape else 1
        self.rows = math.prod(shape[:-1])
        self.m = 0
        self.is_diagonal = False
        self.ng = 0
        self.span = 1.0
        #: Replaces the path's noise while a batch of steps runs.
        self.given: GivenNoise | None = None
        self._g_shapes: list[Any] = []
        self._g_buffer: Callable[[], Tensor | None] = no_buffer

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return self.f, self.g

    @classmethod
    def of(cls, prob: SDEProblem) -> SDEField:  # type: ignore[override]
        structure = StateStructure.of(prob.u0)
        f, g = (
            under_current_autocast(x, structure.device, structure.dtype) for x in (prob.f, prob.g)
        )
        field = cls(f, g, prob.p, structure, prob.noise, prob.interpretation)
        t0, t1 = (float(detached(x)) for x in prob.tspan)
        field.span = abs(t1 - t0)
        return field

    # -- what a step asks for ------------------------------------------------------------------

    def both_ends(self, t: Number, h: Number) -> Sequence[Tensor]:
        """``t`` and ``t + h`` as ``f`` and ``g`` see them, on the step's side of jumps."""
        return self.times(t, h, _ENDS)

    def diffusion(self, t: Tensor, u: Tensor) -> Tensor:
        """``g(t, u)``: ``(N,)`` where ``is_diagonal``, else ``(R, d, m)``; ``u`` is flat."""
        self.ng += 1
        if self._shape is None:
            return self._normalised(self.g(t, self.structure.unravel(u), *self._args))
        G = self.g(t, u if self._is_flat else u.view(*self._view), *self._args)
        if getattr(G, "shape", None) != self._g_shapes[0] or G.dtype is not self.dtype:
            self._refuse_diffusion(G)
        if base_tensor(G) is self._g_buffer():
            G = G.clone()  # g fills one buffer again and again
        if self.is_diagonal:
            return G if self._is_flat else G.reshape(-1)
        return G.reshape(self.rows, self.d, self.m)

    def product(self, G: Tensor, w: Tensor) -> Tensor:
        """Diffusion ``G`` applied to noise ``w`` ``(..., R, m)``: ``(..., N)``."""
        if self.is_diagonal:
            return G * w.flatten(-2)
        if self.m == 1:
            return (G[..., 0] * w).flatten(-2)
        return torch.matmul(G, w[..., None]).flatten(-3)

    def add_noise(self, u: Tensor, G: Tensor, w: Tensor) -> Tensor:
        """``u + product(G, w)``, in one operation where that is possible."""
        if self.is_diagonal:
            return torch.addcmul(u, G, w.flatten(-2))
        return u + self.product(G, w)

    def deviation(self, G: Tensor) -> Tensor:
        """Standard deviation of ``product(G, w)`` for standard normal ``w``: ``(N,)``."""
        if self.is_diagonal:
            return G.abs()
        return torch.linalg.vector_norm(G, dim=-1).reshape(-1)

    def increment(self, t: Any, h: Any) -> Increment:
        """Increment of the path from ``t`` to ``t + h``; ``h`` may be negative."""
        if self.given is not None:
            return Increment(self.given.W, self.given.H)
        assert self.path is not None
        if under_transform():
            with outside_transforms():
                return self.path.increment(t, t + h)
        return self.path.increment(t, t + h)

    def bridges(self, t: Any, h: Any, times: Sequence[float]) -> Tensor:
        """``W(x) - W(t) - (x - t)/h (W(t + h) - W(t))`` at ``times`` in a step: ``(k, R, m)``.

        The path remembers them, and they do not change what its steps draw.
        """
        if self.given is not None:
            return self.given.bridges
        assert self.path is not None
        with outside_transforms():
            whole = self.path.increment(t, t + h).W
            theta = torch.tensor(
                [(x - t) / h for x in times], dtype=torch.float64, device="cpu"
            ).to(whole)
            # draws between known points depend on the order of the reads: take that of the step, as
            # the compiled loop does
            self.path.at(sorted(times, reverse=h < 0), since=t)
            return self.path.at(times, since=t) - theta[:, None, None] * whole

    def noise_of(
        self, steps: Sequence[tuple[float, float]], times: Sequence[Sequence[float]]
    ) -> tuple[Tensor, ...]:
        """The entries of a ``GivenNoise`` for a batch of steps ``(t, h)``.

        ``times`` holds the times at which each step's interpolant is read, equally many for each
        step. It is empty where there are none.
        """
        W, H = zip(*(self.increment(t, h) for t, h in steps), strict=True)
        if times:
            inside = [self.bridges(t, h, x) for (t, h), x in zip(steps, times, strict=True)]
            bridges = torch.stack(inside)
        else:
            bridges = W[0].new_empty(len(W), 0, *W[0].shape)
        areas = () if H[0] is None else (torch.stack(H),)
        return bridges, torch.stack(W), *areas

    # -- parameters and checks -----------------------------------------------------------------

    def discover(self, t0: float, u0: Tensor, h_sign: float, differentiate: bool) -> Tensor:
        """Evaluate ``f`` and ``g`` once at the start; see ``VectorField.discover``.

        Raises
        ------
        TypeError, ValueError
            Also if ``g`` returns a wrong shape, or depends on the state where the noise is said to
            be additive.
        """
        du0 = super().discover(t0, u0, h_sign, differentiate)
        t = self.after(t0, h_sign)
        with torch.set_grad_enabled(differentiate):
            call = call_first(self, self.g, "g", t, u0, differentiate)
        self.ng += 1
        self._g_shapes = self._shapes_of(call.value)
        if self._shape is not None:
            self._g_buffer = weakref.ref(base_tensor(call.value))
        flat = self._normalised(call.value)
        if differentiate:
            self.g = learn_from(self, call, flat, u0.requires_grad)
        if self.noise == "additive":
            self._refuse_state_dependence(t, u0.detach(), flat.detach().clone())
        return du0

    def refuse_moving_jumps(self, u0: Tensor, end: float) -> None:
        refuse_moving_jumps(self, [("f", self.f), ("g", self.g)], u0, end)

    def _leaves_of(self, returned: Any) -> list[Any]:
        if self.structure.is_tensor:
            return [returned]
        try:
            return self.structure.spec.flatten_up_to(returned)
        except ValueError as error:
            raise ValueError(
                f"g({self._signature}) is wrong: it returned {type(returned).__name__}, not in the "
                f"structure of u: {error}"
            ) from error

    def _shapes_of(self, returned: Any) -> list[Any]:
        """Shapes of the leaves of what ``g`` returned first; sets ``m`` and ``is_diagonal``."""
        leaves = self._leaves_of(returned)
        for leaf in leaves:
            why = self._describe(leaf)
            if why is not None:
                raise ValueError(f"g({self._signature}) is wrong: it returned {why}")
        shapes, of_u = [x.shape for x in leaves], self.structure.shapes
        lengths = {g[-1] if len(g) == len(u) + 1 and g[:-1] == u else None
                   for g, u in zip(shapes, of_u, strict=True)}  # fmt: skip
        self.m, self.is_diagonal = 0, False
        if shapes == of_u and self.noise != "general":
            self.m = 1 if self.noise == "scalar" else self.d
            self.is_diagonal = self.m == self.d
        elif len(lengths) == 1 and self.noise != "diagonal":
            self.m = lengths.pop() or 0
        if self.m == 0 or (self.noise == "scalar" and self.m != 1):
            self._refuse_diffusion(returned)
        return shapes

    def _describe(self, leaf: Any) -> str | None:
        """What is wrong with a tensor that ``g`` returned, other than its shape."""
        if not isinstance(leaf, Tensor):
            return f"{type(leaf).__name__}, expected a tensor{advice_for(leaf)}"
        if leaf.dtype != self.dtype:
            return (
                f"{leaf.dtype}, the state has {self.dtype}: give the parameters and constants "
                "the dtype of u0"
            )
        if leaf.device != self.device:
            return f"a tensor on {leaf.device}, the state is on {self.device}"
        return None

    def _normalised(self, returned: Any) -> Tensor:
        leaves = self._leaves_of(returned)
        if [getattr(x, "shape", None) for x in leaves] != self._g_shapes:
            self._refuse_diffusion(returned)
        if self.is_diagonal:
            flat = self.structure.ravel(returned)
            return flat.clone() if len(leaves) == 1 and not self.structure.is_tensor else flat
        parts = [x.reshape(-1, self.m) for x in leaves]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.reshape(self.rows, self.d, self.m)

    def _refuse_diffusion(self, returned: Any) -> None:
        leaves = self._leaves_of(returned)
        why = next((x for x in map(self._describe, leaves) if x is not None), None)
        if why is None:
            shapes = [tuple(x.shape) for x in leaves]
            of_u = [tuple(s) for s in self.structure.shapes]
            got, state = (str(x[0] if self.structure.is_tensor else x) for x in (shapes, of_u))
            why = f"shape {got}, the state has {state}: with {self.noise} noise it is "
            why += _SHAPES[self.noise]
            if self._g_shapes and shapes != self._g_shapes:
                why += f", and it was {[tuple(s) for s in self._g_shapes]} at first"
            elif shapes == of_u:
                why += '; noise="diagonal" is the one where g has the shape of u'
            elif self.noise in ("diagonal", "scalar"):
                why += '; for matrices say noise="general"'
        raise ValueError(f"g({self._signature}) is wrong: it returned {why}")

    def _refuse_state_dependence(self, t: Tensor, u: Tensor, known: Tensor) -> None:
        # no state is a fixed point of both changes, and one of them flips every sign
        for factor, shift in ((1.5, 1.0), (-0.7320508, -0.3141593)):
            with torch.no_grad():
                shifted = self.diffusion(t, factor * u + shift)
            if not torch.equal(torch.nan_to_num(shifted), torch.nan_to_num(known)):
                raise ValueError(NOT_ADDITIVE)

    # -- siblings ------------------------------------------------------------------------------

    def along(self, path: NoisePath) -> SDEField:
        """This field on another path."""
        field = self._sibling(self.p, unchanged)
        field.params, field.path = self.params, path
        return field

    def _sibling(self, p: Any, changed: Callable[..., Callable[..., Any]]) -> SDEField:
        field = SDEField(
            changed(self.f), changed(self.g), p, self.structure, self.noise, self.interpretation
        )
        return self._share(field)

    def _share(self, field: Any) -> Any:
        super()._share(field)
        field.m, field.is_diagonal, field.path = self.m, self.is_diagonal, self.path
        field.span = self.span
        field._g_shapes, field._g_buffer = self._g_shapes, self._g_buffer
        return field

    def counts(self) -> tuple[int, ...]:
        return *super().counts(), self.ng
