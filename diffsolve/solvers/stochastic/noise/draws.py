"""The normals of a batch of paths: from the compiled kernel on the CPU, else from torch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffsolve.solvers.stochastic.noise.bridge import divide
from diffsolve.solvers.stochastic.noise.native import NOISE
from diffsolve.solvers.stochastic.noise.philox import INV_SQRT_12, normals

_WORD64 = (1 << 64) - 1


@functools.cache
def compiled(name: str) -> Callable[..., int] | None:
    """A kernel of ``kernel.py`` for float64, or None where it cannot be made (which is logged)."""
    return NOISE.load(name)


def signed(seed: int) -> int:
    """The 64 bits of an integer as a signed one, which is what torch and the kernels hold.

    Raises
    ------
    ValueError
        If it has more than 64 bits.
    """
    if not -(1 << 63) <= seed <= _WORD64:
        raise ValueError(f"seed must have 64 bits at most, got {seed}")
    return seed - (1 << 64) if seed >> 63 == 1 else seed


class Draws:
    """Normals of ``rows`` paths with ``m`` components, a function of the seed and of a counter.

    Parameters
    ----------
    seed
        An integer: path ``i`` has index ``i``. Or an integer tensor with a seed for each path.
    rows, m
        Paths, and components of each.
    device
        Where numbers are wanted. Those of a device without float64 are drawn on the CPU.
    """

    def __init__(self, seed: int | Tensor, rows: int, m: int, device: torch.device):
        self.rows, self.m = rows, m
        self.device = torch.device("cpu") if device.type == "mps" else device
        own = isinstance(seed, Tensor)
        seeds = seed.reshape(-1) if own else torch.tensor([signed(seed)], device="cpu")
        self.seeds = seeds.to(self.device, torch.int64).contiguous()
        self.seeded = own
        self._draw: Any = self.kernel("draw")
        self._bridge: Any = None  # asked for when it is first needed
        if self._draw is None:
            self._component = torch.arange(m, device=self.device)
            path = torch.arange(rows, device=self.device)
            self._path = (torch.zeros_like(path) if own else path)[:, None]
            return
        self._size = 8 * rows * m
        work = self._work = torch.empty(2, rows, m, dtype=torch.float64, device="cpu")
        at = self.seeds.data_ptr(), own
        self._for_draw = (ctypes.c_int64 * 9)(*at, 0, 0, 0, rows, m)
        self._for_bridge = (ctypes.c_int64 * 9)(*at, 0, rows, m, 0, 0, work.data_ptr())
        self._reals = (ctypes.c_double * 4)()

    def kernel(self, name: str) -> Callable[..., int] | None:
        """A compiled kernel where these numbers can come from one; it takes arrays of ctypes."""
        return compiled(name) if self.device.type == "cpu" else None

    def __call__(self, counter: int, count: int, both: bool) -> Tensor:
        """Of the counters from ``counter`` on: ``(1 or 2, count, rows, m)``, float64.

        First what drives ``W``, of variance 1; with ``both`` then what drives ``H``, of variance
        1/12.
        """
        if self._draw is None:
            return self._by_torch(counter, count, both)
        out = torch.empty(1 + both, count, self.rows, self.m, dtype=torch.float64, device="cpu")
        I = self._for_draw
        I[2], I[3], I[7] = counter, count, out.data_ptr()
        I[8] = I[7] + self._size * count if both else 0
        self._draw(I, None)
        return out

    def divide(
        self, whole: Tensor, row: int, scale: float, counter: int, left: float, right: float
    ) -> Tensor:
        """Both parts of an interval that is divided by the normals of a counter.

        Parameters
        ----------
        whole, row
            ``(n, rows, m)``, contiguous, whose rows ``row`` and ``row + 1`` are ``W`` and ``H`` of
            the interval before they are multiplied by ``scale``.
        left, right
            Lengths of the parts.

        Returns
        -------
        Tensor
            ``W1, H1, W2, H2``, ``(4, rows, m)``.
        """
        if self._bridge is None:
            self._bridge = self._draw and self.kernel("bridge")
        if not self._bridge:
            W, H = whole[row : row + 2] * scale
            return divide(W, H, self(counter, 1, True)[:, 0], left, right)
        out = torch.empty(4, self.rows, self.m, dtype=torch.float64, device="cpu")
        I, R = self._for_bridge, self._reals
        I[2], I[5], I[8] = counter, whole.data_ptr() + row * self._size, out.data_ptr()
        I[6] = I[5] + self._size
        length = left + right
        R[0], R[1], R[2], R[3] = scale, left / length, right / length, length
        self._bridge(I, R)
        return out

    def _by_torch(self, counter: int, count: int, both: bool) -> Tensor:
        counters = torch.arange(counter, counter + count, device=self.device)[:, None, None]
        pair = normals(counters, self._component, self._path, self.seeds[:, None])
        if not both:
            return pair[0][None]
        return torch.stack([pair[0], pair[1] * INV_SQRT_12])
