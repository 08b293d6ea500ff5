"""One step of an explicit Runge-Kutta method over torch tensors.

The same formulas stand twice: written into reused buffers, for speed, where nothing is recorded;
and as pure operations, where autograd or a ``torch.func`` transform looks on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Step
from diffsolve.solvers.explicit_rk.tableau import Interpolant, Stages

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
        exponents, coefficients = _basis(self.field, self.dense, derivative)
        powers = theta.to(exponents)[:, None] ** exponents
        weights = powers.to(coefficients.dtype) @ coefficients
        scale = _as_scale(self.field, self.h)
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
            weights = constant(self.field, row) * _as_scale(self.field, self.h)
            k.append(self.field(time, self.u + weights @ torch.stack(k[: len(row)])))
        self.k = torch.stack(k)
        self.complete = True


def _as_scale(field: VectorField, h: Any) -> Any:
    """``h`` as a factor of states; a tensor must not raise their precision."""
    return h.to(field.dtype) if isinstance(h, Tensor) else h


def constant(field: VectorField, values: np.ndarray) -> Tensor:
    """Coefficients of a tableau as a tensor beside the state, made once for a solve."""
    key = id(values)  # the array is kept in the entry, so its identity stays taken
    if key not in field.scratch:
        tensor = torch.as_tensor(values, dtype=field.dtype, device=field.device)
        field.scratch[key] = (values, tensor)
    return field.scratch[key][1]


def _basis(field: VectorField, dense: Interpolant, derivative: int) -> tuple[Tensor, Tensor]:
    """Exponents of theta and the coefficients ``(d, n)`` of the stages, after differentiation."""
    key = (id(dense), derivative)
    if key not in field.scratch:
        powers = np.arange(1, dense.polynomial.shape[1] + 1)
        factors = np.ones(len(powers))
        for i in range(derivative):
            factors = factors * (powers - i)
        exponents = torch.as_tensor(
            np.maximum(powers - derivative, 0),
            dtype=field.structure.time_dtype,
            device=field.device,
        )
        coefficients = torch.as_tensor(
            (dense.polynomial * factors).T, dtype=field.dtype, device=field.device
        )
        field.scratch[key] = (dense, exponents, coefficients)
    return field.scratch[key][1:]


def take_step(field: VectorField, stages: Stages, t: Any, h: Any, state: RKState) -> Step:
    """Attempt a step; on the tape when autograd records."""
    if torch.is_grad_enabled():
        return _recorded_step(field, stages, t, h, state)
    work = field.scratch.get("explicit_rk")
    if work is None or work.stages is not stages:
        work = field.scratch["explicit_rk"] = _Workspace(field, stages)
    return work.step(field, t, h, state)


def _recorded_step(field: VectorField, stages: Stages, t: Any, h: Any, state: RKState) -> Step:
    u, du = state
    scale = _as_scale(field, h)
    a = constant(field, stages.a) * scale
    times = field.times(t, h, stages.c)
    k, g = [du], u
    stiff_stage = stiffness_stage(stages)
    g_stiff = u
    for i in range(1, stages.n):
        g = torch.addmv(u, torch.stack(k, 1), a[i, :i])
        k.append(field(times[i], g))
        if i == stiff_stage:
            g_stiff = g
    rows = torch.stack(k)
    error, error_low = (
        None if b is None else (constant(field, b) * scale) @ rows
        for b in (stages.b_error, stages.b_error_low)
    )
    return Step(
        RKState(g, k[-1]),
        error,
        (k[-1] - k[stiff_stage], g - g_stiff),
        RKInterpolant(field, t, h, u, rows, stages.interpolant),
        error_low,
    )


def stiffness_stage(stages: Stages) -> int:
    """The last stage before the final one, preferably at the same time.

    Derivatives at equal times differ by the state alone, as in Shampine's estimate (Hairer,
    Wanner, Solving ODEs II, section IV.2).
    """
    same_time = [i for i in range(stages.n - 1) if stages.c[i] == 1.0]
    return same_time[-1] if same_time else stages.n - 2


class _Workspace:
    """Buffers and views of them that one solve uses again in every step."""

    def __init__(self, field: VectorField, stages: Stages):
        n, size = stages.n, field.structure.size
        self.stages = stages
        self.nodes = stages.c[1:]  # the derivative at the first is known
        self.stiff_stage = stiffness_stage(stages)
        rows = [stages.a]
        if stages.b_error is not None:
            rows.append(stages.b_error[None])
        if stages.b_error_low is not None:
            rows.append(stages.b_error_low[None])
        self.weights = torch.as_tensor(np.concatenate(rows), dtype=field.dtype, device=field.device)
        self.scaled = torch.empty_like(self.weights)  # the weights times h
        self.k = torch.empty(n, size, dtype=field.dtype, device=field.device)
        self.k_rows = self.k.unbind(0)
        self.f_rows = field.rows_of(self.k)
        k_columns = self.k.T
        # stage i: u + sum over the stages before it
        self.combine = [(k_columns[:, :i], self.scaled[i, :i]) for i in range(1, n)]
        self.k_columns = k_columns
        self.error_weights = self.scaled[n] if stages.b_error is not None else None
        self.low_weights = self.scaled[n + 1] if stages.b_error_low is not None else None

    def step(self, field: VectorField, t: float, h: float, state: RKState) -> Step:
        u, du = state
        torch.mul(self.weights, h, out=self.scaled)
        times = field.times(t, h, self.nodes)
        rows, f_rows, addmv, write = self.k_rows, self.f_rows, torch.addmv, field.write
        rows[0].copy_(du)
        g = g_stiff = u
        for i, (k_before, a) in enumerate(self.combine, 1):
            g = addmv(u, k_before, a)
            if i == self.stiff_stage:
                g_stiff = g
            write(times[i - 1], g, f_rows[i])
        error = error_low = None
        if self.error_weights is not None:
            error = torch.mv(self.k_columns, self.error_weights)
        if self.low_weights is not None:
            error_low = torch.mv(self.k_columns, self.low_weights)
        last = rows[-1]
        return Step(
            RKState(g, last.clone()),
            error,
            (last - rows[self.stiff_stage], g - g_stiff),
            RKInterpolant(field, t, h, u, self.k, self.stages.interpolant),
            error_low,
        )
