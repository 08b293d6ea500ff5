"""The normals of a batch of paths: from the compiled kernel on the CPU, else from torch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffsolve.solvers.stochastic.noise.philox import INV_SQRT_12, normals

_INTEGERS = 16
_WORD64 = (1 << 64) - 1


@functools.cache
def compiled(name: str) -> Callable[[int, int], int] | None:
    """A kernel of ``kernel.py`` for float64, or None where it cannot be made (which is logged)."""
    # the one place where a solver asks for machine code: the loader belongs to the engine
    from diffsolve.engines.native.declined import Declined
    from diffsolve.engines.native.kernels import kernel

    try:
        return kernel(name, "stochastic/noise", False)
    except Declined:
        return None


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
        seeds = seed.reshape(-1) if own else torch.tensor([signed(seed)])
        self._seeds = seeds.to(self.device, torch.int64).contiguous()
        self._seeded = own
        self._draw: Any = compiled("draw") if self.device.type == "cpu" else None
        if self._draw is None:
            self._component = torch.arange(m, device=self.device)
            path = torch.arange(rows, device=self.device)
            self._path = (torch.zeros_like(path) if own else path)[:, None]
            return
        self._integers = (ctypes.c_int64 * _INTEGERS)(self._seeds.data_ptr(), own, 0, 0, 0, rows, m)
        self._address = ctypes.addressof(self._integers)

    def __call__(self, counter: int, count: int, both: bool) -> Tensor:
        """Of the counters from ``counter`` on: ``(1 or 2, count, rows, m)``, float64.

        First what drives ``W``, of variance 1; with ``both`` then what drives ``H``, of variance
        1/12.
        """
        if self._draw is None:
            return self._by_torch(counter, count, both)
        out = torch.empty(1 + both, count, self.rows, self.m, dtype=torch.float64)
        address = out.data_ptr()
        I = self._integers
        I[2], I[3] = counter, count
        I[7] = address
        I[8] = address + 8 * count * self.rows * self.m if both else 0
        self._draw(self._address, 0)
        return out

    def _by_torch(self, counter: int, count: int, both: bool) -> Tensor:
        counters = torch.arange(counter, counter + count, device=self.device)[:, None, None]
        seeds = self._seeds[:, None]
        found = normals(counters, self._component, self._path, seeds)
        if not both:
            return found[0][None]
        return torch.stack([found[0], found[1] * INV_SQRT_12])
