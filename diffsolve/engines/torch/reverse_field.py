"""The equation that a continuous adjoint solves backward, as a field of its own.

Its state, the reverse state, is flat: ``[lambda, (u,) mu]``. ``lambda`` is the adjoint, and ``mu``
holds the gradients by the parameters so far. ``u`` is the forward state, where it is solved again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffsolve.engines.torch.reverse_jacobian import (
    Lagrangian,
    ReverseJacobian,
    as_reals,
    reverse_jacobian,
)
from diffsolve.problems.capture import reached_leaves, refuse_unknown_leaves
from diffsolve.problems.structure import StateStructure
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.norms import Tolerance, rms


def _unused(t: Any, u: Any) -> Any:  # a bound method here would keep the field alive in a cycle
    raise NotImplementedError


class UsedLater(Exception):
    """``f`` uses a parameter that it did not use at the start."""


class ReverseField(VectorField, ABC):
    """What the reverse equations of ODEs and SDEs share.

    Parameters
    ----------
    forward, params
        Forward right-hand side, and those of its parameters that gradients are taken by.
    extra
        Entries of the reverse state between ``lambda`` and ``mu``.

    Attributes
    ----------
    pins
        Times besides those of the saves where a reverse step must end.
    first_size
        Size of the first reverse step, or None.
    """

    is_of_user = False
    pins: Sequence[float] = ()
    first_size: float | None = None

    def __init__(self, forward: VectorField, params: list[Tensor], extra: int):
        self.forward = forward
        self.n = forward.structure.size
        self.sizes = [self.n, extra, *[as_reals(p, forward.dtype).numel() for p in params]]
        z = torch.empty(sum(self.sizes), dtype=forward.dtype, device=forward.device)
        super().__init__(_unused, None, StateStructure.of(z))
        self.breaks = forward.breaks
        self.params = params
        self._other_params = {id(p) for p in forward.params} - {id(p) for p in params}

    def pull(
        self, outputs: Sequence[Tensor], bars: Sequence[Any], inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Products of ``bars`` with the derivatives of ``outputs``, flat, one for each input.

        Raises
        ------
        UsedLater
            If the outputs depend on a parameter of ``f`` that is not among ``params``.
        RuntimeError
            If they depend on another tensor, whose gradient would be lost.
        """
        pairs = [(y, bar) for y, bar in zip(outputs, bars, strict=True) if y.requires_grad]
        grads: Sequence[Tensor | None] = (None,) * len(inputs)
        if pairs:
            leaves = reached_leaves([y for y, _ in pairs])
            if not self._other_params.isdisjoint(leaves):
                raise UsedLater
            refuse_unknown_leaves(leaves, [*inputs, *self.params])
            ys, y_bars = zip(*pairs, strict=True)
            grads = torch.autograd.grad(ys, inputs, y_bars, allow_unused=True)
        return [
            as_reals(torch.zeros_like(x) if g is None else g, self.dtype)
            for g, x in zip(grads, inputs, strict=True)
        ]

    def blocks(self, z: Tensor) -> tuple[Tensor, ...]:
        """``lambda``, the extra entries, and all of ``mu``."""
        return z.split([self.n, self.sizes[1], sum(self.sizes[2:])])

    def norm(self, scaled: Tensor) -> Tensor:
        """Largest of the blocks' norms, so that no block hides behind a bigger one."""
        return torch.stack([rms(block) for block in self.blocks(scaled) if block.numel()]).max()

    def start(self, bar: Tensor, u: Tensor) -> Tensor:
        """Reverse state at the last saved time."""
        z = torch.zeros(sum(self.sizes), dtype=self.dtype, device=self.device)
        z[: self.n] = bar
        return z

    def at_save(self, z: Tensor, bar: Tensor, u: Tensor) -> Tensor:
        """Reverse state after passing a saved time with cotangent ``bar`` and state ``u``."""
        z = z.clone()
        z[: self.n] += bar
        return z

    def tolerance(self, rtol: float, atol: float, forward: Tolerance) -> Tolerance:
        """Tolerance of the reverse solve; ``forward`` is that of the forward one."""

        def tensor(x: float) -> Tensor:
            return torch.tensor(x, dtype=self.structure.time_dtype, device=self.device)

        return Tolerance(tensor(rtol), tensor(atol), self.norm)

    def check(self, u0: Tensor, times: Sequence[float], states: Tensor) -> None:
        """Called before the reverse solve, with the initial and the saved states."""

    def finish(self, z: Tensor) -> None:
        """Called with the reverse state at ``t0``."""


class ReverseODE(ReverseField, ABC):
    """Right-hand side of the reverse equation of an ODE."""

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        self.nf += 1
        return self.derivative(t, u)

    def write(self, t: Tensor, u: Tensor, row: Tensor) -> None:
        row.copy_(self(t, u))

    @abstractmethod
    def derivative(self, t: Tensor, z: Tensor) -> Tensor:
        """Right-hand side of the reverse state."""

    def products(self, t: Tensor, u: Tensor, bar: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``f(t, u)``, ``J^T bar``, and ``f_p^T bar`` for each parameter; all flat."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            du = self.forward(t, u)
        full = self.pull([du], [bar], [u, *self.params])
        return du.detach(), full[0], full[1:]

    @abstractmethod
    def state_at(self, time: Tensor, z: Tensor) -> Tensor:
        """The forward state ``(N,)`` that the right-hand side uses."""

    @abstractmethod
    def slope_at(self, time: Tensor, at: Lagrangian, by_time: Tensor | None) -> Tensor:
        """Derivative of the right-hand side by time; ``by_time`` is that of ``f``."""

    def linearise(self, t: float, h: float, z: Tensor, slope: bool) -> ReverseJacobian:
        """The Jacobian at the start of a step, for implicit methods; see ``reverse_jacobian``."""
        return reverse_jacobian(self, t, h, z, slope)
