"""The arguments of a solve but for the values of tensors: checked and normalised.

A training solves the same problem with the same arguments again and again. So the problem keeps
the result in its ``SolveCache``, for solves whose arguments cannot have changed unseen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsolve.engines.settings import Settings
from diffsolve.problems.autocast import is_autocasting
from diffsolve.problems.ode import ODEProblem
from diffsolve.problems.sde import SDEProblem
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.structure import StateStructure, detached
from diffsolve.problems.vector_field import VectorField
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.controllers import Controller
from diffsolve.solvers.explicit_rk.methods import Tsit5, Vern7
from diffsolve.solvers.norms import Tolerance
from diffsolve.solvers.stochastic.method import StochasticMethod
from diffsolve.solvers.stochastic.setup import stochastic_method
from diffsolve.solvers.switching import AutoSwitch, AutoTsit5, AutoVern7
from diffsolve.times import ordered_stops

_MOST_UNKNOWNS = 500  # up to which alg=None may use dense matrices
_TSIT5, _VERN7, _AUTO_TSIT5, _AUTO_VERN7 = Tsit5(), Vern7(), AutoTsit5(), AutoVern7()
_PLAIN = frozenset((float, int, bool, type(None)))
_MOST_SETTINGS = 100
_RTOL, _ATOL = 1e-3, 1e-6
_COARSE = 1e-3  # part of the span that rounding may move a time by
_known_settings: dict[Any, Settings] = {}  # nothing changes settings


class Options(NamedTuple):
    """How to integrate, in the user's words; see ``solve``."""

    rtol: Any
    atol: Any
    dt: Any
    adaptive: bool
    dtmin: Any
    dtmax: Any
    maxiters: Any
    progress: bool
    tstops: Sequence[float] = ()
    controller: Controller | None = None
    norm: Callable[[Any], Any] | None = None


@dataclass(slots=True)
class Prepared:
    """The arguments of a solve, checked and normalised.

    Attributes
    ----------
    alg
        Method, chosen where the user left that open.
    t0, t1, direction
        Span, and 1 or -1.
    settings
        How to integrate.
    given
        The user's method and options, if another solve with the same ones may use this again.
    """

    alg: Algorithm
    t0: float
    t1: float
    direction: float
    settings: Settings
    given: tuple[Algorithm | None, Options] | None
    _field: VectorField

    @classmethod
    def of(
        cls, prob: ODEProblem | SDEProblem, alg: Any, values: tuple[Any, ...], transformed: bool
    ) -> Prepared:
        """The prepared arguments: those of the latest solve where they still hold, or new ones.

        Parameters
        ----------
        values
            The fields of ``Options``, in order.
        transformed
            Whether a ``torch.func`` transform is active.

        Raises
        ------
        TypeError, ValueError
            If one of them is wrong.
        """
        if isinstance(prob, ODEProblem):
            latest = prob._solve_cache.prepared
            if isinstance(latest, Prepared) and latest.still_holds(prob, alg, values, transformed):
                return latest
        options = Options(*values)
        alg_given, field = alg, _field_of(prob)
        if isinstance(prob, SDEProblem):
            alg = stochastic_method(alg, prob)
        else:
            alg = _checked_algorithm(alg, prob, options, field, transformed)
        t0, t1 = float(detached(prob.tspan[0])), float(detached(prob.tspan[1]))
        _warn_of_coarse_times(field, t0, t1)
        stops, field.breaks = ordered_stops(options.tstops, t0, t1)
        field.span_end = t1
        settings = _settings(alg, field, options, stops)
        field.accuracy, field.retries = settings.accuracy, settings.adaptive
        direction = 1.0 if t1 >= t0 else -1.0
        reusable = not transformed and _is_reusable(prob, options, field)
        given = (alg_given, options) if reusable else None
        prepared = cls(alg, t0, t1, direction, settings, given, field)
        if given is not None and isinstance(prob, ODEProblem):
            prob._solve_cache.prepared = prepared
        return prepared

    def still_holds(self, prob: Any, alg: Any, values: tuple[Any, ...], transformed: bool) -> bool:
        """Whether these arguments are those that this was made of, and mean the same now."""
        assert self.given is not None
        given_alg, options = self.given
        if transformed or not (alg is given_alg or _are_same(alg, given_alg)):
            return False
        if not (all(map(is_, values, options)) or _are_equal(values, options)):
            return False
        structure = self._field.structure
        return StateStructure.of(prob.u0) is structure and not is_autocasting(structure.device)

    def field(self) -> VectorField:
        """The right-hand side for one solve."""
        return self._field if self.given is None else self._field.fresh()


def _warn_of_coarse_times(field: VectorField, t0: float, t1: float) -> None:
    """Warn where ``f`` may see the same time in one step and the next."""
    dtype = field.structure.time_dtype
    unit = torch.finfo(dtype).eps * max(abs(t0), abs(t1))
    if dtype == torch.float32 and t0 != t1 and unit > _COARSE * abs(t1 - t0):
        warnings.warn(
            f"f sees times in float32, the precision of the state, which tells times near "
            f"{t0:.8g} apart by {unit:.3g} only, in a span of {abs(t1 - t0):.3g}. If f depends on "
            "t, let time begin at zero, or use float64.",
            stacklevel=4,
        )


def _field_of(prob: ODEProblem | SDEProblem) -> VectorField:
    if not isinstance(prob, (ODEProblem, SDEProblem)):
        kind = type(prob).__name__
        raise TypeError(f"prob must be an ODEProblem or an SDEProblem, got {kind}")
    return SDEField.of(prob) if isinstance(prob, SDEProblem) else VectorField.of(prob)


