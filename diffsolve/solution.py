"""What a solve gives back: the solution, its statistics, its steps, and failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ReturnCode(Enum):
    """Why a solve ended. Only ``SUCCESS`` and ``TERMINATED`` are successful."""

    SUCCESS = "reached the end of tspan"
    TERMINATED = "stopped early on request"
    MAX_ITERS = "maxiters steps were not enough"
    DT_LESS_THAN_MIN = "the step size fell below dtmin or the resolution of time"
    UNSTABLE = "the state, its derivative or the error estimate is NaN or Inf"
    NEWTON_FAILED = "Newton's iteration did not converge, or its matrix is singular"

    @property
    def successful(self) -> bool:
        return self in (ReturnCode.SUCCESS, ReturnCode.TERMINATED)


@dataclass(init=False)
class Stats:
    """Work done by a solve.

    Attributes
    ----------
    nf
        Evaluations of the right-hand side, those for the initial step size included. In
        ``adjoint``: evaluations differentiated by the reverse pass.
    ng
        The same of the diffusion of an SDE.
    njac, nlu, nsolve, nnewton
        Jacobians, factorisations, linear solves and Newton iterations (implicit methods).
    naccept, nreject
        Accepted and rejected steps.
    engine
        Engine that ran, with the reason where it was not the first choice.
    alg, sensealg
        What was chosen, also where the user left the choice open.
    wall_s
        Seconds.
    kernel_s, compile_s
        Seconds of them inside of the compiled loop, and for tracing and compiling ``f`` (native
        engine).
    adjoint
        The same of the reverse pass, filled by ``backward``; None before.
    """

    nf: int = 0
    ng: int = 0
    njac: int = 0
    nlu: int = 0
    nsolve: int = 0
    nnewton: int = 0
    naccept: int = 0
    nreject: int = 0
    engine: str = "torch"
    alg: str = ""
    sensealg: str = ""
    wall_s: float = 0.0
    kernel_s: float = 0.0
    compile_s: float = 0.0
    adjoint: Stats | None = None

    def __init__(self, engine: str = "torch", alg: str = "", **others: Any):
        self.engine, self.alg = engine, alg  # the others are those of the class, until they change
        if others:
            self.__dict__.update(others)

    def count(self, counts: tuple[int, ...]) -> None:
        """Note work done: ``nf, njac, nlu, nsolve, nnewton``, and ``ng`` for an SDE."""
        self.nf, self.njac, self.nlu, self.nsolve, self.nnewton, *of_noise = counts
        if of_noise:
            (self.ng,) = of_noise

    def __str__(self) -> str:
        shown = [f"{self.naccept} steps", f"{self.nreject} rejected", f"nf={self.nf}"]
        shown += [
            f"{name}={getattr(self, name)}"
            for name in ("ng", "njac", "nlu", "nsolve", "nnewton")
            if getattr(self, name)
        ]
        return f"{', '.join(shown)}, {self.wall_s * 1e3:.3g} ms ({self.engine})"


@dataclass(frozen=True)
class Steps:
    """One entry an accepted step, in order; every field has shape ``(N,)``.

    Attributes
    ----------
    t, h
        Start and signed size of the step, float64 on the CPU.
    error
        Tolerance-scaled norm of the local error estimate, as the controller saw it: a step is
        accepted when it is <= 1. Dimensionless. Zero where steps are fixed and the method has no
        estimate.
    error_norm
        Root mean square of the unscaled error vector, in units of the state.
    stiffness
        Estimate of the magnitude of the Jacobian's dominant eigenvalue, in 1/time.

    Under ``DiscreteAdjoint`` the last three can be differentiated.
    """

    t: Tensor
    h: Tensor
    error: Tensor
    error_norm: Tensor
    stiffness: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def __repr__(self) -> str:
        if not len(self):
            return "Steps(none)"
        h = self.h.detach().abs()
        return f"Steps({len(self)}, |h| from {h.min():.3g} to {h.max():.3g})"


@dataclass
class Solution:
    """Result of ``solve``.

    Attributes
    ----------
    t
        Saved times ``(T,)``, float64 on the CPU.
    u
        Saved states ``(T, *state)``; a pytree state keeps its structure with ``T`` leading.
    retcode
        Why the solve ended.
    stats, steps
        Work done, and the accepted steps with their estimates.
    message
        What happened, in a sentence, where the solve failed.
    noise
        Brownian path of an SDE, for ``solve(..., noise=sol.noise)``: the same path at other
        tolerances, with another method, or backward. None for an ODE.
    """

    _t: Any = field(repr=False)  # an array until somebody asks for it
    u: Any
    retcode: ReturnCode
    stats: Stats
    message: str = ""
    _steps: Any = field(default=None, repr=False)  # or a function that makes them
    noise: Any = field(default=None, repr=False)
    _interpolate: Callable[[Any, int], Any] | None = field(default=None, repr=False)
    _context: Any = field(default=None, repr=False)  # how it was solved, for local regularizers

    @property
    def t(self) -> Tensor:
        """Saved times."""
        if isinstance(self._t, np.ndarray):
            self._t = torch.from_numpy(self._t.copy())
        return self._t

    @t.setter
    def t(self, times: Tensor) -> None:
        self._t = times

    @property
    def steps(self) -> Steps:
        """The accepted steps with their estimates."""
        if not isinstance(self._steps, Steps):
            self._steps = self._steps()
        return self._steps

    @property
    def success(self) -> bool:
        return self.retcode.successful

    def __call__(self, t: Any, derivative: int = 0) -> Any:
        """State at any time of the solved interval, from the method's continuous extension.

        Parameters
        ----------
        t
            A time or a sequence or tensor of times, any order.
        derivative
            Order of the time derivative wanted; default 0, the state itself.

        Returns
        -------
        Tensor or pytree
            ``(*t.shape, *state)``.

        Raises
        ------
        ValueError
            If the solution was made without ``dense=True``, or a time is outside of it.
        """
        if self._interpolate is None:
            raise ValueError(
                "this solution has no dense output: pass dense=True to solve() "
                "(the default when saveat is None), or list the times in saveat"
            )
        return self._interpolate(t, derivative)

    def __len__(self) -> int:
        return len(self._t)

    def __repr__(self) -> str:
        span = f"t in [{self.t[0]:.6g}, {self.t[-1]:.6g}]" if len(self.t) else "no times"
        lines = [
            f"Solution: {self.retcode.name}, {len(self.t)} saved times, {span}",
            f"  alg {self.stats.alg}; sensealg {self.stats.sensealg or 'none'}",
            f"  {self.stats}",
        ]
        if self.message:
            lines.append(f"  {self.message}")
        return "\n".join(lines)

    def plot(self, ax: Any = None, components: Any = None, **kwargs: Any) -> Any:
        """Plot the components of the state over time (needs matplotlib, extra ``plot``).

        Parameters
        ----------
        ax
            Matplotlib axes; default: the current ones.
        components
            Indices into the flattened state; default: all.
        **kwargs
            Passed to ``Axes.plot``.

        Returns
        -------
        Axes
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("sol.plot() needs matplotlib: pip install diffsolve[plot]") from error
        from torch.utils import _pytree as pytree

        leaves = [leaf.detach().cpu() for leaf in pytree.tree_leaves(self.u)]
        flat = torch.cat([leaf.reshape(len(self.t), -1) for leaf in leaves], 1)
        ax = ax if ax is not None else plt.gca()
        for i in range(flat.shape[1]) if components is None else components:
            ax.plot(self.t.detach().numpy(), flat[:, i].numpy(), **{"label": f"u[{i}]", **kwargs})
        ax.set_xlabel("t")
        if flat.shape[1] <= 10 or components is not None:
            ax.legend()
        return ax


class SolveError(RuntimeError):
    """A solve failed.

    Attributes
    ----------
    retcode
        The return code.
    t, h
        Where it stopped, and the step size that was tried.
    solution
        The partial solution, up to ``t``; None where a reverse solve failed.
    """

    def __init__(
        self,
        message: str,
        retcode: ReturnCode,
        t: float,
        h: float,
        solution: Solution | None = None,
    ):
        super().__init__(message)
        self.retcode = retcode
        self.t = t
        self.h = h
        self.solution = solution
