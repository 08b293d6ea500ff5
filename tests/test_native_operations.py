"""Operations of the native engine against torch: values, pullbacks, Jacobians, second order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from native_graphs import F64, pullback, torch_pullback, traced, value
from operation_checks import Op, zeros
from torch import Tensor, nn

from diffsolve.engines.native.tracing.registry import words

INF, NAN = math.inf, math.nan
POINTS = [
    *[0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, -3.0, 1.5, 2.5, -2.5, 0.25, 0.7, -0.7, 1e-3],
    *[6.0, -6.0, 30.0, -30.0, 800.0, -800.0, INF, -INF, NAN, 0.123, -1.234, 0.999],
]
_NAMES = words(
    "neg abs floor ceil trunc exp expm1 log log1p sqrt sin cos tan asin acos atan sinh cosh "
    "tanh asinh acosh atanh erf erfc sigmoid positive relu sign sgn square reciprocal rsqrt "
    "exp2 log2 log10 frac deg2rad rad2deg sinc round nan_to_num"
)
_ACTIVATIONS = words(
    "silu mish hardsigmoid hardswish relu6 logsigmoid softplus gelu elu celu selu leaky_relu "
    "hardtanh hardshrink softshrink softsign tanhshrink"
)


def half(x: Tensor) -> Tensor:
    return torch.tensor(0.5, dtype=x.dtype)


UNARY: dict[str, Op] = {
    **{name: getattr(torch, name) for name in _NAMES},
    **{name: getattr(F, name) for name in _ACTIVATIONS},
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus, beta": lambda x: F.softplus(x, 2.0, 3.0),
    "elu, alpha": lambda x: F.elu(x, 0.5),
    "celu, alpha": lambda x: F.celu(x, 0.5),
    "threshold": lambda x: F.threshold(x, 1.0, 7.0),
    "prelu": lambda x: F.prelu(x, half(x)),
    "logit, eps": lambda x: torch.logit(x, 1e-3),
    "round, decimals": lambda x: torch.round(x, decimals=1),
    "round, tens": lambda x: torch.round(x, decimals=-1),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp, low": lambda x: x.clamp(min=0.0),
    "clamp, high": lambda x: x.clamp_max(0.5),
    **{f"x**{n}": lambda x, n=n: x**n for n in (0, 1, 2, 3, 4, 5, -1, -2, -3, 0.5, 1.5, -1.5)},
    **{f"{a}**x": lambda x, a=a: a**x for a in (2, 0.0, 1, -2.0)},
    "isnan": lambda x: x.isnan().to(x.dtype) * half(x),
    "isinf": lambda x: x.isinf().to(x.dtype) * half(x),
    "isfinite": lambda x: x.isfinite() * x,
    "x > 0": lambda x: (x > 0) * x,
    "x <= 0.5": lambda x: (x <= 0.5).to(x.dtype) * x,
    "not": lambda x: torch.logical_not(x) * half(x),
    "~": lambda x: ~(x > 1) * x,
    "&, |, ^": lambda x: ((x > 1) & (x < 5) | (x < -1) ^ (x < -2)) * x,
    "x % 2": lambda x: x % 2,
    "x % -1.5": lambda x: x % -1.5,
    "3 % x": lambda x: torch.remainder(torch.full_like(x, 3.0), x.detach()),
    "fmod": lambda x: torch.fmod(x, 1.5),
    "x // 0.7": lambda x: x.detach() // 0.7,
    "div, trunc": lambda x: torch.div(x, 0.7, rounding_mode="trunc"),
    "div, floor": lambda x: torch.div(x, -0.7, rounding_mode="floor"),
    "1 / x": lambda x: 1 / x,
    "x / 3": lambda x: x / 3,
    "1 - x": lambda x: 1 - x,
    "nan_to_num, given": lambda x: torch.nan_to_num(x, 1.0, 2.0, 3.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 1, 3.0),
    "heaviside": lambda x: torch.heaviside(x.detach(), half(x)),
    "ldexp": lambda x: torch.ldexp(x, torch.tensor(2)),
    "copysign": lambda x: torch.copysign(torch.full_like(x, 2.0), x),
}
#: Where the slope differs from torch's on purpose, or means nothing because the value does not.
SLOPES_APART = {
    "clamp": [NAN], "clamp, low": [NAN], "clamp, high": [NAN], "x**-1.5": [-0.0],
    "hardswish": [INF, -INF, NAN], "hardsigmoid": [NAN],
}  # fmt: skip
#: torch rounds these slopes to single precision.
COARSE = {"hardsigmoid"}
#: torch has no derivative of these.
VALUES_ONLY = {"3 % x", "heaviside"}

PAIRS = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, -1.5, 3.3, INF, -INF, NAN]
BINARY: dict[str, Op] = {
    **{
        name: getattr(torch, name)
        for name in words(
            "add sub mul div pow atan2 maximum minimum fmax fmin max min remainder fmod hypot "
            "xlogy logaddexp logaddexp2 copysign"
        )
    },
    "floor_divide": lambda a, b: torch.floor_divide(a.detach(), b.detach()),
    "div, trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "div, floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "heaviside": lambda a, b: torch.heaviside(a.detach(), b.detach()),
    **{
        name: lambda a, b, name=name: getattr(torch, name)(a, b) * a
        for name in words("lt le gt ge eq ne logical_and logical_or logical_xor")
    },
    "add, alpha": lambda a, b: torch.add(a, b, alpha=2),
    "sub, alpha": lambda a, b: torch.sub(a, b, alpha=0.5),
    "rsub": lambda a, b: torch.rsub(a, b, alpha=3),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "lerp, far": lambda a, b: torch.lerp(a, b, 0.8),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b, value=0.5),
    "where": lambda a, b: torch.where(a > b, a, b * 2),
    "clamp, tensors": lambda a, b: torch.clamp(a, b, b + 1),
    "clamp, tensor": lambda a, b: torch.clamp(a, min=b),
}


#: Functions whose zeros have torch's sign.
SIGNED = set(
    words(
        "neg abs floor ceil trunc round expm1 log1p sqrt sin tan asin atan sinh tanh asinh atanh "
        "sign frac positive copysign fmod"
    )
)


def agree(
    f: Callable[..., Tensor],
    u: Tensor,
    rtol: float = 1e-12,
    judged: Any = None,
    signed: bool = False,
) -> None:
    """Values are torch's, and pullbacks where ``judged`` says so (everywhere for None)."""
    tr = traced(f, u)
    w = torch.linspace(0.5, 1.5, u.numel(), dtype=u.dtype)
    expected, row = torch_pullback(f, u, w)
    found = value(tr, u)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)
    zero = (expected == 0) & signed
    np.testing.assert_array_equal(np.signbit(found[zero]), np.signbit(expected[zero]))
    slopes, expected = pullback(tr, u, w)[1 : len(row)], row[1:]
    if judged is not None:
        slopes, expected = slopes[judged], expected[judged]
    np.testing.assert_allclose(slopes, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_functions_of_one_number(name, dtype):
    u = torch.tensor(POINTS, dtype=dtype)
    apart = SLOPES_APART.get(name, [])
    judged = np.array([not any(_same(x, y) for y in apart) for x in POINTS])
    judged &= name not in VALUES_ONLY
    single = dtype is torch.float32
    rtol = 3e-5 if single else 3e-8 if name in COARSE else 1e-12
    if single:  # float32 overflows elsewhere, and rounds near the edges
        keep = [i for i, x in enumerate(POINTS) if 0.1 < abs(x) < 10 and x != 0.999]
        u, judged = u[keep], judged[keep]
    agree(lambda t, u: UNARY[name](u), u, rtol, judged, name in SIGNED)


def _same(x: float, y: float) -> bool:
    return (math.isnan(x) and math.isnan(y)) or (x == y and np.signbit(x) == np.signbit(y))


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_numbers(name):
    u = torch.tensor([(a, b) for a in PAIRS for b in PAIRS], dtype=F64).T.contiguous()
    if name == "hypot":  # torch ignores NaN beside an infinity
        u = u[:, ~(u.isinf().any(0) & u.isnan().any(0))]
    # at infinities and NaN torch's slopes are as they come; at 0 / 0 the value is none either
    judged = u.isfinite().all(0) & (name not in VALUES_ONLY)
    if name == "xlogy":
        judged &= (u != 0).all(0)

    def f(t: Tensor, u: Tensor) -> Tensor:
        y = BINARY[name](u[0], u[1])
        return torch.cat([y[None], torch.zeros_like(u[1:])])

    agree(f, u, judged=judged.repeat(2).numpy())


# -- operations on arrays ------------------------------------------------------------------------

INDEX = torch.tensor([2, 0, 0])
TALL = torch.linspace(-1, 1, 20, dtype=F64).view(4, 5)
BLOCKS = torch.linspace(1, -1, 24, dtype=F64).view(2, 4, 3)
KERNEL = torch.tensor([[[0.5, -1.0]], [[2.0, 0.3]]], dtype=F64)
EYE = torch.eye(3, 4) > 0


def module(net: nn.Module) -> nn.Module:
    for k, x in enumerate(net.parameters()):
        nn.init.constant_(x, 0.3 + 0.2 * k)
    return net.double().eval()


LAYER_NORM, GROUP_NORM = module(nn.LayerNorm(4)), module(nn.GroupNorm(2, 4))
BATCH_NORM, GRU = module(nn.BatchNorm1d(4)), module(nn.GRUCell(4, 4))

ARRAYS: dict[str, Op] = {
    "sum": lambda x: x.sum(),
    "sum, dim": lambda x: x.sum(0),
    "sum, keepdim": lambda x: x.sum(1, keepdim=True),
    "sum, dims": lambda x: x.sum((0, 1)),
    "mean": lambda x: x.mean(),
    "mean, dim": lambda x: x.mean(-1, keepdim=True),
    "prod": lambda x: x.prod(),
    "prod, dim": lambda x: x.prod(1),
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(0),
    "nansum": lambda x: x.nansum(1, keepdim=True),
    "nanmean": lambda x: x.nanmean(0),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin((0, 1)),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max, dim": lambda x: x.max(1)[0],
    "min, dim": lambda x: x.min(0).values,
    "aminmax": lambda x: torch.stack(torch.aminmax(x)),
    "all": lambda x: (x > 0).all(1) * x[:, 0],
    "any": lambda x: (x > 0).any() * x,
    "count_nonzero": lambda x: torch.count_nonzero(x) * x,
    "norm": torch.linalg.norm,
    "norm, 1": lambda x: torch.linalg.vector_norm(x, 1, dim=0),
    "norm, inf": lambda x: torch.linalg.vector_norm(x, INF),
    "norm, -inf": lambda x: torch.linalg.vector_norm(x, -INF, dim=1),
    "norm, 3": lambda x: torch.linalg.vector_norm(x, 3),
    "norm, 0": lambda x: torch.linalg.vector_norm(x, 0) * x,
    "norm of zeros": lambda x: (x * 0).norm(),
    "norm, dim": lambda x: x.norm(dim=-1, keepdim=True),
    "norm, p": lambda x: torch.norm(x, p=1),
    "dist": lambda x: torch.dist(x, x * 2),
    "normalize": lambda x: F.normalize(x, dim=0),
    "var": lambda x: x.var(),
    "var, dim": lambda x: x.var(1, unbiased=False),
    "std": lambda x: x.std(0),
    "std of zeros": lambda x: (x * 0).std(),
    "var_mean": lambda x: torch.cat(torch.var_mean(x, 0)),
    "std_mean": lambda x: torch.cat(torch.std_mean(x, 1, keepdim=True)),
    "logsumexp": lambda x: x.logsumexp(1),
    "logsumexp, dims": lambda x: torch.logsumexp(x, (0, 1)),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, 0),
    "softmin": lambda x: F.softmin(x, 0),
    "glu": F.glu,
    "matmul": lambda x: x @ TALL,
    "matmul, self": lambda x: x @ x.T,
    "mv": lambda x: x @ x[0],
    "vm": lambda x: x[:, 0] @ x,
    "dot": lambda x: x[0].dot(x[1]),
    "bmm": lambda x: x.expand(2, 3, 4) @ BLOCKS,
    "matmul, blocks": lambda x: torch.matmul(x, BLOCKS),
    "addmm": lambda x: torch.addmm(x[:, :1], x, TALL, beta=0.5, alpha=2),
    "addmv": lambda x: torch.addmv(x[:, 0], x, x[0], alpha=0.5),
    "baddbmm": lambda x: torch.baddbmm(x[:, :3], x.expand(2, 3, 4), BLOCKS),
    "addbmm": lambda x: torch.addbmm(x[:, :3], x.expand(2, 3, 4), BLOCKS),
    "addr": lambda x: torch.addr(x, x[:, 0], x[0], beta=2),
    "linear": lambda x: F.linear(x, TALL.T, x[0, :1]),
    "linear, vector": lambda x: F.linear(x[0], TALL.T),
    "einsum": lambda x: torch.einsum("ij,ik->jk", x, x),
    "einsum, three": lambda x: torch.einsum("ij,jk,lk->il", x, TALL, TALL),
    "outer": lambda x: torch.outer(x[0], x[1]),
    "inner": lambda x: torch.inner(x, x),
    "tensordot": lambda x: torch.tensordot(x, TALL, 1),
    "kron": lambda x: torch.kron(x[0], x[1]),
    "bilinear": lambda x: F.bilinear(x[0], x[1], TALL[None, :, :4]),
    "cross": lambda x: torch.linalg.cross(x[:, 0], x[:, 1]),
    "cross, dim": lambda x: torch.cross(x, x.roll(1, 0), dim=0),
    "trace": lambda x: torch.trace(x[:, :3]),
    "vecdot": lambda x: torch.linalg.vecdot(x, x + 1),
    "matrix_power": lambda x: torch.linalg.matrix_power(x[:, :3], 3),
    "multi_dot": lambda x: torch.linalg.multi_dot([x, TALL, TALL.T]),
    "conv1d": lambda x: F.conv1d(x[:, None], KERNEL, padding=1, stride=2, bias=x[0, :2]),
    "conv1d, circular": lambda x: F.conv1d(F.pad(x[:, None], (1, 1), mode="circular"), KERNEL),
    "conv1d, groups": lambda x: F.conv1d(x[None, :2], KERNEL, groups=2),
    "conv1d, dilation": lambda x: F.conv1d(x[:, None], KERNEL, dilation=2),
    "conv2d": lambda x: F.conv2d(x[None, None], x[None, None, :2, :2], padding=1),
    "layer_norm": lambda x: LAYER_NORM(x),
    "layer_norm, plain": lambda x: F.layer_norm(x, (3, 4)),
    "group_norm": lambda x: GROUP_NORM(x),
    "batch_norm": lambda x: BATCH_NORM(x),
    "instance_norm": lambda x: F.instance_norm(x[None]),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "GRUCell": lambda x: GRU(x),
    "mse_loss": lambda x: F.mse_loss(x, x * 2),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x + 1),
    "pairwise_distance": lambda x: F.pairwise_distance(x, x + 1),
    "cov": torch.cov,
    "cat": lambda x: torch.cat([x, zeros(1, 4), x]),
    "stack": lambda x: torch.stack([x, 2 * x], -1),
    "hstack": lambda x: torch.hstack([x, x]),
    "repeat": lambda x: x.repeat(2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "tile": lambda x: x.tile(2, 2),
    "roll": lambda x: x.roll(1),
    "roll, dims": lambda x: x.roll((1, -1), (0, 1)),
    "flip": lambda x: x.flip(0, 1),
    "rot90": torch.rot90,
    "tril": lambda x: x.tril(-1),
    "triu": lambda x: x.triu(1),
    "diag_embed": lambda x: torch.diag_embed(x, -1, 0, 2),
    "diag": lambda x: torch.diag(x[0]),
    "diag, of matrix": torch.diag,
    "diagonal": lambda x: x.diagonal(1),
    "block_diag": lambda x: torch.block_diag(x, x),
    "pad": lambda x: F.pad(x, (1, -1, 2, 0), value=3.0),
    "pad, reflect": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "pad, replicate": lambda x: F.pad(x, (1, 2), mode="replicate"),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "index": lambda x: x[INDEX],
    "index, columns": lambda x: x[:, [0, 3]],
    "index, pairs": lambda x: x[INDEX, INDEX],
    "index, mask": lambda x: x[[0, 1]][:, [True, False, True, True]],
    "index, None": lambda x: x[None, INDEX, 1:],
    "take": lambda x: x.take(INDEX),
    "masked_select": lambda x: x.masked_select(EYE),
    "gather": lambda x: x.gather(1, INDEX[:, None]),
    "take_along_dim": lambda x: torch.take_along_dim(x, INDEX[:, None], 1),
    "index_select": lambda x: x.index_select(0, INDEX),
    "embedding": lambda x: F.embedding(INDEX, x),
    "scatter": lambda x: zeros(3, 4).scatter(1, INDEX[:2, None], x[:2, :1]),
    "scatter, value": lambda x: x.scatter(1, INDEX[:, None], 2.0),
    "scatter_add": lambda x: zeros(3, 4).scatter_add(0, INDEX[:, None].expand(3, 4), x),
    "scatter_reduce": lambda x: x.scatter_reduce(0, INDEX[:, None].expand(3, 4), x, "sum"),
    "index_add": lambda x: x.index_add(0, INDEX, x, alpha=0.5),
    "index_copy": lambda x: x.index_copy(0, INDEX[:2], x[1:]),
    "index_fill": lambda x: x.index_fill(1, INDEX, 5.0),
    "index_put, add": lambda x: x.index_put((INDEX,), x[0], accumulate=True),
    "index_put": lambda x: x.index_put((INDEX[:2], INDEX[:2]), torch.tensor(2.0, dtype=F64)),
    "select_scatter": lambda x: x.select_scatter(x[0], 0, 1),
    "slice_scatter": lambda x: x.slice_scatter(x[:1], 0, 1, 2),
    "diagonal_scatter": lambda x: x.diagonal_scatter(x[0, :3]),
    "permute": lambda x: x.permute(1, 0).reshape(-1),
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(),
    "split": lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1),
    "chunk": lambda x: x.chunk(2, 1)[0],
    "unbind": lambda x: x.unbind(0)[1],
    "expand": lambda x: x[:1].expand(2, 3, 4),
    "unflatten": lambda x: x.unflatten(1, (2, 2)).flatten(),
    "movedim": lambda x: x.movedim(0, 1),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "as_strided": lambda x: x.as_strided((2, 2), (4, 1), 1),
    "meshgrid": lambda x: torch.stack(torch.meshgrid(x[0], x[1], indexing="ij")),
    "diff": torch.diff,
    "trapezoid": torch.trapezoid,
    "gradient": lambda x: torch.gradient(x[0])[0],
    "vander": lambda x: torch.linalg.vander(x[0], N=3),
    "isclose": lambda x: torch.isclose(x, x) * x,
    "vmap": lambda x: torch.func.vmap(lambda a: a.sin() * a.sum())(x),
    "jacrev": lambda x: torch.func.jacrev(lambda a: a.sin() * a.sum())(x[0]),
    "jvp": lambda x: torch.func.jvp(lambda a: a.tanh() * a.sum(), (x,), (x * 2,))[1],
    "hessian": lambda x: torch.func.hessian(lambda a: (a**3).sum() * a[0])(x[0]),
}


