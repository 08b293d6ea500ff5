"""Norms of a step: the scaled error that is controlled, and the estimates that are recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.problems.structure import Number, StateStructure, as_float, outside_transforms
from diffsolve.solvers.algorithm import Step


def rms(x: Tensor) -> Tensor:
    """Root mean square, of the magnitudes where complex."""
    return torch.linalg.vector_norm(x) / math.sqrt(max(x.numel(), 1))


@dataclass(frozen=True)
class Tolerance:
    """``atol + rtol * |u|`` and the norm that is taken of what it scales.

    Parameters
    ----------
    rtol, atol
        0-d tensors, or flat tensors with an entry a component.
    norm
        Norm of the scaled flat error; None: root mean square.
    """

    rtol: Tensor
    atol: Tensor
    norm: Callable[[Tensor], Any] | None = None

    @classmethod
    def build(
        cls, rtol: Any, atol: Any, structure: StateStructure, norm: Callable[[Any], Any] | None
    ) -> Tolerance:
        """Check what a user gave: numbers, or tensors or pytrees that broadcast to the state.

        Raises
        ------
        ValueError
            If one is negative, NaN or of a wrong shape, or both are zero.
        TypeError
            If ``norm`` is not callable.
        """
        if norm is not None and not callable(norm):
            raise TypeError(f"norm must be a function of the scaled error, got {norm!r}")
        if norm is None and isinstance(rtol, float) and isinstance(atol, float):
            return _uniform(rtol, atol, structure.time_dtype, structure.device)
        relative = _flat_tolerance("rtol", rtol, structure)
        absolute = _flat_tolerance("atol", atol, structure)
        if not bool(((relative > 0) | (absolute > 0)).all()):
            raise ValueError("rtol and atol must not both be zero")
        if norm is None:
            return cls(relative, absolute)
        return cls(relative, absolute, lambda scaled: norm(structure.unravel(scaled)))

    @cached_property
    def doubles(self) -> tuple[np.ndarray, np.ndarray]:
        """``rtol`` and ``atol`` in double precision, ``(1,)`` where they are one number."""
        both = (self.rtol, self.atol)
        rtol, atol = (np.atleast_1d(x.cpu().numpy().astype(np.float64)) for x in both)
        return rtol, atol

    def scale(self, magnitude: Tensor) -> Tensor:
        return torch.addcmul(self.atol, self.rtol, magnitude)

    def scaled_norm(self, x: Tensor, magnitude: Tensor) -> Any:
        scaled = x / self.scale(magnitude)
        return rms(scaled) if self.norm is None else self.norm(scaled)


@lru_cache(maxsize=100)
def _uniform(rtol: float, atol: float, dtype: torch.dtype, device: torch.device) -> Tolerance:
    """The usual case, two numbers: the tolerance is made once for many solves."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be zero or positive and finite, got {value!r}")
    if rtol == atol == 0:
        raise ValueError("rtol and atol must not both be zero")
    # a cached tensor outlives the transforms that are active now, and must not belong to one
    with outside_transforms():
        relative, absolute = (torch.tensor(x, dtype=dtype, device=device) for x in (rtol, atol))
    return Tolerance(relative, absolute)


def _flat_tolerance(name: str, value: Any, structure: StateStructure) -> Tensor:
    dtype, device = structure.time_dtype, structure.device
    if isinstance(value, (int, float)):
        with outside_transforms():
            flat = torch.tensor(float(value), dtype=dtype, device=device)
        smallest = float(value)
    else:
        leaves = pytree.tree_leaves(value)
        if len(leaves) == 1:
            leaves = leaves * len(structure.shapes)
        else:
            try:
                leaves = structure.spec.flatten_up_to(value)
            except ValueError as error:
                raise ValueError(f"{name} has not the structure of the state: {error}") from error
        try:
            parts = [
                torch.as_tensor(leaf, dtype=dtype, device=device).expand(shape).reshape(-1)
                for leaf, shape in zip(leaves, structure.shapes, strict=True)
            ]
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{name} does not broadcast to the state: {error}") from error
        flat = torch.cat(parts)
        smallest = float(flat.min())
    if not (smallest >= 0 and bool(torch.isfinite(flat).all())):
        raise ValueError(f"{name} must be zero or positive and finite, got {value!r}")
    return flat


class Estimates(NamedTuple):
    """Estimates of a step: floats, or 0-d tensors on the tape."""

    error: Number
    error_norm: Number
    stiffness: Number


_NO_ESTIMATES = Estimates(0.0, 0.0, 0.0)  # of all finite steps of methods that have none


