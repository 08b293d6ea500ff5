"""``NeuralODE``: the solve of an ODE as a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffsolve.adjoints.sensealg import Sensealg
from diffsolve.nn.options import check_options, lifted, with_dtypes_of
from diffsolve.problems.ode import ODEProblem
from diffsolve.solution import Solution
from diffsolve.solve import solve
from diffsolve.solvers.algorithm import Algorithm


class NeuralODE(nn.Module):
    """``du/dt = module(u)``, or ``module(t, u)``, as a layer from ``u(t0)`` to ``u(t1)``.

    Parameters
    ----------
    module
        The right-hand side.
    tspan
        ``(t0, t1)``; default ``(0.0, 1.0)``.
    alg
        Method; None: as in ``solve``.
    sensealg
        How to differentiate; None: as in ``solve``.
    takes_time
        Whether ``module`` is called with ``(t, u)``; default: with ``u`` alone.
    **options
        Further options of ``solve``: ``rtol``, ``atol``, ``saveat``, ...

    Examples
    --------
    >>> from diffsolve.nn import NeuralODE
    >>> from torch import nn
    >>> layer = NeuralODE(nn.Linear(2, 2), (0.0, 1.0), Tsit5(), rtol=1e-6)
    >>> model = nn.Sequential(nn.Linear(3, 2), layer, nn.Linear(2, 1))

    References
    ----------
    Chen, Rubanova, Bettencourt, Duvenaud, Neural Ordinary Differential Equations, NeurIPS 2018.
    """

    def __init__(
        self,
        module: nn.Module,
        tspan: tuple[Any, Any] = (0.0, 1.0),
        alg: Algorithm | None = None,
        sensealg: Sensealg | None = None,
        *,
        takes_time: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.module = module
        self.tspan = tspan
        self.alg = alg
        self.sensealg = sensealg
        self.takes_time = takes_time
        check_options("NeuralODE", options)
        self.options = options

    def forward(self, u0: Any) -> Any:
        """State at ``t1``, in the shape of ``u0``; ``(T, *state)`` where ``saveat`` was given.

        States that autocast made half precise are solved in float32. The result has their dtype.

        Raises
        ------
        SolveError
            If the solve fails.
        """
        whole = self.options.get("saveat") is not None
        options: dict[str, Any] = {} if whole else {"saveat": None, "save_everystep": False}
        u = self.solve(u0, **options).u
        if not whole:
            u = u[-1] if isinstance(u, Tensor) else last(u)
        return with_dtypes_of(u, u0)

    def solve(self, u0: Any, **overrides: Any) -> Solution:
        """The whole solution, with its statistics and the estimates of its steps.

        Parameters
        ----------
        u0
            Initial state. One that autocast made half precise is solved in float32.
        **overrides
            Options of ``solve`` that replace those of the layer; also ``tspan``, ``alg`` and
            ``sensealg``.
        """
        options = {
            "alg": self.alg,
            "sensealg": self.sensealg,
            "tspan": self.tspan,
            **self.options,
            **overrides,
        }
        f = self.module if self.takes_time else self._without_time
        return solve(ODEProblem(f, lifted(u0), options.pop("tspan")), **options)

    def _without_time(self, t: Tensor, u: Any) -> Any:
        return self.module(u)

    def extra_repr(self) -> str:
        return f"tspan={self.tspan}, alg={self.alg}, sensealg={self.sensealg}"


def last(u: Any) -> Any:
    """The last of the saved states."""
    return pytree.tree_map(lambda leaf: leaf[-1], u)
