"""From expressions to machine code: LLVM IR is written, compiled, and loaded.

``function_ir`` writes the IR of a function. ``compile_function`` gives machine code that can be
called, from the cache on disk where the same IR was compiled before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from diffsolve.engines.native.codegen.cache import KERNEL, read, write
from diffsolve.engines.native.codegen.emitter import FIELD, NEVER, Emitter, Output, Signature
from diffsolve.engines.native.codegen.machine import Code, lanes_of, machine
from diffsolve.engines.native.locks import compiling

__all__ = [
    "FIELD",
    "Code",
    "Output",
    "Signature",
    "cached_code",
    "compile_function",
    "function_ir",
    "lanes_of",
    "machine",
]


def function_ir(
    name: str, signature: Signature, outputs: Sequence[Output], is_float32: bool
) -> str:
    """IR of a function that computes the outputs. Its arrays must not overlap.

    Parameters
    ----------
    is_float32
        Whether numbers are float32 rather than float64.
    """
    return Emitter("float" if is_float32 else "double", signature).function(name, outputs)


def compile_function(
    signature: Signature, outputs: Sequence[Output], is_float32: bool, level: int = 2
) -> Code:
    """Machine code of a function that computes the outputs, from the cache if it is there.

    Parameters
    ----------
    level
        Care of LLVM's code generation, 0 to 3.
    """
    text = function_ir("{name}", signature, outputs, is_float32)
    passes = NEVER not in text  # they would join the blocks
    return cached_code(f"{level}\n{text}", lambda: text, passes, level)


def cached_code(
    content: str,
    make_ir: Callable[[], str],
    passes: bool = False,
    level: int = 2,
    is_kernel: bool = False,
) -> Code:
    """Machine code from the cache, or compiled from ``make_ir()``.

    Parameters
    ----------
    content
        Text that tells this code from all other: the same content means the same code.
    make_ir
        Gives the IR, in which the function's name stands as ``{name}``.
    passes
        Whether LLVM simplifies the IR.
    level
        Care of LLVM's code generation, 0 to 3.
    is_kernel
        Whether it is a kernel, which is kept in the cache for longer.
    """
    key = hashlib.sha256(f"{machine().identity}\n{content}".encode()).hexdigest()
    name, file = f"diffsolve_{key[:24]}", key + KERNEL if is_kernel else key
    object_file = read(file)
    if object_file is None:
        object_file = _compiled(make_ir().replace("{name}", name, 1), passes, level)
        write(file, object_file)
    return Code(name, object_file)


def _compiled(text: str, passes: bool, level: int) -> bytes:
    """The object file of some IR."""
    with compiling:
        llvm = machine().llvm
        module = llvm.parse_assembly(text)
        module.verify()
        if passes:
            options = llvm.create_pipeline_tuning_options(speed_level=1)
            options.slp_vectorization = False  # takes seconds on long straight code, for nothing
            options.loop_vectorization = False
            machine().run_passes(module, options, level)
        return machine().target_machine(level).emit_object(module)
