"""Numbers that f reads in rare ways, and what is changed behind names."""

from __future__ import annotations

import array
import builtins
import ctypes
import dataclasses
import decimal
import functools
import inspect
import pathlib
import tempfile
import threading
import types
from typing import Any

import numpy as np
import pytest
import torch
from native_changes import ENGINES, F64, end, ones
from torch import Tensor, nn

from diffsolve import ODEProblem, Tsit5, solve

# -- numbers that are read in rare ways, and what is changed behind names --------------------------


@dataclasses.dataclass
class Box:
    amp: float = 1.0
    other: float = 0.0


class Other(Box):
    @property
    def twice(self) -> float:
        return 10.0


class Doubling(Box):
    @property
    def twice(self) -> float:
        return 2 * self.amp


class Meta(type):
    amp = 1.0


class Managed(metaclass=Meta):
    pass


class Settings(types.ModuleType):
    amp = 1.0


class Numbers(array.array):  # type: ignore[type-arg]
    pass


class Scaling(nn.Module):
    factor = 1.0

    def forward(self, u: Tensor) -> Tensor:
        return self.factor * u


class Scaling5(Scaling):
    factor = 5.0


def _five_times(module: Any, args: Any, out: Any) -> Any:
    return 5 * out


def changes(place: pytest.MonkeyPatch, path: Any) -> dict[str, tuple[Any, Any]]:
    """What ``f`` reads, and what changes it; ``place`` restores what all tests share."""
    box, doubling, box_class = Box(), Doubling(), type("Held", (), {"amp": 1.0})
    kept, table = {"amp": 1.0}, functools.lru_cache(lambda: np.ones(1))
    cached = functools.lru_cache(lambda: kept["amp"])
    number, numbers, astuple = ctypes.c_double(1.0), Numbers("d", [1.0]), dataclasses.astuple
    module, one = Settings("settings"), torch.ones(1, dtype=F64)
    linear, identity = nn.Linear(1, 1, bias=False, dtype=F64), nn.Sequential(nn.Identity())
    patched, scaling = nn.Linear(1, 1, bias=False, dtype=F64), Scaling()
    derived = type("Derived", (box_class,), {})
    held, moved = box_class(), derived()
    text, raw = path / "amp.txt", path / "amp.bin"
    for x in (linear, patched):
        nn.init.ones_(x.weight).requires_grad_(False)

    def by_keyword() -> float:
        match box:
            case Box(amp=found):
                return found
        return 0.0

    def by_position() -> float:
        match box:
            case Box(found, _):
                return found
        return 0.0

    def of_python() -> float:
        return AMP_OF_A_TEST  # type: ignore[name-defined] # noqa: F821

    def write(x: float) -> None:
        text.write_text(str(x))
        np.array([x]).tofile(raw)

    def clear() -> None:
        kept["amp"] = 5.0
        cached.cache_clear()

    def rebase() -> None:
        derived.__bases__ = (type("Held5", (), {"amp": 5.0}),)

    write(1.0)
    cached()
    place.setattr(builtins, "AMP_OF_A_TEST", 1.0, raising=False)
    five, forward = lambda: setattr(box, "amp", 5.0), nn.Linear.forward
    hooks: Any = nn.modules.module._global_forward_hooks
    return {
        "pattern with a name": (by_keyword, five),
        "pattern by position": (by_position, five),
        "astuple": (lambda: dataclasses.astuple(box)[0], five),
        "astuple by another name": (lambda: astuple(box)[0], five),
        "__getattribute__": (lambda: box.__getattribute__("amp"), five),
        "__getstate__": (lambda: box.__getstate__()["amp"], five),  # type: ignore[attr-defined]
        "__reduce_ex__": (lambda: box.__reduce_ex__(2)[2]["amp"], five),  # type: ignore[index]
        "getmembers": (lambda: dict(inspect.getmembers(box))["amp"], five),
        "format": (lambda: float("{0.amp:.3f}".format(box)), five),  # noqa: UP030, UP032
        "annotations": (
            lambda: float(Meta.__annotations__.get("amp", 1.0)),
            lambda: place.setitem(Meta.__annotations__, "amp", "5.0"),
        ),
        "lru_cache": (cached, clear),
        "array in a cache": (lambda: float(table()[0]), lambda: table().fill(5.0)),
        "ctypes": (lambda: number.value, lambda: setattr(number, "value", 5.0)),
        "array of C": (lambda: numbers[0], lambda: numbers.__setitem__(0, 5.0)),
        "metaclass": (lambda: Managed.amp, lambda: place.setattr(Meta, "amp", 5.0)),
        "class of a module": (lambda: module.amp, lambda: place.setattr(Settings, "amp", 5.0)),
        "builtins": (of_python, lambda: place.setattr(builtins, "AMP_OF_A_TEST", 5.0)),
        "pathlib": (lambda: float(text.read_text()), lambda: write(5.0)),
        "fromfile": (lambda: float(np.fromfile(raw)[0]), lambda: write(5.0)),
        "decimal": (
            lambda: float(decimal.Decimal(10) / 3),
            lambda: place.setattr(decimal.getcontext(), "prec", 1),
        ),
        "class of an object": (
            lambda: doubling.twice,
            lambda: setattr(doubling, "__class__", Other),
        ),
        "class of a plain object": (
            lambda: held.amp,
            lambda: setattr(held, "__class__", type("Held2", (), {"amp": 5.0})),
        ),
        "bases of a class": (lambda: moved.amp, rebase),
        "class of a layer": (
            lambda: scaling(one),
            lambda: setattr(scaling, "__class__", Scaling5),
        ),
        "forward of torch's class": (
            lambda: linear(one),
            lambda: place.setattr(nn.Linear, "forward", lambda self, u: 5 * forward(self, u)),
        ),
        "forward of torch's layer": (
            lambda: patched(one),
            lambda: setattr(patched, "forward", lambda u: 5 * u),
        ),
        "forward of a child": (
            lambda: identity(one),
            lambda: setattr(identity[0], "forward", lambda u: 5 * u),
        ),
        "hook on all layers": (
            lambda: linear(one),
            lambda: place.setitem(hooks, -1, _five_times),
        ),
    }


