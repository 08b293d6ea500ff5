"""``solve``: normalise the problem, choose, integrate, wrap."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from diffsolve.adjoints.select import refuse_moving_times, transforms_active
from diffsolve.adjoints.sensealg import Sensealg
from diffsolve.adjoints.time_gradient import attach_start
from diffsolve.choose import Request, choose_plan
from diffsolve.engines.plan import SolveContext
from diffsolve.prepared import Prepared
from diffsolve.problems.ode import ODEProblem
from diffsolve.problems.sde import SDEProblem
from diffsolve.results import solution_of
from diffsolve.solution import Solution, SolveError, Stats
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.controllers import Controller
from diffsolve.solvers.given_jacobian import check_jacobian
from diffsolve.solvers.stochastic.setup import prepare_path, refuse_noise
from diffsolve.times import SaveTimes

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
        ``"native"``: ``f`` is traced, differentiated and compiled, and the whole solve and its
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
    if engine not in ("auto", "torch", "native"):
        raise ValueError(f'engine must be "auto", "torch" or "native", got {engine!r}')
    transformed = transforms_active()
    options = (
        *(rtol, atol, dt, adaptive, dtmin, dtmax, maxiters, progress),
        *(tstops, controller, norm),
    )
    prepared = Prepared.of(prob, alg, options, transformed)
    alg, settings, field = prepared.alg, prepared.settings, prepared.field()
    t0, t1, direction = prepared.t0, prepared.t1, prepared.direction
    saves = SaveTimes.build(saveat, t0, t1, save_everystep)
    if seed is not None or noise is not None:
        refuse_noise(field, seed, noise)

    u0 = field.structure.ravel(prob.u0)
    if alg.is_implicit and (field.jac is not None or field.jac_sparsity is not None):
        check_jacobian(field, field.after(t0, direction), u0.detach().clone())
    by_time = saves.differentiable(prob.tspan)
    recording = torch.is_grad_enabled() and not transformed
    how = engine, sensealg, by_time, transformed, recording, noise is not None
    asked = Request(prepared, field, u0, *how)
    plan, sensealg, du0 = choose_plan(asked)
    if recording and field.breaks and field.compares and asked.wants_gradients:
        field.refuse_moving_jumps(u0, t1)
    if field.is_stochastic:
        fixed = None if settings.adaptive else settings.dt
        prepare_path(field, alg, seed, noise, (t0, t1), fixed)
    if transformed:
        refuse_moving_times([*([] if sensealg.handles_time else prob.tspan), saveat])
    if by_time and not sensealg.handles_time:
        u0 = attach_start(u0, prob.tspan[0], field, direction)

    keep_dense = saves.array is None if dense is None else dense
    if keep_dense or sensealg.reads_params:
        plan.keep_params()
    stats = Stats(
        engine=str(plan), alg=alg.name, sensealg=repr(sensealg), compile_s=plan.compile_s()
    )
    settings = sensealg.prepared(settings)
    span = t0, t1, prob.tspan
    context = SolveContext(field, alg, u0, du0, *span, settings, saves, keep_dense, plan, stats)
    outputs = sensealg.run(context)
    solution = solution_of(context, sensealg, outputs)
    stats.wall_s = time.perf_counter() - started
    if throw and not solution.success:
        trajectory = outputs.trajectory
        raise SolveError(
            solution.message, solution.retcode, trajectory.final_t, trajectory.final_h, solution
        )
    return solution
