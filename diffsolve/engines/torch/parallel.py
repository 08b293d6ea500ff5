"""The discrete adjoint of many steps at once, for small states.

Run one by one, the reverse pass of a small system is all overhead: thousands of tiny autograd
calls. But the states of all steps are known, so every step can be run again in one batch
(``torch.vmap``), which leaves only a linear recursion from step to step:

    lambda_n = (du_{n+1}/du_n)^T lambda_{n+1} + (cotangents of what was read off step n).

Its matrices cost one batched reverse pass a component of the state, its solution one small
matrix-vector product a step, and the gradients by the parameters one more batched pass with all
the lambdas. Where the state is a batch of rows ``(..., d)``, ``f`` usually treats them one by one:
then ``d`` passes give every row's matrix. This is assumed, and checked: the last pass also gives
the true product of every step's matrix with its lambda. ``torch.vmap`` is checked as well, since
its rule for an operation of ``f`` may have a wrong derivative: once a solve, the gradients of one
step are computed without it. Where something differs, or ``f`` cannot be batched, the caller goes
step by step. Both ways agree to rounding. Which one runs depends on sizes and on what ``f`` allows,
never on timings.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.plan import SolveContext
from diffsolve.engines.torch.step_log import Record
from diffsolve.problems.capture import reached_leaves, refuse_unknown_leaves
from diffsolve.problems.sde_field import GivenNoise, SDEField
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.agreement import same_gradients, uneven
from diffsolve.solvers.algorithm import summands
from diffsolve.solvers.norms import measure
from diffsolve.solvers.switching import AutoSwitch

# Measured on a CPU: a call of f with its reverse pass costs about 100 us beyond its arithmetic,
# and an entry of a tensor about 1 ns. Batching saves the calls and repeats the arithmetic.
_WORK_WORTH_A_CALL = 100_000
_LARGEST_BLOCK = 32  # rows of a step's matrix, a reverse pass each
_FEWEST_STEPS = 6
_MOST_STEPS = 256  # in one batch
_MOST_WORK = 4_000_000  # entries of a batch, the values inside of its steps too: bounds the memory

_log = logging.getLogger(__name__)
_coupled: weakref.WeakSet[Any] = weakref.WeakSet()  # functions whose rows are not independent


class ParallelSweep:
    """Cotangents through a run of recorded steps in one batch; see the module's text.

    Attributes
    ----------
    alg
        The method of such steps.
    enabled
        Whether a batch may still be tried.
    """

    def __init__(
        self,
        context: SolveContext,
        field: VectorField,
        params: list[Tensor],
        cotangents: Sequence[Tensor | None],
    ):
        self.context, self.field, self.params = context, field, params
        self.alg = context.alg.nonstiff if isinstance(context.alg, AutoSwitch) else context.alg
        self.of_saved, *self.of_estimates = cotangents
        self.value = self._entries_of_a_value()
        self.rows, self.size = self._blocks()
        self._checked = False  # whether a batch has the gradients of a step alone
        self.enabled = (
            self.size <= _LARGEST_BLOCK
            and (2 * self.size + 2) * context.field.work <= _WORK_WORTH_A_CALL
            and not field.dtype.is_complex
            and not context.field.reverse_in_turn
            and not field.breaks  # one-sided times are decided step by step, on the host
            and self.alg.is_one_step
        )

    def _blocks(self) -> tuple[int, int]:
        """Number and size of the independent rows of the state."""
        structure = self.field.structure
        shape = structure.shapes[0]
        has_rows = structure.is_tensor and len(shape) > 1
        # lower precision is too coarse to tell that rows are independent
        if has_rows and not self.field.low_eps and not _is_coupled(self.context.field.f):
            return math.prod(shape[:-1]), shape[-1]
        return 1, structure.size

    def _entries_of_a_value(self) -> int:
        """Entries of a value inside of a step, and of the noise that leads to it."""
        field = self.field
        noise = field.rows * field.m if isinstance(field, SDEField) else 0
        return field.structure.size + noise

    def _batches(self, records: list[Record]) -> list[tuple[int, int]]:
        """Ranges of steps that are run at once, the last ones first.

        Each step of a batch has as many values inside as the one that has the most.
        """
        ranges: list[tuple[int, int]] = []
        high, most = len(records), 0
        for i in reversed(range(len(records))):
            inside = 0 if self.of_saved is None else len(records[i].thetas)
            work = self.context.field.work + max(most, inside) * self.value
            count = high - i
            if count > 1 and (count > _MOST_STEPS or count * work > _MOST_WORK):
                ranges.append((i + 1, high))
                high, most = i + 1, 0
            most = max(most, inside)
        return [*ranges, (0, high)]

    def suits(self, records: list[Record]) -> bool:
        enough = len(records) >= _FEWEST_STEPS + self.size // 2
        return self.enabled and enough and all(r.alg is self.alg for r in records)

    def through(
        self,
        begin: int,
        records: list[Record],
        states: list[Tensor],
        end: Tensor,
        bar: Tensor | None,
    ) -> tuple[Tensor, list[Tensor | None]] | None:
        """Cotangents of the first state and of the parameters.

        Parameters
        ----------
        begin
            Index of the first of the records in the solve.
        records, states
            Consecutive steps and the flat states they start from.
        end, bar
            The flat state after the last of them, and its cotangent.

        Returns
        -------
        tuple or None
            None where ``f`` cannot be batched: nothing was done then.
        """
        bar = torch.zeros_like(states[0]) if bar is None else bar
        total: list[Tensor | None] = [None] * len(self.params)
        for low, high in self._batches(records):
            part = slice(low, high)
            pulled = self._through_batch(begin + low, records[part], states[part], end, bar)
            if pulled is None:
                return None
            bar, grads = pulled
            end = states[low]
            add_up(total, grads)
        return bar, total

    def _through_batch(
        self, begin: int, records: list[Record], states: list[Tensor], end: Tensor, bar: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]] | None:
        steps = len(records)
        calls = self._calls()
        u = torch.stack(states).detach().requires_grad_()
        try:
            arguments = self._arguments(records, u)
            outputs = self._run_again(*arguments)
        except Exception as error:  # whatever torch.vmap cannot do, the other sweep can
            return self._give_up(f"f cannot be batched over steps: {error}")
        refuse_unknown_leaves(reached_leaves(outputs), [u, *self.params])
        self._count_each(calls, steps)
        u_new, of_u, of_f, values, *estimates = outputs
        known = torch.stack([*states[1:], end])
        off = self.field.rounding_error(u_new, known, (of_u, of_f))
        if not bool((off <= 1).all()):
            return self._give_up("f gives other values in a batch")

        read: list[tuple[Tensor, Tensor]] = []  # what was read off the steps, with cotangents
        if self.of_saved is not None and values.shape[1]:
            read.append((values, self._bars_inside(records, values)))
        for y, y_bar in zip(estimates, self.of_estimates, strict=True):
            if y_bar is not None:
                read.append((y, y_bar[begin : begin + steps].to(y.dtype)))
        read = [(y, y_bar) for y, y_bar in read if y.requires_grad]

        try:
            if not self._checked and not self._has_true_gradients(arguments, outputs):
                return self._give_up("f has other gradients in a batch")
            local = _pull(read, [u])[0] if read else None
            bars_after, bars = self._recursion(records, self._step_jacobians(u_new, u), local, bar)
            pairs = [*([(u_new, bars_after)] if u_new.requires_grad else []), *read]
            true_bars, *grads = _pull(pairs, [u, *self.params])
        except RuntimeError as error:  # such as that of torch.utils.checkpoint
            return self._give_up(f"f cannot be differentiated in a batch: {error}")
        if self.rows > 1 and not _same_products(bars, true_bars, bars_after):
            _remember_coupled(self.context.field.f)
            return self._give_up("the rows of the state are not independent")
        return bars[0], grads

    def _give_up(self, why: str) -> None:
        """Try no batch again in this reverse pass."""
        _log.debug("going step by step: %s", why)
        self.enabled = False

    def _has_true_gradients(
        self, arguments: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
    ) -> bool:
        """Whether the step in the middle of a batch has the gradients that it has alone."""
        i, u = len(outputs[0]) // 2, arguments[2]
        start = u[i].detach().requires_grad_()
        nf, ng = self._calls()
        times, theta, _, *noise = (x[i] for x in arguments)
        alone = self._run_again(times, theta, start, *noise)
        self.field.nf = nf
        if isinstance(self.field, SDEField):
            self.field.ng = ng
        together_pairs, alone_pairs = [], []
        for k in (0, *range(3, len(outputs))):  # without the sizes of summands
            together, one = outputs[k], alone[k]
            if together.requires_grad and one.requires_grad:
                weights = uneven(one)
                bars = torch.zeros_like(together)
                bars[i] = weights
                together_pairs.append((together, bars))
                alone_pairs.append((one, weights))
        in_batch = _pull(together_pairs, [u, *self.params])
        by_start, *by_params = _pull(alone_pairs, [start, *self.params])
        if by_start is not None:  # no other step may get a part of it
            whole = torch.zeros_like(u)
            whole[i] = by_start
            by_start = whole
        self._checked = same_gradients(list(in_batch), [by_start, *by_params])
        return self._checked

    def _calls(self) -> tuple[int, int]:
        return self.field.nf, self.field.ng if isinstance(self.field, SDEField) else 0

    def _count_each(self, before: tuple[int, int], steps: int) -> None:
        """Count the calls since ``before`` for each of the steps that were run at once."""
        nf, ng = self._calls()
        self.field.nf += (nf - before[0]) * (steps - 1)
        if isinstance(self.field, SDEField):
            self.field.ng += (ng - before[1]) * (steps - 1)

    def _arguments(self, records: list[Record], u: Tensor) -> tuple[Tensor, ...]:
        """The arguments of ``_run_again`` for all the steps, with a row for each."""
        field = self.field
        most = max(len(r.thetas) for r in records) if self.of_saved is not None else 0
        thetas = [[*r.thetas, *[0.0] * (most - len(r.thetas))] for r in records] if most else []
        times = torch.tensor([(r.t, r.h) for r in records], dtype=torch.float64, device="cpu")
        theta = torch.tensor(thetas, dtype=torch.float64, device=u.device)
        noise: tuple[Tensor, ...] = ()
        if isinstance(field, SDEField):
            noise = field.noise_of([(r.t, r.h) for r in records], self._times_inside(records, most))
        return times.to(u.device), theta.reshape(len(records), most), u, *noise

    def _run_again(
        self, time: Tensor, theta: Tensor, u: Tensor, *noise: Tensor
    ) -> tuple[Tensor, ...]:
        """New states, their summands, values inside the steps, and estimates.

        Parameters
        ----------
        time, theta, u, noise
            Start and size of a step, where values inside are wanted, the state, and the noise; or
            of all steps ``(m, ...)``.
        """
        alg, field, tolerance = self.alg, self.field, self.context.settings.tolerance
        wanted = any(bar is not None for bar in self.of_estimates)

        def one_step(time: Tensor, theta: Tensor, u: Tensor, *noise: Tensor) -> tuple[Tensor, ...]:
            t, h = time.unbind()
            if isinstance(field, SDEField):
                field.given = GivenNoise(*noise)
            state = alg.init(field, t, u)
            step = alg.step(field, t, h, state)
            reached = step.state[0], *summands(state, h)
            values = step.interpolant(theta) if len(theta) else u[None][:0]
            if not wanted:
                return *reached, values, *(u.new_zeros(3).unbind())
            estimates: Any = measure(step, u, tolerance, on_tape=True)
            return *reached, values, *estimates

        try:
            with torch.enable_grad():
                if u.dim() == 1:
                    return one_step(time, theta, u, *noise)
                return torch.vmap(one_step)(time, theta, u, *noise)
        finally:
            if isinstance(field, SDEField):
                field.given = None

    def _times_inside(self, records: list[Record], most: int) -> list[list[float]]:
        """Times of the values inside the steps, filled up with the starts of the steps."""
        saves = self.context.save_times
        if not most or saves is None:
            return []
        times = [saves[r.first_save : r.first_save + len(r.thetas)] for r in records]
        return [[*x, *[r.t] * (most - len(x))] for x, r in zip(times, records, strict=True)]

    def _bars_inside(self, records: list[Record], values: Tensor) -> Tensor:
        """Cotangents of the values inside the steps, zero where a step has fewer."""
        assert self.of_saved is not None
        bars = torch.zeros_like(values)
        rows = [i for i, r in enumerate(records) for _ in r.thetas]
        columns = [j for r in records for j in range(len(r.thetas))]
        saved = [r.first_save + j for r in records for j in range(len(r.thetas))]
        bars[rows, columns] = self.of_saved[saved]
        return bars

    def _step_jacobians(self, u_new: Tensor, u: Tensor) -> Tensor:
        """``du_new/du`` of each row of each step, ``(m, rows, size, size)``."""
        m, rows, size = len(u), self.rows, self.size
        if not u_new.requires_grad:
            return torch.zeros(m, rows, size, size, dtype=u.dtype, device=u.device)
        jacobian_rows = []
        for j in range(size):
            basis = torch.zeros(m, rows, size, dtype=u.dtype, device=u.device)
            basis[:, :, j] = 1.0
            (row,) = torch.autograd.grad(
                u_new, u, basis.view_as(u), retain_graph=True, allow_unused=True
            )
            row = torch.zeros_like(basis) if row is None else row.view(m, rows, size)
            jacobian_rows.append(row)
        return torch.stack(jacobian_rows, 2)

    def _recursion(
        self, records: list[Record], matrices: Tensor, local: Tensor | None, bar: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cotangents of the states after the steps, and of those before them, ``(m, N)`` each."""
        # tiny products in a long chain: NumPy's calls cost the least
        jacobians = matrices.cpu().numpy()
        sources = None if local is None else local.cpu().numpy()
        saved = None if self.of_saved is None else self.of_saved.cpu().numpy()
        after = np.empty((len(records), len(bar)), dtype=jacobians.dtype)
        before = np.empty_like(after)
        running = bar.detach().cpu().numpy()
        for n in reversed(range(len(records))):
            end_save = records[n].end_save
            if end_save is not None and saved is not None:
                running = running + saved[end_save]
            after[n] = running
            if self.size == 1:
                running = running * jacobians[n].reshape(-1)
            else:
                running = (running.reshape(self.rows, 1, self.size) @ jacobians[n]).reshape(-1)
            if sources is not None:
                running = running + sources[n]
            before[n] = running
        return torch.from_numpy(after).to(bar), torch.from_numpy(before).to(bar)


