"""The layers of the package: who imports whom, read from the source, and the figure of it.

``python docs/layers.py`` writes the figure into architecture.md (``make docs-figures``).
``tests/test_layers.py`` checks the imports against the table of layers there. Nothing of the
package is imported: its files are parsed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "diffsolve"
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- figure of the layers: begin -->", "<!-- figure of the layers: end -->"

Graph = Mapping[str, frozenset[str]]


@cache
def modules() -> dict[str, Path]:
    """The modules of the package by name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> Graph:
    """The modules that each module imports: at its top, inside of functions, and for types only."""
    return {name: frozenset(_imported(path)) for name, path in modules().items()}


def _imported(path: Path) -> Iterator[str]:
    known = modules()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module in known:
                    yield node.module


@cache
def layers() -> tuple[tuple[str, ...], ...]:
    """The files and folders that the rows of the table in architecture.md name, from the top."""
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Layers\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return tuple(tuple(re.findall(r"`([^`]+)`", row)) for row in rows)


def entry_of(module: str) -> str | None:
    """The file or folder of the table that holds a module: of several, the innermost."""
    path = str(modules()[module].relative_to(ROOT / PACKAGE).as_posix())
    entries = [x for row in layers() for x in row]
    holding = [x for x in entries if path == x or (x.endswith("/") and path.startswith(x))]
    return max(holding, key=len, default=None)


def layer_of(module: str) -> int | None:
    """The number of a module's row in the table, counted from the top."""
    entry = entry_of(module)
    return next((i for i, row in enumerate(layers()) if entry in row), None)


def circles(graph: Graph) -> list[set[str]]:
    """The sets of modules that import each other, directly or through others of the set."""
    reached = {name: _reachable(graph, name) for name in graph}
    found: list[set[str]] = []
    for name in graph:
        if name in reached[name] and not any(name in circle for circle in found):
            found.append({other for other in reached[name] if name in reached[other]})
    return found


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()]:
            if name not in seen:
                seen.add(name)
                waiting.append(name)
    return seen


# -- the figure ----------------------------------------------------------------------------------


def figure() -> str:
    """A Mermaid diagram: a box for each entry of the table, arrows for imports between them.

    An arrow is left out where a longer way leads to the same box.
    """
    direct: dict[str, set[str]] = {x: set() for row in layers() for x in row}
    for module, imported in imports().items():
        for other in imported:
            a, b = layer_of(module), layer_of(other)
            if a is not None and b is not None and a <= b:
                direct[entry_of(module) or ""].add(entry_of(other) or "")
    graph = {name: frozenset(others - {name}) for name, others in direct.items()}
    boxes = [name for row in layers() for name in row]
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {_identifier(name)}["{name}"]' for name in boxes]
    for name in boxes:
        implied = set().union(*(_reachable(graph, other) for other in graph[name]))
        for other in boxes:
            if other in graph[name] and other not in implied:
                lines.append(f"    {_identifier(name)} --> {_identifier(other)}")
    return "\n".join([*lines, "```"])


def _identifier(name: str) -> str:
    return re.sub(r"\W+", "_", name.removesuffix(".py")).strip("_")


def with_figure(text: str) -> str:
    """The document with the figure of today between its markers."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{figure()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_figure(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the figure of the layers into {DOCUMENT.relative_to(ROOT)}")
