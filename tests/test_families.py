"""What kernels are made of: the files whose change builds them again."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import diffsolve
from diffsolve.engines.native.runtime import kernels
from diffsolve.solvers.explicit_rk.native import FAMILY as EXPLICIT_RK
from diffsolve.solvers.kernels.family import Family, KernelSet
from diffsolve.solvers.rosenbrock.native import FAMILY as ROSENBROCK
from diffsolve.solvers.sdirk.native import FAMILY as SDIRK
from diffsolve.solvers.stochastic.native import FAMILY as STOCHASTIC
from diffsolve.solvers.stochastic.noise.native import NOISE

PACKAGE = Path(diffsolve.__file__).parent
SETS = (EXPLICIT_RK, ROSENBROCK, SDIRK, STOCHASTIC, NOISE)
SHARED = {"layout", "memory"}
OF_STEPS = SHARED | {"norms", "rows", "estimates", "stable_steps"}
OF_IMPLICIT = OF_STEPS | {"linear", "implicit"}
LOOPS = {"engines.native.runtime.loop", "engines.native.runtime.sweep"}
#: Of each what it cannot do without, under ``solvers/kernels/`` and elsewhere.
LEAST = {
    EXPLICIT_RK: (OF_STEPS, LOOPS | {"solvers.explicit_rk.kernel"}),
    ROSENBROCK: (OF_IMPLICIT, LOOPS | {"solvers.rosenbrock.kernel"}),
    SDIRK: (OF_IMPLICIT, LOOPS | {"solvers.sdirk.kernel"}),
    STOCHASTIC: (OF_STEPS, LOOPS | {"solvers.stochastic.kernel"}),
    NOISE: (
        SHARED,
        {"solvers.stochastic.noise.kernel", "solvers.stochastic.noise.kernel_bridges"},
    ),
}


def file_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere, as Python's grammar has it."""
    found = set()
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return {name for name in found if name.startswith("diffsolve.") and file_of(name).exists()}


def reachable(*modules: str) -> set[str]:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imports(module)
    return found


def is_compiled(module: str) -> bool:
    """Whether a module holds functions that Numba compiles."""
    decorators = {"inlined", "_always", "intrinsic"}
    tree = ast.parse(file_of(module).read_text())
    functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    return any(
        isinstance(d, ast.Name) and d.id in decorators for f in functions for d in f.decorator_list
    )


@pytest.mark.parametrize("kernel_set", SETS, ids=lambda x: x.name)
def test_no_source_is_forgotten(kernel_set: KernelSet) -> None:
    roots = [kernel_set.root, *(kernels.LOOPS if isinstance(kernel_set, Family) else ())]
    expected = reachable(*roots) | {"diffsolve.engines.native.runtime.build"}
    assert set(kernels.sources(kernel_set)) == expected
    shared, others = LEAST[kernel_set]
    least = {f"diffsolve.solvers.kernels.{name}" for name in shared}
    assert least | {f"diffsolve.{name}" for name in others} <= expected


def test_a_change_of_a_source_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in kernels.sources(ROSENBROCK):
        text = kernels._text(module)
        before = kernels._source.__wrapped__(ROSENBROCK)
        with monkeypatch.context() as patch:
            changed = {module: text + "# a change\n"}
            patch.setattr(kernels, "_text", lambda x, c=changed: c.get(x) or file_of(x).read_text())
            assert kernels._source.__wrapped__(ROSENBROCK) != before


def test_the_builder_uses_the_loops_and_no_other_kernels() -> None:
    used = {x for x in imports("diffsolve.engines.native.runtime.build") if is_compiled(x)}
    assert used == set(kernels.LOOPS)


def test_pyright_leaves_out_what_numba_compiles() -> None:
    sources = {name for kernel_set in SETS for name in kernels.sources(kernel_set)}
    compiled = {str(file_of(x).relative_to(PACKAGE.parent)) for x in sources if is_compiled(x)}
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    assert set(settings["tool"]["pyright"]["ignore"]) == compiled


def test_families_are_known_without_numba() -> None:
    lines = [f"import {x.root.rsplit('.', 1)[0]}.native" for x in SETS]
    code = ["import sys", *lines, "assert not {'numba', 'llvmlite'} & sys.modules.keys()"]
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True, timeout=120)


@pytest.mark.parametrize("kernel_set", SETS, ids=lambda x: x.name)
def test_each_has_its_functions(kernel_set: KernelSet) -> None:
    if isinstance(kernel_set, Family):
        assert all(callable(x) for x in kernel_set.functions())
    else:
        assert all(callable(x) for x in kernel_set.kernels().values()) and kernel_set.kernels()
