"""What a named test problem is: a function that makes an ``ODEProblem``, and a reference solution.

The reference solutions that have no closed form are stored in ``references.json``, which
``benchmarks/make_references.py`` and ``benchmarks/make_stiff_references.py`` make in multiple
precision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, update_wrapper
from importlib.resources import files
from typing import Any, Generic, NamedTuple, ParamSpec, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsolve.problems.ode import ODEProblem

P = ParamSpec("P")
Values = Sequence[float] | Sequence[Sequence[float]] | NDArray[np.float64] | Tensor


class Reference(NamedTuple):
    """Reference solution: times ``t`` of shape ``(T,)`` and states ``u`` of ``(T, *state)``."""

    t: NDArray[np.float64]
    u: NDArray[np.float64]


@cache
def _stored() -> dict[str, dict[str, Any]]:
    text = (
        files("diffsolve.problems.library").joinpath("references.json").read_text(encoding="utf-8")
    )
    return json.loads(text)


def tensor(values: Values, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """``values`` as a tensor; a tensor keeps its graph, so that gradients reach the caller's."""
    return torch.as_tensor(values, dtype=dtype, device=device)


class LibraryProblem(Generic[P]):
    """A named test problem; call it for an ``ODEProblem``.

    Parameters
    ----------
    make
        Makes the problem; its name, docstring and signature become those of the object.
    source
        Where the problem is published.
    solution
        ``solution(t, problem)``: closed form at the times ``t``. Without one, the reference
        solution is a stored one.
    stiff
        Whether the problem is stiff: explicit methods take far too many steps.

    Attributes
    ----------
    name : str
        Name of the problem.
    source : str
        Where the problem is published.
    stiff : bool
        Whether the problem is stiff.
    """

    def __init__(
        self,
        make: Callable[P, ODEProblem],
        source: str,
        solution: Callable[[NDArray[np.float64], ODEProblem], NDArray[np.float64]] | None = None,
        stiff: bool = False,
    ):
        self._make = make
        self._solution = solution
        self.name: str = make.__name__
        self.source = source
        self.stiff = stiff
        update_wrapper(self, make)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> ODEProblem:
        return self._make(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<library problem {self.name}>"

    def reference(self, *args: P.args, **kwargs: P.kwargs) -> Reference:
        """Solution at eleven times from one end of the interval to the other.

        The times are evenly spaced; those of `rober` and `e5` are powers of ten. The solution
        belongs to the float64 values of the data, and is accurate to ``1e-12`` relative to each
        component.

        Parameters
        ----------
        *args, **kwargs
            Parameters of the problem, where the solution has a closed form. A stored reference is
            that of the default parameters; `van_der_pol` has one for ``mu=1e6`` too, and `rober`
            for ``tspan=(0, 1e11)``.

        Raises
        ------
        ValueError
            There is no stored reference for these parameters.
        """
        if self._solution is not None:
            problem = self._make(*args, **kwargs)
            t = np.linspace(float(problem.tspan[0]), float(problem.tspan[1]), 11)
            return Reference(t, self._solution(t, problem))
        given = {
            k: tensor(v, torch.float64, None).tolist() for k, v in kwargs.items() if _is_data(v)
        }
        if not args and len(given) == len(kwargs):
            for key, entry in _stored().items():
                if key.partition("(")[0] == self.name and entry.get("given", {}) == given:
                    return Reference(np.array(entry["t"]), np.array(entry["u"]))
        raise ValueError(
            f"{self.name} has no stored reference for these parameters; "
            "leave them out for that of its default parameters"
        )


def _is_data(value: object) -> TypeGuard[Values]:
    return isinstance(value, int | float | tuple | list | np.ndarray | Tensor)


def library_problem(
    source: str,
    solution: Callable[[NDArray[np.float64], ODEProblem], NDArray[np.float64]] | None = None,
    stiff: bool = False,
) -> Callable[[Callable[P, ODEProblem]], LibraryProblem[P]]:
    """Make a `LibraryProblem` of the decorated function; see there for the parameters."""

    def decorate(make: Callable[P, ODEProblem]) -> LibraryProblem[P]:
        return LibraryProblem(make, source, solution, stiff)

    return decorate
