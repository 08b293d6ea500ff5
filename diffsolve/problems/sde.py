"""The initial value problem of a stochastic differential equation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from diffsolve.problems.ode import check_state, checked_span

NOISE_TYPES = ("diagonal", "scalar", "additive", "general")
INTERPRETATIONS = ("ito", "stratonovich")


@dataclass(frozen=True, eq=False)
class SDEProblem:
    """``du = f(t, u, p) dt + g(t, u, p) dW`` with ``u(t0) = u0`` on ``tspan = (t0, t1)``.

    The state is a tensor ``(..., d)``: its leading dimensions are independent paths, each with
    ``d`` components and ``m`` Brownian motions of its own. A 1-d state is one path, and so is a
    pytree, over all of its entries.

    Parameters
    ----------
    f
        Drift ``f(t, u, p)``, or ``f(t, u)`` when ``p`` is None; a function or an ``nn.Module``.
        Returns the shape, dtype and structure of ``u``.
    g
        Diffusion, called as ``f`` is. What it returns depends on ``noise``.
    u0
        Initial state: a tensor, or a pytree (dict, tuple, list, named tuple) of tensors of one
        dtype (float32, float64) and device.
    tspan
        ``(t0, t1)``, numbers or 0-d tensors; ``t1 < t0`` integrates backward in time.
    p
        Parameters of both: a tensor, a pytree of tensors and other values,
        ``module.parameters()``, or None. Whatever else ``f`` and ``g`` touch is found and gets its
        gradient as well.
    noise
        ``"diagonal"`` (default): ``g`` has the shape of ``u``, and every component a Brownian
        motion of its own, ``m = d``. ``"scalar"``: ``g`` has the shape of ``u`` or ``(..., d, 1)``,
        and a path has one Brownian motion. ``"general"``: ``g`` is ``(..., d, m)``; for a pytree
        each leaf is ``(*leaf.shape, m)``. ``"additive"``: ``g`` has the shape of ``u`` or
        ``(..., d, m)``, and does not depend on ``u``.
    interpretation
        ``"ito"`` (default) or ``"stratonovich"``: which integral ``g dW`` is.

    Raises
    ------
    TypeError
        If ``f`` or ``g`` is not callable, or ``u0`` holds something else than tensors.
    ValueError
        If ``u0`` is empty, not finite, complex, of an unsupported dtype or of mixed dtypes or
        devices; if ``tspan`` is not two finite times; if ``noise`` or ``interpretation`` is
        unknown.

    Examples
    --------
    >>> gbm = SDEProblem(
    ...     lambda t, u, p: p[0] * u,
    ...     lambda t, u, p: p[1] * u,
    ...     torch.ones(1000, 1),  # 1,000 paths
    ...     (0.0, 1.0),
    ...     torch.tensor([0.1, 0.2]),
    ... )
    """

    f: Callable[..., Any]
    g: Callable[..., Any]
    u0: Any
    tspan: tuple[Any, Any]
    p: Any = None
    _: KW_ONLY
    noise: str = "diagonal"
    interpretation: str = "ito"

    def __post_init__(self) -> None:
        for name, function in (("f", self.f), ("g", self.g)):
            if not callable(function):
                kind = type(function).__name__
                raise TypeError(f"{name} must be callable as {name}(t, u, p), got {kind}")
        if isinstance(self.p, Iterator):  # module.parameters() can be read only once
            object.__setattr__(self, "p", tuple(self.p))
        check_state(self.u0)
        first: torch.Tensor = pytree.tree_leaves(self.u0)[0]
        if first.is_complex():
            raise ValueError(
                f"u0 has dtype {first.dtype}: an SDE needs a real state; write u as its real and "
                "imaginary parts (torch.view_as_real)"
            )
        object.__setattr__(self, "tspan", checked_span(self.tspan))
        choices = (("noise", NOISE_TYPES), ("interpretation", INTERPRETATIONS))
        for name, known in choices:
            if getattr(self, name) not in known:
                options = ", ".join(f'"{x}"' for x in known)
                raise ValueError(f"{name} must be one of {options}, got {getattr(self, name)!r}")

    def remake(self, **changes: Any) -> SDEProblem:
        """A new problem with some fields changed."""
        return replace(self, **changes)
