"""What the tests of the native engine share: right-hand sides compiled, and torch's own answers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffsolve.engines.native.codegen.llvm import FIELD, Output, Signature, compile_function
from diffsolve.engines.native.graph.derivative import jvp, vjp
from diffsolve.engines.native.graph.expression import Node
from diffsolve.engines.native.tracing.trace import Trace, trace
from diffsolve.problems.structure import StateStructure

F64 = torch.float64
_PRODUCT = Signature(("t",), ("u", "p", "w", "out"))
_CONTRACTION = Signature(("t",), ("u", "p", "v", "w", "out"))


def traced(f: Callable[..., Any], u: Any, p: Any = None, t: float = 0.3) -> Trace:
    structure = StateStructure.of(u)
    return trace(f, structure, p, t, structure.ravel(u))


def entries(tr: Trace, p: Any) -> np.ndarray:
    """Values of the block ``p`` of inputs."""
    leaves = pytree.tree_leaves(p)
    tensors = [x.tensor if x.p_position is None else leaves[x.p_position] for x in tr.inputs]
    parts = [x.detach().numpy().reshape(-1) for x in tensors]
    return np.concatenate(parts) if parts else np.zeros(0)


def run(
    signature: Signature, nodes: Sequence[Node | None], t: float, *arrays: np.ndarray
) -> np.ndarray:
    """Values of nodes by machine code; zero for None."""
    single = arrays[0].dtype == np.float32
    number = ctypes.c_float if single else ctypes.c_double
    outputs = [Output("out", i, x) for i, x in enumerate(nodes) if x is not None]
    code = compile_function(signature, outputs, single, level=0)
    out = np.zeros(len(nodes), arrays[0].dtype)
    held = [np.ascontiguousarray(a, arrays[0].dtype) for a in (*arrays, out)]
    types = [number, *[ctypes.c_void_p] * len(held)]
    ctypes.CFUNCTYPE(None, *types)(code.address)(t, *[a.ctypes.data for a in held])
    return held[-1]


def value(tr: Trace, u: Tensor, p: Any = None, t: float = 0.3) -> np.ndarray:
    u_array = u.detach().numpy().reshape(-1)
    return run(FIELD, tr.outputs, t, u_array, entries(tr, p).astype(u_array.dtype))


def pullback(tr: Trace, u: Tensor, w: Tensor, p: Any = None, t: float = 0.3) -> np.ndarray:
    """``w^T`` times the derivatives by ``t``, ``u`` and all lifted tensors, in one row."""
    pool = tr.pool
    bars = [pool.input("w", i) for i in range(len(tr.outputs))]
    count = sum(x.count for x in tr.inputs)
    wrt = [tr.t, *tr.u, *[pool.input("p", k) for k in range(count)]]
    u_array = u.detach().numpy().reshape(-1)
    more = entries(tr, p).astype(u_array.dtype), w.numpy().reshape(-1)
    return run(_PRODUCT, vjp(tr.outputs, bars, wrt), t, u_array, *more)


def torch_pullback(
    f: Callable[..., Any], u: Tensor, w: Tensor, p: Sequence[Tensor] = (), t: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """What ``f`` gives, and ``pullback``, by torch; ``p`` in the order in which it is lifted."""
    leaves = [torch.tensor(t, dtype=u.dtype), u.detach().clone(), *p]
    leaves = [x if x.requires_grad else x.detach().clone().requires_grad_() for x in leaves]
    args = (leaves[0], leaves[1], *([leaves[2:]] if p else []))
    du = f(*args)
    if not du.requires_grad:
        return du.numpy().reshape(-1), np.zeros(sum(x.numel() for x in leaves))
    grads = torch.autograd.grad(du, leaves, w.view_as(du), allow_unused=True)
    rows = [
        torch.zeros(x.numel(), dtype=u.dtype) if g is None else g.reshape(-1)
        for g, x in zip(grads, leaves, strict=True)
    ]
    return du.detach().numpy().reshape(-1), torch.cat(rows).numpy()


def second_order_terms(tr: Trace, u: Tensor, p: Any, v: Tensor, w: Tensor) -> np.ndarray:
    """Gradient of ``w^T J v`` by ``u`` and all lifted tensors, in one row."""
    pool = tr.pool
    bars = [pool.input("w", i) for i in range(len(tr.outputs))]
    tangents = {x: pool.input("v", i) for i, x in enumerate(tr.u)}
    wrt = [*tr.u, *[pool.input("p", k) for k in range(sum(x.count for x in tr.inputs))]]
    dots = zip(jvp(tr.outputs, tangents), bars, strict=True)
    pairs = [(dot, bar) for dot, bar in dots if dot is not None]
    nodes = vjp([dot for dot, _ in pairs], [bar for _, bar in pairs], wrt)
    arrays = [x.numpy() for x in (v, w)]
    return run(_CONTRACTION, nodes, 0.3, u.numpy(), entries(tr, p), *arrays)
