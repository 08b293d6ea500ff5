"""``NeuralSDE``: the solve of an SDE as a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffsolve.adjoints.sensealg import Sensealg
from diffsolve.nn.ode import last
from diffsolve.nn.options import check_options, lifted, with_dtypes_of
from diffsolve.nn.path_kl import PathKL, split
from diffsolve.problems.sde import SDEProblem
from diffsolve.problems.structure import detached
from diffsolve.solution import ReturnCode, Solution, SolveError
from diffsolve.solve import solve
from diffsolve.solvers.algorithm import Algorithm


class NeuralSDE(nn.Module):
    """``du = drift(u) dt + diffusion(u) dW`` as a layer from ``u(t0)`` to ``u(t1)``.

    Each call draws new noise, from torch's default generator (``torch.manual_seed``), unless a
    ``seed`` is given here or in the call.

    Parameters
    ----------
    drift, diffusion
        Modules or functions of ``u``. ``diffusion`` returns what ``noise`` says.
    tspan
        ``(t0, t1)``; default ``(0.0, 1.0)``.
    alg
        Method; None: as in ``solve``.
    sensealg
        How to differentiate; None: as in ``solve``.
    noise, interpretation
        As in ``SDEProblem``. Default: diagonal noise, ``diffusion`` has the shape of ``u``; Ito.
    prior
        Drift of the prior of a latent SDE, with the diffusion in common, for ``logqp``.
    takes_time
        Whether ``drift``, ``diffusion`` and ``prior`` are called with ``(t, u)``; default: with
        ``u`` alone.
    seed
        An integer or a tensor of integers: the same noise in every call. A ``torch.Generator``: a
        new seed is drawn from it in each call. None: one from torch's default generator.
    **options
        Further options of ``solve``: ``rtol``, ``atol``, ``dt``, ``saveat``, ...

    Examples
    --------
    >>> from diffsolve.nn import NeuralSDE
    >>> from torch import nn
    >>> layer = NeuralSDE(nn.Linear(2, 2), nn.Linear(2, 2), (0.0, 1.0), SOSRI(), rtol=1e-2)
    >>> layer(torch.zeros(100, 2)).shape  # 100 paths
    torch.Size([100, 2])

    References
    ----------
    Tzen, Raginsky, Neural stochastic differential equations (2019); Li, Wong, Chen, Duvenaud,
    Scalable gradients for stochastic differential equations, AISTATS 2020.
    """

    def __init__(
        self,
        drift: Callable[..., Any],
        diffusion: Callable[..., Any],
        tspan: tuple[Any, Any] = (0.0, 1.0),
        alg: Algorithm | None = None,
        sensealg: Sensealg | None = None,
        *,
        noise: str = "diagonal",
        interpretation: str = "ito",
        prior: Callable[..., Any] | None = None,
        takes_time: bool = False,
        seed: Any = None,
        **options: Any,
    ):
        super().__init__()
        self.drift = drift
        self.diffusion = diffusion
        self.prior = prior
        self.tspan = tspan
        self.alg = alg
        self.sensealg = sensealg
        self.noise = noise
        self.interpretation = interpretation
        self.takes_time = takes_time
        self.seed = seed
        check_options("NeuralSDE", options)
        self.options = options

    def forward(self, u0: Any, *, seed: Any = None, logqp: bool = False) -> Any:
        """State at ``t1``, in the shape of ``u0``; ``(T, *state)`` where ``saveat`` was given.

        States that autocast made half precise are solved in float32. The result has their dtype.

        Parameters
        ----------
        u0
            Initial state: a tensor ``(..., d)`` of paths, or a pytree.
        seed
            Of the noise, instead of the layer's.
        logqp
            Return the pair of this and the path's share of the divergence from the prior,
            ``integral of 1/2 |v|^2 dt`` from ``t0`` with ``diffusion v = drift - prior``, for each
            path: ``(...)``, or ``(T, ...)`` where ``saveat`` was given. Its mean over paths is the
            Kullback-Leibler divergence of the paths' law from that of the prior.

        Raises
        ------
        SolveError
            If the solve fails.
        ValueError
            With ``logqp``, if there is no prior or the divergence is infinite: the diffusion does
            not reach ``drift - prior``.
        """
        whole = self.options.get("saveat") is not None
        options: dict[str, Any] = {} if whole else {"saveat": None, "save_everystep": False}
        if seed is not None:
            options["seed"] = seed
        u = self.solve(u0, logqp=logqp, **options).u
        u = u if whole else last(u)
        if not logqp:
            return with_dtypes_of(u, u0)
        states, divergence = self.split(u)
        return with_dtypes_of(states, u0), divergence

    def solve(self, u0: Any, *, logqp: bool = False, **overrides: Any) -> Solution:
        """The whole solution, with its noise, its statistics and the estimates of its steps.

        Parameters
        ----------
        u0
            Initial state.
        logqp
            Carry the divergence of each path as one more component of the state, which ``split``
            takes apart: the last one of a tensor ``(..., d + 1)``; for another state, a tensor
            ``(1,)`` in a pair with it. It is in the norm of the error as well.
        **overrides
            Options of ``solve`` that replace those of the layer; also ``tspan``, ``alg`` and
            ``sensealg``. ``noise`` here is a path to follow, as in ``solve``.
        """
        options = {
            "alg": self.alg,
            "sensealg": self.sensealg,
            "tspan": self.tspan,
            "seed": None if "noise" in overrides else self.seed,
            **self.options,
            **overrides,
        }
        if logqp and self.prior is None:
            raise ValueError("logqp needs the drift of the prior: NeuralSDE(..., prior=...)")
        prob = SDEProblem(
            *self._functions(),
            lifted(u0),
            options.pop("tspan"),
            noise=self.noise,
            interpretation=self.interpretation,
        )
        return self._solve_with_kl(prob, options) if logqp else solve(prob, **options)

    @staticmethod
    def split(u: Any) -> tuple[Any, Tensor]:
        """States, and the divergence so far of each path, from those of ``solve(logqp=True)``."""
        return split(u)

    def _functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Drift and diffusion of ``(t, u)``."""
        if self.takes_time:
            return self.drift, self.diffusion
        return self._drift, self._diffusion

    def _drift(self, t: Tensor, u: Any) -> Any:
        return self.drift(u)

    def _diffusion(self, t: Tensor, u: Any) -> Any:
        return self.diffusion(u)

    def _prior(self, t: Tensor, u: Any) -> Any:
        assert self.prior is not None
        return self.prior(u)

    def _path_kl(self) -> PathKL:
        prior = self.prior if self.takes_time else self._prior
        assert prior is not None
        f, g = self._functions()
        return PathKL(f, g, self.noise, prior)

    # methods of the layer: code that was compiled for them is found again in the next solve
    def _drift_with_kl(self, t: Tensor, u: Any) -> Any:
        return self._path_kl().drift(t, u)

    def _diffusion_with_kl(self, t: Tensor, u: Any) -> Any:
        return self._path_kl().diffusion(t, u)

    def _solve_with_kl(self, prob: SDEProblem, options: dict[str, Any]) -> Solution:
        t0, t1 = (float(detached(t)) for t in prob.tspan)
        if t1 < t0:
            raise ValueError(f"logqp is an integral forward in time, got tspan = ({t0}, {t1})")
        kl, u0 = self._path_kl(), prob.u0
        first: Tensor = pytree.tree_leaves(u0)[0]
        with torch.no_grad():
            rate = kl.rate(first.new_tensor(t0), u0)
        if not bool(torch.isfinite(rate).all()):
            raise ValueError(_INFINITE.format(where=f" at t0 = {t0:g}"))
        larger = prob.remake(f=self._drift_with_kl, g=self._diffusion_with_kl, u0=kl.start(u0))
        try:
            return solve(larger, **options)
        except SolveError as error:
            if error.retcode is not ReturnCode.UNSTABLE:
                raise
            hint = _INFINITE.format(where="")
            raise SolveError(
                f"{error} Perhaps {hint}", error.retcode, error.t, error.h, error.solution
            ) from error

    def extra_repr(self) -> str:
        shown = [f"tspan={self.tspan}", f"alg={self.alg}", f"sensealg={self.sensealg}"]
        return ", ".join(
            [*shown, f"noise={self.noise!r}", f"interpretation={self.interpretation!r}"]
        )


_INFINITE = (
    "the divergence from the prior is infinite{where}: diffusion is zero there, or of too low a "
    "rank, and drift differs from prior. Make the diffusion positive (softplus), or let drift be "
    "prior plus the diffusion times a function."
)
