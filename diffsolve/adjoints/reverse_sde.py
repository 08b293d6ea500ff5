"""The reverse equations of SDEs, which are SDEs as well, and the method that solves them.

Of a Stratonovich equation ``du = f dt + g_j o dW_j``, the adjoint and the gradients by the
parameters obey the Stratonovich equations

    d lambda = -(f_u^T lambda) dt - (g_j)_u^T lambda o dW_j
    d mu     = -(f_p^T lambda) dt - (g_j)_p^T lambda o dW_j,

solved from the last saved time to the first along the same Brownian path (Li, Wong, Chen, Duvenaud,
Scalable gradients for stochastic differential equations, AISTATS 2020, theorem 3.2). An Ito
equation is a Stratonovich one with the drift ``f - c``, ``c = 1/2 (g_j)_u g_j`` (sum over ``j``).
With

    H(lambda, u, p) = lambda . (h f + g W) - h S,  S = lambda . c = 1/2 g_j . ((g_j)_u^T lambda),

a step's increments are ``H_lambda`` of ``u``, ``-H_u`` of ``lambda`` and ``-H_p`` of ``mu``: one
evaluation of ``f`` and ``g`` and one reverse pass through both, whatever the noise. ``S`` costs one
reverse pass through ``g`` more for diagonal and scalar noise, and ``m`` for general noise; it is
differentiated in turn, so ``g`` must have second derivatives there.

Such a system is Hamiltonian: its noise commutes where that of the forward equation does. The
reverse solve takes Euler-Heun steps, of strong order 1 for such noise and of 1/2 for any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsolve.adjoints.backsolved_state import BacksolvedState
from diffsolve.adjoints.forward_states import ForwardStates
from diffsolve.engines.plan import AdjointEquation, SolveContext
from diffsolve.engines.settings import Settings
from diffsolve.engines.torch.reverse_field import ReverseField
from diffsolve.engines.torch.step_log import StepLog
from diffsolve.engines.torch.tape import StepTape
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.vector_field import CHANGED, VectorField
from diffsolve.solvers.algorithm import Algorithm, Step
from diffsolve.solvers.controllers import Controller
from diffsolve.solvers.norms import rms
from diffsolve.solvers.stochastic.low_order import EulerHeun, LambaEulerHeun
from diffsolve.solvers.stochastic.method import StochasticMethod, sqrt_abs
from diffsolve.solvers.stochastic.noise.base import Noise

REVERSE_METHODS = (EulerHeun, LambaEulerHeun)
_RECENT = 3  # steps that the first reverse one is guessed from
_TWICE = (
    "The correction of an Ito equation needs second derivatives of g. Where it has none, for "
    "instance by a custom autograd function, use DiscreteAdjoint(), or write the equation as a "
    "Stratonovich one."
)
_LOOKS = 8  # saved states where g is checked for coupled components, about
_ROUNDING = 1e3  # units in which products that ought to be in proportion may differ


@dataclass
class ForwardSteps:
    """What a reverse solve knows of the forward one's steps.

    Attributes
    ----------
    starts, end
        Where the steps began, and where the last one ended.
    size
        The largest of the last few sizes; None where there were no steps.
    """

    starts: Sequence[float]
    end: float
    size: float | None

    @classmethod
    def of(cls, log: StepLog) -> ForwardSteps:
        recent = [abs(float(h)) for h in log.step_h[-_RECENT:]]
        starts = [float(t) for t in log.step_t]
        return cls(starts, log.final_t, max(recent, default=None))


def diffusion_at_start(context: SolveContext, u0: Tensor) -> Tensor:
    """``g(t0, u0)``."""
    field = context.field
    assert isinstance(field, SDEField)
    with torch.no_grad():
        return field.diffusion(field.after(context.t0, context.direction), u0).clone()


class ReverseSDE(ReverseField):
    """Reverse equation of an SDE.

    Parameters
    ----------
    context
        The forward solve.
    forward, params, extra
        As in ``ReverseField``.
    steps, G0
        The forward steps, and the diffusion at their start.

    Attributes
    ----------
    path
        The Brownian path: a copy, so that new times in it leave ``sol.noise`` as it is.
    ng
        Evaluations of ``g`` so far.
    correction
        Whether the equation is an Ito one whose noise is not additive.
    """

    forward: SDEField

    def __init__(
        self,
        context: SolveContext,
        forward: VectorField,
        params: list[Tensor],
        steps: ForwardSteps,
        G0: Tensor,
        extra: int,
    ):
        super().__init__(forward, params, extra)
        field = context.field
        assert isinstance(field, SDEField) and isinstance(field.path, Noise)
        self.context, self.G0 = context, G0
        self.path = field.path.fork(levy_area=False)
        self.ng = 0
        self.first_size = steps.size
        self.correction = field.interpretation == "ito" and field.noise != "additive"
        #: Whether a component of diagonal noise depends on other components of the state.
        self.coupled = False

    def check(self, u0: Tensor, times: Sequence[float], states: Tensor) -> None:
        """Refuse a ``g`` that has changed, and learn what its correction needs.

        Parameters
        ----------
        u0
            Flat initial state.
        times, states
            The saved ones, ``(T,)`` and ``(T, N)``, to look at ``g`` in.

        Raises
        ------
        RuntimeError
            If ``g`` gives other values than in the solve.
        ValueError
            If it lets paths of a batch depend on each other.
        """
        field, context = self.forward, self.context
        t = field.after(context.t0, context.direction)
        with torch.no_grad():
            now = field.diffusion(t, u0)
        if not float(field.rounding_error(now.reshape(-1), self.G0.reshape(-1))) <= 1:
            raise RuntimeError(re.sub(r"\bf\b", "g", CHANGED))
        if self.correction:
            some = range(0, len(times), max(1, len(times) // _LOOKS))
            at = [(t, u0), *((field.time(times[i]), states[i]) for i in some)]
            self.coupled = any([_couples(field, t, u) for t, u in at])

    def both_ends(self, t: float, h: float) -> Sequence[Tensor]:
        return self.forward.both_ends(t, h)

    def state_at(self, t: float, z: Tensor) -> Tensor:
        """The forward state that goes with the reverse state ``z``."""
        raise NotImplementedError

    def moves(self, now: Tensor, t: float, h: float, w: Tensor, z: Tensor) -> Tensor:
        """Increment of the reverse state over ``(h, w)`` with everything taken at ``(t, z)``.

        ``now`` is ``t`` as ``f`` and ``g`` see it. With ``h = 0``, it is that of the noise alone.
        """
        self.nf, self.ng = self.nf + (h != 0), self.ng + 1
        field = self.forward
        bar, u = z[: self.n], self.state_at(t, z)
        with torch.enable_grad():
            u, bar = u.detach().requires_grad_(), bar.detach().requires_grad_()
            G = field.diffusion(now, u)
            moved = field.product(G, w)
            correction = None
            if h != 0:
                moved = moved + h * field(now, u)
                correction = self._correction(G, u, bar) if self.correction else None
        outputs, bars = [moved], [bar.detach()]
        if correction is not None:
            # an Ito integral looks along the forward solve, whichever way its time goes
            ahead = correction.new_full((), -self.context.direction * h)
            outputs, bars = [moved, correction], [*bars, ahead]
        try:
            by_bar, by_u, *by_p = self.pull(outputs, bars, [bar, u, *self.params])
        except RuntimeError as error:
            if correction is not None:
                error.add_note(_TWICE)
            raise
        return self._joined(moved.detach() + by_bar, by_u, by_p)

    def _joined(self, du: Tensor, by_u: Tensor, by_p: list[Tensor]) -> Tensor:
        """The increment of the reverse state."""
        return torch.cat([-by_u, *[-x for x in by_p]])

    def _correction(self, G: Tensor, u: Tensor, bar: Tensor) -> Tensor | None:
        """``S`` of the module's text; None where it is zero."""
        if not G.requires_grad:
            return None
        field = self.forward
        if field.is_diagonal and not self.coupled:
            parts = [(G, bar, G)]
        elif field.is_diagonal:
            # one component of all paths at a time
            eye = torch.eye(field.d, dtype=G.dtype, device=G.device).repeat(1, field.rows)
            parts = [(G, bar * column, G * column) for column in eye.unbind()]
        else:
            rows = bar.view(field.rows, field.d)
            parts = [(column, rows, column) for column in G.unbind(-1)]
        total: Any = 0.0
        for g, weight, along in parts:
            (v,) = torch.autograd.grad(g, u, weight, create_graph=True, allow_unused=True)
            if v is not None:  # else this part of g does not depend on u
                total = total + 0.5 * (v * along.reshape(-1)).sum()
        return total if isinstance(total, Tensor) and total.requires_grad else None

    def counts(self) -> tuple[int, ...]:
        return *super().counts(), self.ng


