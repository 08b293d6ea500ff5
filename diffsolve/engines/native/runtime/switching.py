"""A solve that two methods share: handing over from one to the other, and reading what both left.

The kernels know one method at a time. Where ``loop.py`` says that the other is to go on, its
numbers replace those of the first in the same memory. ``SolveMemory.runs`` notes which method took
which steps.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from diffsolve.engines.declined import Declined
from diffsolve.engines.native.runtime.memory import SolveMemory
from diffsolve.engines.native.runtime.method import address
from diffsolve.engines.native.runtime.runs import Run
from diffsolve.solvers.continuous_extension import elevated
from diffsolve.solvers.kernels import layout as L
from diffsolve.solvers.switching import FACTOR, NONSTIFF_STEPS, STIFF_STEPS

_log = logging.getLogger("diffsolve")
#: Slots that belong to the method at work.
_METHOD = slice(L.STAGES, L.SMOOTHED + 1)
_CONTROLLER = slice(L.SAFETY, L.BETA_PLAIN + 1)


def advance(memory: SolveMemory, bar: Any = None) -> int:
    """Integrate until the end, with both of two methods; returns how it ended."""
    while True:
        status = memory.run(memory.runs[-1].template.advance, bar)
        if status != L.SWITCHED:
            return status
        switch(memory)


def use(memory: SolveMemory, run: Run) -> None:
    """Let the method of a run be the one at work."""
    method, integers = run.template.method, memory.integers
    memory.method = method
    integers[_METHOD] = run.template.integers[_METHOD]
    integers[L.FUSED] = 0 if memory.solves_other else run.template.integers[L.FUSED]
    integers[L.RUN_BEGIN] = run.begin
    if run.state is not None:
        memory.hold_new(L.RUN_STATE, run.state)


def switch(memory: SolveMemory) -> None:
    """Hand over to the other method; where it cannot be compiled, the first one stays."""
    integers, reals, template = memory.integers, memory.reals, memory.template
    assert template.other is not None
    to_stiff = integers[L.SWITCH] == L.NONSTIFF
    try:
        successor = template.other() if to_stiff else template
        if to_stiff:
            memory.prepare_stiff()
            memory.jacobian()
    except Declined as reason:
        name = template.stiff.name if template.stiff is not None else ""
        _log.warning("diffsolve: the problem is stiff, but %s cannot take over: %s", name, reason)
        integers[L.SWITCH] = 0
        return
    iterated = memory.method.family.iterates
    n = memory.n
    run = Run(successor, integers[L.ACCEPTED], state=np.empty((2, n), memory.dtype))
    memory.runs.append(run)
    use(memory, run)
    if to_stiff:
        memory.add_linear_systems()
    integers[L.HANDED_OVER] = L.WITHOUT_DERIVATIVE if iterated else L.WITH_DERIVATIVE
    integers[L.CONTROLLER] = successor.integers[L.CONTROLLER]
    integers[L.JVP] = 0 if memory.solves_other else successor.integers[L.JVP]
    reals[_CONTROLLER] = successor.reals[_CONTROLLER]
    reals[L.MEMORY1] = reals[L.MEMORY2] = 0.0
    integers[L.HAS_MEMORY] = integers[L.SWITCH_COUNT] = integers[L.STABLE_WAIT] = 0
    integers[L.SWITCH] = L.STIFF if to_stiff else L.NONSTIFF
    integers[L.SWITCH_AFTER] = NONSTIFF_STEPS if to_stiff else STIFF_STEPS
    reals[L.SIZE] *= FACTOR if to_stiff else 1 / FACTOR


def runs_of(memory: SolveMemory) -> list[Run]:
    """The runs that took steps, in order, with their ends."""
    runs = memory.runs
    if len(runs) == 1:
        runs[0].end = memory.integers[L.ACCEPTED]
        return [*runs] if runs[0].end > runs[0].begin else []
    ends = [*(run.begin for run in runs[1:]), memory.integers[L.ACCEPTED]]
    for run, end in zip(runs, ends, strict=True):
        run.end = end
    return [run for run in runs if run.end > run.begin]


def degree_of(memory: SolveMemory) -> int:
    """Of polynomials that hold the continuous extensions of all methods of a solve."""
    return max((run.template.method.degree for run in runs_of(memory)), default=1)


def as_polynomials(dense: np.ndarray, run: Run, degree: int) -> np.ndarray:
    """Records of states and stages of one method as coefficients ``(steps, 1 + degree, N)``.

    The form is that of ``Interpolant.bernstein``.
    """
    method = run.template.method
    coefficients = np.empty((len(dense), 1 + degree, dense.shape[2]), dense.dtype)
    weights = elevated(method.stages.interpolant.bernstein, degree)
    coefficients[:, 0] = dense[:, 0]
    stages = dense[:, 1 : 1 + method.rows]
    coefficients[:, 1:] = np.einsum("jd,sjn->sdn", weights, stages)
    return coefficients


def use_polynomials(memory: SolveMemory, degree: int) -> None:
    """Let kernels read dense records of this degree that hold coefficients, not stages."""
    memory.identity = identity = np.eye(degree)
    integers = memory.integers
    integers[L.STAGES] = integers[L.DEGREE] = degree
    integers[L.EXTRA], integers[L.DENSE_ROWS] = 0, 1 + degree
    integers[L.POLY] = address(identity)


def join_dense(memory: SolveMemory) -> None:
    """Records of the stages of both methods as polynomials of one form, which any kernel reads."""
    dense, degree = memory.arrays[L.DENSE], degree_of(memory)
    parts = [as_polynomials(dense[run.begin : run.end], run, degree) for run in runs_of(memory)]
    joined = np.concatenate(parts)
    memory.hold_new(L.DENSE, joined)
    memory.hold_new(L.COMPLETE, np.ones(len(joined), np.int64))
    use_polynomials(memory, degree)