def fitted(f: Op) -> Op:
    """``f`` with its result added up to the size of its argument, each entry with a weight."""

    def g(t: Tensor, u: Tensor) -> Tensor:
        y = f(u).reshape(-1)
        rows = -(-y.numel() // u.numel())
        y = torch.cat([y, y.new_zeros(rows * u.numel() - y.numel())]).view(rows, -1)
        return (y * torch.arange(1.0, rows + 1, dtype=u.dtype)[:, None]).sum(0).view(u.shape)

    return g


@pytest.mark.parametrize("name", ARRAYS)
def test_operations_on_arrays(name):
    u = torch.tensor(
        [[0.7, 0.0, -1.2, 0.4], [1.1, 0.3, -0.6, -0.6], [0.2, -0.9, 1.6, 0.8]], dtype=F64
    )  # with a zero and a tie
    agree(fitted(ARRAYS[name]), u, 1e-11)


def test_beta_zero_ignores_nan():
    u = torch.ones(2, 2, dtype=F64)
    tr = traced(lambda t, u: torch.addmm(u * NAN, u, u, beta=0), u)
    assert value(tr, u).tolist() == [2.0] * 4


@pytest.mark.parametrize("op", [torch.amax, torch.amin, torch.logsumexp, lambda x, d: x.max(d)[0]])
@pytest.mark.parametrize("point", [NAN, INF, -INF])
def test_reductions_of_what_is_not_finite(op, point):
    u = torch.tensor([[0.5, point, 1.0], [point, point, point]], dtype=F64)
    tr = traced(lambda t, u: op(u, 1)[:, None].expand(2, 3) * 1.0, u)
    np.testing.assert_array_equal(value(tr, u), op(u, 1)[:, None].expand(2, 3).numpy().ravel())


@pytest.mark.parametrize(
    "name", [*sorted({*_ACTIVATIONS} - COARSE), "tanh", "sigmoid", "relu", "gelu, tanh"]
)
def test_backward_operations(name):
    """``f`` that takes the gradient of an activation itself."""
    op = UNARY[name]

    def f(t: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            x = u * 1.0 if u.requires_grad else u.clone().requires_grad_()
            return torch.autograd.grad((op(x) * x).sum(), x, create_graph=True)[0]

    u = torch.tensor([0.3, -0.8, 2.4, -3.5, 7.0, -25.0, 0.45], dtype=F64)
    agree(f, u, 1e-10)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "layer_norm", "group_norm", "unfold"])
def test_backward_operations_on_arrays(name):
    op = ARRAYS[name]

    def f(t: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            x = u * 1.0 if u.requires_grad else u.clone().requires_grad_()
            y = op(x)
            return torch.autograd.grad((y.sin() * y).sum(), x, create_graph=True)[0]

    u = torch.linspace(-1, 1.3, 12, dtype=F64).view(3, 4) ** 2
    agree(f, u, 1e-10)
