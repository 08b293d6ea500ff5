"""How the right-hand side of an ODE becomes a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.programs.bound import ScalarBound
from diffsolve.engines.native.programs.recipe import (
    DRAWN_ANEW,
    FROZEN,
    ProgramGraph,
    Recipe,
    key_of,
)
from diffsolve.engines.native.programs.scalar import ScalarProgram
from diffsolve.engines.native.programs.traces import TraceEntry
from diffsolve.engines.native.tracing.fingerprint.recorder import CodeRecorder
from diffsolve.engines.native.tracing.trace import trace
from diffsolve.problems.capture import reached_leaves
from diffsolve.problems.probe import Probe
from diffsolve.problems.vector_field import VectorField


class ScalarRecipe(Recipe):
    """For a right-hand side whose every number becomes an expression."""

    bound = ScalarBound

    def key(self, field: VectorField, leaves: list[Any]) -> Any:
        return key_of(field.f, field.p, field.structure, leaves)

    def graph(
        self, field: VectorField, t: Tensor, u0: Tensor, leaves: list[Any], recorder: CodeRecorder
    ) -> ProgramGraph:
        try:
            result = trace(field.f, field.structure, field.p, t, u0, recorder=recorder)
        except Declined:
            raise
        except Exception as error:  # f's own, which the torch engine reports as it is
            raise Declined(f"f raised {type(error).__name__}: {error}") from error
        return ProgramGraph.of(result, result.outputs, leaves, ("ode",))

    def program(self, graph: ProgramGraph) -> ScalarProgram:
        return ScalarProgram(graph.pool, graph.outputs, graph.blocks, graph.is_float32)

    def is_confirmed(self, field: VectorField, bound: ScalarBound, t: Tensor, u0: Tensor) -> bool:
        eager, foreign = _by_torch(field, t, u0, bound.tensors)
        return _agrees(field, bound, t, u0, eager) and bound.uses_all(foreign)

    def judge(
        self,
        entry: TraceEntry,
        field: VectorField,
        bound: ScalarBound,
        t: Tensor,
        u0: Tensor,
        direction: float,
    ) -> str:
        """See ``Recipe.judge``.

        At the start, where ``f`` was traced, a difference beyond rounding shows numbers that ``f``
        draws. Beside it one shows values that went around torch, and are frozen in the trace.
        """
        eager, _ = _by_torch(field, t, u0)
        if not _agrees(field, bound, t, u0, eager):
            again, _ = _by_torch(field, t, u0)
            if not (torch.equal(eager, again) or bool((eager.isnan() & again.isnan()).any())):
                return DRAWN_ANEW
        beside = t + math.copysign(1e-3 * max(1.0, abs(float(t))), direction), u0 * 1.001 + 1e-3
        try:
            eager, _ = _by_torch(field, *beside)
        except Exception:  # outside of where f is defined
            return ""
        if not bool(eager.isfinite().all()):
            return ""
        off = (bound.evaluate(float(beside[0]), beside[1]) - eager).abs().max()
        roughly = 1e-3 if bound.program.is_float32 else 1e-6
        return FROZEN if float(off) > roughly * max(float(eager.abs().max()), 1e-3) else ""


def _by_torch(
    field: VectorField, t: Tensor, u0: Tensor, known: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """``f(t, u0)`` by torch, and the tensors it used whose gradient is wanted.

    Those are looked for if one of the ``known`` tensors requires a gradient.
    """
    f, structure = field.f, field.structure
    state = structure.unravel(u0)
    wanted = [x for x in known if x.requires_grad] if torch.is_grad_enabled() else []
    if not wanted:
        with torch.no_grad():
            return structure.ravel(f(t, state, *field._args)).clone(), []
    if all(x.is_leaf for x in wanted):  # the graph tells, in a fifth of the time
        du = structure.ravel(f(t, state, *field._args))
        return du.detach().clone(), list(reached_leaves([du]).values())
    with torch.no_grad():
        probe = Probe(t, pytree.tree_leaves(state))
        with probe:
            du = f(t, state, *field._args)
        return structure.ravel(du).clone(), probe.foreign


def _agrees(field: VectorField, bound: ScalarBound, t: Tensor, u0: Tensor, eager: Tensor) -> bool:
    """Whether the compiled function gives what ``f`` gives now."""
    if eager.shape != u0.shape or eager.dtype is not u0.dtype:
        return False
    ours = bound.evaluate(float(t), u0)
    return torch.equal(ours, eager) or bool(field.rounding_error(ours, eager) <= 1)
