"""The peers of the native engine; ``native_cases.py`` says what a side is.

Every peer is set up as its documentation advises for speed: diffrax jitted, with arrays as
arguments, and for gradients with no more checkpoints and steps than needed; CVODES with the Adams
formulas and functional iteration, called through CasADi's buffers; heyoka's integrator made once
and reset. A peer that is not installed is left out, with a note.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from native_cases import MOST_STEPS, Array, At, Case, Run
from timing import Times, in_turn
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

# ---------------------------------------------------------------------------------------------
# torchdiffeq
# ---------------------------------------------------------------------------------------------


def torchdiffeq_states(case: Case, method: str) -> At:
    f, u0, p = case.problem.f, case.problem.u0, case.problem.p
    times = torch.from_numpy(case.t)

    def at(tolerance: float) -> Run:
        @torch.no_grad()
        def run() -> Array:
            integrated: Any = odeint(
                lambda t, u: f(t, u, p), u0, times, rtol=tolerance, atol=tolerance, method=method
            )
            return integrated.numpy()

        return run

    return at


def torchdiffeq_gradient(case: Case, adjoint: bool) -> At:
    f, u0, p = case.problem.f, case.problem.u0, case.problem.p.clone().requires_grad_()
    times = torch.from_numpy(case.t)
    integrate: Any = odeint_adjoint if adjoint else odeint
    options: dict[str, Any] = {"adjoint_params": (p,)} if adjoint else {}

    def at(tolerance: float) -> Run:
        def run() -> Tensor | None:
            p.grad = None
            u = integrate(
                lambda t, u: f(t, u, p),
                u0,
                times,
                rtol=tolerance,
                atol=tolerance,
                method="dopri5",
                **options,
            )
            u[-1].sum().backward()
            return p.grad

        return run

    return at


# ---------------------------------------------------------------------------------------------
# diffrax
# ---------------------------------------------------------------------------------------------


def jax_modules() -> tuple[Any, Any]:
    """``jax`` and ``diffrax``, in double precision."""
    import diffrax
    import jax

    jax.config.update("jax_enable_x64", True)
    # on one core, a thread that runs the call only costs the switches to it
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return jax, diffrax


def _diffrax_solve(f: Callable[..., Any], t: Array, method: str) -> Callable[..., Any]:
    """``states(u0, p, rtol, atol)`` at the times ``t``."""
    jax, diffrax = jax_modules()
    times = jax.numpy.asarray(t)

    def states(u0: Any, p: Any, rtol: Any, atol: Any, **options: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(f),
            getattr(diffrax, method)(),
            t[0],
            t[-1],
            None,  # the size of the first step: diffrax chooses
            u0,
            p,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            **{"max_steps": None, **options},
        ).ys

    return states


def _jax_field(case: Case) -> Callable[..., Any]:
    numpy, arrays = jax_modules()[0].numpy, case.arrays
    if arrays is not None:
        return lambda t, u, p: arrays(numpy, u, p)
    return lambda t, u, p: numpy.stack(case.equations(u, p))


def diffrax_states(case: Case, method: str) -> At:
    jax, _ = jax_modules()
    compiled = jax.jit(_diffrax_solve(_jax_field(case), case.t, method))
    u0, p = jax.numpy.asarray(case.u0), jax.numpy.asarray(case.p)

    def at(tolerance: float) -> Run:
        limit = jax.numpy.asarray(tolerance)
        return lambda: compiled(u0, p, limit, limit).block_until_ready()

    return at


def diffrax_gradient(case: Case, adjoint: str, steps: int = 256) -> At:
    """With an adjoint of diffrax; ``steps``: no fewer than the solve takes, for its tape."""
    jax, diffrax = jax_modules()
    states = _diffrax_solve(_jax_field(case), case.t, "Tsit5")
    u0, p = jax.numpy.asarray(case.u0), jax.numpy.asarray(case.p)

    def at(tolerance: float) -> Run:
        if adjoint == "RecursiveCheckpointAdjoint":
            chosen = diffrax.RecursiveCheckpointAdjoint(checkpoints=steps)
        elif adjoint == "BacksolveAdjoint":
            control = diffrax.PIDController(rtol=tolerance, atol=tolerance)
            chosen = diffrax.BacksolveAdjoint(
                solver=diffrax.Tsit5(), stepsize_controller=control, max_steps=16 * steps
            )
        else:
            chosen = getattr(diffrax, adjoint)()

        def loss(p: Any) -> Any:
            u = states(u0, p, tolerance, tolerance, adjoint=chosen, max_steps=steps)
            return u[-1].sum()

        if adjoint == "ForwardMode":
            compiled = jax.jit(jax.jacfwd(lambda p: (loss(p),) * 2, has_aux=True))
            return lambda: jax.block_until_ready(compiled(p))[0]
        compiled = jax.jit(jax.value_and_grad(loss))
        return lambda: jax.block_until_ready(compiled(p))[1]

    return at


def diffrax_network(
    weights: Sequence[Array], u0: Array, times: Array, data: Array, rtol: float, atol: float
) -> tuple[Run, Run]:
    """Solve, and gradient of the mean squared error, of ``u' = W2 tanh(W1 u^3 + b1) + b2``."""
    jax, diffrax = jax_modules()
    start, true = jax.numpy.asarray(u0), jax.numpy.asarray(data)
    given = tuple(jax.numpy.asarray(w) for w in weights)

    def f(t: Any, u: Any, p: Any) -> Any:
        w1, b1, w2, b2 = p
        return w2 @ jax.numpy.tanh(w1 @ u**3 + b1) + b2

    states = _diffrax_solve(f, times, "Tsit5")

    def loss(p: Any) -> Any:
        adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=128)
        u = states(start, p, rtol, atol, adjoint=adjoint, max_steps=128)
        return ((u - true) ** 2).mean()

    forward, backward = jax.jit(states), jax.jit(jax.value_and_grad(loss))
    return (
        lambda: forward(start, given, rtol, atol).block_until_ready(),
        lambda: jax.block_until_ready(backward(given)),
    )


