"""A solve that two methods share: handing over from one to the other, and reading what both left.

The kernels know one method at a time. Where ``loop.py`` says that the other is to go on, its numbers
replace those of the first in the same memory. ``Memory.runs`` notes the steps from which on a
template was at work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.method import address
from diffsolve.solvers.kernels import layout as L

if TYPE_CHECKING:
    from diffsolve.engines.native.engine import Memory, Template

#: Slots that belong to the method at work.
_METHOD = slice(L.STAGES, L.SMOOTHED + 1)
_CONTROLLER = slice(L.SAFETY, L.BETA_PLAIN + 1)
_GROWTH = 2.0  # of the step size for the stiff method


def use(memory: Memory, template: Template) -> None:
    """Let the method of a template be the one at work."""
    memory.method = template.method
    memory.integers[_METHOD] = template.integers[_METHOD]
    memory.integers[L.FUSED] = 0 if template.method.is_implicit else memory.fused


def switch(memory: Memory) -> None:
    """Hand over to the other method; where it cannot be compiled, the first one stays."""
    integers, reals, template = memory.integers, memory.reals, memory.template
    assert template.other is not None
    to_stiff = integers[L.SWITCH] == L.NONSTIFF
    try:
        found = template.other() if to_stiff else template
        if to_stiff:
            memory.prepare_stiff()
    except Declined:
        integers[L.SWITCH] = 0
        return
    use(memory, found)
    if to_stiff:
        memory.work_of_systems()
    integers[L.CONTROLLER] = found.integers[L.CONTROLLER]
    integers[L.JVP] = found.integers[L.JVP]
    reals[_CONTROLLER] = found.reals[_CONTROLLER]
    integers[L.HAS_MEMORY] = integers[L.SWITCH_COUNT] = 0
    integers[L.SWITCH] = L.STIFF if to_stiff else L.NONSTIFF
    reals[L.SIZE] *= _GROWTH if to_stiff else 1 / _GROWTH
    memory.runs.append((integers[L.ACCEPTED], found))


def ranges(memory: Memory) -> list[tuple[int, int, Template]]:
    """First step, the one behind the last, and the template, for each run of one method."""
    starts = [start for start, _ in memory.runs]
    ends = [*starts[1:], memory.integers[L.ACCEPTED]]
    return [
        (start, end, template)
        for (start, template), end in zip(memory.runs, ends, strict=True)
        if end > start
    ]


def join_dense(memory: Memory) -> None:
    """Records of the stages of both methods as polynomials of one form, which any kernel reads."""
    dense, runs = memory.held[L.DENSE], ranges(memory)
    degree = max((run.method.degree for *_, run in runs), default=1)
    count = memory.integers[L.ACCEPTED]
    joined = np.zeros((max(count, 1), 1 + degree, memory.n), dense.dtype)
    for begin, end, run in runs:
        method, part = run.method, dense[begin:end]
        weights = method.stages.interpolant.polynomial
        stages = part[:, 1 : 1 + method.rows]
        joined[begin:end, 0] = part[:, 0]
        joined[begin:end, 1 : 1 + method.degree] = np.einsum("jd,sjn->sdn", weights, stages)
    memory.hold_new(L.DENSE, joined)
    memory.hold_new(L.COMPLETE, np.ones(max(count, 1), np.int64))
    memory.identity = np.eye(degree)
    integers = memory.integers
    integers[L.STAGES] = integers[L.DEGREE] = degree
    integers[L.EXTRA], integers[L.DENSE_ROWS] = 0, 1 + degree
    integers[L.POLY] = address(memory.identity)
