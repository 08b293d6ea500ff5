"""Machine code of the reverse passes, made before a solve, so that what cannot be is declined then."""

from __future__ import annotations

from diffsolve.engines.native.field import NativeField
from diffsolve.engines.native.kernels import kernel
from diffsolve.engines.native.method import method_of
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.switching import AutoSwitch


def compile_sweep(native: NativeField, alg: Algorithm) -> None:
    """Make what the reverse sweep through the steps of ``alg`` needs."""
    if isinstance(alg, AutoSwitch):
        alg = alg.nonstiff  # that of the other is made when it takes over
    compiled, active, method = native.compiled, native.active, method_of(alg)
    kernel("sweep", method.family, compiled.single)
    compiled.vjp(active)
    if method.is_implicit:
        compiled.jacobian_vjp(active)
    else:
        compiled.step_vjp(method.stages, active)


def compile_adjoint(native: NativeField, alg: Algorithm, along_path: bool) -> None:
    """Make the adjoint equation, to be solved by ``alg``."""
    if isinstance(alg, AutoSwitch):
        alg = alg.nonstiff
    compiled, active, method = native.compiled, native.active, method_of(alg)
    kernel("advance", method.family, compiled.single)
    (compiled.interpolating if along_path else compiled.backsolve)(active)
    if method.is_implicit:
        compiled.adjoint_jacobian(active, not along_path)
