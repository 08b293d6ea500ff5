"""What every source of noise has in common."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.sde_field import Increment
from diffsolve.solvers.stochastic.noise.draws import Draws, signed
from diffsolve.solvers.stochastic.noise.philox import EXTRA, counter_of


def draw_seed() -> int:
    """A seed from torch's default generator, so that ``torch.manual_seed`` decides it."""
    return int(torch.randint(1 << 62, (), device="cpu"))


def from_numpy(seed: Any) -> Any:
    """A seed, a tensor where it is an array of NumPy."""
    return torch.from_numpy(seed) if isinstance(seed, np.ndarray) else seed


class Noise(ABC):
    """Brownian motions of a batch of paths: increments over any interval, the same at each call.

    Parameters
    ----------
    seed
        An integer of 64 bits: the numbers of path ``i`` are then a function of the seed and ``i``,
        whatever the size of the batch. Or an integer tensor or array with ``rows`` entries, of any
        shape: a seed a path, whose numbers are then the same wherever in a batch it stands.
    rows
        Number of paths.
    m
        Brownian motions of each.
    dtype, device
        Of the tensors that are handed out. Default: float64, on the CPU. Numbers are drawn and
        added up in float64, and are the same on every device but for the last digits.
    levy_area
        Whether increments come with ``H``, the space-time Levy area. It does not change ``W``.

    Raises
    ------
    TypeError, ValueError
        If the seed is no integer, or not one for each path; if ``dtype`` is not real.
    """

    def __init__(
        self,
        seed: int | Tensor,
        rows: int = 1,
        m: int = 1,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        levy_area: bool = False,
    ):
        seed = from_numpy(seed)
        if isinstance(seed, Tensor):
            if seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool:
                raise TypeError(f"seed must be a tensor of integers, got one of {seed.dtype}")
            if seed.ndim and seed.numel() != rows:
                raise ValueError(
                    f"seed has {seed.numel()} entries for {rows} paths: give one for each path, "
                    "or an integer for all of them"
                )
            seed = seed.detach().clone() if seed.ndim else int(seed)
        elif isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise TypeError(f"seed must be an integer or a tensor of integers, got {seed!r}")
        else:
            seed = operator.index(seed)  # NumPy's integers too
            signed(seed)
        if not dtype.is_floating_point:
            raise TypeError(f"noise is real: dtype must be a floating-point type, got {dtype}")
        if rows < 0 or m < 0:
            raise ValueError(f"rows and m must not be negative, got {rows} and {m}")
        self.seed = seed
        self.rows, self.m = rows, m
        self.dtype, self.device = dtype, torch.device(device)
        self.levy_area = levy_area
        self._draws = Draws(seed, rows, m, self.device)

    # -- what each source defines --------------------------------------------------------------

    @abstractmethod
    def increment(self, s: float, t: float) -> Increment:
        """Increment from ``s`` to ``t``, which may lie before ``s``: then ``(-W, H)`` of the other.

        ``W`` is ``W(t) - W(s)``, and ``H`` None unless ``levy_area``; both ``(rows, m)``.
        """

    @abstractmethod
    def at(self, times: Sequence[float], since: float | None = None) -> Tensor:
        """``W`` at times, from ``since`` on: ``(len(times), rows, m)``.

        Default of ``since``: the start of the path.
        """

    @abstractmethod
    def fork(
        self,
        *,
        levy_area: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A copy with the same paths. Its reads and draws never change this object."""

    # -- shared --------------------------------------------------------------------------------

    def expect(self, count: int) -> None:  # noqa: B027  # most have nothing to prepare
        """Announce that about so many new increments, one after the other, will be asked for.

        It changes no number; they may be drawn ahead.
        """

    def extra(self, s: float, t: float, count: int) -> Tensor:
        """Standard normals that belong to a step from ``s`` to ``t``: ``(count, rows, m)``.

        They are independent of ``W`` and ``H``, and a function of the seed and of the two times
        alone: what approximations of Levy areas need beside the increment. Those of other times are
        independent, also where the steps overlap.
        """
        normals = self._draws(counter_of(EXTRA, s, t), count, False)[0]
        return normals.to(self.device, self.dtype)

    def check(self, rows: int, m: int, t0: float, t1: float) -> None:
        """Refuse a problem that this noise is not for.

        Raises
        ------
        ValueError
            If the numbers of paths or of Brownian motions differ, or times are not covered.
        """
        if (self.rows, self.m) != (rows, m):
            raise ValueError(
                f"the noise has {self.rows} paths of {self.m} Brownian motions, but the problem "
                f"{rows} paths of {m}"
            )

    def _zeros(self) -> Increment:
        zero = torch.zeros(self.rows, self.m, dtype=self.dtype, device=self.device)
        return Increment(zero, zero.clone() if self.levy_area else None)

    def _out(self, x: Tensor) -> Tensor:
        """``x`` in the dtype and on the device of the noise."""
        return (
            x
            if x.dtype is self.dtype and x.device == self.device
            else x.to(self.device, self.dtype)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_draws"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._draws = Draws(self.seed, self.rows, self.m, self.device)

    def __repr__(self) -> str:
        seed = "a seed a path" if isinstance(self.seed, Tensor) else f"seed={self.seed}"
        return f"{type(self).__name__}({seed}, rows={self.rows}, m={self.m}, {self._span()})"

    @abstractmethod
    def _span(self) -> str:
        """The times that it covers, in words."""