class BacksolveSDE(BacksolvedState, ReverseSDE):
    """Of the backsolve adjoint: ``z = [lambda, u, mu]``."""

    def __init__(
        self,
        adjoint: AdjointEquation,
        context: SolveContext,
        forward: VectorField,
        params: list[Tensor],
        steps: ForwardSteps,
        u0: Tensor,
        G0: Tensor,
    ):
        super().__init__(context, forward, params, steps, G0, extra=forward.structure.size)
        self.expect(adjoint, context, u0)
        if not context.settings.adaptive:  # read no increments but those of the forward steps
            self.pins = steps.starts

    def state_at(self, t: float, z: Tensor) -> Tensor:
        return z[self.n : 2 * self.n]

    def distance(self, reached: Tensor, u: Tensor) -> float:
        # noise leads components through zero, where a relative tolerance means nothing
        return float(rms((reached - u) / self.context.settings.tolerance.scale(rms(u))))

    def _joined(self, du: Tensor, by_u: Tensor, by_p: list[Tensor]) -> Tensor:
        return torch.cat([-by_u, du, *[-x for x in by_p]])


class InterpolatingSDE(ReverseSDE):
    """Of the interpolating adjoint: ``z = [lambda, mu]``.

    Reverse steps end wherever forward steps did. The states there are those of ``tape``. Between
    them, ``ForwardStates`` reads the interpolant of the forward step, which follows the same path.
    """

    def __init__(
        self,
        context: SolveContext,
        forward: VectorField,
        params: list[Tensor],
        steps: ForwardSteps,
        G0: Tensor,
        tape: StepTape,
        final: Tensor,
    ):
        super().__init__(context, forward, params, steps, G0, extra=0)
        self.pins = steps.starts
        self.states = ForwardStates(context, self.path, tape, steps.end, final)

    def state_at(self, t: float, z: Tensor) -> Tensor:
        return self.states.at(t)


