"""Code for many rows: elementary functions of vectors, and functions of ragged batches."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from diffsolve.engines.native.codegen import llvm, vector_math
from diffsolve.engines.native.codegen.llvm import Output
from diffsolve.engines.native.codegen.row_functions import TooWide, compile_rows
from diffsolve.engines.native.codegen.rows import Array, Call, Routine
from diffsolve.engines.native.graph.derivative import vjp
from diffsolve.engines.native.graph.expression import Pool

FUNCTIONS = ["exp", "expm1", "tanh", "log", "log1p", "sin", "cos"]
LANES = [1, 2, 4, 8]
SPECIAL = [
    0.0, -0.0, math.inf, -math.inf, math.nan, 1e-310, 1e308, -1e308, 1.0, -1.0, 709.7, 710.0,
    -745.0, -746.0, 800.0, -2.0, 1e7,
]  # fmt: skip


def vector_function(op: str, lanes: int, single: bool = False) -> Any:
    """One of the functions for an array whose length is a multiple of ``lanes``."""
    kind, library = ("float", op + "f") if single else ("double", op)
    vector, name = f"<{lanes} x {kind}>", vector_math.function_name(op, single)
    text = f"""define void @{{name}}(ptr %x, ptr %y, i64 %n) #0 {{
entry:
br label %loop
loop:
%i = phi i64 [0, %entry], [%j, %loop]
%a = getelementptr {vector}, ptr %x, i64 %i
%b = getelementptr {vector}, ptr %y, i64 %i
%v = load {vector}, ptr %a, align 4
%r = call {vector} @{name}({vector} %v)
store {vector} %r, ptr %b, align 4
%j = add i64 %i, 1
%more = icmp ult i64 %j, %n
br i1 %more, label %loop, label %end
end:
ret void
}}
"""
    parts = [text, *vector_math.definitions(op, 1, library, lanes, single)]
    parts.append(
        "attributes #0 = { nounwind }\nattributes #1 = { nounwind }\nattributes #2 = { nounwind }"
    )
    whole = "\n".join(parts)
    code = llvm.cached_code(whole, lambda: whole, True)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
        code.address
    )

    def call(x: np.ndarray) -> np.ndarray:
        assert code.address
        dtype = np.float32 if single else np.float64
        padded = np.zeros(-(-len(x) // lanes) * lanes, dtype)
        padded[: len(x)] = x
        y = np.empty_like(padded)
        function(padded.ctypes.data, y.ctypes.data, len(padded) // lanes)
        return y[: len(x)]

    return call


def points(op: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    if op in ("log", "log1p"):
        near = np.abs(x) * 1e-9 if op == "log1p" else 1 + x * 1e-9
        return np.concatenate([np.exp(100 * x), np.abs(x), near, 5e-324 * np.arange(1, 20)])
    if op in ("sin", "cos"):
        beside = np.arange(-50, 50) * (math.pi / 2)
        return np.concatenate([x, 100 * x, 1e5 * x, 1e-9 * x, beside, 1e8 * x])
    return np.concatenate([x, 20 * x, 300 * x, 1e-9 * x, 0.3 * x])


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_functions_of_vectors_are_right_to_the_last_digits(op, lanes):
    x = points(op)
    y = vector_function(op, lanes)(x)
    worst = 0.0
    with mpmath.workprec(120):
        exact = getattr(mpmath, op)
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            value = exact(mpmath.mpf(a))
            rounded = float(value)
            if not math.isfinite(rounded) or rounded == 0:
                assert b == rounded
                continue
            worst = max(worst, float(abs(mpmath.mpf(b) - value) / math.ulp(rounded)))
    assert worst < 2.6


@pytest.mark.parametrize("op", FUNCTIONS)
def test_special_values_are_those_of_the_library(op):
    x = np.array(SPECIAL)
    with np.errstate(all="ignore"):
        expected = getattr(np, op)(x)
    got = vector_function(op, 8)(x)
    np.testing.assert_allclose(got, expected, rtol=5e-16, atol=5e-324)
    assert (np.signbit(got) == np.signbit(expected))[~np.isnan(expected)].all()


@pytest.mark.parametrize("op", FUNCTIONS)
def test_single_precision_is_rounded_from_double(op):
    with np.errstate(over="ignore"):
        x = points(op).astype(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) > 1e-30)]
    with np.errstate(all="ignore"):
        expected = getattr(np, op)(x.astype(np.float64)).astype(np.float32)
    assert (vector_function(op, 8, single=True)(x) == expected).mean() > 0.999


def test_a_function_without_a_form_for_vectors_goes_to_the_library():
    x = np.linspace(-3, 3, 16)
    got = vector_function("erf", 4)(x)
    np.testing.assert_array_equal(got, [math.erf(t) for t in x])


# -- functions of rows -----------------------------------------------------------------------------


def arguments(rows: int, p: torch.Tensor) -> tuple[np.ndarray, int]:
    """The parameters behind the number of rows, and their address."""
    numbers = p.numpy()
    head = 8 // numbers.itemsize
    whole = np.empty(head + len(numbers), numbers.dtype)
    whole[:head].view(np.int64)[0] = rows
    whole[head:] = numbers
    return whole, whole.ctypes.data + 8


def nodes_of(pool: Pool, d: int) -> tuple[list[Any], list[Any], list[Any]]:
    """One row: entries that are coupled, functions, a comparison, and what no row moves."""
    u, p = list(pool.inputs("u", d)), list(pool.inputs("p", 2))
    shared = pool.unary("exp", p[0]) / p[1]
    out = []
    for a, b in zip(u, [*u[1:], u[0]], strict=True):
        kept = pool.where(pool.binary("gt", a, 0.25), a, a * b)
        out.append(shared * pool.unary("tanh", kept) + pool.unary("sin", a) - p[1] * b)
    return u, p, out


def expected(u: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    turned = u.roll(-1, -1)
    kept = torch.where(u > 0.25, u, u * turned)
    return p[0].exp() / p[1] * torch.tanh(kept) + torch.sin(u) - p[1] * turned


def batch(rows: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows + d)
    return torch.randn(rows, d, dtype=dtype), torch.tensor([0.3, 1.7], dtype=dtype)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("d", [1, 2, 3, 9])
def test_rows_of_any_number_and_width(d, lanes, single):
    dtype = torch.float32 if single else torch.float64
    pool = Pool(np.float32 if single else np.float64)
    _, _, out = nodes_of(pool, d)
    arrays = Array("u", "in", d), Array("p", "shared"), Array("out", "out", d)
    routine = Routine("f", ("t",), arrays, [Output("out", i, y) for i, y in enumerate(out)])
    code = compile_rows(routine, lanes, single)
    number = ctypes.c_float if single else ctypes.c_double
    function = ctypes.CFUNCTYPE(None, number, *[ctypes.c_void_p] * 3)(code.address)
    for rows in (1, 2, 7, 8, 9, 16, 21):
        u, p = batch(rows, d, dtype)
        found = torch.full((rows + 1, d), 7.0, dtype=dtype)  # the last row is not to be written
        kept, place = arguments(rows, p)
        function(0.0, u.data_ptr(), place, found.data_ptr())
        assert len(kept)
        torch.testing.assert_close(found[:-1], expected(u, p))
        assert bool((found[-1] == 7.0).all())


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("copies", [1, 20])
def test_sums_over_rows_leave_out_what_is_not_there(d, lanes, copies):
    """Products with the Jacobian, with few sums in registers and with many in memory."""
    pool = Pool(np.float64)
    u, p, out = nodes_of(pool, d)
    w = list(pool.inputs("w", d))
    bars = vjp(out, w, [*u, *p])
    statements: list[Any] = [Output("u_bar", i, x) for i, x in enumerate(bars[:d]) if x is not None]
    sums = [x for x in bars[d:] if x is not None] * copies
    statements += [Output("p_bar", i, x, add=True) for i, x in enumerate(sums)]
    statements.append(Output("squares", 0, pool.sum([x * x + 1.0 for x in out])))
    arrays = (
        Array("u", "in", d), Array("p", "shared"), Array("w", "bar", d), Array("u_bar", "out", d),
        Array("p_bar", "lanes", 2 * copies), Array("squares", "sums", 1),
    )  # fmt: skip
    code = compile_rows(Routine("f_vjp", ("t",), arrays, statements), lanes, False)
    function = ctypes.CFUNCTYPE(None, ctypes.c_double, *[ctypes.c_void_p] * 6)(code.address)
    for rows in (1, 5, 8, 13):
        x, q = batch(rows, d, torch.float64)
        weights = torch.randn(rows, d, dtype=torch.float64)
        u_bar = torch.empty(rows, d, dtype=torch.float64)
        p_bar = torch.ones(2 * copies, lanes, dtype=torch.float64)  # it is added to what is there
        squares = torch.empty(1, dtype=torch.float64)
        kept, place = arguments(rows, q)
        pointers = (y.data_ptr() for y in (weights, u_bar, p_bar, squares))
        function(0.0, x.data_ptr(), place, *pointers)
        assert len(kept)
        x.requires_grad_(), q.requires_grad_()
        value = expected(x, q)
        by_x, by_q = torch.autograd.grad(value, (x, q), weights)
        torch.testing.assert_close(u_bar, by_x)
        total = p_bar.sum(1) - lanes
        torch.testing.assert_close(total.view(copies, 2), by_q.expand(copies, 2))
        torch.testing.assert_close(squares[0], (value.detach() ** 2 + 1).sum())


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("terms", [1, 700])
def test_a_routine_calls_another(terms, lanes):
    """Short ones are put in, long ones called; arrays that are there are not copied."""
    pool = Pool(np.float64)
    u, out = list(pool.inputs("u", 2)), []
    for i in range(2):
        x = u[i]
        for k in range(terms):
            x = x * (1.0 + 1e-4 * k) + u[1 - i] * 1e-3
        out.append(x)
    inner = Routine(
        "inner", ("t",), (Array("u", "in", 2), Array("out", "out", 2)),
        [Output("out", i, x) for i, x in enumerate(out)],
    )  # fmt: skip
    first, second = list(pool.inputs("k0", 2)), list(pool.inputs("k1", 2))
    t = pool.input("t", 0)
    outer = Routine(
        "outer", ("t",), (Array("u", "in", 2), Array("p", "shared"), Array("out", "out", 2)),
        [
            Call(inner, [t], [u, "k0"]),
            Call(inner, [t], [[0.5 * x for x in first], "k1"]),
            *(Output("out", i, x + y * t) for i, (x, y) in enumerate(zip(second, u, strict=True))),
        ],
        {"k0": 2, "k1": 2},
    )  # fmt: skip
    code = compile_rows(outer, lanes, False)
    function = ctypes.CFUNCTYPE(None, ctypes.c_double, *[ctypes.c_void_p] * 3)(code.address)
    state = torch.randn(11, 2, dtype=torch.float64)
    found = torch.empty_like(state)
    kept, place = arguments(11, torch.zeros(1, dtype=torch.float64))
    function(0.25, state.data_ptr(), place, found.data_ptr())
    assert len(kept)

    def repeated(x: torch.Tensor) -> torch.Tensor:
        y = x
        for k in range(terms):
            y = y * (1.0 + 1e-4 * k) + x.flip(-1) * 1e-3
        return y

    torch.testing.assert_close(found, repeated(0.5 * repeated(state)) + 0.25 * state)


def test_rows_that_are_too_wide_are_refused():
    pool = Pool(np.float64, 100_000)
    u = list(pool.inputs("u", 5000))
    arrays = Array("u", "in", 5000), Array("p", "shared"), Array("out", "out", 5000)
    routine = Routine("f", ("t",), arrays, [Output("out", i, -x) for i, x in enumerate(u)])
    with pytest.raises(TooWide):
        compile_rows(routine, 8, False)
