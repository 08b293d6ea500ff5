"""Normals from counters: Philox4x32-10 and the transformation of Box and Muller, in torch.

The numbers are a function of a seed and of a counter, so that they can be drawn in any order, on
any device, and again. A counter has four words of 32 bits: the lower half of a 64-bit number, the
component, the path, and the upper half of that number, whose highest byte is the domain. The key is
the seed. ``kernel.py`` computes the same for the CPU.

References
----------
Salmon, Moraes, Dror, Shaw (2011), Parallel random numbers: as easy as 1, 2, 3, section 4.3.
Box, Muller (1958), A note on the generation of random normal deviates.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

#: Domains: what a counter counts. Steps count on from zero, reads use the bits of a time.
STEPS, READS, TREE, EXTRA = (domain << 56 for domain in range(4))
INV_SQRT_12 = 12**-0.5

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_MANTISSA = (1 << 52) - 1


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for a counter and a key.

    All are int64 tensors that hold words of 32 bits, of shapes that broadcast.
    """
    for i in range(_ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # the upper half wraps, and is right
        key0, key1 = ((k + i * w) & _WORD for k, w in zip((k0, k1), _WEYL, strict=True))
        c0, c1, c2, c3 = (
            ((b >> 32) & _WORD) ^ c1 ^ key0,
            b & _WORD,
            ((a >> 32) & _WORD) ^ c3 ^ key1,
            a & _WORD,
        )
    return c0, c1, c2, c3


def normals(
    counter: Tensor, component: Tensor, path: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, float64, for each counter, component, path and seed.

    All are int64 tensors of shapes that broadcast; ``counter`` and ``seed`` have 64 bits.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    x0, x1, x2, x3 = philox(counter & _WORD, component, path, (counter >> 32) & _WORD, k0, k1)
    # u in (0, 1] and v in [0, 1) of 53 bits; v's first bit is the half of the circle
    u = (((x1 << 21) | (x0 >> 11)) + 1).to(torch.float64) * 2.0**-53
    v = (x3 << 21) | (x2 >> 11)
    r = (v & _MANTISSA).to(torch.float64) * 2.0**-51 - 1.0
    radius = torch.where(v > _MANTISSA, -1.0, 1.0) * torch.sqrt(-2.0 * torch.log(u))
    half_pi = 0.5 * math.pi
    return -radius * torch.sin(half_pi * r), radius * torch.sin(half_pi * (1.0 - r.abs()))


def counter_of(domain: int, *times: float) -> int:
    """A counter made of the bits of times, scrambled to the 56 that are left beside the domain."""
    x = 0
    for time in times:
        x ^= int.from_bytes(struct.pack("<d", time + 0.0), "little")  # minus zero is zero
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF  # Steele et al. (2014)
        x ^= x >> 31
    return domain | x >> 8