# ---------------------------------------------------------------------------------------------
# heyoka
# ---------------------------------------------------------------------------------------------


def _heyoka_system(case: Case) -> list:
    import heyoka

    u = heyoka.make_vars(*(f"u{i}" for i in range(len(case.u0))))
    p = [heyoka.par[i] for i in range(len(case.p))]
    return list(zip(u, case.equations(u, p), strict=True))


def heyoka_states(case: Case) -> At:
    import heyoka

    system, u0, p = _heyoka_system(case), case.u0, case.p

    def at(tolerance: float) -> Run:
        integrator = heyoka.taylor_adaptive(system, list(u0), pars=list(p), tol=tolerance)

        def run() -> Array:
            integrator.time = case.t[0]
            integrator.state[:] = u0
            integrator.pars[:] = p
            return integrator.propagate_grid(case.t)[-1]

        return run

    return at


def heyoka_gradient(case: Case) -> At:
    """By the variational equations."""
    import heyoka

    n, p = len(case.u0), case.p
    system = heyoka.var_ode_sys(_heyoka_system(case), heyoka.var_args.params, order=1)

    def at(tolerance: float) -> Run:
        integrator = heyoka.taylor_adaptive(system, list(case.u0), pars=list(p), tol=tolerance)
        start = integrator.state.copy()

        def run() -> Array:
            integrator.time = case.t[0]
            integrator.state[:] = start
            integrator.pars[:] = p
            integrator.propagate_grid(case.t)
            return integrator.state[n:].reshape(n, -1).sum(0)

        return run

    return at


# ---------------------------------------------------------------------------------------------
# CVODES, of CasADi
# ---------------------------------------------------------------------------------------------


def _cvodes(case: Case, tolerance: float) -> Any:
    import casadi

    u, p = casadi.SX.sym("u", len(case.u0)), casadi.SX.sym("p", len(case.p))
    equations = case.equations(casadi.vertsplit(u), casadi.vertsplit(p))
    options = {
        "abstol": tolerance,
        "reltol": tolerance,
        "linear_multistep_method": "adams",
        "nonlinear_solver_iteration": "functional",
        "max_num_steps": MOST_STEPS,
        "show_eval_warnings": False,
    }
    system = {"x": u, "p": p, "ode": casadi.vertcat(*equations)}
    return casadi.integrator("solver", "cvodes", system, case.t[0], list(case.t[1:]), options)


def casadi_solve(solver: Any, u0: Array, p: Array, u: Array) -> Run:
    """A solve through CasADi's buffers, which writes the states to ``u``."""
    buffer, evaluate = solver.buffer()
    buffer.set_arg(solver.index_in("x0"), memoryview(u0))
    buffer.set_arg(solver.index_in("p"), memoryview(p))
    buffer.set_res(solver.index_out("xf"), memoryview(u))

    def run(keep: object = (buffer, u0, p, u)) -> None:  # CasADi has only their addresses
        evaluate()

    return run


def casadi_derivative(
    solver: Any, u0: Array, p: Array, loss_of: Callable[[Any], Any], forward: bool
) -> Run:
    """Gradient of a loss of the states, by CVODES's adjoint or its forward sensitivities."""
    import casadi

    variables = casadi.MX.sym("p", len(p))
    loss = loss_of(solver(x0=casadi.DM(u0), p=variables)["xf"])
    derivative = casadi.jtimes(loss, variables, casadi.DM.eye(len(p)))
    if not forward:
        derivative = casadi.gradient(loss, variables)
    function = casadi.Function("gradient", [variables], [loss, derivative])
    buffer, evaluate = function.buffer()
    given, value, gradient = p.copy(), np.empty(1), np.empty(len(p))
    buffer.set_arg(0, memoryview(given))
    buffer.set_res(0, memoryview(value))
    buffer.set_res(1, memoryview(gradient))

    def run(keep: object = (buffer, given, value)) -> Array:
        evaluate()
        return gradient

    return run


