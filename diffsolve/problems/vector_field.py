"""The right-hand side, normalised: flat state in, flat derivative out, every parameter known.

``VectorField`` is what steps and adjoints call. It counts evaluations, makes the times that ``f``
sees, and hands out a copy whose parameters are fresh leaves for vector-Jacobian products.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.problems.autocast import Autocasting, under_current_autocast
from diffsolve.problems.capture import Substitute, reachable_tensors
from diffsolve.problems.first_call import call_first, learn_from, unwrapped
from diffsolve.problems.jumps import refuse_moving_jumps
from diffsolve.problems.ode import ODEProblem
from diffsolve.problems.solve_cache import SolveMemo
from diffsolve.problems.structure import Number, StateStructure, detached
from diffsolve.problems.workspace import Workspace

_START = np.zeros(1)
CHANGED = (
    "f gives other values now than when the problem was solved, so that its gradient would be of "
    "another solution: f draws random numbers, a layer of it changes itself in training mode, as "
    "spectral_norm does (call .eval()), or a variable or buffer that it uses was changed in "
    "between. Keep it fixed until backward, or use DiscreteAdjoint(tape=True)."
)


def no_buffer() -> None:
    """In the place of a weak reference, where there is no tensor to refer to."""
    return None


class VectorField:
    """Right-hand side of a problem over a flat state.

    Attributes
    ----------
    structure
        Shape of the state that ``f`` sees.
    params
        Every tensor with ``requires_grad`` that ``f`` depends on: leaves of ``p``, parameters of
        modules, captured tensors. Filled by ``discover``.
    used
        Identities of those that the first evaluation used. The others may belong to parts of a
        model that ``f`` never calls, or to a later branch of it.
    nf
        Evaluations so far.
    njac, nlu, nsolve, nnewton
        Jacobians, factorisations, linear solves and Newton iterations of implicit methods so far.
    jac, jac_sparsity
        Jacobian and its pattern as the user gave them, or None.
    accuracy
        Tolerance of the iterations within a step, set by the loop; None: they go on to rounding.
    retries
        Whether a step whose equations were not solved is tried again with half the size. If not,
        Newton's iteration insists.
    largest_matrix
        Most unknowns that a dense Jacobian is made for. Default 5000: 200 MB, seconds to factor.
    differentiated_once
        Whether nobody differentiates a gradient of this field: its steps then record what first
        derivatives need, and no more.
    work
        Entries that one evaluation computes, about. Filled by ``discover``.
    workspace
        What steps keep between calls. One field serves one solve.
    span_end
        Where the solve ends: ``f`` is not evaluated beyond. NaN: not known.
    breaks
        Times where ``f`` may jump, increasing: stages of a step stay on the step's side of them.
    memo
        What solves of this problem leave for the next one: shared with ``fresh`` copies.
    low_eps
        Relative rounding inside ``f`` where autocast lowers its precision, else zero.
    cut
        How ``f`` cuts a gradient off, in words; empty where it does not. Filled by ``discover``.
    reverse_in_turn
        Whether the reverse pass must take steps one by one: ``f`` has hooks on gradients, or code
        of TorchScript, which ``torch.vmap`` would skip. Filled by ``discover``.
    compares
        Whether ``f`` compares or rounds anything. Filled by ``discover``.
    """

    #: Whether there is noise beside it, which a Brownian path drives; an ``SDEField`` has both.
    is_stochastic: ClassVar[bool] = False
    path: Any = None
    #: Message where a step that is taken again differs from that of the solve.
    changed = CHANGED
    #: Takes the place of the usual linearisation in implicit methods, ``(t, h, u, slope)``.
    linearise: Callable[..., Any] | None = None

    # defaults are on the class, so that a new field need not set them
    nf = njac = nlu = nsolve = nnewton = 0
    jac: Callable[..., Any] | None = None
    jac_sparsity: Any = None
    accuracy: Any = None
    retries = False
    largest_matrix = 5000
    differentiated_once = False
    work = 0
    #: Whether messages may speak of it as ``f``.
    is_of_user = True
    breaks: tuple[float, ...] = ()
    span_end = math.nan
    low_eps = 0.0
    cut = ""
    reverse_in_turn = compares = False

    def __init__(self, f: Callable[..., Any], p: Any, structure: StateStructure):
        self.f = f
        self.p = p
        self.structure = structure
        self.params: list[Tensor] = []
        self.used: set[int] = set()
        self.workspace = Workspace()
        self.memo = SolveMemo()
        inner = unwrapped(f)
        if isinstance(inner, Autocasting):
            self.low_eps = torch.finfo(inner.dtype).eps
        self._shape = structure.shapes[0] if structure.is_tensor else None
        self._on_cpu = structure.device.type == "cpu"
        self._numpy_time = np.float32 if structure.time_dtype == torch.float32 else np.float64
        self._view: Any = self._shape or ((),)  # as numbers, which is faster than as a size
        self._is_flat = self._shape is not None and len(self._shape) == 1
        self._args = () if p is None else (p,)
        self._signature = "t, u" if p is None else "t, u, p"
        # refers to what f returned first: f may fill that tensor again, and return it again
        self._buffer: Callable[[], Tensor | None] = no_buffer

    @classmethod
    def of(cls, prob: ODEProblem) -> VectorField:
        structure = StateStructure.of(prob.u0)
        f = under_current_autocast(prob.f, structure.device, structure.dtype)
        field = cls(f, prob.p, structure)
        field.jac, field.jac_sparsity = prob.jac, prob.jac_sparsity
        return field

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies, which look for machine code anew."""
        return {**self.__dict__, "memo": SolveMemo()}

    def fresh(self) -> VectorField:
        """This field for another solve: counts, parameters and workspace start empty."""
        field = object.__new__(type(self))
        field.__dict__ = self.__dict__.copy()
        field.params, field.used, field.workspace = [], set(), Workspace()
        return field

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """Those of the user's that are solved: the right-hand side."""
        return (self.f,)

    def without_functions(self) -> VectorField:
        """The parameters, the structure and the breaks alone."""
        field = object.__new__(VectorField)
        field.structure, field.params, field.breaks = self.structure, self.params, self.breaks
        return field

    @property
    def dtype(self) -> torch.dtype:
        return self.structure.dtype

    @property
    def device(self) -> torch.device:
        return self.structure.device

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        self.nf += 1
        if self._shape is None:
            du = self.structure.ravel(self.f(t, self.structure.unravel(u), *self._args))
            return du.clone() if len(self.structure.shapes) == 1 else du
        du = self.f(t, u if self._is_flat else u.view(*self._view), *self._args)
        if getattr(du, "shape", None) != self._shape or du.dtype is not self.dtype:
            self._refuse(du)
        if base_tensor(du) is self._buffer():
            du = du.clone()  # f fills one buffer again and again
        return du if self._is_flat else du.reshape(-1)

    def write(self, t: Tensor, u: Tensor, row: Tensor) -> None:
        """Evaluate into ``row``, one of ``rows_of``: as ``__call__``, with fewer operations."""
        self.nf += 1
        if self._shape is None:
            row.copy_(self.structure.ravel(self.f(t, self.structure.unravel(u), *self._args)))
            return
        du = self.f(t, u if self._is_flat else u.view_as(row), *self._args)
        if getattr(du, "shape", None) != self._shape or du.dtype is not self.dtype:
            self._refuse(du)
        row.copy_(du)

    def counts(self) -> tuple[int, ...]:
        """Work done so far, as ``Stats.count`` takes it."""
        return self.nf, self.njac, self.nlu, self.nsolve, self.nnewton

    def _refuse(self, du: Any) -> None:
        mismatch = self.structure.describe_mismatch(du)
        raise ValueError(f"f({self._signature}) is wrong: {mismatch}")

    def rows_of(self, k: Tensor) -> Sequence[Tensor]:
        """Rows of ``k`` ``(n, N)`` for ``write``, in the shape of what ``f`` returns."""
        return (k if self._shape is None else k.view(len(k), *self._shape)).unbind(0)

    # -- times ---------------------------------------------------------------------------------

    def times(self, t: Any, h: Any, c: np.ndarray) -> Sequence[Tensor]:
        """0-d tensors ``t + c h`` as ``f`` sees them; ``t`` and ``h`` are floats or 0-d tensors."""
        dtype = self.structure.time_dtype
        if isinstance(h, Tensor) or isinstance(t, Tensor):
            device = h.device if isinstance(h, Tensor) else t.device
            moving = t + torch.as_tensor(c, dtype=torch.float64, device=device) * h
            if self.breaks:
                values = moving.detach().tolist()
                aside = self._beside_breaks(values, *(float(detached(x)) for x in (t, t + h)))
                moving = moving + (_doubles(aside) - _doubles(values)).to(device)
            return moving.to(dtype=dtype, device=self.device).unbind()
        values = t + c * h
        if self.breaks:
            values = np.array(self._beside_breaks(values.tolist(), t, t + h))
        times = torch.from_numpy(values.astype(self._numpy_time, copy=False))
        return (times if self._on_cpu else times.to(self.device)).unbind()

    def time(self, t: Number) -> Tensor:
        """``t`` as ``f`` sees it."""
        return torch.as_tensor(t, dtype=self.structure.time_dtype, device=self.device)

    def after(self, t: float, direction: float) -> Tensor:
        """``t`` as seen just after it, in the direction of a step (its sign): past a break."""
        if not self.breaks:
            return self.time(t)
        return self.times(t, math.copysign(1.0, direction), _START)[0]

    def crosses_break(self, t: float, h: float, c: float) -> bool:
        """Whether ``t + c h`` is beyond a break or the end of the span, and the step is not."""
        sign, ahead = math.copysign(1.0, h), c * abs(h)
        near = min(8 * math.ulp(max(abs(t), abs(t + h))), 0.125 * abs(c - 1) * abs(h))
        return any(near < sign * (b - t) < ahead - near for b in (*self.breaks, self.span_end))

    def _beside_breaks(self, values: list[float], start: float, end: float) -> list[float]:
        """Move times at a break that bounds a step, or beyond it, just inside."""
        low, high = min(start, end), max(start, end)
        near = min(8 * math.ulp(max(abs(low), abs(high))), 0.25 * (high - low))
        breaks, i = self.breaks, bisect_right(self.breaks, low + near)
        if i > 0:
            at, inside = breaks[i - 1] + near, self._next(breaks[i - 1], math.inf)
            values = [inside if x <= at else x for x in values]
        i = bisect_left(breaks, high - near, i)
        if i < len(breaks):
            at, inside = breaks[i] - near, self._next(breaks[i], -math.inf)
            values = [inside if x >= at else x for x in values]
        return values

    def _next(self, t: float, towards: float) -> float:
        kind = self._numpy_time
        return float(np.nextafter(kind(t), kind(towards)))

    # -- parameters and checks -----------------------------------------------------------------

    def discover(self, t0: float, u0: Tensor, h_sign: float, differentiate: bool) -> Tensor:
        """Evaluate ``f`` once at the start: check what it returns, and find what it depends on.

        Parameters
        ----------
        t0, u0
            Start; ``u0`` flat.
        h_sign
            Direction of integration, for an ``f`` that jumps at ``t0``.
        differentiate
            Whether gradients are wanted: fills ``params``.

        Returns
        -------
        Tensor
            ``f(t0, u0)``, flat, off the tape.

        Raises
        ------
        TypeError, ValueError
            If ``f`` returns something else than the derivative of its state.
        RuntimeError
            If gradients are wanted and ``f`` switches them off, or makes numbers of tensors.
        """
        t = self.after(t0, h_sign)
        self.params, self.used, self.work, self.cut = [], set(), 0, ""
        self.reverse_in_turn = self.compares = False
        with torch.set_grad_enabled(differentiate):
            call = call_first(self, self.f, "f", t, u0, differentiate)
        self.nf += 1
        du = call.value
        mismatch = self.structure.describe_mismatch(du)
        if mismatch is not None:
            raise ValueError(f"f({self._signature}) is wrong: {mismatch}")
        flat = self.structure.ravel(du)
        if self._shape is not None:
            self._buffer = weakref.ref(base_tensor(du))
        if differentiate:
            self.f = learn_from(self, call, flat, u0.requires_grad)
        return flat.detach().clone()

    def refuse_moving_jumps(self, u0: Tensor, end: float) -> None:
        """Refuse a gradient by the times where ``f`` jumps; see there."""
        refuse_moving_jumps(self, [("f", self.f)], u0, end)

    def refuse_changed(self, t0: float, h_sign: float, u0: Tensor, du0: Tensor) -> None:
        """Refuse to go backward through an ``f`` that no longer gives what it gave.

        Raises
        ------
        RuntimeError
            If ``f(t0, u0)`` is not ``du0``.
        """
        with torch.no_grad():
            du = self(self.after(t0, h_sign), u0)
        if not float(self.rounding_error(du, du0)) <= 1:
            raise RuntimeError(CHANGED)

    def rounding_error(
        self, computed: Tensor, known: Tensor, summands: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Distance of values computed again from known ones, in units of what rounding explains.

        Parameters
        ----------
        computed, known
            Values ``(..., N)``; each row is judged by its largest entry.
        summands
            Largest entries ``(...)`` of the states and of the multiples of ``f`` that they are
            sums of; None where they are values of ``f``.
        """
        known, computed = known.detach(), computed.detach()
        largest = of_f = known.abs().amax(-1)
        if summands is not None:
            state, of_f = (x.detach() for x in summands)
            largest = torch.maximum(torch.maximum(state, of_f), largest)
        double = known.dtype.to_real() == torch.float64
        allowed = (1e5 if double else 1e3) * torch.finfo(known.dtype).eps * largest
        allowed = allowed + 8 * self.low_eps * of_f + torch.finfo(known.dtype).tiny
        return (computed - known).abs().amax(-1) / allowed

    def for_vjp(self) -> tuple[VectorField, list[Tensor]]:
        """This field for vector-Jacobian products, and the tensors to take them by.

        Those stand for ``params`` one by one. A leaf stands for itself. A tensor that was
        computed from others, or that has hooks, is replaced by a detached one in each call, so
        that no gradient flows through how it was made, and no hook runs at each step.
        """
        fresh = {id(x): (x, x.detach().requires_grad_()) for x in self.params if _is_derived(x)}
        if not fresh:
            field = self._sibling(self.p, unchanged)
            field.params = self.params
            return field, field.params
        leaves, spec = pytree.tree_flatten(self.p)
        p = pytree.tree_unflatten([fresh[id(x)][1] if id(x) in fresh else x for x in leaves], spec)
        given = {id(x) for x in leaves}

        def substituted(f: Callable[..., Any]) -> Callable[..., Any]:
            in_p = given - {id(x) for x in reachable_tensors(f)}
            return f if in_p.issuperset(fresh) else Substitute(f, fresh)

        field = self._sibling(p, substituted)
        field.params = [fresh[id(x)][1] if id(x) in fresh else x for x in self.params]
        return field, field.params

    def _sibling(self, p: Any, changed: Callable[..., Callable[..., Any]]) -> VectorField:
        """This field with other parameters, and functions as ``changed`` makes them."""
        return self._share(VectorField(changed(self.f), p, self.structure))

    def _share(self, field: Any) -> Any:
        """``field`` with what does not depend on its functions."""
        field.breaks, field._buffer = self.breaks, self._buffer
        field.span_end = self.span_end
        field.jac, field.jac_sparsity = self.jac, self.jac_sparsity
        field.accuracy, field.retries = self.accuracy, self.retries
        field.largest_matrix = self.largest_matrix
        return field


def unchanged(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``."""
    return f


def _is_derived(x: Tensor) -> bool:
    return not x.is_leaf or bool(x._backward_hooks)


def base_tensor(x: Tensor) -> Tensor:
    """The tensor whose memory ``x`` shows."""
    return x if x._base is None else x._base


def _doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