class ReverseHeun(Algorithm):
    """Euler-Heun steps of a ``ReverseSDE``.

    Parameters
    ----------
    alg
        ``EulerHeun()``, or ``LambaEulerHeun()`` for adaptive steps.
    """

    carries_derivative = False
    is_one_step = True

    def __init__(self, alg: EulerHeun):
        self.alg = alg
        self.order, self.adaptive = alg.order, alg.adaptive

    @property
    def name(self) -> str:
        return self.alg.name

    def default_controller(self) -> Controller:
        return self.alg.default_controller()

    def init(
        self, field: VectorField, t: Any, u: Tensor, du: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return (u,)

    def step(self, field: Any, t: Any, h: Any, state: tuple[Tensor, ...]) -> Step:
        reverse: ReverseSDE = field
        (z,) = state
        now, then = reverse.both_ends(t, h)
        w = reverse.path.increment(t, t + h).W
        first = reverse.moves(now, t, h, w, z)
        K = z + first
        second = reverse.moves(then, t + h, h, w, K)
        error = None
        if self.adaptive:
            error = 0.5 * (second - first)
            if reverse.forward.m > 1 and not reverse.forward.is_diagonal:
                # independent noise shows the Levy areas that are left out, as in LambaEulerHeun
                extra = sqrt_abs(h) * 0.5**0.5 * reverse.path.extra(t, t + h, 1)[0]
                at_end = reverse.moves(then, t + h, 0.0, extra, K)
                error = torch.hypot(error, at_end - reverse.moves(now, t, 0.0, extra, z))
        nothing: Any = None  # no value inside of a reverse step is ever read
        return Step((z + 0.5 * (first + second),), error, None, nothing)


def reverse_method(alg: Algorithm | None, context: SolveContext) -> ReverseHeun:
    """The method of a reverse solve; None: ``LambaEulerHeun()`` where the steps are adaptive.

    Raises
    ------
    ValueError
        If another one than ``EulerHeun()`` or ``LambaEulerHeun()`` was asked for.
    """
    if alg is None:
        return ReverseHeun(LambaEulerHeun() if context.settings.adaptive else EulerHeun())
    check_reverse_method(alg, True)
    assert isinstance(alg, EulerHeun)
    return ReverseHeun(alg)


def check_reverse_method(alg: Algorithm, stochastic: bool) -> None:
    """Refuse a method that cannot take the reverse steps of an SDE, or of an ODE.

    Raises
    ------
    ValueError
        If it cannot.
    """
    if stochastic and type(alg) not in REVERSE_METHODS:
        names = " or ".join(f"{method.__name__}()" for method in REVERSE_METHODS)
        raise ValueError(
            f"{alg!r} does not solve the adjoint equation of an SDE, which is a Stratonovich "
            f"equation with noise of its own: use alg={names}, or leave it out"
        )
    if not stochastic and isinstance(alg, StochasticMethod):
        raise ValueError(
            f"{alg!r} is a method for SDEs: give a method for ODEs as alg, or leave it out"
        )


def check_explicit(alg: StochasticMethod, settings: Settings) -> None:
    """Refuse fixed implicit steps: explicit reverse ones of their size would be unstable.

    Raises
    ------
    ValueError
        If the forward solve takes such.
    """
    if alg.is_implicit and not settings.adaptive:
        raise ValueError(
            f"the reverse steps of an SDE are explicit, and fixed ones may be too long where "
            f"{alg!r} is stable: use DiscreteAdjoint(), or adaptive steps"
        )


# -- what the correction depends on ---------------------------------------------------------------


def _couples(field: SDEField, t: Tensor, u: Tensor) -> bool:
    """Whether a component of diagonal noise depends on other components of its path's state.

    Raises
    ------
    ValueError
        If the noise of a path depends on the state of another path.
    """
    rows, d = field.rows, field.d
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(u)

    with torch.enable_grad():
        u = u.detach().requires_grad_()
        G = field.diffusion(t, u).view(rows, d, -1)
    if not G.requires_grad:
        return False
    path = normal(d, G.shape[-1])
    allowed = _ROUNDING * torch.finfo(u.dtype).eps + 32 * field.low_eps
    if rows > 1 and not _in_proportion(G, u, normal(rows, 1, 1), normal(rows, 1, 1), path, allowed):
        raise ValueError(
            "the noise of a path depends on the state of another path of the batch, but the "
            "leading dimensions of the state are independent paths: use DiscreteAdjoint(), or "
            'make the state one path with noise="general"'
        )
    if not field.is_diagonal or d == 1:
        return False
    if field.low_eps:  # too coarse to tell that there is no weak dependence
        return True
    return not _in_proportion(G, u, normal(rows, d, 1), normal(rows, d, 1), normal(1), allowed)


def _in_proportion(
    G: Tensor, u: Tensor, x: Tensor, y: Tensor, shared: Tensor, allowed: float
) -> bool:
    """Whether the products of ``x shared`` and ``y shared`` with ``g_u`` are as ``x`` to ``y``.

    They are where each entry of ``g`` depends only on entries of ``u`` that have the same factor.
    With random factors they are so nowhere else.
    """
    products = [
        torch.autograd.grad(G, u, (v * shared).expand_as(G), retain_graph=True, allow_unused=True)
        for v in (x, y)
    ]
    (of_x,), (of_y,) = products
    if of_x is None or of_y is None:  # g does not depend on u
        return True
    a, b = of_x.view(*G.shape[:2], 1) * y, of_y.view(*G.shape[:2], 1) * x
    largest = torch.maximum(a.abs(), b.abs()).nan_to_num().amax()
    apart = (a - b).abs().nan_to_num().amax()
    return bool(apart <= allowed * largest)
