"""``solve``: normalise the problem, choose, integrate, wrap."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from diffsolve.adjoints.discrete import DiscreteAdjoint
from diffsolve.adjoints.select import (
    choose,
    refuse_for_noise,
    refuse_moving_times,
    transforms_active,
)
from diffsolve.adjoints.sensealg import Job, Outputs, Sensealg, undifferentiable
from diffsolve.adjoints.time_gradient import attach_saved, attach_slopes, attach_start
from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.programs.lookup import find
from diffsolve.engines.native.programs.row_recipe import RowRecipe
from diffsolve.engines.native.programs.scalar_recipe import ScalarRecipe
from diffsolve.engines.native.runtime.solve import NativeDense, NativeTrajectory
from diffsolve.engines.native.runtime.template import template
from diffsolve.engines.native.runtime.threads import template as stochastic_template
from diffsolve.engines.settings import Settings
from diffsolve.engines.trajectory import Trajectory
from diffsolve.prepared import Prepared
from diffsolve.problems.capture import reachable_tensors
from diffsolve.problems.ode import ODEProblem
from diffsolve.problems.probe import unhooked
from diffsolve.problems.sde import SDEProblem
from diffsolve.problems.sde_field import SDEField
from diffsolve.problems.vector_field import VectorField
from diffsolve.solution import Solution, SolveError, Stats, Steps
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.controllers import Controller
from diffsolve.solvers.given_jacobian import given_jacobian
from diffsolve.solvers.interpolation import DenseOutput
from diffsolve.solvers.jacobian_layout import checked_pattern
from diffsolve.solvers.stochastic.method import StochasticMethod
from diffsolve.solvers.stochastic.setup import brownian_path, refuse_noise
from diffsolve.times import SaveTimes, snapped

_STEPS_NEED_DISCRETE = (
    "sol.steps.{name} has no gradient under {sensealg}: a continuous adjoint differentiates the "
    "equation, not the solver's steps. Use sensealg=DiscreteAdjoint(), or the local regularizer "
    "diffsolve.regularization.local_error_estimate, which works under every sensealg."
)
_NO_ESTIMATE = (
    "sol.steps.{name} has no gradient: a step of {alg} estimates no such thing. Use a method that "
    "does, such as LambaEM(), LambaEulerHeun() or SOSRI()."
)
_DENSE_NEEDS_TAPE = (
    "sol(t) has no gradient under {sensealg}: list the times in saveat, whose values do, or use "
    "sensealg=DiscreteAdjoint(tape=True)."
)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _between_graphs(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function`` as a break in the graph where ``torch.compile`` looks on.

    A solve compiles for itself, or is a loop over Python's floats.
    """

    @wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            eager: Any = torch.compiler.disable(function)
            return eager(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


@_between_graphs
def solve(
    prob: ODEProblem | SDEProblem,
    alg: Algorithm | None = None,
    *,
    sensealg: Sensealg | None = None,
    saveat: Any = None,
    rtol: Any = None,
    atol: Any = None,
    dt: float | None = None,
    adaptive: bool = True,
    dtmin: float = 0.0,
    dtmax: float = math.inf,
    maxiters: int = 100_000,
    tstops: Sequence[float] = (),
    controller: Controller | None = None,
    norm: Callable[[Any], Any] | None = None,
    dense: bool | None = None,
    save_everystep: bool | None = None,
    engine: str = "auto",
    progress: bool = False,
    throw: bool = True,
    seed: Any = None,
    noise: Any = None,
) -> Solution:
    """Solve an initial value problem of an ODE or an SDE; the solution can be differentiated.

    Parameters
    ----------
    prob
        The problem.
    alg
        Method. None: ``AutoTsit5()``, or ``AutoVern7()`` where ``rtol`` is below 1e-6 and the
        state is in double precision: explicit methods that hand over to ``Rodas5P()`` where the
        problem is stiff. ``Tsit5()`` or ``Vern7()`` alone where no matrix is to be had: for complex
        states; for those of more than 500 numbers, unless they are a batch ``(..., d)`` of rows
        with ``d <= 500``; with fixed steps; under ``torch.func`` transforms and forward mode.
        For an SDE: ``SOSRA()`` where the noise is additive; ``SOSRI()``, or in the sense of
        Stratonovich ``RKMil("stratonovich")``, where it is diagonal or scalar; else ``LambaEM()``
        or ``LambaEulerHeun()``. ``sol.stats.alg`` tells.
    sensealg
        How to differentiate. None: ``DiscreteAdjoint()`` where something requires a gradient;
        ``DiscreteAdjoint(tape=True)`` under ``torch.func`` transforms and forward mode.
    saveat
        Times to save. None: every accepted step and both ends. A number: this spacing from
        ``t0``, and ``t1``. A sequence or 1-d tensor: exactly those times, in the order of
        integration.
    rtol, atol
        A step is accepted when the RMS of ``error / (atol + rtol * max(|u|, |u_new|))`` is at
        most 1. Numbers, or tensors (pytrees of them) that broadcast to the state. Newton's
        iteration leaves a hundredth of that. None: 1e-3 and 1e-6; with fixed steps, if both are
        None, implicit methods solve their equations to rounding instead.
    dt
        First step size, or the fixed one; positive, also backward in time.
    adaptive
        False: fixed steps of size ``dt``. Methods without error estimate always take those.
    dtmin, dtmax
        Limits of the step size. An adaptive solve that needs less than ``dtmin`` fails.
    maxiters
        Most attempted steps, rejected ones included.
    tstops
        Times where a step must end, such as jumps of ``f``, which is then evaluated on the step's
        side of them only. Times outside of ``tspan`` have no effect.
    controller
        Step-size controller. None: the method's own.
    norm
        Norm of the scaled error, given in the structure of the state, instead of RMS.
    dense
        Keep the continuous extension for ``sol(t)``. None: when every step is saved. Between long
        steps of implicit methods ``sol(t)`` is less accurate than at their ends; times in
        ``saveat`` shorten such steps.
    save_everystep
        False without ``saveat``: save the two ends only.
    engine
        ``"native"``: ``f`` is traced, differentiated and program, and the whole solve and its
        reverse pass run as machine code; ``f`` itself runs a few times, and again when something
        that it uses was replaced. ``"torch"``: any ``f``, dtype and device. ``"auto"``: native
        where that is possible, after a comparison with one evaluation of ``f``;
        ``sol.stats.engine`` tells.
    progress
        Show a progress bar.
    throw
        Raise ``SolveError`` when the solve fails; False: return the partial solution, whose
        ``retcode`` and ``message`` tell why.
    seed
        Of the noise of an SDE: an integer, with which path ``i`` of a batch has its own numbers
        whatever the size of the batch; an integer tensor of the batch's shape, a seed a path; a
        ``torch.Generator``, to draw one from. None: one drawn from torch's default generator, so
        that ``torch.manual_seed`` decides it. ``sol.noise.seed`` tells. Steps take the numbers in
        turn, so paths are equal where the steps are: fixed ones, whatever the batch. Adaptive steps
        depend on the batch and the tolerance, and the paths with them, unless
        ``noise=VirtualBrownianTree(seed, ...)``.
    noise
        A Brownian path for an SDE to follow: ``sol.noise`` of another solve, of the same shapes,
        which covers the span; or a ``VirtualBrownianTree``. It stays as it is.

    Returns
    -------
    Solution

    Raises
    ------
    SolveError
        If the solve fails and ``throw`` is True. It carries the partial solution.
    TypeError, ValueError
        If an argument is wrong, before any work; or with ``engine="native"``, if the solve cannot
        run as machine code: the message says why.

    Examples
    --------
    >>> prob = ODEProblem(lambda t, u: -u, torch.ones(1), (0.0, 1.0))
    >>> solve(prob, Tsit5(), saveat=0.5).t
    tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    started = time.perf_counter()
    if not isinstance(prob, (ODEProblem, SDEProblem)):
        kind = type(prob).__name__
        raise TypeError(f"prob must be an ODEProblem or an SDEProblem, got {kind}")
    if engine not in ("auto", "torch", "native"):
        raise ValueError(f'engine must be "auto", "torch" or "native", got {engine!r}')
    if not (seed is None and noise is None) and not isinstance(prob, SDEProblem):
        refuse_noise(seed, noise)
    transformed = transforms_active()
    options = (
        *(rtol, atol, dt, adaptive, dtmin, dtmax, maxiters, progress),
        *(tstops, controller, norm),
    )
    prepared = Prepared.of(prob, alg, options, transformed)
    alg, settings, field = prepared.alg, prepared.settings, prepared.field()
    t0, t1, direction = prepared.t0, prepared.t1, prepared.direction
    saves = SaveTimes.build(saveat, t0, t1, save_everystep)

    recording = torch.is_grad_enabled() and not transformed
    u0 = field.structure.ravel(prob.u0)
    if alg.is_implicit and (field.jac is not None or field.jac_sparsity is not None):
        _check_jacobian(field, field.after(t0, direction), u0.detach().clone())
    by_time = saves.differentiable(prob.tspan)
    moving = u0.requires_grad or by_time
    if isinstance(field, SDEField):
        refuse_for_noise(sensealg, recording and by_time)
    stats = Stats(engine="torch", alg=alg.name)
    native, du0, asked = None, None, sensealg
    if engine != "torch":
        try:
            if transformed:
                raise Declined("a torch.func transform looks on")
            if noise is not None:
                raise Declined("it draws its noise itself, and cannot follow a path that is given")
            if recording and isinstance(asked, Sensealg):
                _refuse_native(asked, field, moving)
            recipe = RowRecipe() if isinstance(field, SDEField) else ScalarRecipe()
            with unhooked():
                native = find(field, recipe, t0, u0, direction, verify=engine == "auto")
            if recording:
                field.params = native.differentiable(field, u0.requires_grad)
            sensealg = choose(asked, recording and (moving or bool(field.params)), transformed)
            _make_ready(native, alg, sensealg, settings, field)
            stats.engine, stats.compile_s = "native", native.compile_s()
        except Declined as reason:
            native = None
            stats.engine = f"torch, because native declined: {reason}"
    if native is None:
        with torch.set_grad_enabled(recording):
            du0 = field.discover(t0, u0, direction, recording)
        if engine == "native":
            why = stats.engine.partition(": ")[2]
            raise ValueError(f'engine="native" cannot run this solve: {why}')
        sensealg = choose(asked, recording and (moving or bool(field.params)), transformed)
    assert sensealg is not None
    if recording and field.breaks and field.compares and (moving or field.params):
        field.refuse_moving_jumps(u0, t1)
    if isinstance(field, SDEField):
        fixed = None if settings.adaptive else settings.dt
        field.path = brownian_path(field, alg, seed, noise, (t0, t1), fixed)
    if transformed:
        refuse_moving_times([*([] if sensealg.handles_time else prob.tspan), saveat])
    if by_time and not sensealg.handles_time:
        u0 = attach_start(u0, prob.tspan[0], field, direction)

    keep_dense = saves.array is None if dense is None else dense
    if native is not None and (keep_dense or sensealg.reads_params):
        native.keep_params()

    job = Job(
        field=field,
        alg=alg,
        u0=u0,
        du0=du0,
        t0=t0,
        t1=t1,
        span=prob.tspan,
        settings=sensealg.prepared(settings),
        saves=saves,
        dense=keep_dense,
        native=native,
        stats=stats,
    )
    stats.sensealg = repr(sensealg)
    outputs = sensealg.run(job)
    solution = _wrap(job, sensealg, outputs, saves)
    job.stats.wall_s = time.perf_counter() - started
    if throw and not solution.success:
        trajectory = outputs.trajectory
        raise SolveError(
            solution.message, solution.retcode, trajectory.final_t, trajectory.final_h, solution
        )
    return solution


def _refuse_native(sensealg: Sensealg, field: VectorField, moving: bool) -> None:
    """Decline a sensealg that needs torch before ``f`` is traced in vain."""
    try:
        sensealg.refuse_native()
    except Declined:
        functions = field.f, getattr(field, "g", None), field.p
        if moving or any(x.requires_grad for x in reachable_tensors(functions)):
            raise


def _make_ready(
    native: Any, alg: Algorithm, sensealg: Sensealg, settings: Settings, field: VectorField
) -> None:
    """Find the template of a native solve, and compile what its reverse pass needs."""
    latest = field.memo.setup
    wanted = (native.program, sensealg, native.active)
    if latest is not None and latest[0] == wanted:
        native.template = latest[1]
        return
    prepared = sensealg.prepared(settings)
    if isinstance(field, SDEField):
        native.template = stochastic_template(native.program, alg, field.noise, prepared)
    else:
        native.template = template(native.program, alg, prepared)
    sensealg.compile(native, alg)
    field.memo.setup = wanted, native.template  # an SDE's field is made anew, and forgets it


def _check_jacobian(field: VectorField, t: Tensor, u: Tensor) -> None:
    """Refuse a ``jac`` or ``jac_sparsity`` of a wrong shape before any work."""
    if field.jac_sparsity is not None:
        checked_pattern(field.jac_sparsity, field.structure.size)
    if field.jac is not None:
        with torch.no_grad():
            given_jacobian(field, t, u)


def _wrap(job: Job, sensealg: Sensealg, outputs: Outputs, saves: SaveTimes) -> Solution:
    trajectory, field, stats = outputs.trajectory, job.field, job.stats
    u, times = outputs.u, saves.array
    if times is None or trajectory.t is not times or saves.differentiable(job.span):
        times = saves.as_tensor(job.span, trajectory.t)
        moving = saves.inside(times, job.span) if sensealg.handles_time else times
        u = attach_saved(u, moving, field, job.t0, job.t1)
    steps = _steps_of(job, trajectory, outputs)
    if u.requires_grad and not sensealg.handles_steps:
        steps = _refusing_gradients(steps() if callable(steps) else steps, u, sensealg)
    elif u.requires_grad and isinstance(job.alg, StochasticMethod) and not transforms_active():
        steps = _refusing_missing(steps() if callable(steps) else steps, u, job.alg)
    if isinstance(trajectory, NativeTrajectory):
        stats.count(trajectory.counts)
    else:
        stats.nf = field.nf
        field.count_in(stats)
    stats.naccept, stats.nreject = trajectory.naccept, trajectory.nreject

    return Solution(
        _t=times,
        u=field.structure.unravel(u),
        retcode=trajectory.retcode,
        stats=stats,
        _steps=steps,
        message=trajectory.message,
        noise=field.path if isinstance(field, SDEField) else None,
        _interpolate=_dense_reader(job, sensealg, trajectory.dense, u),
        _job=job,
    )


def _steps_of(
    job: Job, trajectory: Trajectory | NativeTrajectory, outputs: Outputs
) -> Steps | Callable[[], Steps]:
    """The steps, or what makes them: most users never look."""
    if isinstance(trajectory, NativeTrajectory):
        return partial(trajectory.columns.steps, cast("Tensor | None", outputs.estimates))
    times = _as_column(trajectory.step_t), _as_column(trajectory.step_h)
    if outputs.estimates is not None:
        return Steps(*times, *outputs.estimates)
    # without the states, which the solution has
    light = Trajectory(estimates=trajectory.estimates, last_stiffness=trajectory.last_stiffness)
    return lambda: Steps(*times, *job.estimates(light))


def _dense_reader(
    job: Job, sensealg: Sensealg, dense: DenseOutput | NativeDense | None, anchor: Tensor
) -> Callable[[Any, int], Any] | None:
    """``sol(t)``; its values are on the tape where the whole solve is, and else say that not."""
    if dense is None:
        return None
    structure = job.field.structure
    ends = (job.t0, dense.direction * dense.ends[-1])
    on_tape = isinstance(sensealg, DiscreteAdjoint) and sensealg.tape
    noisy = isinstance(job.field, SDEField)

    def interpolate(t: Any, derivative: int) -> Any:
        if not isinstance(derivative, int) or derivative < 0:
            raise ValueError(f"derivative must be 0, 1, 2, ..., got {derivative!r}")
        eps = torch.finfo(t.dtype).eps if isinstance(t, Tensor) and t.is_floating_point() else 0.0
        at = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        times = [snapped(x, ends, eps) for x in at.detach().reshape(-1).tolist()]
        if noisy and at.requires_grad and torch.is_grad_enabled():
            dense(times, 1)  # raises: a path has no derivative
        flat = _read_dense(dense, on_tape, anchor, why, at.reshape(-1), times, derivative)
        return structure.unravel(flat.reshape(*at.shape, structure.size))

    why = _DENSE_NEEDS_TAPE.format(sensealg=sensealg)
    return interpolate


def _read_dense(
    dense: DenseOutput | NativeDense,
    on_tape: bool,
    anchor: Tensor,
    why: str,
    at: Tensor,
    times: list[float],
    derivative: int,
) -> Tensor:
    """Flat states at ``times``, with gradients by ``at``, or with ``why`` there are none.

    It stands alone: a closure that names itself would keep the solution alive.
    """
    recording = torch.is_grad_enabled()
    with torch.set_grad_enabled(on_tape and recording):
        flat = dense(times, derivative)
    if recording and not on_tape and anchor.requires_grad:
        flat = undifferentiable(flat, anchor, why)
    if recording and at.requires_grad:
        again = partial(_read_dense, dense, on_tape, anchor, why)
        flat = attach_slopes(flat, at, lambda at: again(at, times, derivative + 1))
    return flat


def _as_column(values: list[Any]) -> Tensor:
    if any(isinstance(x, Tensor) for x in values):
        return torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in values])
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _refusing_gradients(steps: Steps, anchor: Tensor, sensealg: Sensealg) -> Steps:
    def guard(name: str) -> Tensor:
        message = _STEPS_NEED_DISCRETE.format(name=name, sensealg=sensealg)
        return undifferentiable(getattr(steps, name), anchor, message)

    return Steps(steps.t, steps.h, guard("error"), guard("error_norm"), guard("stiffness"))


def _refusing_missing(steps: Steps, anchor: Tensor, alg: StochasticMethod) -> Steps:
    """Estimates that a method lacks are zero: to optimise them would do nothing, silently."""
    missing = [] if alg.adaptive else ["error", "error_norm"]
    missing += [] if alg.estimates_stiffness else ["stiffness"]
    refusing = {
        name: undifferentiable(
            getattr(steps, name), anchor, _NO_ESTIMATE.format(name=name, alg=alg.name)
        )
        for name in missing
    }
    return replace(steps, **refusing)
