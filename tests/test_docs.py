"""The code of README.md and of the pages in docs/ runs, and prints what is said there."""

import doctest
import linecache
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from diffsolve.nn import NeuralODE

ROOT = Path(__file__).parents[1]
#: A fenced block: its language and what is in it. Blocks in other languages are not read.
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Languages of what a block of code prints, ``...`` for anything. ``asm`` depends on the processor.
PRINTED = ("text", "llvm")
FILE = "model.py"  # what the code thinks it is, for messages that name the line


class Example(NamedTuple):
    """A block of code, the line of the page on which it begins, and what it prints, if told."""

    line: int
    code: str
    printed: str | None


def examples(page: str) -> list[Example]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[Example] = []
    for block in BLOCK.finditer(text):
        language, content = block.groups()
        if language == "python":
            found.append(Example(text.count("\n", 0, block.start()) + 2, content, None))
        elif language in PRINTED:
            found[-1] = found[-1]._replace(printed=content)
    return found


def run(page: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[Example]:
    """Run the code of a page in one namespace and compare what it prints."""
    checker = doctest.OutputChecker()
    names["__name__"] = "model"
    found = examples(page)
    for example in found:
        lines = example.code.splitlines(keepends=True)
        linecache.cache[FILE] = (len(example.code), None, lines, FILE)
        try:
            exec(compile(example.code, FILE, "exec"), names)
        except Exception as error:
            error.add_note(f"in the code at {page}:{example.line}")
            raise
        printed = capsys.readouterr().out
        if example.printed is not None:
            told = example.printed
            where = f"{page}:{example.line} prints\n{printed}\nand not\n{told}"
            assert checker.check_output(told, printed, doctest.ELLIPSIS), where
    return found


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    layer = NeuralODE(nn.Linear(2, 2), (0.0, 1.0))
    names = {
        "node": layer,
        "x": torch.ones(3, 2),
        "task_loss": lambda u: u.square().mean(),
        "epochs": 10,
        "epoch": 3,
    }
    assert len(run("README.md", names, capsys)) >= 3
    names["loss"].backward()
    assert names["p"].grad is not None
    assert layer.module.weight.grad is not None


def test_native_engine(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("docs/native_engine.md", {}, capsys)
    assert sum(x.printed is not None for x in found) >= 10


def test_sde(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("docs/sde.md", {}, capsys)
    assert sum(x.printed is not None for x in found) >= 3


def test_stiff(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("docs/stiff.md", {}, capsys)
    assert sum(x.printed is not None for x in found) >= 5