def casadi_states(case: Case) -> At:
    def at(tolerance: float) -> Run:
        u = np.empty((len(case.t), len(case.u0)))
        u[0] = case.u0
        solve = casadi_solve(_cvodes(case, tolerance), case.u0.copy(), case.p.copy(), u[1:])

        def run() -> Array:
            solve()
            return u

        return run

    return at


def casadi_gradient(case: Case, forward: bool) -> At:
    """By CVODES's adjoint, or its forward sensitivities."""

    def at(tolerance: float) -> Run:
        import casadi

        solver = _cvodes(case, tolerance)
        return casadi_derivative(solver, case.u0, case.p, lambda u: casadi.sum1(u[:, -1]), forward)

    return at


# ---------------------------------------------------------------------------------------------
# SciPy
# ---------------------------------------------------------------------------------------------


def scipy_states(case: Case, method: str) -> At:
    from scipy.integrate import solve_ivp

    p, arrays, equations = case.p, case.arrays, case.equations
    numbers = p.tolist()

    def f(t: float, u: Array) -> Any:
        # of a small system, Python's numbers are faster than NumPy's
        return equations(u.tolist(), numbers) if arrays is None else arrays(np, u, p)

    def at(tolerance: float) -> Run:
        span, limits = (case.t[0], case.t[-1]), {"rtol": tolerance, "atol": tolerance}
        return lambda: solve_ivp(f, span, case.u0, method=method, t_eval=case.t, **limits).y.T

    return at


# ---------------------------------------------------------------------------------------------
# Which there are
# ---------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """The package that it needs, and what makes it of a `Case`."""

    package: str
    make: Callable[[Case], At]


PEERS: dict[str, Side] = {
    "heyoka": Side("heyoka", heyoka_states),
    "diffrax Tsit5": Side("diffrax", partial(diffrax_states, method="Tsit5")),
    "diffrax Dopri8": Side("diffrax", partial(diffrax_states, method="Dopri8")),
    "CVODES (CasADi)": Side("casadi", casadi_states),
    "SciPy RK45": Side("scipy", partial(scipy_states, method="RK45")),
    "SciPy DOP853": Side("scipy", partial(scipy_states, method="DOP853")),
    "torchdiffeq dopri5": Side("torchdiffeq", partial(torchdiffeq_states, method="dopri5")),
    "torchdiffeq dopri8": Side("torchdiffeq", partial(torchdiffeq_states, method="dopri8")),
}

GRADIENTS: dict[str, Side] = {
    "torchdiffeq odeint": Side("torchdiffeq", partial(torchdiffeq_gradient, adjoint=False)),
    "torchdiffeq odeint_adjoint": Side("torchdiffeq", partial(torchdiffeq_gradient, adjoint=True)),
    **{
        f"diffrax {adjoint}": Side("diffrax", partial(diffrax_gradient, adjoint=adjoint))
        for adjoint in ("RecursiveCheckpointAdjoint", "BacksolveAdjoint", "ForwardMode")
    },
    "heyoka, variational": Side("heyoka", heyoka_gradient),
    "CVODES (CasADi), adjoint": Side("casadi", partial(casadi_gradient, forward=False)),
    "CVODES (CasADi), forward": Side("casadi", partial(casadi_gradient, forward=True)),
}


@cache
def installed(package: str) -> bool:
    """Whether a peer can be imported; says so where it cannot."""
    try:
        import_module(package)
    except (ImportError, OSError) as error:
        print(f"({package} is left out: {error})", flush=True)
        return False
    return True


def present(sides: Mapping[str, Side]) -> dict[str, Side]:
    return {name: side for name, side in sides.items() if installed(side.package)}


def one_core() -> None:
    """Keep this process, and the threads that peers may start, on one core."""
    # JAX reads this when it is imported
    single = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {single}".strip()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for side in {**PEERS, **GRADIENTS}.values():
        installed(side.package)


def timed(sides: Mapping[str, Run], rounds: int, least: float, warmup: int = 1) -> dict[str, Times]:
    """`in_turn`, with all that is there now left out of the garbage collections.

    With JAX and its compiled functions a collection takes 0.2 s. One starts every turn, and those
    that Python starts by itself would count as the time of a side that makes many objects.
    """
    gc.collect()
    gc.freeze()
    return in_turn(sides, rounds, least, warmup)


def versions() -> str:
    """Of the peers beyond those that `timing.machine` names."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("numba", "llvmlite", "jax", "diffrax", "heyoka", "casadi"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)
