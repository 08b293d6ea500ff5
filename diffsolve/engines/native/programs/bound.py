"""A program with the tensors of one solve."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.programs.rows import RowProgram
from diffsolve.engines.native.programs.scalar import ScalarProgram
from diffsolve.engines.native.programs.traces import FunctionCache, TraceEntry
from diffsolve.engines.native.tracing.fingerprint.fingerprint import Fingerprint
from diffsolve.problems.capture import reachable_tensors
from diffsolve.problems.vector_field import VectorField

_NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")


@functools.lru_cache(maxsize=100)
def function_at(address: int, is_float32: bool) -> Callable[[float, int, int, int], None]:
    """``f(t, u, p, out)`` at an address."""
    number, pointer = ctypes.c_float if is_float32 else ctypes.c_double, ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, number, pointer, pointer, pointer)(address)


class BoundProgram:
    """The machine code of a right-hand side with the tensors of one solve.

    Attributes
    ----------
    program
        Its functions.
    tensors
        What it uses besides ``t`` and ``u``, one tensor a block of the flat parameters.
    params
        Their numbers, flat. This is the memory of the tensor itself until ``keep_params`` makes a
        copy, for what reads them after the solve.
    """

    def __init__(
        self, entry: TraceEntry, fingerprint: Fingerprint, leaves: list[Any], trace_s: float
    ):
        program = entry.program
        assert program is not None
        self.program: Any = program  # its kind is that of the class
        self._trace_s = trace_s - program.compile_s
        self._entry = entry
        self._fingerprint: Fingerprint | None = fingerprint
        self._active: tuple[bool, ...] | None = None
        self.template: Any = None
        self.tensors: list[Tensor] = [fingerprint.tensor_of(x, leaves) for x in entry.sources]
        flat = [x.detach() if x.dim() == 1 else x.detach().reshape(-1) for x in self.tensors]
        self._borrowed = len(flat) == 1 and flat[0].is_contiguous()
        self.params = flat[0] if self._borrowed else torch.cat(flat) if flat else _NOTHING

    def keep_params(self) -> None:
        """Copy the numbers, which the user may change after the solve."""
        if self._borrowed:
            self.params, self._borrowed = self.params.clone(), False

    def forget_functions(self) -> None:
        """Let go of what looked at ``f``: what is kept for a reverse pass must not refer to it."""
        self._fingerprint = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundProgram:
        return self  # nothing changes it, and machine code has no copies

    def compile_s(self) -> float:
        """Seconds spent on tracing and compiling since this was made."""
        return self._trace_s + self.program.compile_s

    @property
    def active(self) -> tuple[bool, ...]:
        """Which of the tensors require a gradient, and have one that is not zero."""
        active = self._active
        if active is None:
            pairs = zip(self.tensors, self._entry.used, strict=True)
            active = self._active = tuple([x.requires_grad and used for x, used in pairs])
        return active

    def uses_all(self, tensors: list[Tensor]) -> bool:
        """Whether the tensors that ``f`` was seen to use are those that get gradients."""
        if not tensors:
            return True
        mine = {id(x) for x in self.tensors}
        return all(id(x) in mine for x in tensors)

    def differentiable(self, field: VectorField, by_state: bool) -> list[Tensor]:
        """Every tensor with ``requires_grad`` that ``f`` uses, or could use.

        Parameters
        ----------
        by_state
            Whether the gradient by the initial state is wanted.

        Raises
        ------
        Declined
            If ``f`` keeps gradients from flowing somewhere.
        """
        entry = self._entry
        tensors = {id(x): x for x in (*self.tensors, *self._reachable(field)) if x.requires_grad}
        if (tensors or by_state) and entry.detached is not None:
            raise Declined(f"it switches gradients off by {entry.detached}")
        if (tensors or by_state) and entry.hook:
            raise Declined(f"it has hooks on gradients: {entry.hook}")
        field.compares = entry.compares
        return list(tensors.values())

    def _reachable(self, field: VectorField) -> list[Tensor]:
        """Leaves that ``f`` could use; they are looked for where the tensors in use are others."""
        assert self._fingerprint is not None  # the solve has not begun
        met, functions = self._fingerprint.tensors, field.functions
        cache = FunctionCache.of(functions[0])
        parts = [getattr(f, "__func__", None) for f in functions]
        key = (*parts, *map(FunctionCache.of, functions[1:]))
        known = cache.reachable.get(key)
        if known is not None and len(known[0]) == len(met) and all(map(is_, known[0], met)):
            return known[1]
        leaves = [x for x in reachable_tensors(functions) if x.is_leaf]
        cache.note_reachable(key, met, leaves)
        return leaves


class ScalarBound(BoundProgram):
    """A ``ScalarProgram`` with the tensors of one solve."""

    program: ScalarProgram

    def evaluate(self, t: float, u: Tensor) -> Tensor:
        """``f(t, u)`` by the compiled function."""
        program = self.program
        function = function_at(program.address("field"), program.is_float32)
        u = u.detach().contiguous()
        out = torch.empty_like(u)
        function(t, u.data_ptr(), self.params.data_ptr(), out.data_ptr())
        return out


class RowBound(BoundProgram):
    """A ``RowProgram`` with the tensors of one solve."""

    program: RowProgram

    def arguments(self, rows: int) -> np.ndarray:
        """The flat parameters behind the number of rows.

        Compiled functions get the address of the parameters.
        """
        numbers = self.params.numpy()
        item = numbers.itemsize
        whole = np.empty(8 // item + len(numbers), numbers.dtype)
        whole[: 8 // item].view(np.int64)[0] = rows
        whole[8 // item :] = numbers
        return whole

    def evaluate(self, kind: str, t: float, u: Tensor, rows: int) -> Tensor:
        """``"drift"`` or ``"diffusion"`` of the flat state by the compiled function."""
        program = self.program
        width = program.d if kind == "drift" else program.width
        arguments = self.arguments(rows)
        u = u.detach().contiguous()
        out = torch.empty(rows * width, dtype=u.dtype, device="cpu")
        function = function_at(program.address(kind), program.is_float32)
        function(t, u.data_ptr(), arguments.ctypes.data + 8, out.data_ptr())
        return out
