"""Normalisations as plain arithmetic, for derivatives that torch's own operations get wrong.

The second derivative of ``torch.native_layer_norm`` and ``torch.native_batch_norm`` takes the mean
and the deviation for constants, so that the derivatives of it are wrong without an error. The
method of a stiff problem that multiplies with the Jacobian needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from diffsolve.problems.capture import nodes_of

#: Nodes of a graph that cannot be differentiated three times.
_OPAQUE = ("NativeLayerNormBackward", "NativeBatchNormBackward", "CudnnBatchNormBackward")


class PlainNorms(TorchFunctionMode):
    """Within it, layer, group, instance and batch norms are sums, products and roots."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain = _PLAIN.get(func)
        if plain is None:
            return func(*args, **(kwargs or {}))
        return plain(*args, **(kwargs or {}))


def refuse_opaque_norms(y: Tensor) -> None:
    """Refuse a graph with a normalisation that was out of the reach of ``PlainNorms``.

    Raises
    ------
    RuntimeError
        If the graph of ``y`` has one.
    """
    for node in nodes_of([y]):
        if node.name().startswith(_OPAQUE):
            raise RuntimeError(
                f"f calls a normalisation ({node.name()}) from compiled code, such as TorchScript, "
                "and PyTorch gets its third derivative wrong, which a gradient through this method "
                "needs: call it from Python, or solve with KenCarp4() or an explicit method"
            )


def _standard(x: Tensor, axes: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` less its mean, over its deviation; the mean, and the variance."""
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    variance = (centred * centred).mean(axes, keepdim=True)
    return centred * torch.rsqrt(variance + eps), mean, variance


def _working(x: Tensor) -> tuple[Tensor, torch.dtype]:
    """``x`` in the precision that statistics have, and the dtype of the result."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return x, x.dtype
    return x.float(), torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


def _affine(x: Tensor, weight: Any, bias: Any, shape: Sequence[int] | None = None) -> Tensor:
    for y, combine in ((weight, torch.mul), (bias, torch.add)):
        if y is not None:
            x = combine(x, (y if shape is None else y.reshape(shape)).to(x.dtype))
    return x


def _native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, dtype = _working(input)
    y, mean, variance = _standard(x, tuple(range(-len(normalized_shape), 0)), eps)
    return _affine(y, weight, bias).to(dtype), mean, torch.rsqrt(variance + eps)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _native_layer_norm(input, normalized_shape, weight, bias, eps)[0]


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    x, dtype = _working(input)
    y, _, _ = _standard(x.reshape(len(x), num_groups, -1), (-1,), eps)
    return _affine(y.reshape(x.shape), weight, bias, _by_channel(x)).to(dtype)


def _by_channel(x: Tensor) -> list[int]:
    return [1, -1, *[1] * (x.dim() - 2)]


def _statistics(
    x: Tensor,
    axes: tuple[int, ...],
    means: Any,
    variances: Any,
    own: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_standard``, by running statistics where there are no own ones; those are updated."""
    shape = _by_channel(x)
    if not own:
        mean, variance = means.reshape(shape), variances.reshape(shape)
        return (x - mean) * torch.rsqrt(variance + eps), mean, variance
    y, mean, variance = _standard(x, axes, eps)
    if means is not None:
        count = 1
        for axis in axes:
            count *= x.shape[axis]
        with torch.no_grad():
            unbiased = variance * (count / max(count - 1, 1))
            for running, new in ((means, mean), (variances, unbiased)):
                new = new.reshape(-1, len(running)).mean(0)
                running.lerp_(new.to(running.dtype), momentum)
    return y, mean, variance


def _native_batch_norm(
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    x, dtype = _working(input)
    axes = (0, *range(2, x.dim()))
    y, mean, variance = _statistics(x, axes, running_mean, running_var, training, momentum, eps)
    y = _affine(y, weight, bias, _by_channel(x)).to(dtype)
    return y, mean.reshape(-1), torch.rsqrt(variance + eps).reshape(-1)


def _torch_batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    return _native_batch_norm(*args, **kwargs)[0]


def _batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    given = (input, weight, bias, running_mean, running_var, training, momentum, eps)
    return _native_batch_norm(*given)[0]


def _torch_instance_norm(
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    x, dtype = _working(input)
    axes, own = tuple(range(2, x.dim())), use_input_stats
    y, _, _ = _statistics(x, axes, running_mean, running_var, own, momentum, eps)
    return _affine(y, weight, bias, _by_channel(x)).to(dtype)


def _instance_norm(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    given = (input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps)
    return _torch_instance_norm(*given)


_PLAIN: dict[Any, Callable[..., Any]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    functional.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    functional.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    torch.native_batch_norm: _native_batch_norm,
    functional.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
}
