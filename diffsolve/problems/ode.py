"""The initial value problem of an ordinary differential equation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.problems.solve_cache import SolveCache
from diffsolve.problems.structure import detached

_SUPPORTED = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True, eq=False)
class ODEProblem:
    """``du/dt = f(t, u, p)`` with ``u(t0) = u0`` on ``tspan = (t0, t1)``.

    Parameters
    ----------
    f
        Right-hand side ``f(t, u, p)``, or ``f(t, u)`` when ``p`` is None; a function or an
        ``nn.Module``. ``t`` is a 0-d tensor in the state's real dtype, on its device. Returns the
        derivative in the shape, dtype and structure of ``u``.
    u0
        Initial state: a tensor of any shape, or a pytree (dict, tuple, list, named tuple) of
        tensors of one dtype (float32, float64, complex64, complex128) and device.
    tspan
        ``(t0, t1)``, numbers or 0-d tensors; ``t1 < t0`` integrates backward in time.
    p
        Parameters: a tensor, a pytree of tensors and other values, ``module.parameters()``, or
        None. Whatever else ``f`` touches is found and gets its gradient as well.
    jac
        Jacobian ``jac(t, u, p)``, or ``jac(t, u)`` when ``p`` is None, for implicit methods: ``(N,
        N)`` over the raveled state, or ``(..., d, d)`` where ``u`` is a batch ``(..., d)`` of rows
        that ``f`` treats independently. None: computed from ``f``, exactly where autograd can.
        Gradients never use it, and the native engine, which has the exact one, does not either.
        ``check_jacobian`` compares the two.
    jac_sparsity
        Which entries of the Jacobian can be other than zero, ``(N, N)``: a tensor or an array, or
        a sparse matrix of torch or SciPy, of which every stored entry counts. Where the Jacobian is
        computed by autograd, rows that share no column are then computed at once; a pattern that
        lacks an entry is refused when that is found. Linear systems are dense all the same.
    mass_matrix
        ``M`` in ``M du/dt = f``; refused by methods that cannot use it.

    Raises
    ------
    TypeError
        If ``f`` is not callable or ``u0`` holds something else than tensors.
    ValueError
        If ``u0`` is empty, not finite, of an unsupported dtype or of mixed dtypes or devices, or
        if ``tspan`` is not two finite times.

    Examples
    --------
    >>> prob = ODEProblem(lambda t, u, p: -p * u, torch.ones(3), (0.0, 1.0), torch.tensor(2.0))
    >>> shorter = prob.remake(tspan=(0.0, 0.5))
    """

    f: Callable[..., Any]
    u0: Any
    tspan: tuple[Any, Any]
    p: Any = None
    jac: Callable[..., Any] | None = None
    jac_sparsity: Any = None
    mass_matrix: Any = None

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise TypeError(f"f must be callable as f(t, u, p), got {type(self.f).__name__}")
        if self.jac is not None and not callable(self.jac):
            raise TypeError(f"jac must be callable as jac(t, u, p), got {type(self.jac).__name__}")
        if isinstance(self.p, Iterator):  # module.parameters() can be read only once
            object.__setattr__(self, "p", tuple(self.p))
        check_state(self.u0)
        object.__setattr__(self, "tspan", checked_span(self.tspan))

    @cached_property
    def _solve_cache(self) -> SolveCache:
        return SolveCache()

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: the fields."""
        return {name: x for name, x in self.__dict__.items() if type(x) is not SolveCache}

    def remake(self, **changes: Any) -> ODEProblem:
        """A new problem with some fields changed."""
        return replace(self, **changes)


def check_state(u0: Any) -> None:
    """Raise the errors of a problem whose initial state is wrong."""
    leaves = pytree.tree_leaves(u0)
    if not leaves:
        raise ValueError("u0 is an empty structure: it must hold at least one tensor")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"u0 must be a tensor or a pytree of tensors, found {type(leaf).__name__}; "
                "use torch.as_tensor(u0, dtype=torch.float64)"
            )
    first = leaves[0]
    if any(leaf.dtype != first.dtype or leaf.device != first.device for leaf in leaves):
        kinds = sorted({f"{leaf.dtype} on {leaf.device}" for leaf in leaves})
        raise ValueError(f"the tensors of u0 must share one dtype and device, found {kinds}")
    if first.dtype not in _SUPPORTED:
        advice = "use u0.double() or u0.float()"
        if first.dtype in (torch.float16, torch.bfloat16):
            advice = "half precision cannot resolve an error estimate; keep the state in float32 "
            advice += "and lower the precision inside f"
        raise ValueError(f"u0 has dtype {first.dtype}: {advice}")
    if sum(leaf.numel() for leaf in leaves) == 0:
        raise ValueError(f"u0 has no elements (shape {tuple(first.shape)})")
    for leaf in leaves:
        finite = torch.isfinite(leaf.detach())
        if not bool(finite.all()):
            raise ValueError(f"u0 holds {int((~finite).sum())} NaN or Inf")


def checked_span(tspan: Any) -> tuple[Any, Any]:
    """``tspan`` as a pair; a ``ValueError`` where it is not two finite times."""
    try:
        t0, t1 = tspan
        ends = [float(detached(t)) for t in (t0, t1)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"tspan must be two times (t0, t1), got {tspan!r}") from error
    if not all(abs(t) < float("inf") for t in ends):
        raise ValueError(f"tspan must be finite, got {ends}")
    return (t0, t1)