def relative_stiffness(step: Step, u: Tensor, tolerance: Tolerance, plain: Number) -> float:
    """The stiffness estimate with both of its norms in units of the tolerance.

    It tells whether a problem is stiff where ``plain``, the step's own estimate, does not: when the
    fast components are the small ones, the differences of a smooth solution drown theirs.
    """
    if not isinstance(step.stiffness, tuple):
        return as_float(plain)
    scale = tolerance.scale(torch.maximum(u.abs(), step.state[0].abs())).detach()
    pair = torch.stack([x.detach() / scale for x in step.stiffness])
    slopes, states = torch.linalg.vector_norm(pair, dim=1).tolist()
    return slopes / states if states > 0 else 0.0


def measure(step: Step, u: Tensor, tolerance: Tolerance, on_tape: bool) -> Estimates:
    """Norms of a step that started at ``u``; off the tape they cost one host synchronisation."""
    return (_measure_on_tape if on_tape else _measure)(step, u, tolerance)


def _measure_on_tape(step: Step, u: Tensor, tolerance: Tolerance) -> Estimates:
    stiffness = step.stiffness() if callable(step.stiffness) else step.stiffness
    if isinstance(stiffness, tuple):
        stiffness = _safe_ratio(*(torch.linalg.vector_norm(x) for x in stiffness))
    elif stiffness is None:
        stiffness = torch.zeros((), dtype=tolerance.atol.dtype, device=u.device)
    if step.error is None:
        zero = torch.zeros((), dtype=tolerance.atol.dtype, device=u.device)
        return Estimates(zero, zero, stiffness)
    magnitude = torch.maximum(u.abs(), step.state[0].abs())
    error = tolerance.scaled_norm(step.error, magnitude)
    if not isinstance(error, Tensor):
        raise TypeError(f"norm must return a 0-d tensor where it is differentiated, got {error!r}")
    if step.error_low is not None:
        high = tolerance.scaled_norm(step.error_low, magnitude)
        error = error * _safe_ratio(error, _safe_hypot(error, 0.1 * high))
    return Estimates(error, rms(step.error), stiffness)


def _measure(step: Step, u: Tensor, tolerance: Tolerance) -> Estimates:
    new = step.state[0]
    if step.error is None and step.stiffness is None and math.isfinite(float(new.sum())):
        return _NO_ESTIMATES
    rows = [step.error] if step.error is not None else [new]  # its norm is finite if it is
    rows += step.stiffness if isinstance(step.stiffness, tuple) else step.state[1:]
    scaled: list[Tensor] = []
    if step.error is not None and len(step.state) == 1:
        rows.append(new)  # where it is infinite, the scaled error is zero and nothing else shows it
    if step.error is not None:
        scale = tolerance.scale(torch.maximum(u.abs(), new.abs()))
        scaled.append(step.error / scale)
        if step.error_low is not None:
            scaled.append(step.error_low / scale)
        if tolerance.norm is None:
            rows += scaled
    stacked = torch.stack(rows)
    norms = torch.linalg.vector_norm(stacked, dim=1).tolist()
    if not math.isfinite(sum(norms)):
        if not bool(torch.isfinite(stacked).all()):
            return Estimates(math.nan, norms[0], math.nan)
        # squares may overflow where the values do not
        peak = stacked.abs().amax(1, keepdim=True).clamp(min=torch.finfo(stacked.dtype).tiny)
        norms = (torch.linalg.vector_norm(stacked / peak, dim=1) * peak[:, 0]).tolist()
    if isinstance(step.stiffness, tuple):
        stiffness = norms[1] / norms[2] if norms[2] > 0 else 0.0
    elif step.stiffness is None:
        stiffness = 0.0
    else:
        stiffness = float(step.stiffness() if callable(step.stiffness) else step.stiffness)
    if step.error is None:
        return Estimates(0.0, 0.0, stiffness)
    root = math.sqrt(u.numel())
    if tolerance.norm is None:
        errors = [x / root for x in norms[len(rows) - len(scaled) :]]
    else:
        errors = [_number(tolerance.norm(x)) for x in scaled]
    error = errors[0]
    if len(errors) == 2 and error > 0:
        error = error * error / math.hypot(error, 0.1 * errors[1])
    return Estimates(error, norms[0] / root, stiffness)


def _safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Ratio that is zero, with zero gradient, where the denominator is."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), 0.0)


def _safe_hypot(a: Tensor, b: Tensor) -> Tensor:
    """``sqrt(a**2 + b**2)`` with zero gradient at the origin."""
    return torch.linalg.vector_norm(torch.stack([a, b]))


def _number(x: Any) -> float:
    try:
        return float(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"norm must return a number or a 0-d tensor, got {x!r}") from error
