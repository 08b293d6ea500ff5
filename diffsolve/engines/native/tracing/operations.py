"""The operations of torch that the native engine can compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# these fill the table
from diffsolve.engines.native.tracing import (  # noqa: F401
    activations,
    backward,
    movement,
    pointwise,
    products,
    reductions,
)
from diffsolve.engines.native.tracing.registry import TABLE, Unsupported, words

__all__ = ["Rule", "Unsupported", "rule_of"]

#: Operations whose result is a view of their argument, though their schema does not say so.
VIEWS = set(
    words(
        "_unsafe_view _reshape_alias unsafe_split unsafe_split_with_sizes unsafe_chunk lift "
        "squeeze_ unsqueeze_ t_ transpose_ swapaxes_ swapdims_ as_strided_ detach_"
    )
)
#: Operations that never read their first argument.
OVERWRITES = {"copy_", "fill_", "zero_"}
#: Operations whose result is not initialised.
UNWRITTEN = set(words("empty empty_like empty_strided empty_permuted new_empty new_empty_strided"))
#: Operations that read only the shape and type of a tensor.
SHAPE_ONLY = set(
    words(
        "zeros_like ones_like new_zeros new_ones new_full "
        "sym_size sym_stride sym_numel sym_storage_offset is_same_size size stride "
        "_has_same_storage_numel"
    )
)
#: Operations whose result is a number or a shape, which Python needs at once.
DATA_DEPENDENT = set(
    words(
        "_local_scalar_dense item is_nonzero nonzero nonzero_static nonzero_numpy argwhere unique "
        "unique_consecutive unique_dim _unique _unique2 equal allclose bincount "
        "histc repeat_interleave"
    )
)
#: Names of operations as users know them, where they differ from those of the dispatcher.
PUBLIC_NAMES = {
    "_local_scalar_dense": "Tensor.item",
    "_to_copy": "Tensor.to",
    "_unique2": "torch.unique",
    "_cdist_forward": "torch.cdist",
    "_fft_c2c": "torch.fft.fft",
    "_fft_c2r": "torch.fft.irfft",
    "_fft_r2c": "torch.fft.rfft",
    "_linalg_det": "torch.linalg.det",
    "_linalg_eigh": "torch.linalg.eigh",
    "_linalg_solve_ex": "torch.linalg.solve",
    "_linalg_svd": "torch.linalg.svd",
    "linalg_cholesky_ex": "torch.linalg.cholesky",
    "linalg_inv_ex": "torch.linalg.inv",
    "native_batch_norm": "torch.nn.functional.batch_norm",
    "native_layer_norm": "torch.nn.functional.layer_norm",
}


@dataclass
class Rule:
    """How the tracer treats an operation of torch.

    Attributes
    ----------
    handler
        Makes the expressions of its result; None if the operation has no rule.
    name
        As users know it.
    is_view
        Whether its result is a view of its argument.
    is_shape_only
        Whether it reads no values.
    is_unwritten
        Whether its result is not initialised.
    is_random
        Whether it draws random numbers.
    is_data_dependent
        Whether Python needs its result at once.
    overwrites
        1 if it never reads its first argument, else 0.
    writes
        Positions and names of the arguments that it changes.
    """

    handler: Callable[..., Any] | None
    name: str
    is_view: bool
    is_shape_only: bool
    is_unwritten: bool
    is_random: bool
    is_data_dependent: bool
    overwrites: int
    writes: tuple[tuple[int, str], ...]


@functools.cache
def rule_of(func: Any) -> Rule:
    """The rule of an overload."""
    schema = func._schema
    space, _, name = schema.name.partition("::")
    base = name if space == "aten" else schema.name
    if base.endswith("_") and not base.endswith("__"):
        base = base[:-1]
    writes = tuple(
        (i, a.name)
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    )
    returned = [r.alias_info for r in schema.returns]
    aliases = bool(returned) and all(a is not None and not a.is_write for a in returned)
    return Rule(
        TABLE.get(base),
        _public_name(space, base),
        aliases or name in VIEWS,
        base in SHAPE_ONLY or base in UNWRITTEN,
        base in UNWRITTEN,
        torch.Tag.nondeterministic_seeded in func.tags,
        base in DATA_DEPENDENT,
        int(name in OVERWRITES),
        () if name in VIEWS else writes,
    )


def _public_name(space: str, base: str) -> str:
    """An operation's name as users know it."""
    if space != "aten" or base in PUBLIC_NAMES:
        return PUBLIC_NAMES.get(base, base)
    for module, prefix in ((torch, "torch"), (torch.nn.functional, "torch.nn.functional")):
        if hasattr(module, base):
            return f"{prefix}.{base}"
    public = base.replace("linalg_", "torch.linalg.").replace("fft_", "torch.fft.")
    return public if "." in public else f"aten.{base}"
