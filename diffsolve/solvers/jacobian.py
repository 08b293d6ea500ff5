"""The Jacobian of a right-hand side where a step needs it: the user's, exact, or by differences.

Exact Jacobians come from reverse-mode products, many at once, so ``f`` itself need not support
batching. A state ``(..., d)`` is often a batch of independent rows: then ``d`` products give every
row's block. That is never assumed: each time products with random vectors must agree as well.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffsolve.problems.capture import nodes_of
from diffsolve.problems.plain_norms import PlainNorms, refuse_opaque_norms
from diffsolve.problems.probe import may_be_read, was_read
from diffsolve.problems.structure import as_float, under_transform
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.agreement import same_gradients, uneven
from diffsolve.solvers.given_jacobian import given_jacobian
from diffsolve.solvers.jacobian_layout import Layout, first_layout
from diffsolve.solvers.linear import Jacobian, Linearisation
from diffsolve.solvers.time_difference import time_difference, time_difference_on_tape

_START = np.zeros(1)
_ONCE = "torch::autograd::Error"  # where something is differentiable once only
_MOST_AT_ONCE = 4_000_000  # entries of the products that are computed in one batch


def linearise(
    field: VectorField, t: Any, h: Any, u: Tensor, slope: bool = False, exact: bool = False
) -> Linearisation:
    """``df/du``, and ``df/dt``, at the start of a step.

    Parameters
    ----------
    field, t, h, u
        Right-hand side and the step's start; the sign of ``h`` matters where ``f`` jumps.
    slope
        Whether ``df/dt`` is wanted.
    exact
        Whether the user's ``jac`` is passed over.

    Returns
    -------
    Linearisation
        A ``Jacobian``, off the tape, or what ``field.linearise`` gives.

    Raises
    ------
    ValueError
        If the user's ``jac`` or ``jac_sparsity`` is wrong, or a dense matrix would be too large.
    """
    field.njac += 1
    t, h = as_float(t), as_float(h)
    if field.linearise is not None:
        return field.linearise(t, h, u.detach(), slope)
    return differentiator(field).at(t, h, u.detach(), slope, exact)


def differentiator(field: VectorField) -> Differentiator:
    """The differentiator of this solve."""
    known = field.workspace.get(Differentiator)
    return field.workspace.put(Differentiator(field)) if known is None else known


class _Watch(TorchFunctionMode):
    """Notes whether a tensor is used, be it by ``float(t)``."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.tensor, self.touched = tensor, False

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.touched |= any(x is self.tensor for x in (*args, *kwargs.values()))
        return func(*args, **kwargs)


class _NotDifferentiable(Exception):
    """Autograd does not see how ``f`` depends on the state."""


