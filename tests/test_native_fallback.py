"""Right-hand sides and machines on which the native engine gives up, and says so."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsolve import ODEProblem, Tsit5, solve
from diffsolve.engines.native.programs import scalar as compiled_module
from diffsolve.engines.native.runtime import kernels

F64 = torch.float64


@pytest.mark.parametrize("where", ["kernels", "compiled"])
def test_what_cannot_be_built_falls_back_to_torch(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("no such thing as Numba")

    if where == "kernels":
        original = kernels.llvm.cached_code

        def nothing_is_cached(content: str, make: Any, *args: Any, **options: Any) -> Any:
            if content.startswith("advance"):
                return make()
            return original(content, make, *args, **options)

        monkeypatch.setattr(kernels.llvm, "cached_code", nothing_is_cached)
        monkeypatch.setitem(sys.modules, "diffsolve.engines.native.runtime.build", None)
        kernels.kernel.cache_clear()
    else:
        monkeypatch.setattr(compiled_module, "compile_function", fails)
    prob = ODEProblem(lambda t, u: -1.2345 * u, torch.ones(1, dtype=F64), (0.0, 1.0))
    try:
        sol = solve(prob, Tsit5())
        assert sol.stats.engine.startswith("torch, because native declined")
        assert "ImportError" in sol.stats.engine or "ModuleNotFoundError" in sol.stats.engine
        with pytest.raises(ValueError, match="could not"):
            solve(prob, Tsit5(), engine="native")
    finally:
        kernels.kernel.cache_clear()


@pytest.mark.parametrize("engine", ["auto", "native"])
def test_numbers_that_python_draws_are_no_constants(engine: str) -> None:
    prob = ODEProblem(lambda t, u: -random.random() * u, torch.ones(1, dtype=F64), (0.0, 1.0))
    if engine == "native":
        with pytest.raises(ValueError, match="other values at each evaluation"):
            solve(prob, Tsit5(), engine=engine)
        return
    for _ in range(2):
        assert "other values at each evaluation" in solve(prob, Tsit5()).stats.engine


def test_cancellation_is_not_taken_for_random_numbers() -> None:
    # at an equilibrium nothing but rounding is left of the derivative
    p = torch.tensor([0.1, 0.3, 0.7], dtype=F64)
    u0 = torch.tensor([1.0, 3.0], dtype=F64) / 7

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return (p * u[0]).sum() * u - (u * p[0] * u[0] + u * (p[1] + p[2]) * u[0])

    for _ in range(3):
        assert solve(ODEProblem(f, u0, (0.0, 1.0), p), Tsit5()).stats.engine == "native"


class _NotToBeLookedInto:
    __slots__ = ()

    @property
    def __dict__(self) -> Any:
        raise RuntimeError("no looking")

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        return -u


def test_an_f_that_cannot_be_looked_into() -> None:
    """Torch runs it: without gradients, nothing else has to look."""
    prob = ODEProblem(_NotToBeLookedInto(), torch.ones(2, dtype=torch.float64), (0.0, 1.0))
    with torch.no_grad():
        sol = solve(prob, Tsit5())
        assert "f raised RuntimeError: no looking" in sol.stats.engine
        torch.testing.assert_close(sol.u[-1], torch.exp(-sol.t[-1]).expand(2), rtol=1e-2, atol=0)
        with pytest.raises(ValueError, match="no looking"):
            solve(prob, Tsit5(), engine="native")
