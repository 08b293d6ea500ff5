"""The first evaluation of ``f`` or ``g``: it checks the function and finds what that depends on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.problems.autocast import Autocasting
from diffsolve.problems.capture import Substitute, is_torchscript, reached_leaves, reached_objects
from diffsolve.problems.probe import CUT, STOPPED, Probe, Watched, has_module_hooks, unhooked
from diffsolve.problems.structure import StateStructure


class Learner(Protocol):
    """A right-hand side that learns from its first call; see ``VectorField`` for what each is."""

    p: Any
    structure: StateStructure
    params: list[Tensor]
    used: set[int]
    work: int
    cut: str
    compares: bool
    reverse_in_turn: bool
    _args: tuple[Any, ...]
    _signature: str


@dataclass
class FirstCall:
    """A function at the start of a solve.

    Attributes
    ----------
    f, name
        The function, and what messages call it.
    value
        What it returned.
    probe
        What was seen of it on the way.
    state
        The flat state that it was given: a copy, which requires a gradient if one is wanted by
        anything, since later states depend on whatever the function does.
    reached
        Tensors and TorchScript that it can reach.
    """

    f: Callable[..., Any]
    name: str
    value: Any
    probe: Probe
    state: Tensor
    reached: list[Any]


def call_first(
    field: Learner, f: Callable[..., Any], name: str, t: Tensor, u0: Tensor, differentiate: bool
) -> FirstCall:
    """Evaluate ``f`` at ``(t, u0)`` under a probe.

    Raises
    ------
    TypeError
        If it takes other arguments.
    ValueError
        If it changes the state in place.
    """
    reached = reached_objects((f, field.p)) if differentiate else []
    needs_gradient = differentiate and (
        u0.requires_grad or any(isinstance(x, Tensor) for x in reached)
    )
    leaf = u0.detach().clone()
    if needs_gradient:  # never under a transform, which allows no such leaf
        leaf.requires_grad_()
    # autograd would refuse a leaf that changes in place, but in words that help nobody
    state = field.structure.unravel(leaf.clone() if needs_gradient else leaf)
    leaves = pytree.tree_leaves(state)
    versions = [_version(x) for x in leaves]
    probe = Probe(t, leaves)
    try:
        with unhooked(), probe if differentiate else nullcontext():
            value = f(t, state, *field._args)
    except Exception as error:
        if isinstance(error, TypeError) and not _can_call(f, 2 + len(field._args)):
            raise TypeError(
                f"{name} must be callable as {name}({field._signature}): {error}"
                + _how_to_call(field, f, name)
            ) from error
        error.add_note(f"raised while {name} was evaluated first, at t = {float(t):.8g}")
        raise
    if versions != [_version(x) for x in leaves]:
        raise ValueError(
            f"{name} changes the state u in place: compute what it returns from a copy of it"
        )
    return FirstCall(f, name, value, probe, leaf, reached)


def learn_from(field: Learner, call: FirstCall, flat: Tensor, by_state: bool) -> Callable[..., Any]:
    """Add what a function depends on to the attributes of ``field`` that ``discover`` fills.

    Parameters
    ----------
    call, flat
        Its first call, and what it returned, flat.
    by_state
        Whether a gradient by the initial state is wanted.

    Returns
    -------
    Callable
        The function, watched where its next run may do other things.

    Raises
    ------
    RuntimeError
        If it loses a gradient that is wanted.
    """
    probe, name = call.probe, call.name
    in_p = [x for x in pytree.tree_leaves(field.p) if isinstance(x, Tensor)]
    # a tensor that was computed from others counts where the function was seen to use it
    reached = [x for x in call.reached if isinstance(x, Tensor) and x.is_leaf]
    tensors = [*field.params, *in_p, *probe.foreign, *reached]
    unique = {id(x): x for x in tensors if x.requires_grad}
    field.params = list(unique.values())
    field.used |= {id(x) for x in probe.foreign}
    field.work += probe.work
    if probe.cut:
        field.cut = field.cut or CUT.format(name=name, how=probe.cut)
    stopped = probe.stopped
    owner = flat if flat._base is None else flat._base
    if type(owner) is torch.nn.Parameter and owner.is_leaf and id(owner) not in unique:
        stopped = stopped or "returning a torch.nn.Parameter that it made"
    if stopped:
        field.cut = field.cut or STOPPED.format(name=name, how=stopped)
    field.compares |= probe.compares
    field.reverse_in_turn |= (
        bool(probe.hook) or has_module_hooks([flat]) or any(map(is_torchscript, call.reached))
    )
    if not by_state and not field.params:
        return call.f
    if field.cut:
        raise RuntimeError(field.cut)
    ignored = set() if by_state else {id(call.state)}
    if probe.saw_no_grad and not reached_leaves([flat]).keys() - ignored:
        raise RuntimeError(
            f"gradients are wanted, but {name} switches them off: it runs under "
            "torch.no_grad() or inference_mode. Remove that, or detach u0 and the parameters."
        )
    return Watched(call.f, name) if probe.reads else call.f


def _how_to_call(field: Learner, f: Callable[..., Any], name: str) -> str:
    """What to do with an ``f`` that takes other arguments than it is given."""
    if _can_call(f, 1):
        takes = f"lambda {field._signature}: {name}(u)"
        return f"; where {name} is a function of the state alone, pass {takes}"
    if not field._args:
        return "; the problem has no p"
    if _can_call(f, 2):
        return f"; it takes no p: pass lambda t, u, p: {name}(t, u), or a problem without p"
    return ""


def unwrapped(f: Any) -> Any:
    """The user's function, or what binds autocast to it."""
    while isinstance(f, (Substitute, Watched)):
        f = f.f
    return f


def _can_call(f: Callable[..., Any], count: int) -> bool:
    f = unwrapped(f)
    f = f.f if isinstance(f, Autocasting) else f
    try:
        # the call of a module takes any arguments and passes them to forward
        inspect.signature(f.forward if isinstance(f, torch.nn.Module) else f).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # inference tensors do not count changes