def add_up(totals: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Add gradients, None where there is none, to their totals."""
    for i, g in enumerate(grads):
        if g is not None:
            total = totals[i]
            totals[i] = g if total is None else total + g


def _same_products(assumed: Tensor, true: Tensor | None, after: Tensor) -> bool:
    """Whether the blocks' products with the lambdas are those of the whole matrices."""
    true = torch.zeros_like(assumed) if true is None else true
    scale = torch.maximum(true.abs().amax(1), after.abs().amax(1))
    close = (assumed - true).abs().amax(1) <= 200 * torch.finfo(true.dtype).eps * scale
    return bool(close.all())


def _identity(f: Any) -> Any:
    """The object that stands for ``f`` in every solve: a bound method is a new object each time."""
    return getattr(f, "__self__", f)


def _is_coupled(f: Any) -> bool:
    try:
        return _identity(f) in _coupled
    except TypeError:  # no weak reference can be made of it
        return False


def _remember_coupled(f: Any) -> None:
    try:
        _coupled.add(_identity(f))
    except TypeError:
        _log.debug("%r cannot be remembered as one whose rows are coupled", f)


def _pull(
    pairs: list[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    if not pairs:
        return (None,) * len(inputs)
    outputs, bars = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, bars, retain_graph=True, allow_unused=True)
