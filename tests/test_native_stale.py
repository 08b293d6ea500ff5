"""Numbers that ``f`` reads from somewhere else, changed where ``f(t0, u0)`` does not show it.

Each case forces the equation by ``sin(t)`` from ``t0 = 0`` on, so that the amplitude has no part in
what ``f`` gives at the start. The torch engine, which calls ``f`` at every step, is the reference.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
import os
import random
import sys
import types
from collections import ChainMap, UserDict, defaultdict, namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from native_changes import ENGINES, F64
from torch import Tensor, nn

from diffsolve import EM, ODEProblem, SDEProblem, Tsit5, solve
from diffsolve.engines.native.programs import scalar_recipe


def end(f: Any, engine: str, p: Any = None) -> float:
    prob = ODEProblem(f, torch.ones(1, dtype=F64), (0.0, 1.0), p)
    return float(solve(prob, Tsit5(), engine=engine, save_everystep=False).u[-1].detach())


def forced(read: Any) -> Any:
    return lambda t, u: -u + read() * torch.sin(t)


config = SimpleNamespace(forcing=SimpleNamespace(deep=SimpleNamespace(amp=1.0)))
LEVEL = 1.0
TABLE = {"season": {"summer": {"month": [{"amp": 1.0}]}}}
ARRAY = np.array([1.0, 2.0])
COUNTS = torch.tensor([1, 2])
LONG = [1.0] * 500
Point = namedtuple("Point", "amp other")
POINT = Point([1.0], 0)


def _level() -> float:
    return LEVEL


def _through(x: Any) -> float:
    return x() if callable(x) else x


class Plant:
    amp = 1.0

    def __init__(self) -> None:
        self.nested = SimpleNamespace(rates=[1.0, {"x": 1.0}])

    @property
    def derived(self) -> float:
        return 2 * LEVEL

    @functools.cached_property
    def kept(self) -> float:
        return 1.0

    @classmethod
    def of_class(cls) -> float:
        return cls.amp

    @staticmethod
    def of_none() -> float:
        return LEVEL

    def by_attribute(self, t: Tensor, u: Tensor) -> Tensor:
        return -u + self.amp * torch.sin(t)

    def __call__(self, t: Tensor, u: Tensor, scale: float = 1.0) -> Tensor:
        return -u + scale * self.nested.rates[1]["x"] * torch.sin(t)


class Lazy:
    """What it has is known to ``__getattr__`` alone."""

    def __init__(self) -> None:
        self.__dict__["_store"] = {"amp": 1.0}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_store"][name]
        except KeyError:
            raise AttributeError(name) from None


class Mapped(UserDict):
    def __missing__(self, key: Any) -> float:
        return LEVEL


class Mode(enum.Enum):
    SLOW = 1.0
    FAST = 5.0


@dataclasses.dataclass
class Inner:
    amp: float = 1.0


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    mode: Mode = Mode.SLOW


class Slots:
    __slots__ = ("amp",)

    def __init__(self) -> None:
        self.amp = 1.0


class Meta(type):
    @property
    def amp(cls) -> float:
        return LEVEL


class Managed(metaclass=Meta):
    pass


class Weighted:
    def __init__(self, amp: float):
        self.amp = amp

    def __rmul__(self, other: Any) -> Any:
        return self.amp * other

    __mul__ = __rmul__


class Net(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), Leaf())
        self.register_buffer("counts", torch.tensor([1, 2]))
        self.table = {"a": [1.0]}

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -u + self.inner(u) * self.counts[0] * self.scale * self.table["a"][0] * torch.sin(t)


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0

    def forward(self, u: Tensor) -> Tensor:
        return self.beta * torch.ones_like(u)


def _case(name: str) -> tuple[Any, Any]:
    """A right-hand side, and what changes it."""
    plant, lazy, outer, slots, net = Plant(), Lazy(), Outer(), Slots(), Net()
    weighted, box, cached = Weighted(1.0), [1.0], functools.lru_cache(lambda x: x * box[0])
    chained, mapped, grouped = ChainMap({}, {"amp": 1.0}), Mapped(), defaultdict(lambda: box[0])
    polynomial = np.polynomial.Polynomial([1.0, 0.0])
    module = types.ModuleType("settings_of_a_test")
    module.physics = SimpleNamespace(amp=1.0)  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    by_default = _with_default()
    sensors = {i: SimpleNamespace(amp=1.0) for i in range(3)}

    def assign(place: Any, value: float = 5.0, name: str = "amp") -> Any:
        return lambda: setattr(place, name, value)

    def put(place: Any, key: Any, value: Any = 5.0) -> Any:
        return lambda: operator.setitem(place, key, value)

    def imported(t: Tensor, u: Tensor) -> Tensor:
        import settings_of_a_test as found  # type: ignore[import-not-found]

        return -u + found.physics.amp * torch.sin(t)

    def looped(t: Tensor, u: Tensor) -> Tensor:
        return -u + sum(x.amp for x in sensors.values()) * torch.sin(t)

    level = put(globals(), "LEVEL")
    os.environ["DIFFSOLVE_TEST_AMP"] = "1.0"
    cases: dict[str, tuple[Any, Any]] = {
        "global object": (forced(lambda: config.forcing.deep.amp), assign(config.forcing.deep)),
        "three calls below": (forced(lambda: _through(_through(_level) and _level)), level),
        "class attribute": (plant.by_attribute, assign(Plant)),
        "class itself": (forced(lambda: Plant.amp), assign(Plant)),
        "classmethod": (forced(plant.of_class), assign(Plant)),
        "staticmethod": (forced(lambda: plant.of_none()), level),
        "property": (forced(lambda: plant.derived), level),
        "metaclass": (forced(lambda: Managed.amp), level),
        "attribute that hides": (plant.by_attribute, assign(plant)),
        "attribute deep down": (plant, put(plant.nested.rates[1], "x")),
        "dicts of dicts": (
            forced(lambda: TABLE["season"]["summer"]["month"][0]["amp"]),
            put(TABLE["season"]["summer"]["month"][0], "amp"),
        ),
        "long list": (forced(lambda: LONG[400]), put(LONG, 400)),
        "array": (forced(lambda: float(ARRAY[0])), put(ARRAY, 0)),
        "array as tensor": (forced(lambda: torch.from_numpy(ARRAY)[0]), put(ARRAY, 0)),
        "tensor of integers": (forced(lambda: COUNTS[0]), put(COUNTS, 0, 5)),
        "data of a tensor": (forced(lambda: COUNTS[0]), put(COUNTS.data, 0, 5)),
        "named tuple": (forced(lambda: POINT.amp[0]), put(POINT.amp, 0)),
        "__getattr__": (forced(lambda: lazy.amp), put(lazy._store, "amp")),
        "getattr": (forced(lambda: getattr(plant, "".join(["a", "mp"]))), assign(plant)),
        "attrgetter": (
            forced(functools.partial(operator.attrgetter("inner.amp"), outer)),
            assign(outer.inner),
        ),
        "vars": (forced(lambda: vars(outer)["inner"].amp), assign(outer.inner)),
        "dataclass": (forced(lambda: outer.inner.amp), assign(outer.inner)),
        "asdict": (forced(lambda: dataclasses.asdict(outer.inner)["amp"]), assign(outer.inner)),
        "enum": (forced(lambda: outer.mode.value), assign(outer, Mode.FAST, "mode")),  # type: ignore[arg-type]
        "slots": (forced(lambda: slots.amp), assign(slots)),
        "environment": (
            forced(lambda: float(os.environ["DIFFSOLVE_TEST_AMP"])),
            put(os.environ, "DIFFSOLVE_TEST_AMP", "5.0"),
        ),
        "getenv": (
            forced(lambda: float(os.getenv("DIFFSOLVE_TEST_AMP", "0"))),
            put(os.environ, "DIFFSOLVE_TEST_AMP", "5.0"),
        ),
        "operator of an object": (forced(lambda: weighted), assign(weighted)),
        "partial": (functools.partial(_scaled, box), put(box, 0)),
        "function of C": (forced(lambda: max(box)), put(box, 0)),
        "method of a container": (forced(_of_container(box.__getitem__)), put(box, 0)),
        "default": (by_default, lambda: setattr(by_default, "__defaults__", (5.0,))),
        "default object": (_with_default(box), put(box, 0)),
        "lru_cache": (forced(lambda: cached(1.0)), lambda: (cached.cache_clear(), put(box, 0)())),
        "chain of maps": (forced(lambda: chained["amp"]), put(chained, "amp")),
        "dict that falls back": (forced(lambda: mapped["amp"]), level),
        "object of NumPy": (forced(lambda: float(polynomial(1.0))), put(polynomial.coef, 0)),
        "wrapped by torch": (torch.no_grad()(forced(lambda: box[0])), put(box, 0)),
        "default dict": (forced(lambda: grouped.default_factory()), put(box, 0)),  # type: ignore[misc]
        "set": (forced(lambda: sum({1.0, *box})), put(box, 0)),
        "import in f": (imported, assign(module.physics)),  # type: ignore[attr-defined]
        "objects in a loop": (looped, assign(sensors[2])),
        "module: attribute deep down": (net, assign(net.inner[1], name="beta")),
        "module: class attribute": (net, assign(Net, name="scale")),
        "module: buffer": (net, put(net.counts, 0, 5)),
        "module: buffer's data": (net, put(net.counts.data, 0, 5)),
        "module: list in a dict": (net, put(net.table["a"], 0)),
        "module: child": (net, lambda: net.inner.__setitem__(0, _Times(5.0))),
    }
    return cases[name] if name else cases  # type: ignore[return-value]


def _of_container(get: Any) -> Any:
    return lambda: get(0)


class _Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, u: Tensor) -> Tensor:
        return self.factor * u


def _scaled(box: Any, t: Tensor, u: Tensor) -> Tensor:
    return -u + box[0] * torch.sin(t)


def _with_default(amp: Any = 1.0) -> Any:
    def f(t: Tensor, u: Tensor, amp: Any = amp) -> Tensor:
        return -u + (amp if isinstance(amp, float) else amp[0]) * torch.sin(t)

    return f


@pytest.fixture
def _as_before() -> Any:
    yield
    config.forcing.deep.amp = Plant.amp = Net.scale = 1.0
    globals()["LEVEL"] = 1.0
    TABLE["season"]["summer"]["month"][0]["amp"] = LONG[400] = POINT.amp[0] = 1.0
    ARRAY[0], COUNTS[0] = 1.0, 1
    os.environ.pop("DIFFSOLVE_TEST_AMP", None)


@ENGINES
@pytest.mark.parametrize("name", _case(""))
def test_change_that_the_start_does_not_show(name: str, engine: str, _as_before: Any) -> None:
    f, change = _case(name)
    before = end(f, engine), end(f, engine)
    assert before == pytest.approx([end(f, "torch")] * 2, rel=1e-9)
    change()
    after = end(f, engine), end(f, engine)
    if not name.endswith("child"):
        assert abs(after[0] - before[0]) > 0.1
    assert after == pytest.approx([end(f, "torch")] * 2, rel=1e-9)


# -- what costs a trace, and what does not ---------------------------------------------------------


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with each trace."""
    found: list[Any] = []
    original = scalar_recipe.trace

    def counted(f: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(f)
        return original(f, *args, **kwargs)

    monkeypatch.setattr(scalar_recipe, "trace", counted)
    return found


@ENGINES
def test_new_objects_of_the_same_kind_are_inputs(engine: str, traces: list[Any]) -> None:
    net = nn.Linear(2, 2, dtype=F64)

    class Context:
        def __init__(self, shift: Tensor):
            self.shift = shift

    def make(shift: Tensor) -> Any:
        context, inner = Context(shift), nn.Linear(2, 2, dtype=F64)
        f = lambda t, u: net(u) + inner(u) * t + context.shift  # noqa: E731
        return f, [net.weight, inner.weight, shift]

    for i in range(5):
        f, wrt = make(torch.full((2,), float(i), dtype=F64, requires_grad=True))
        found = []
        for e in (engine, "torch"):
            prob = ODEProblem(f, torch.ones(2, dtype=F64), (0.0, 1.0))
            u = solve(prob, Tsit5(), engine=e, save_everystep=False).u[-1]
            found.append([u.detach(), *torch.autograd.grad(u.sum(), wrt)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert len(traces) == 1


@ENGINES
def test_tensors_that_are_one_and_tensors_that_are_two(engine: str) -> None:
    a, b = (torch.full((1,), x, dtype=F64) for x in (1.0, 3.0))

    def make(x: Tensor, y: Tensor) -> Any:
        return lambda t, u: -x * u + y * torch.sin(t)

    whole = torch.tensor([1.0, 3.0], dtype=F64)
    pairs = [(a, a), (a, b), (b, a), (b, b), (whole[:1], whole[1:]), (whole[:1], whole[:1])]
    for x, y in (*pairs, *reversed(pairs)):
        f = make(x, y)
        assert end(f, engine) == pytest.approx(end(f, "torch"), rel=1e-9)


@ENGINES
def test_other_shapes_classes_and_functions_are_other_code(engine: str) -> None:
    def make(act: Any, w: Any) -> Any:
        return lambda t, u: -act(u) * w.sum()

    twice = {"torch": lambda u: 2 * u, "half": lambda u: 0.5 * u}
    acts = [torch.tanh, torch.sin, nn.Tanh(), nn.Sigmoid(), *twice.values()]
    for act in acts:
        for w in (torch.ones(1, dtype=F64), torch.ones(3, dtype=F64), np.ones(2)):
            f = make(act, w)
            assert end(f, engine) == pytest.approx(end(f, "torch"), rel=1e-9)


def test_what_was_declined_is_not_traced_again_and_again(traces: list[Any]) -> None:
    def make(shift: Tensor, number: float) -> Any:
        return lambda t, u: torch.sort(u).values * number + shift

    for i in range(20):
        f = make(torch.full((2,), float(i), dtype=F64), 1.0)
        prob = ODEProblem(f, torch.ones(2, dtype=F64), (0.0, 0.1))
        assert "torch.sort" in solve(prob, Tsit5()).stats.engine
    assert len(traces) == 1
    for i in range(40):
        prob = ODEProblem(
            make(torch.ones(2, dtype=F64), 0.01 * i), torch.ones(2).double(), (0, 0.1)
        )
        assert "torch.sort" in solve(prob, Tsit5()).stats.engine
    assert len(traces) < 12
    with pytest.raises(ValueError, match=r"torch\.sort"):
        solve(prob, Tsit5(), engine="native")


amp = 0.0  # named as an attribute that is read


def test_a_global_with_the_name_of_an_attribute_costs_no_trace(traces: list[Any]) -> None:
    plant = Plant()
    f = lambda t, u: -plant.amp * u  # noqa: E731
    for i in range(4):
        globals()["amp"] = float(i)
        end(f, "auto")
    assert len(traces) == 1


def test_numbers_that_f_does_not_read_cost_no_trace(traces: list[Any]) -> None:
    net = Net()
    for i in range(4):
        net.epoch, net.inner[1].seen = i, [i]  # type: ignore[attr-defined]
        end(net, "native")
    assert len(traces) <= 4
    plant = Plant()
    end(plant, "native")  # it may be known already
    before = len(traces)
    for i in range(4):
        plant.epoch = i  # type: ignore[attr-defined]
        end(plant, "native")
    assert len(traces) == before


# -- random numbers, and noise ---------------------------------------------------------------------


def test_random_numbers_that_the_start_does_not_show_are_declined() -> None:
    rng, own = np.random.default_rng(0), random.Random(0)
    for draw in (rng.normal, np.random.rand, own.random, random.random):
        f = forced(lambda draw=draw: 1e-9 * draw())
        prob = ODEProblem(f, torch.ones(1, dtype=F64), (0.0, 1.0))
        assert "each evaluation" in solve(prob, Tsit5()).stats.engine


@ENGINES
def test_diffusion_of_an_sde_is_looked_into(engine: str, _as_before: Any) -> None:
    prob = SDEProblem(
        lambda t, u: -u,
        lambda t, u: config.forcing.deep.amp * torch.sin(t) * torch.ones_like(u),
        torch.ones(3, 1, dtype=F64),
        (0.0, 1.0),
    )

    def last(engine: str) -> Tensor:
        return solve(prob, EM(), dt=0.1, seed=1, engine=engine).u[-1]

    before = last(engine)
    torch.testing.assert_close(before, last("torch"), rtol=1e-9, atol=1e-12)
    config.forcing.deep.amp = 5.0
    torch.testing.assert_close(last(engine), last("torch"), rtol=1e-9, atol=1e-12)
    assert not torch.equal(last(engine), before)
