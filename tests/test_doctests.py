"""The examples in docstrings run, and print what is said there."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import diffsolve

ROOT = Path(__file__).parents[1]
#: What an example may use without an import.
NAMES = {name: getattr(diffsolve, name) for name in diffsolve.__all__} | {"torch": torch}
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def _with_examples() -> list[Path]:
    paths = sorted((ROOT / "diffsolve").rglob("*.py"))
    return [path for path in paths if ">>>" in path.read_text(encoding="utf-8")]


def _examples() -> list[doctest.DocTest]:
    finder, found = doctest.DocTestFinder(), []
    for path in _with_examples():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found += finder.find(importlib.import_module(name), name)
    return [example for example in found if example.examples]


EXAMPLES = _examples()


def test_every_example_is_found() -> None:
    written = sum(path.read_text(encoding="utf-8").count(">>>") for path in _with_examples())
    assert written == sum(len(example.examples) for example in EXAMPLES) >= 25


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda x: x.name)
def test_example(example: doctest.DocTest) -> None:
    example.globs = NAMES | {"__name__": example.name}
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=told.append)
    assert result.failed == 0, "".join(told)
