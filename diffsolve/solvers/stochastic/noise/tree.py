"""A Brownian path that remembers nothing: every value is found anew from the seed."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from diffsolve.problems.sde_field import Increment
from diffsolve.solvers.stochastic.noise.base import Noise
from diffsolve.solvers.stochastic.noise.descent import Descent

#: Least tolerance, in units of the length of the tree: below, a place in a leaf is mostly rounding.
_DEEPEST = 40
_ROUNDING = 1 - 1e-6  # of a step that is as long as a leaf
_ROWS, _TILE = 12, 256  # of the kernel's work space


class VirtualBrownianTree(Noise):
    """Brownian motions between two times, each value a function of the seed and the times alone.

    The interval is halved again and again, with ``W`` and ``H`` of each half by the exact law and
    from normals that belong to the node; what is asked for is found by going down to it. Nothing is
    stored, the order of the questions does not matter, and the steps before have no influence: two
    solves with other steps, in either direction, see one path.

    That path is resolved down to ``tol``. The increments between times that are in different leaves
    have their exact law, jointly, as long as no two of these times lie within one leaf. Steps must
    be longer than that: ``increment`` refuses others. ``at`` looks anywhere.

    Parameters
    ----------
    seed
        As in ``Noise``.
    t0, t1
        Times that are covered, ``t0 < t1``.
    rows, m, dtype, device, levy_area
        As in ``Noise``.
    tol
        Largest length of a leaf. Default: 1e-6 of the whole. Time grows with its logarithm.

    Raises
    ------
    ValueError
        If ``t0 < t1`` does not hold, or ``tol`` is too small for rounding of the times.

    References
    ----------
    Jelinčič, Foster, Kidger (2024), Single-seed generation of Brownian paths and integrals for
    adaptive and high order SDE solvers. Gaines, Lyons (1997), Variable step size control in the
    numerical solution of stochastic differential equations.

    Examples
    --------
    >>> tree = VirtualBrownianTree(seed=1, t0=0.0, t1=1.0)
    >>> whole = tree.increment(0.2, 0.9).W
    >>> torch.allclose(tree.increment(0.2, 0.5).W + tree.increment(0.5, 0.9).W, whole)
    True
    """

    def __init__(
        self,
        seed: int | Tensor,
        t0: float,
        t1: float,
        rows: int = 1,
        m: int = 1,
        *,
        tol: float | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        levy_area: bool = False,
    ):
        super().__init__(seed, rows, m, dtype=dtype, device=device, levy_area=levy_area)
        self.t0, self.t1 = float(t0), float(t1)
        if not (self.t0 < self.t1 and math.isfinite(self.t1 - self.t0)):
            raise ValueError(f"a tree needs finite times t0 < t1, got {t0} and {t1}")
        span = self.t1 - self.t0
        self.tol = 1e-6 * span if tol is None else float(tol)
        least = max(span * 2.0**-_DEEPEST, 64 * math.ulp(max(abs(self.t0), abs(self.t1))))
        if not self.tol >= least:
            raise ValueError(f"tol must be {least:.3g} at least for these times, got {self.tol}")
        self._depth = max(0, math.ceil(math.log2(span / self.tol)))
        self._prepare()

    def _prepare(self) -> None:
        """Get the kernel and memory for it, or what does the same with tensors."""
        self._kernel: Any = self._draws.kernel("tree")
        if self._kernel is None:
            self._descent = Descent(self._draws, self._depth, self.t1 - self.t0)
            return
        self._work = torch.empty(_ROWS * max(_TILE, self.m), dtype=torch.float64, device="cpu")
        at = self._draws.seeds.data_ptr(), self._draws.seeded, self.rows, self.m, self._depth
        self._integers = (ctypes.c_int64 * 10)(*at, 0, 0, 0, 0, self._work.data_ptr())
        self._reals = (ctypes.c_double * 4)(self.t1 - self.t0)

    # -- what is asked for ---------------------------------------------------------------------

    def increment(self, s: float, t: float) -> Increment:
        """As in ``Noise``.

        Raises
        ------
        ValueError
            If a time is not covered, or the interval is shorter than a leaf: what a step sees there
            would not be Brownian motion. ``at`` and ``inside`` look closer.
        """
        leaf = math.ldexp(self.t1 - self.t0, -self._depth)
        if 0 < abs(t - s) < leaf * _ROUNDING and self._leaf(s) != self._leaf(t):
            raise ValueError(
                f"a step of {abs(t - s):.3g} is shorter than what the virtual Brownian tree "
                f"resolves, {leaf:.3g}, and would not see Brownian motion: make the tree with a "
                "smaller tol, or take larger steps"
            )
        return self.inside(s, t)

    def inside(self, s: float, t: float) -> Increment:
        """As ``increment``, for a look inside of a step: however short the interval is."""
        if t < s:
            W, H = self.inside(t, s)
            return Increment(-W, H)
        s, t = self._inside(s), self._inside(t)
        leaf_s, part_s = self._leaf(s)
        leaf_t, part_t = self._leaf(t)
        if (leaf_s, part_s) == (leaf_t, part_t):  # one time, but for rounding
            return self._zeros()
        if part_t == 0.0:  # the end of a leaf rather than the start of the next
            leaf_t, part_t = leaf_t - 1, 1.0
        if self._kernel is None:
            W, area = self._descent.between(leaf_s, part_s, leaf_t, part_t)
            H = area / (t - s) - 0.5 * W
        else:
            W_and_H = torch.empty(2, self.rows, self.m, dtype=torch.float64, device="cpu")
            I, R = self._integers, self._reals
            I[5], I[6], I[7] = leaf_s, leaf_t, W_and_H.data_ptr()
            I[8] = I[7] + 8 * self.rows * self.m
            R[1], R[2], R[3] = part_s, part_t, t - s
            self._kernel(I, R)
            W, H = W_and_H.unbind(0)
        return Increment(self._out(W), self._out(H) if self.levy_area else None)

    def at(self, times: Sequence[float], since: float | None = None) -> Tensor:
        start = self.t0 if since is None else float(since)
        values = [self.inside(start, float(t)).W for t in times]
        return torch.stack(values) if values else self._zeros().W[None][:0]

    def fork(
        self,
        *,
        levy_area: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        return type(self)(
            self.seed,
            self.t0,
            self.t1,
            self.rows,
            self.m,
            tol=self.tol,
            dtype=self.dtype if dtype is None else dtype,
            device=self.device if device is None else device,
            levy_area=self.levy_area if levy_area is None else levy_area,
        )

    def check(self, rows: int, m: int, t0: float, t1: float) -> None:
        super().check(rows, m, t0, t1)
        for t in (t0, t1):
            self._inside(t)

    # -- times ---------------------------------------------------------------------------------

    def _inside(self, t: float) -> float:
        """A time, at an end where it differs from that by rounding."""
        if self.t0 <= t <= self.t1:
            return t
        near = 16 * math.ulp(max(abs(self.t0), abs(self.t1)))
        if self.t0 - near <= t <= self.t1 + near:
            return min(max(t, self.t0), self.t1)
        raise ValueError(
            f"the virtual Brownian tree covers {self.t0:.8g} to {self.t1:.8g}, but is asked for "
            f"t = {t:.8g}: make it with other t0 and t1"
        )

    def _leaf(self, t: float) -> tuple[int, float]:
        """Number of the leaf that a time is in, and what part of it lies before the time.

        A time that is an end of a leaf but for rounding is that end.
        """
        place = math.ldexp((t - self.t0) / (self.t1 - self.t0), self._depth)
        whole = round(place)
        rounding = math.ldexp(4 * math.ulp(max(abs(self.t0), abs(self.t1))), self._depth)
        if abs(place - whole) * (self.t1 - self.t0) <= rounding:
            return whole, 0.0
        leaf = math.floor(place)
        return leaf, place - leaf

    # -- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        private = "_kernel", "_descent", "_work", "_integers", "_reals"
        return {k: v for k, v in super().__getstate__().items() if k not in private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def _span(self) -> str:
        return f"t0={self.t0:.6g}, t1={self.t1:.6g}, tol={self.tol:.3g}"
