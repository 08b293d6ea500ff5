"""The kernels as LLVM IR that stands alone: from Numba, but it needs neither Numba nor Python.

Done once on a machine, and kept in the cache on disk with the program right-hand sides; after
that the kernels load in milliseconds, and Numba is not imported at all.
"""

from __future__ import annotations

import re
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import cfunc, types
from numba.core import config

from diffsolve.engines.native.codegen.llvm import machine
from diffsolve.engines.native.runtime.loop import advance, polynomial_at, read
from diffsolve.engines.native.runtime.sweep import replay, sweep
from diffsolve.solvers.explicit_rk import kernel as explicit_rk
from diffsolve.solvers.kernels.implicit import measure, reverse_estimates
from diffsolve.solvers.kernels.rows import nothing_to_complete
from diffsolve.solvers.rosenbrock import kernel as rosenbrock
from diffsolve.solvers.sdirk import kernel as sdirk
from diffsolve.solvers.stochastic import kernel as stochastic
from diffsolve.solvers.stochastic.noise import kernel as noise
from diffsolve.solvers.stochastic.noise import kernel_bridges as bridges

_ARGUMENTS = (types.CPointer(types.int64), types.CPointer(types.float64))
#: What is left for the linker: the mathematical library and the compiler's own helpers.
_OUTSIDE = re.compile(
    r"llvm\.|mem(cpy|set|move)$|(pow|exp|log|sqrt|atan|hypot|nextafter|tan|fmod)f?$"
)


def _kernels(family: Any, measure: Any, estimates: Any, complete: Any, reverse_complete: Any):
    """The kernels of a family of methods: loops, and the functions of its steps that they call."""
    step, reverse = family.take_step, (family.recall, estimates, family.reverse_step)
    return {
        "advance": (advance, (step, measure, complete, polynomial_at)),
        "sweep": (sweep, (step, *reverse, complete, reverse_complete)),
        "read": (read, (complete,)),
        "replay": (replay, (step, complete)),
    }


_IMPLICIT = measure, reverse_estimates, nothing_to_complete, nothing_to_complete
_FAMILIES = {
    "explicit_rk": _kernels(
        explicit_rk,
        explicit_rk.measure,
        explicit_rk.reverse_estimates,
        explicit_rk.add_extra_stages,
        explicit_rk.reverse_extra_stages,
    ),
    "rosenbrock": _kernels(rosenbrock, *_IMPLICIT),
    "sdirk": _kernels(sdirk, *_IMPLICIT),
    "stochastic": {
        "advance": (
            advance,
            (stochastic.take_step, stochastic.measure, nothing_to_complete, stochastic.value_at),
        ),
        "sweep": (stochastic.sweep, ()),
    },
    "stochastic/noise": {
        "draw": (noise.draw, ()),
        "bridge": (bridges.bridge, ()),
        "tree": (bridges.tree, ()),
    },
}
#: Families whose loops are over many numbers, and written to be made of vectors.
_VECTORISED = {"stochastic/noise"}


def kernel_ir(name: str, family: str, single: bool) -> str:
    """IR of ``int64 {name}(int64*, double*)``; the placeholder stands for the function's name.

    Parameters
    ----------
    name
        ``"advance"``, ``"sweep"``, ``"read"`` or ``"replay"``.
    family
        Of methods: the name of its folder.
    single
        Whether states are float32 rather than float64.
    """
    kernel, parts = _FAMILIES[family][name]
    like = np.float32(0.0) if single else np.float64(0.0)
    entry = _ENTRIES[len(parts)](kernel, *parts, like)

    optimise: Any = config.OPT  # type: ignore[attr-defined]
    config.OPT = type(optimise)(0)  # type: ignore[attr-defined]  # done below, and once
    try:
        options: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
        program = cfunc(types.int64(*_ARGUMENTS), **options)(entry)
    finally:
        config.OPT = optimise  # type: ignore[attr-defined]
    wrapper = program.native_name
    inner = wrapper.removeprefix("cfunc.")
    module = llvm.parse_assembly(program.inspect_llvm())
    module.link_in(llvm.parse_assembly(_plain_call(inner)))
    for function in module.functions:
        if not function.is_declaration and function.name != "plain_kernel":
            function.linkage = llvm.Linkage.internal
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = llvm.Linkage.internal
    _drop_unused(module, family in _VECTORISED)
    strange = [f.name for f in module.functions if f.is_declaration and not _OUTSIDE.match(f.name)]
    if strange:
        raise RuntimeError(f"the kernel {name} needs {strange} of Numba at run time")
    return str(module).replace("plain_kernel", "{name}")


# Numba must see each function by itself: a tuple of them would be called through pointers.
def _entry_of_none(kernel: Any, like: Any) -> Any:
    return lambda I, R: kernel(I, R, like)


def _entry_of_one(kernel: Any, a: Any, like: Any) -> Any:
    return lambda I, R: kernel(I, R, a, like)


def _entry_of_two(kernel: Any, a: Any, b: Any, like: Any) -> Any:
    return lambda I, R: kernel(I, R, a, b, like)


def _entry_of_three(kernel: Any, a: Any, b: Any, c: Any, like: Any) -> Any:
    return lambda I, R: kernel(I, R, a, b, c, like)


def _entry_of_four(kernel: Any, a: Any, b: Any, c: Any, d: Any, like: Any) -> Any:
    return lambda I, R: kernel(I, R, a, b, c, d, like)


def _entry_of_six(kernel: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, like: Any) -> Any:
    return lambda I, R: kernel(I, R, a, b, c, d, e, f, like)


_ENTRIES = {
    0: _entry_of_none,
    1: _entry_of_one,
    2: _entry_of_two,
    3: _entry_of_three,
    4: _entry_of_four,
    6: _entry_of_six,
}


def _plain_call(inner: str) -> str:
    """A function without Numba's conventions: no exceptions, the result returned."""
    return f'''
declare i32 @"{inner}"(ptr, ptr, ptr, ptr)
define i64 @plain_kernel(ptr %integers, ptr %reals) {{
  %result = alloca i64
  %problem = alloca ptr
  %status = call i32 @"{inner}"(ptr %result, ptr %problem, ptr %integers, ptr %reals)
  %value = load i64, ptr %result
  ret i64 %value
}}
'''


def _drop_unused(module: Any, vectorised: bool) -> None:
    """Inline, and drop what nothing calls: Numba's wrappers and error paths."""
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # loops over two or three numbers get slower by it; long ones are unrolled by hand
    options.loop_vectorization = vectorised
    options.slp_vectorization = True
    machine().run_passes(module, options)
