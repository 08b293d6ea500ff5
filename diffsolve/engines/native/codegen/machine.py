"""The processor at hand as LLVM sees it, and machine code that is loaded."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from typing import Any

from diffsolve.engines.native.locks import compiling

#: Raised by one whenever other machine code is made of the same IR.
_FORMAT = 1


class Machine:
    """The processor at hand, as LLVM sees it; made when code is first compiled."""

    def __init__(self) -> None:
        import llvmlite
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self.llvm = llvm
        self.cpu = llvm.get_host_cpu_name()
        self.features = llvm.get_host_cpu_features().flatten()
        self.target = llvm.Target.from_default_triple()
        self.linker = Linker(self)
        version = ".".join(map(str, llvm.llvm_version_info))
        self.identity = f"{_FORMAT} {llvmlite.__version__} {version} {self.cpu} {self.features}"

    def target_machine(self, level: int) -> Any:
        return self.target.create_target_machine(
            cpu=self.cpu, features=self.features, opt=level, reloc="pic", jit=True
        )

    def run_passes(self, module: Any, options: Any, level: int = 2) -> None:
        """Simplify a module, by LLVM's pipeline with these options."""
        builder = self.llvm.create_pass_builder(self.target_machine(level), options)
        passes = builder.getModulePassManager()
        passes.run(module, builder)
        # llvmlite's own method is hidden by an empty one of a base class, and 50 kB would be lost
        if type(passes)._dispose is self.llvm.ffi.ObjectRef._dispose:
            self.llvm.newpassmanagers.NewPassManager._dispose(passes)


@functools.cache
def _machine() -> Machine:
    return Machine()


def machine() -> Any:
    with compiling:
        return _machine()


class Linker:
    """Loads object files.

    An LLVM linker keeps some memory and the name of each library, also after the library is
    unloaded. So there is a new linker after ``most`` libraries. An old one lives as long as code
    that it loaded.
    """

    most = 32  # libraries

    def __init__(self, machine: Machine):
        self._machine, self._count = machine, self.most

    def load(self, name: str, object_file: bytes) -> tuple[Any, Any]:
        """The library, and the linker that it needs."""
        llvm = self._machine.llvm
        while _unused:
            library, _linker = _unused.popleft()
            library.close()
        if self._count == self.most:
            self.jit = llvm.create_lljit_compiler(self._machine.target_machine(2))
            self._count = 0
        self._count += 1
        builder = llvm.JITLibraryBuilder().add_object_img(object_file)
        builder = builder.export_symbol(name).add_current_process()
        return builder.link(self.jit, f"{name}_{self._count}"), self.jit


#: Libraries to unload, with their linkers. The next load unloads them: a finalizer runs in any
#: thread at any time, and must not wait for a lock.
_unused: deque[tuple[Any, Any]] = deque()


class Code:
    """Machine code, loaded as long as this object lives.

    Attributes
    ----------
    address
        Of the function.
    """

    def __init__(self, name: str, object_file: bytes):
        self.name = name
        with compiling:
            library, linker = machine().linker.load(name, object_file)
        self.address = int(library[name])
        # not at exit: a thread may be running it
        weakref.finalize(self, _unused.append, (library, linker)).atexit = False


def lanes_of(is_float32: bool) -> int:
    """How many numbers a vector has: as many as a register of the processor, at least four."""
    wide = 8 if "+avx512f" in machine().features and "+avx512dq" in machine().features else 4
    return 2 * wide if is_float32 else wide
