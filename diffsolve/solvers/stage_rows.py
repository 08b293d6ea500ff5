"""What the steps of all Runge-Kutta-like families share: their state, and the rows of a step.

Row 0 is the derivative at the start of a step, the last row the derivative at its end; a tableau
says what is between them. Dense output is a polynomial over these rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.continuous_extension import Interpolant

_START = np.zeros(1)


class RKState(NamedTuple):
    """State ``u`` and its derivative ``du = f(t, u)``, both flat."""

    u: Tensor
    du: Tensor


class RKInterpolant:
    """Continuous extension of a step: the polynomial of the tableau over the stages.

    Extra stages are evaluated the first time a value is asked for.
    """

    __slots__ = ("complete", "dense", "field", "h", "k", "kept", "t", "u")

    def __init__(
        self, field: VectorField, t: Any, h: Any, u: Tensor, k: Tensor, dense: Interpolant
    ):
        self.field, self.t, self.h, self.u, self.k, self.dense = field, t, h, u, k, dense
        self.complete = not dense.c_extra
        self.kept = False

    def keep(self) -> RKInterpolant:
        (u, k), kept = self.parts()
        return kept(u, k.clone())

    def parts(self) -> tuple[tuple[Tensor, Tensor], Callable[[Tensor, Tensor], RKInterpolant]]:
        field, t, h, dense, complete = self.field, self.t, self.h, self.dense, self.complete

        def kept(u: Tensor, k: Tensor) -> RKInterpolant:
            made = RKInterpolant(field, t, h, u, k, dense)
            made.complete, made.kept = complete, True
            return made

        return (self.u, self.k), kept

    def __call__(self, theta: Tensor, derivative: int = 0) -> Tensor:
        if not self.complete:
            self._add_stages()
        # in double precision, and only the weights are rounded to that of the state
        up, down, coefficients = _basis(self.field, self.dense, derivative, theta.device)
        theta = theta.to(torch.float64)[:, None]
        weights = ((theta**up * (1 - theta) ** down) @ coefficients).to(self.k)
        scale = as_scale(self.field, self.h)
        if derivative:
            return (weights * scale ** (1 - derivative)) @ self.k
        if isinstance(scale, Tensor):
            return self.u + (weights * scale) @ self.k
        return torch.addmm(self.u, weights, self.k, alpha=scale)

    def _add_stages(self) -> None:
        k = list(self.k.unbind(0))
        if self.kept:  # f may have been trained since
            (start,) = self.field.times(self.t, self.h, _START)
            if not float(self.field.rounding_error(self.field(start, self.u), k[0])) <= 1:
                raise RuntimeError(
                    "f has changed since the solve, and the dense output from t = "
                    f"{float(self.t):.8g} on still needs evaluations of it: call sol(t) before, "
                    "or list the times in saveat"
                )
        times = self.field.times(self.t, self.h, np.asarray(self.dense.c_extra))
        for row, time in zip(self.dense.a_extra, times, strict=True):
            weights = constant(self.field, row) * as_scale(self.field, self.h)
            k.append(self.field(time, self.u + weights @ torch.stack(k[: len(row)])))
        self.k = torch.stack(k)
        self.complete = True


def as_scale(field: VectorField, h: Any) -> Any:
    """``h`` as a factor of states; a tensor must not raise their precision."""
    return h.to(field.dtype) if isinstance(h, Tensor) else h


class _Coefficients:
    """Coefficients of tableaus and interpolants as tensors, each made once for a solve.

    They are found by the identity of the array. An entry holds the array too: while it does, no
    other array can have that identity.
    """

    def __init__(self) -> None:
        self.constants: dict[int, tuple[np.ndarray, Tensor]] = {}
        self.bases: dict[Any, tuple[Interpolant, tuple[Tensor, Tensor, Tensor]]] = {}


def _coefficients(field: VectorField) -> _Coefficients:
    known = field.workspace.get(_Coefficients)
    return field.workspace.put(_Coefficients()) if known is None else known


def constant(field: VectorField, values: np.ndarray) -> Tensor:
    """Coefficients of a tableau as a tensor in the state's dtype, on its device."""
    entries, key = _coefficients(field).constants, id(values)
    if key not in entries:
        tensor = torch.as_tensor(values, dtype=field.dtype, device=field.device)
        entries[key] = (values, tensor)
    return entries[key][1]


def _basis(
    field: VectorField, dense: Interpolant, derivative: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Exponents of theta and of ``1 - theta``, and the coefficients ``(m, n)`` of the stages."""
    entries, key = _coefficients(field).bases, (id(dense), derivative, device)
    if key not in entries:
        coefficients = torch.as_tensor(dense.coefficients(derivative).T, device=device)
        up = torch.arange(len(coefficients), dtype=torch.float64, device=device)
        entries[key] = (dense, (up, up.flip(0), coefficients))
    return entries[key][1]
