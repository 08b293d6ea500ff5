"""What a family of methods brings to the native engine.

A family is one object, ``FAMILY`` in ``solvers/<family>/native.py``. The engine asks it instead of
looking at its name. Importing such a file loads no Numba: only kernels need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ClassVar, Protocol

import numpy as np

from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.kernels.functions import StepFunctions

#: An array in the work space: the slot of ``layout`` for its address, its shape and its type.
Room = tuple[int, tuple[int, ...], np.dtype]
_FLOAT64, _INT64 = np.dtype(np.float64), np.dtype(np.int64)


class Numbers(Protocol):
    """Takes the numbers of a method."""

    def array(self, slot: int, values: Any, dtype: Any = np.float64) -> None:
        """Keep an array, and note its address in a slot; None: leave the slot zero."""
        ...

    def number(self, slot: int, value: int) -> None:
        """Write an integer."""
        ...


class KernelSet:
    """Kernels that are written in one place.

    Parameters
    ----------
    name
        For messages, and for the cache of kernels.
    root
        The module that names the kernels. They are built again where this file or one that it
        imports from this package was changed.

    Attributes
    ----------
    has_long_loops
        Whether loops are over many numbers, and written to be made of vectors.
    """

    has_long_loops = False
    #: Loads a kernel ``(name, kernel_set)`` for float64, or gives None where none can be made. Set
    #: by the native engine, which lies above the methods that ask for such a kernel.
    loader: ClassVar[Callable[[str, KernelSet], Callable[..., int] | None]]

    def __init__(self, name: str, root: str):
        self.name, self.root = name, root

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def load(self, name: str) -> Callable[..., int] | None:
        """A kernel for float64, or None where it cannot be made (which is logged)."""
        return KernelSet.loader(name, self)

    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        """Kernels ``(I, R, like)`` by name: ``KERNELS`` of the root, which loads Numba."""
        return getattr(import_module(self.root), "KERNELS", {})


class Family(KernelSet):
    """A family of methods: the loops of the engine, run with the functions of its steps.

    Attributes
    ----------
    is_implicit
        Whether a step solves equations, with the Jacobian of the right-hand side.
    needs_jvp
        Whether a step needs products with a Jacobian whose entries are not at hand.
    iterates
        Whether equations are solved up to a tolerance only. The derivative at the end of a step is
        then not exact.
    keeps_stages
        Whether stages are kept for the reverse pass even where they could be made again.
    """

    is_implicit = False
    needs_jvp = False
    iterates = False
    keeps_stages = False

    def functions(self) -> StepFunctions:
        """The functions of its steps: ``FUNCTIONS`` of the root, which loads Numba."""
        return import_module(self.root).FUNCTIONS

    def write(self, numbers: Numbers, method: Any) -> None:
        """Write the coefficients of a method."""
        raise NotImplementedError

    def room(self, n: int, jacobian: Any) -> list[Room]:
        """Arrays in the work space beside the rows; ``jacobian`` is that of ``n`` states."""
        return []

    def fused_step(self, program: Any, method: Any) -> int:
        """Address of a whole step as one function, or 0 where there is none."""
        return 0

    def fused_vjp(self, program: Any, method: Any, active: tuple[bool, ...], fused: int) -> int:
        """Address of the reverse of a whole step, or 0 where there is none.

        Parameters
        ----------
        active
            Which parameters are differentiated.
        fused
            What ``fused_step`` gave.
        """
        return 0


class TableauFamily(Family):
    """Methods whose step is a number of stages, given by a tableau (``tableau.stages``)."""

    def write(self, numbers: Numbers, method: Any) -> None:
        dense = method.interpolant
        extra = len(dense.c_extra)
        rows = method.n + extra
        a_extra = np.zeros((max(extra, 1), rows))
        for i, row in enumerate(dense.a_extra):
            a_extra[i, : len(row)] = row
        for slot, values in (
            (L.A, method.a),
            (L.C, method.c),
            (L.B_ERROR, method.b_error),
            (L.B_LOW, method.b_error_low),
            (L.B_DENSE, method.b_dense),
            (L.POLY, dense.bernstein),
            (L.A_EXTRA, a_extra),
            (L.C_EXTRA, [*dense.c_extra, 0.0]),
        ):
            numbers.array(slot, values)
        for slot, value in (
            (L.STAGES, method.n),
            (L.EXTRA, extra),
            (L.DEGREE, dense.polynomial.shape[1]),
            (L.DENSE_ROWS, 1 + rows),
        ):
            numbers.number(slot, value)


class ImplicitFamily(TableauFamily):
    """The same with linear systems in each step, ``M = I / gamma - h J``."""

    is_implicit = True
    keeps_stages = True  # they are a solution, which is not to be looked for again

    def write(self, numbers: Numbers, method: Any) -> None:
        super().write(numbers, method)
        numbers.array(L.GAMMA, [method.gamma])

    def room(self, n: int, jacobian: Any) -> list[Room]:
        """Room for a Jacobian, its factors and the vectors that are solved for."""
        values, columns = jacobian.entries + jacobian.time_terms, jacobian.head
        return [
            (L.MATRIX, (columns, columns), _FLOAT64),
            (L.PIVOTS, (columns,), _INT64),
            (L.VECTOR, (n,), _FLOAT64),
            (L.JAC_VALUES, (values + 1,), _FLOAT64),
            (L.JAC_BAR, (values,), _FLOAT64),
        ]