def _are_same(a: Any, b: Any) -> bool:
    return isinstance(a, Algorithm) and isinstance(b, Algorithm) and a.key == b.key


def _are_equal(values: tuple[Any, ...], options: Options) -> bool:
    """Whether the first eight values are equal numbers, and the others the same objects."""
    plain = _PLAIN.issuperset(map(type, values[:8])) and values[:8] == options[:8]
    return plain and all(map(is_, values[8:], options[8:]))


def _is_reusable(prob: ODEProblem | SDEProblem, options: Options, field: VectorField) -> bool:
    """Whether no argument can change without ``still_holds`` seeing it."""
    return (
        isinstance(prob, ODEProblem)
        and isinstance(prob.u0, Tensor)
        and _PLAIN.issuperset(map(type, (*prob.tspan, *options[:8])))
        and isinstance(options.tstops, tuple)
        and not options.tstops
        and options.norm is None
        and field.f is prob.f  # no autocast is bound to it
    )


def _chosen_algorithm(options: Options, field: VectorField, transformed: bool) -> Algorithm:
    """What ``alg=None`` means; see ``solve``."""
    structure, rtol = field.structure, options.rtol
    tight = isinstance(rtol, (int, float)) and rtol < 1e-6
    tight = tight and structure.time_dtype == torch.float64
    rows = structure.is_tensor and len(structure.shapes[0]) > 1
    size = structure.shapes[0][-1] if rows else structure.size
    alone = structure.dtype.is_complex or size > _MOST_UNKNOWNS
    if alone or not options.adaptive or transformed:
        return _VERN7 if tight else _TSIT5
    # rows may turn out to be coupled: the explicit method then goes on
    field.largest_matrix = _MOST_UNKNOWNS
    return _AUTO_VERN7 if tight else _AUTO_TSIT5


def _checked_algorithm(
    alg: Algorithm | None, prob: ODEProblem, options: Options, field: VectorField, transformed: bool
) -> Algorithm:
    if alg is None:
        alg = _chosen_algorithm(options, field, transformed)
    if not isinstance(alg, Algorithm):
        hint = f"; write {alg.__name__}()" if isinstance(alg, type) else ""
        raise TypeError(f"alg must be a method such as Tsit5(), got {alg!r}{hint}")
    if isinstance(alg, StochasticMethod):
        raise ValueError(f"{alg!r} is a method for SDEs: for an ODEProblem use e.g. Tsit5()")
    if prob.mass_matrix is not None and not alg.supports_mass_matrix:
        raise ValueError(
            f"{alg.name} cannot solve M du/dt = f with a mass matrix; where M is regular, "
            "multiply f by its inverse"
        )
    if alg.is_implicit and field.dtype.is_complex:
        raise ValueError(
            f"{alg.name} is implicit and needs a real state, got {field.dtype}: write u as its "
            "real and imaginary parts (torch.view_as_real), or use an explicit method"
        )
    return alg


def _settings(
    alg: Algorithm, field: VectorField, options: Options, stops: tuple[float, ...]
) -> Settings:
    """How to integrate, checked; the same plain numbers give the same object again."""
    rtol, atol, dt, adaptive, dtmin, dtmax, maxiters, progress, _, controller, norm = options
    stiff = None
    if controller is None:
        controller = alg.default_controller()
        if isinstance(alg, AutoSwitch):
            stiff = alg.stiff.default_controller()
    structure = field.structure
    key = None
    if norm is None and not stops and _PLAIN.issuperset(map(type, options[:8])):
        ids = id(controller), id(stiff)  # the cached settings keep both alive
        key = (alg.key, *ids, *options[:8], structure.time_dtype, structure.device)
        cached = _known_settings.get(key)
        if cached is not None:
            return cached
    settings = Settings(
        tolerance=Tolerance.build(
            _RTOL if rtol is None else rtol, _ATOL if atol is None else atol, structure, norm
        ),
        controller=controller,
        controller_stiff=stiff,
        adaptive=adaptive and alg.adaptive,
        to_rounding=rtol is None and atol is None and not (adaptive and alg.adaptive),
        dt=None if dt is None else _constant("dt", dt),
        dtmin=float(dtmin),
        dtmax=float(dtmax),
        maxiters=_counted(maxiters),
        tstops=stops,
        progress=progress,
    )
    _check(settings, alg)
    if key is not None:
        if len(_known_settings) >= _MOST_SETTINGS:
            _known_settings.clear()
        _known_settings[key] = settings
    return settings


def _constant(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} has no gradient: detach it")
    return float(value)


def _counted(maxiters: Any) -> int:
    if not 0 < maxiters < math.inf:
        raise ValueError(f"maxiters must be a positive number, got {maxiters}")
    return int(maxiters)


def _check(settings: Settings, alg: Algorithm) -> None:
    dt, dtmin, dtmax = settings.dt, settings.dtmin, settings.dtmax
    if dt is None and not settings.adaptive:
        why = "adaptive=False" if alg.adaptive else f"{alg.name} has no error estimate"
        raise ValueError(f"{why}: give the step size, dt=...")
    if dt is not None and not 0 < dt < math.inf:
        raise ValueError(f"dt must be positive and finite (also backward in time), got {dt}")
    if not (dtmin >= 0 and dtmax > 0 and dtmin <= dtmax):
        raise ValueError(f"need 0 <= dtmin <= dtmax and dtmax > 0, got {dtmin} and {dtmax}")
    if not isinstance(settings.controller, Controller):
        raise TypeError(f"controller must be e.g. PIController(), got {settings.controller!r}")
