"""The structure of the package is the one that docs/architecture.md tells.

The source is parsed, not imported. ``docs/layers.py`` reads the imports and the table of layers.
"""

import ast
import tomllib
from collections.abc import Iterator
from typing import Any

import layers

FAMILIES = "solvers/explicit_rk/", "solvers/rosenbrock/", "solvers/sdirk/", "solvers/stochastic/"
MOST_LINES = 500  # of a file
MOST_LINES_OF_FUNCTION = 60  # without its docstring
LONGEST = ("solve.py", "solve")  # half of it are its arguments


def _points_up(module: str, imported: str) -> bool:
    """Whether an import goes to a layer above, or from one family of methods to another."""
    if module == layers.PACKAGE:  # it gathers the public names of all layers
        return False
    a, b = layers.layer_of(module), layers.layer_of(imported)
    if a is None or b is None or b < a:
        return True
    ours, theirs = layers.entry_of(module), layers.entry_of(imported)
    return ours != theirs and ours in FAMILIES and theirs in FAMILIES


def _all_imports() -> Iterator[tuple[str, str]]:
    for module, imported in sorted(layers.imports().items()):
        for other in sorted(imported):
            yield module, other


def test_every_module_has_a_layer() -> None:
    lost = [x for x in layers.modules() if "." in x and layers.entry_of(x) is None]
    assert not [x for x in lost if layers.modules()[x].name != "__init__.py"], (
        "name them in the table of docs/architecture.md"
    )


def test_every_entry_of_the_table_exists() -> None:
    entries = [x for row in layers.layers() for x in row]
    assert len(entries) == len(set(entries)) >= 15
    for entry in entries:
        path = layers.ROOT / layers.PACKAGE / entry
        assert path.is_dir() if entry.endswith("/") else path.is_file(), entry


def test_imports_point_down_the_table() -> None:
    wrong = [x for x in _all_imports() if _points_up(*x)]
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    assert layers.circles(layers.imports()) == []


def test_the_figure_is_that_of_the_code() -> None:
    text = layers.DOCUMENT.read_text(encoding="utf-8")
    is_current = text == layers.with_figure(text)
    assert is_current, "run `make docs-figures`"


def test_files_are_short() -> None:
    sizes = {
        str(path.relative_to(layers.ROOT / layers.PACKAGE)): len(path.read_text().splitlines())
        for path in layers.modules().values()
    }
    long = sorted(name for name, size in sizes.items() if size > MOST_LINES)
    assert long == []


def test_test_files_are_short() -> None:
    paths = (layers.ROOT / "tests").glob("*.py")
    assert not [x.name for x in paths if len(x.read_text().splitlines()) > MOST_LINES]


def _settings() -> dict[str, Any]:
    return tomllib.loads((layers.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


def test_kernels_are_left_out_alike() -> None:
    settings = _settings()
    assert settings["pyright"]["ignore"] == settings["coverage"]["run"]["omit"]


def _long_functions() -> Iterator[tuple[str, str]]:
    kernels = {layers.ROOT / x for x in _settings()["pyright"]["ignore"]}
    for path in layers.modules().values():
        if path in kernels:  # a kernel is a loop over numbers, which gains nothing from pieces
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and _lines_of(node) > MOST_LINES_OF_FUNCTION:
                yield str(path.relative_to(layers.ROOT / layers.PACKAGE)), node.name


def _lines_of(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_functions_are_short() -> None:
    assert sorted(_long_functions()) == [LONGEST]