class Differentiator:
    """Computes Jacobians of one field and remembers how that works.

    Attributes
    ----------
    layout
        Which products make the matrix.
    by_differences
        Whether autograd cannot go through ``f``, so that differences must do.
    moves_unseen
        Whether ``f`` depends on time in a way that autograd does not see; None: not known yet.
    norms_checked
        Whether a graph of ``f`` was looked at by ``refuse_opaque_norms``.
    """

    def __init__(self, field: VectorField):
        self._field = weakref.ref(field)  # which keeps this
        self.layout: Layout = first_layout(field)
        self.by_differences = False
        self.moves_unseen: bool | None = None
        self.norms_checked = False
        self._batched = True
        self._checked = False  # whether a batch of products is what they are one by one

    @property
    def field(self) -> VectorField:
        field = self._field()
        assert field is not None
        return field

    def at(self, t: float, h: float, u: Tensor, slope: bool, exact: bool) -> Jacobian:
        field, count = self.field, self.field.nf
        (time,) = field.times(t, h, _START)
        given = None
        if field.jac is not None and not exact:
            with torch.no_grad():
                given = given_jacobian(field, time, u)
        if not self.by_differences:
            try:
                made = self._automatic(time, t, h, u, slope, given)
                field.nf = count  # part of the Jacobian
                return made
            except _NotDifferentiable:
                self.by_differences = True
        with torch.no_grad():
            y = field(time, u)
            f = functools.partial(field, time)
            blocks = self._differences(f, u, y) if given is None else given
            return Jacobian(field, blocks, self._unseen_slope(t, h, u, y) if slope else None)

    # -- by autograd ---------------------------------------------------------------------------

    def _automatic(
        self, time: Tensor, t: float, h: float, u: Tensor, slope: bool, given: Tensor | None
    ) -> Jacobian:
        if given is not None and not slope:
            return Jacobian(self.field, given)
        if under_transform():
            return self._transformed(time, u, slope, given)
        moving = may_be_read(time.detach().requires_grad_()) if slope else time
        y, leaf = self._graph(functools.partial(self.field, moving), u)
        blocks = self.of_graph(y, leaf) if given is None else given
        if not slope:
            return Jacobian(self.field, blocks)
        w = torch.zeros_like(y, requires_grad=True)
        (by_time,) = torch.autograd.grad(y, moving, w, create_graph=True, allow_unused=True)
        if by_time is None:
            return Jacobian(self.field, blocks, self._unseen_slope(t, h, u, y.detach()))
        self.notice(moving, by_time)
        if self.moves_unseen:
            with torch.no_grad():
                pushed = time_difference(self.field, t, h, u, y.detach())
        else:
            (pushed,) = torch.autograd.grad(by_time, w, torch.ones_like(by_time))
        return Jacobian(self.field, blocks, pushed)

    def notice(self, time: Tensor, by_time: Tensor | None) -> None:
        """Note whether autograd sees less than all of what ``f`` does with its time.

        It may be read as a number, and a function of it may be differentiable once only: PyTorch
        leaves out both where another path leads on. The graph is looked at once a solve.
        """
        if self.moves_unseen is None and by_time is not None:
            self.moves_unseen = any(node.name() == _ONCE for node in nodes_of([by_time]))
        if was_read(time) and by_time is not None:
            self.moves_unseen = True

    def _graph(self, f: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            try:
                y = f(leaf)
            except RuntimeError as error:  # as .numpy() does
                raise _NotDifferentiable from error
        if not y.requires_grad:
            raise _NotDifferentiable
        return y, leaf

    def exact_at(self, f: Callable[[Tensor], Tensor], u: Tensor, y: Tensor) -> Tensor:
        """Blocks of ``df/du`` at one time, where ``y = f(u)`` may be on the tape."""
        self.field.njac += 1
        if under_transform():
            return self._pulled(f, u.detach())
        try:
            if u.requires_grad and y.requires_grad:
                return self.of_graph(y, u)
            return self.of_graph(*self._graph(f, u))
        except _NotDifferentiable:
            with torch.no_grad():
                return self._differences(f, u.detach(), f(u.detach()))

    def of_graph(self, y: Tensor, u: Tensor) -> Tensor:
        """Blocks of ``dy/du``, off the tape, where ``y = f(u)`` is on it."""
        while True:
            rows = self._products(y, u)
            if rows is None:
                raise _NotDifferentiable
            blocks = self.layout.blocks(rows.detach())
            if blocks is not None:
                return blocks
            self.layout = first_layout(self.field, rows=False)

    def _products(self, y: Tensor, u: Tensor) -> Tensor | None:
        """Products of ``dy/du`` with the layout's cotangents, or None where y ignores u."""
        chunk = max(1, _MOST_AT_ONCE // y.numel())
        parts = []
        for bars in self.layout.cotangents.split(chunk):
            part = self._batch(y, u, bars) if self._batched else None
            if part is None:
                try:
                    rows = [
                        torch.autograd.grad(y, u, bar, retain_graph=True, allow_unused=True)[0]
                        for bar in bars
                    ]
                except RuntimeError as error:  # an operation of f has no derivative
                    raise _NotDifferentiable from error
                if rows[0] is None:
                    return None
                part = torch.stack(rows)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _batch(self, y: Tensor, u: Tensor, bars: Tensor) -> Tensor | None:
        try:
            (rows,) = torch.autograd.grad(
                y, u, bars, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # an operation of f that torch.vmap does not know
            self._batched = False
            return None
        if rows is not None and not self._checked:
            weights = uneven(bars[:, 0])
            alone = torch.autograd.grad(y, u, weights @ bars, retain_graph=True)
            self._checked = self._batched = same_gradients([weights @ rows], alone)
        return rows if self._batched else None

    def _transformed(self, time: Tensor, u: Tensor, slope: bool, given: Tensor | None) -> Jacobian:
        """The same in the way of ``torch.func``, whose transforms nest."""
        blocks = self._pulled(functools.partial(self.field, time), u) if given is None else given
        pushed = _nested_push(self.field, time, u, None, 1.0).detach() if slope else None
        return Jacobian(self.field, blocks, pushed)

    def _pulled(self, f: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        blocks = None
        while blocks is None:
            pull: Any = torch.func.vjp(f, u)[1]
            rows = self._each_pulled(pull, self.layout.cotangents)
            blocks = self.layout.blocks(rows.detach())
            if blocks is None:
                self.layout = first_layout(self.field, rows=False)
        return blocks

    def _each_pulled(self, pull: Any, bars: Tensor) -> Tensor:
        """What ``torch.vmap(pull)`` should be."""
        if self._batched:
            try:
                (rows,) = torch.vmap(pull)(bars)
                if not self._checked:
                    weights = uneven(bars[:, 0])
                    (alone,) = pull(weights @ bars)
                    found, known = (weights @ rows).detach(), alone.detach()
                    self._checked = self._batched = same_gradients([found], [known])
            except RuntimeError:  # an operation of f that torch.vmap does not know
                self._batched = False
            else:
                if self._batched:
                    return rows
        return torch.stack([pull(bar)[0] for bar in bars])

    # -- by differences ------------------------------------------------------------------------

    def _differences(self, f: Callable[[Tensor], Tensor], u: Tensor, y: Tensor) -> Tensor:
        layout = self.layout
        while True:
            count, size = layout.shape
            steps = _difference_step(u).reshape(count, size)

            def moved(direction: Tensor) -> Tensor:
                change = f(u + direction.reshape(-1)) - y
                return change.reshape(count, size)  # noqa: B023

            columns = []
            for j in range(size):
                direction = torch.zeros_like(steps)
                direction[:, j] = steps[:, j]
                columns.append(moved(direction) / steps[:, j, None])
            blocks = torch.stack(columns, -1)
            if count == 1:
                return blocks
            eps = torch.finfo(y.dtype.to_real()).eps
            rtol, noise = max(1e-5, 1e4 * eps), 100 * eps * float(y.abs().max())
            moves = [steps * x.reshape(count, size) for x in layout.directions]
            if all(layout.agree(moved(x), blocks * x[:, None, :], rtol, noise) for x in moves):
                return blocks
            layout = self.layout = first_layout(self.field, rows=False)

    def _unseen_slope(self, t: float, h: float, u: Tensor, y: Tensor) -> Tensor | None:
        """``df/dt`` by a difference, where autograd saw no dependence on time; None: it has none.

        That is found out once: an ``f`` that does not touch its time, and gives the same at the end
        of the step, costs one evaluation a solve.
        """
        with torch.no_grad():
            if self.moves_unseen is None:
                (end,) = self.field.times(t, h, np.ones(1))
                watch = _Watch(end)
                with watch:
                    later = self.field(end, u)
                self.moves_unseen = watch.touched or not torch.equal(later, y)
            return time_difference(self.field, t, h, u, y) if self.moves_unseen else None


def _difference_step(x: Tensor) -> Tensor:
    """Increments of one-sided differences (Hairer, Wanner, Solving ODEs II, code RODAS)."""
    return torch.sqrt(torch.finfo(x.dtype).eps * x.abs().clamp(min=1e-5))


Push = Callable[[Tensor | None, float], Tensor]


def push_forward(
    field: VectorField, t: Any, h: Any, u: Tensor, anchor: Tensor | None = None
) -> Push:
    """Directional derivatives of ``f`` at the start of a step, on the tape where ``u`` is.

    Two reverse passes make one forward: what the first gives is linear in its cotangent.

    Parameters
    ----------
    field, t, h, u
        Right-hand side, and where.
    anchor
        A tensor on the tape. What is made here hangs from it, so that a graph leads to no leaf
        that nobody knows.

    Returns
    -------
    callable
        From ``(v, d)`` to ``J v + d df/dt``, flat; None for ``v`` is zero.
    """
    (time,) = field.times(t, h, _START)
    if under_transform():
        return functools.partial(_nested_push, field, time, u)
    known = differentiator(field)
    recorded = torch.is_grad_enabled()
    start = u
    with torch.enable_grad(), PlainNorms():
        zero: Any = None
        if anchor is not None and anchor.requires_grad:
            zero = 0 * anchor.reshape(-1)[0]
        u = u.view_as(u)
        if not u.requires_grad:
            u.requires_grad_()
        if recorded and not field.differentiated_once:
            u.register_hook(functools.partial(_refuse_endless, as_float(t)))
        if not time.requires_grad:
            time = time.clone().requires_grad_() if zero is None else time + zero
            may_be_read(time)
        y = field(time, u)
        w = torch.zeros_like(y, requires_grad=True) if zero is None else torch.zeros_like(y) + zero
        pulled: Any = (None, None)
        if y.requires_grad:
            pulled = torch.autograd.grad(y, (u, time), w, create_graph=True, allow_unused=True)
    if recorded and not known.norms_checked:
        refuse_opaque_norms(y)
        known.norms_checked = True
    moving = None
    known.notice(time, pulled[1])
    if known.moves_unseen:
        pulled = pulled[0], None
        moving = time_difference_on_tape(field, as_float(t), as_float(h), start)

    def push(v: Tensor | None, d: float) -> Tensor:
        pairs = [
            (p, x)
            for p, x in zip(pulled, (v, torch.full_like(time, d) if d else None), strict=True)
            if p is not None and x is not None and p.requires_grad
        ]
        pushed = None
        if pairs:
            outputs, tangents = zip(*pairs, strict=True)
            (pushed,) = torch.autograd.grad(
                outputs, w, tangents, create_graph=True, allow_unused=True
            )
        total = torch.zeros_like(u) if pushed is None else pushed
        return total + d * moving if moving is not None and d else total

    return push


def _refuse_endless(t: float, grad: Tensor) -> None:
    if not bool(torch.isfinite(grad).all()):
        raise RuntimeError(
            f"a gradient through the Jacobian of f is NaN or Inf at t = {t:.8g}: f has no second "
            "derivative there, as u**1.5 and a norm at zero, or the loss has none. Use "
            "DiscreteAdjoint() without tape, or a method that needs only first derivatives, such "
            "as KenCarp4()"
        )


def _nested_push(field: VectorField, time: Tensor, u: Tensor, v: Tensor | None, d: float) -> Tensor:
    """The same in the way of ``torch.func``."""

    def plain(s: Tensor, x: Tensor) -> Tensor:
        with PlainNorms():
            return field(s, x)

    def pull(w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.vjp(plain, time, u)[1](w)

    push: Any = torch.func.vjp(pull, torch.zeros_like(u))[1]
    return push((torch.full_like(time, d), torch.zeros_like(u) if v is None else v))[0]
