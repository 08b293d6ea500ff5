"""The choice of the engine, and of the sensealg."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsolve.adjoints.select import choose_sensealg, refuse_for_noise
from diffsolve.adjoints.sensealg import Sensealg
from diffsolve.engines.declined import Declined
from diffsolve.engines.native.plan import NativePlan
from diffsolve.engines.plan import Plan
from diffsolve.engines.torch.plan import TorchPlan
from diffsolve.prepared import Prepared
from diffsolve.problems.capture import reachable_tensors
from diffsolve.problems.vector_field import VectorField


@dataclass
class Request:
    """What to solve, and what the user has said about how.

    Attributes
    ----------
    prepared, field
        The arguments of ``solve``, normalised, and the right-hand side.
    u0
        Flat initial state.
    engine, sensealg
        As the user gave them.
    by_time
        Whether a time of the solve requires a gradient.
    transformed, recording
        Whether a ``torch.func`` transform is active; whether autograd, and no transform,
        differentiates the solve.
    has_noise
        Whether the user gave the Brownian path.
    """

    prepared: Prepared
    field: VectorField
    u0: Tensor
    engine: str
    sensealg: Sensealg | None
    by_time: bool
    transformed: bool
    recording: bool
    has_noise: bool

    @property
    def moves_start(self) -> bool:
        """Whether the initial state, or a time, requires a gradient."""
        return self.u0.requires_grad or self.by_time

    @property
    def wants_gradients(self) -> bool:
        """Whether anything requires a gradient; known once the plan has found the parameters."""
        return self.moves_start or bool(self.field.params)

    def chosen_sensealg(self) -> Sensealg:
        """The sensealg, once the parameters are known that require a gradient."""
        wants = self.recording and self.wants_gradients
        return choose_sensealg(self.sensealg, wants, self.transformed)


def choose_plan(request: Request) -> tuple[Plan, Sensealg, Tensor | None]:
    """Choose the engine and the sensealg, and prepare both.

    Only this makes a torch plan where the native engine raises ``Declined``, which is its reason.

    Returns
    -------
    tuple
        The plan, the sensealg, and ``f(t0, u0)`` where torch has evaluated it.

    Raises
    ------
    ValueError
        If the user asked for the native engine, and it declines; or if the solve cannot be
        differentiated in this way.
    """
    field, recording = request.field, request.recording
    if field.is_stochastic:
        refuse_for_noise(request.sensealg, recording and request.by_time)
    reason = ""
    if request.engine != "torch":
        try:
            return *_native(request), None
        except Declined as declined:
            reason = str(declined)
    prepared = request.prepared
    with torch.set_grad_enabled(recording):
        du0 = field.discover(prepared.t0, request.u0, prepared.direction, recording)
    if request.engine == "native":
        raise ValueError(f'engine="native" cannot run this solve: {reason}')
    return TorchPlan(reason), request.chosen_sensealg(), du0


def _native(request: Request) -> tuple[NativePlan, Sensealg]:
    """The plan of the native engine, and the sensealg.

    Raises
    ------
    Declined
        If it cannot run the solve, or its reverse pass.
    """
    if request.transformed:
        raise Declined("a torch.func transform looks on")
    if request.has_noise:
        raise Declined("it draws its noise itself, and cannot follow a path that is given")
    field, prepared, u0 = request.field, request.prepared, request.u0
    if request.recording and isinstance(request.sensealg, Sensealg):
        _refuse_early(request.sensealg, request)
    verify = request.engine == "auto"
    native = NativePlan(field, prepared.t0, u0, prepared.direction, verify)
    if request.recording:
        field.params = native.differentiable(field, u0.requires_grad)
    sensealg = request.chosen_sensealg()
    native.prepare(field, prepared.alg, prepared.settings, sensealg)
    return native, sensealg


def _refuse_early(sensealg: Sensealg, request: Request) -> None:
    """Decline a sensealg that needs torch if it will be used, before ``f`` is traced in vain."""
    try:
        sensealg.refuse_native()
    except Declined:
        field = request.field
        reachable = reachable_tensors((*field.functions, field.p))
        if request.moves_start or any(x.requires_grad for x in reachable):
            raise