with pytest.MonkeyPatch.context() as _place, tempfile.TemporaryDirectory() as _path:
    CHANGES = [*changes(_place, pathlib.Path(_path))]


@ENGINES
@pytest.mark.parametrize("name", CHANGES)
def test_rare_reads_and_changes_behind_names(
    name: str, engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The forcing is zero at the start, so that only what is read can show the change."""
    read, change = changes(monkeypatch, tmp_path)[name]
    f = lambda t, u: -u + read() * torch.sin(t)  # noqa: E731
    prob = ODEProblem(f, ones(1), (0.0, 1.0))
    before = [end(prob, engine) for _ in range(3)][-1]
    change()
    after = end(prob, "torch")
    assert abs(after[0] - before[0]) > 0.01
    assert end(prob, engine) == pytest.approx(after, rel=1e-6)
    assert end(ODEProblem(f, ones(1), (0.0, 1.0)), engine) == pytest.approx(after, rel=1e-6)


def test_number_of_another_thread() -> None:
    local = threading.local()
    local.amp = 1.0
    prob = ODEProblem(lambda t, u: -u + local.amp * torch.sin(t), ones(1), (0.0, 1.0))
    here = [end(prob) for _ in range(3)][-1]
    found: list[list[float]] = []

    def there() -> None:
        local.amp = 5.0
        found.extend(end(prob, engine) for engine in ("native", "torch"))

    thread = threading.Thread(target=there)
    thread.start()
    thread.join()
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert end(prob) == here


def test_hook_on_gradients_of_all_layers_added_later() -> None:
    net = nn.Linear(1, 1, dtype=F64)
    prob = ODEProblem(lambda t, u: net(u), ones(1), (0.0, 1.0))
    for _ in range(3):
        solve(prob, Tsit5())
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, i, o: (0 * i[0],))
    try:
        got = []
        for engine in ("auto", "torch"):
            net.zero_grad()
            solve(prob, Tsit5(), engine=engine).u[-1].sum().backward()
            got.append(net.weight.grad.clone())  # type: ignore[union-attr]
    finally:
        handle.remove()
    torch.testing.assert_close(got[0], got[1])
