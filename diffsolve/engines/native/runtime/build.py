"""The kernels as LLVM IR that stands alone: from Numba, but it needs neither Numba nor Python.

Done once on a machine, and kept in the cache on disk with the compiled right-hand sides; after
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
from diffsolve.engines.native.runtime.loop import advance
from diffsolve.engines.native.runtime.saving import read
from diffsolve.engines.native.runtime.sweep import replay, sweep
from diffsolve.solvers.kernels.family import Family, KernelSet

_ARGUMENTS = (types.CPointer(types.int64), types.CPointer(types.float64))
#: What is left for the linker: the mathematical library and the compiler's own helpers.
_OUTSIDE = re.compile(
    r"llvm\.|mem(cpy|set|move)$|(pow|exp|log|sqrt|atan|hypot|nextafter|tan|fmod)f?$"
)


#: Loops ``(I, R, F, like)`` over the steps of any family.
LOOPS = {"advance": advance, "sweep": sweep, "read": read, "replay": replay}


def _entry(name: str, kernels: KernelSet, like: Any) -> Any:
    """The function of two arrays that is compiled."""
    own = kernels.kernels().get(name)
    if own is not None:
        return lambda I, R: own(I, R, like)
    assert isinstance(kernels, Family)
    loop, functions = LOOPS[name], kernels.functions()
    return lambda I, R: loop(I, R, functions, like)


def kernel_ir(name: str, kernels: KernelSet, is_float32: bool) -> str:
    """IR of ``int64 {name}(int64*, double*)``; the placeholder stands for the function's name.

    Parameters
    ----------
    name
        One of ``LOOPS``, or a kernel that ``kernels`` has itself.
    kernels
        Usually a family of methods.
    is_float32
        Whether states are float32 rather than float64.
    """
    entry = _entry(name, kernels, np.float32(0.0) if is_float32 else np.float64(0.0))
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
    _drop_unused(module, kernels.has_long_loops)
    strange = [f.name for f in module.functions if f.is_declaration and not _OUTSIDE.match(f.name)]
    if strange:
        raise RuntimeError(f"the kernel {name} needs {strange} of Numba at run time")
    return str(module).replace("plain_kernel", "{name}")


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
