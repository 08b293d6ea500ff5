"""What is wrong with a right-hand side near the point where a solve stopped."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.problems.structure import StateStructure
from diffsolve.problems.vector_field import VectorField

_REACH, _FARTHEST = 8, 1_000  # step sizes that the search covers, usually and at most
_LEAST_ULPS = 4_096  # units of rounding of t and u that it covers at least
_PARTS = 16
_HALVINGS = 40
_LEFT_OF_A_JUMP = 0.25  # of the first difference; that of a smooth function goes to zero
_LEAST_JUMP = 1e-3  # in units of f
_DEPTH = 3
_MOST_ITEMS = 100
_DOMINANT = 3.0  # times the error of every other row


@dataclass
class Finding:
    """Where ``f`` gives NaN or jumps.

    Attributes
    ----------
    kind
        ``"nan"``; or ``"time"`` or ``"state"``, by which of the two ``f`` jumps.
    t
        When; ``ahead``: whether that lies beyond the last state of the solution.
    place
        A component where it shows.
    """

    kind: str
    t: float
    ahead: bool
    place: str


class _Line:
    """Values of ``f`` along a straight line in the direction of the solution."""

    def __init__(self, field: VectorField, t: float, u: Tensor):
        self.field, self.t, self.u, self.slope = field, t, u, torch.zeros_like(u)
        self.slope = self(0.0)

    def __call__(self, s: float, s_state: float | None = None) -> Tensor:
        u = self.u + (s if s_state is None else s_state) * self.slope
        return self.field(self.field.time(self.t + s), u).clone()


def examine(field: VectorField, t: float, u: Tensor, h: float) -> Finding | None:
    """Look for NaN and for a jump of ``f`` within some steps ``h``, which has a sign."""
    evaluations = field.nf
    try:
        with torch.no_grad():
            return _examine(field, t, u.detach(), h)
    except Exception:  # f's own, which the solve did not meet
        return None
    finally:
        field.nf = evaluations


def _examine(field: VectorField, t: float, u: Tensor, h: float) -> Finding | None:
    line = _Line(field, t, u)
    if not _is_finite(line.slope):
        return Finding("nan", t, False, _first_bad(field.structure, line.slope))
    # so far that rounding of t and u does not matter, but still near
    moves = torch.finfo(u.dtype).eps * _size(u)
    slope = _size(line.slope)
    least = _LEAST_ULPS * moves / slope if slope > 0 else 0.0
    size = max(_REACH * abs(h), _LEAST_ULPS * math.ulp(t), min(least, _FARTHEST * abs(h)))
    reach = math.copysign(size, h)
    sizes = [reach * i / _PARTS for i in range(_PARTS + 1)]
    values: list[Tensor] = []
    for low, high in itertools.pairwise([0.0, *sizes]):
        values.append(line(high))
        if not _is_finite(values[-1]):
            return _border_of_nan(line, low, high)
    return _jump(line, sizes, values) if size >= least else None


def _border_of_nan(line: _Line, low: float, high: float) -> Finding:
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _is_finite(line(middle)) else (low, middle)
    return Finding("nan", line.t + high, True, _first_bad(line.field.structure, line(high)))


def _jump(line: _Line, sizes: list[float], values: list[Tensor]) -> Finding | None:
    """A jump of ``f`` between these points: its sides differ, however near they are."""
    largest = max(_size(x) for x in values)
    steps = [_size(b - a) for a, b in itertools.pairwise(values)]
    i = max(range(len(steps)), key=steps.__getitem__)
    low, high, of_low, of_high = sizes[i], sizes[i + 1], values[i], values[i + 1]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        value = line(middle)
        if _size(value - of_low) > _size(of_high - value):
            high, of_high = middle, value
        else:
            low, of_low = middle, value
    left = _size(of_high - of_low)
    if not left > max(_LEFT_OF_A_JUMP * steps[i], _LEAST_JUMP * largest):
        return None
    by_time = _size(line(high, low) - of_low) > left / 2
    place = name_of(line.field.structure, int((of_high - of_low).abs().argmax()))
    return Finding("time" if by_time else "state", line.t + high, True, place)


def _size(x: Tensor) -> float:
    return float(x.abs().max())


def _is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _first_bad(structure: StateStructure, du: Tensor) -> str:
    return name_of(structure, int(du.isfinite().logical_not().nonzero()[0, 0]))


def name_of(structure: StateStructure, index: int) -> str:
    """How a user writes an entry of the flat state: ``u[3]``, ``u['x'][0, 1]``."""
    prefixes = [""]
    if not structure.is_tensor:
        dummy = pytree.tree_unflatten(list(range(len(structure.shapes))), structure.spec)
        prefixes = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(dummy)[0]]
    for prefix, shape, size in zip(prefixes, structure.shapes, structure.sizes, strict=True):
        if index < size:
            at = torch.unravel_index(torch.tensor(index), shape) if shape else ()
            entry = f"[{', '.join(str(int(i)) for i in at)}]" if shape else ""
            return f"u{prefix}{entry}"
        index -= size
    raise IndexError(index)


def hardest_row(field: VectorField, t: float, u: Tensor, h: float, scale: Tensor) -> int | None:
    """The row of a batch that most of the error of a step ``h`` lies in.

    None where there is none, or no row stands out.
    """
    shape = field.structure.shapes[0]
    if not field.structure.is_tensor or len(shape) < 2 or shape[0] < 2 or not math.isfinite(h):
        return None
    evaluations = field.nf
    try:
        with torch.no_grad():
            line = _Line(field, t, u.detach())
            error = (h * (line(h) - line.slope)).abs() / scale
    except Exception:  # f's own
        return None
    finally:
        field.nf = evaluations
    rows = error.reshape(shape[0], -1).square().mean(1).sqrt().nan_to_num(math.inf, math.inf)
    largest, second = rows.topk(2).values.tolist()
    return int(rows.argmax()) if largest > _DOMINANT * second else None


def inputs_with_nan(field: VectorField) -> list[str]:
    """Names of the tensors with NaN among the parameters, and among what ``f`` captures."""
    tensors = []
    for path, leaf in pytree.tree_flatten_with_path(field.p)[0]:
        tensors += [(f"p{pytree.keystr(path)}", leaf)] if isinstance(leaf, Tensor) else []
    functions = [field.f, *([field.g] if hasattr(field, "g") else [])]  # type: ignore[attr-defined]
    for f in functions:
        tensors += _tensors(f, "", _DEPTH, set())
    bad = [name for name, x in tensors if _can_be_nan(x) and bool(x.detach().isnan().any())]
    return list(dict.fromkeys(bad))


def _can_be_nan(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _tensors(x: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a function can reach, with the names by which it does."""
    if isinstance(x, Tensor):
        yield name, x
        return
    if depth < 0 or id(x) in seen or isinstance(x, type) or inspect.ismodule(x):
        return
    seen.add(id(x))
    dot = f"{name}." if name else ""
    inner: list[tuple[str, Any]] = []
    if isinstance(x, torch.nn.Module):
        inner = [*x.named_parameters(), *x.named_buffers()]
        inner += [(k, v) for k, v in vars(x).items() if not k.startswith("_")]
        inner = [(dot + k, v) for k, v in inner]
    elif isinstance(x, dict) and len(x) <= _MOST_ITEMS:
        inner = [(f"{name}[{k!r}]", v) for k, v in x.items()]
    elif isinstance(x, (list, tuple)) and len(x) <= _MOST_ITEMS:
        inner = [(f"{name}[{k}]", v) for k, v in enumerate(x)]
    elif isinstance(x, functools.partial):
        inner = [(name, y) for y in (x.func, *x.args)] + list(x.keywords.items())
    elif inspect.ismethod(x):
        inner = [("self", x.__self__), (name, x.__func__)]
    elif inspect.isfunction(x):
        if not (x.__module__ or "").startswith("torch."):
            variables = inspect.getclosurevars(x)
            inner = [*variables.nonlocals.items(), *variables.globals.items()]
    elif hasattr(x, "__dict__"):
        inner = [(dot + k, v) for k, v in vars(x).items()]
    for key, value in inner:
        yield from _tensors(value, key, depth - 1, seen)
