"""The peers of the stiff solvers; ``stiff_cases.py`` says what a side is.

Every peer is set up for speed: SciPy's methods call right-hand sides and analytic Jacobians that
Numba compiled, and LSODA is called through ``odeint``, whose loop is compiled; CVODES has CasADi's
exact sparse Jacobian and is called through buffers; diffsol has its equations compiled by LLVM;
diffrax is jitted, and has the step size control of its documentation for stiff problems. A peer
that is not installed is left out, with a note.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import sympy
from native_cases import MOST_STEPS, Array
from native_peers import casadi_derivative, casadi_solve, installed, jax_modules
from stiff_cases import At, Counts, Run, Solved, StiffCase
from sympy.printing.str import StrPrinter


class Failed(RuntimeError):
    """A peer gave up."""


# ---------------------------------------------------------------------------------------------
# Equations as text
# ---------------------------------------------------------------------------------------------


class _Products(StrPrinter):
    """Whole powers as products."""

    def _print_Pow(self, expr: Any, rational: bool = False) -> str:
        base, exponent = expr.as_base_exp()
        if exponent.is_Integer and exponent > 1:
            return "(" + "*".join([self.parenthesize(base, 1000)] * int(exponent)) + ")"
        return super()._print_Pow(expr, rational)


def _symbols(case: StiffCase) -> tuple[list[Any], list[Any], list[Any]]:
    """State, parameters and derivatives."""
    u, p = (
        [sympy.Symbol(f"{x}{i}") for i in range(len(v))]
        for x, v in zip("yp", (case.u0, case.p), strict=True)
    )
    return u, p, [sympy.sympify(e) for e in case.equations(u, p)]


def _written(results: Iterable[Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """Common subexpressions with their names, and the results, as text."""
    printed = _Products().doprint
    shared, reduced = sympy.cse(
        list(results), symbols=(sympy.Symbol(f"x{i}") for i in itertools.count())
    )
    return [(str(name), printed(e)) for name, e in shared], [printed(e) for e in reduced]


@cache
def compiled_field(case: StiffCase) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """``f(t, u, p)`` and its Jacobian, compiled by Numba."""
    import numba

    u, p, derivatives = _symbols(case)
    jacobian = sympy.Matrix(derivatives).jacobian(u)
    inputs = [f"{x} = u[{i}]" for i, x in enumerate(u)] + [f"{x} = p[{i}]" for i, x in enumerate(p)]

    def function(name: str, shape: str, results: list[Any], places: list[str]) -> Any:
        shared, reduced = _written(results)
        lines = [*inputs, *(f"{x} = {e}" for x, e in shared), f"out = np.zeros({shape})"]
        lines += [f"out[{i}] = {e}" for i, e in zip(places, reduced, strict=True) if e != "0"]
        source = f"def {name}(t, u, p):\n    " + "\n    ".join([*lines, "return out"])
        space: dict[str, Any] = {"np": np}
        exec(source, space)
        return numba.njit(space[name])

    n = len(u)
    pairs = list(itertools.product(range(n), range(n)))
    return (
        function("f", f"{n}", derivatives, [str(i) for i in range(n)]),
        function(
            "jac",
            f"({n}, {n})",
            [jacobian[i, j] for i, j in pairs],
            [f"{i}, {j}" for i, j in pairs],
        ),
    )


def diffsl(case: StiffCase) -> str:
    """The equations in the language of diffsol."""
    u, p, derivatives = _symbols(case)
    shared, reduced = _written(derivatives)
    return "\n".join(
        [
            "in_i { "
            + ", ".join(f"{x} = {v!r}" for x, v in zip(p, case.p.tolist(), strict=True))
            + " }",
            "u_i { "
            + ", ".join(f"{x} = {v!r}" for x, v in zip(u, case.u0.tolist(), strict=True))
            + " }",
            *(f"{x} {{ {e} }}" for x, e in shared),
            "F_i { " + ", ".join(reduced) + " }",
        ]
    )


# ---------------------------------------------------------------------------------------------
# SciPy
# ---------------------------------------------------------------------------------------------


def solve_ivp_states(case: StiffCase, method: str, p: Array | None = None) -> At:
    """Radau or BDF, in Python around compiled equations; ``p``: other parameters."""
    from scipy.integrate import solve_ivp

    compiled, compiled_jac = compiled_field(case)
    given, span = case.p if p is None else p, (case.t0, float(case.t[-1]))

    def f(t: float, u: Array) -> Array:
        return compiled(t, u, given)

    def jac(t: float, u: Array) -> Array:
        return compiled_jac(t, u, given)

    def at(rtol: float, atol: float) -> Run:
        def run() -> Solved:
            result = solve_ivp(f, span, case.u0, method, case.t, jac=jac, rtol=rtol, atol=atol)
            if not result.success:
                raise Failed(result.message)
            return result.y.T, lambda: {x: int(result[x]) for x in ("nfev", "njev", "nlu")}

        return run

    return at


def lsoda_states(case: StiffCase) -> At:
    from scipy.integrate import ODEintWarning, odeint

    warnings.simplefilter("ignore", ODEintWarning)  # `Failed` says it

    f, jac = compiled_field(case)
    times, p, u0 = np.concatenate([[case.t0], case.t]), case.p, case.u0

    def at(rtol: float, atol: float) -> Run:
        def run() -> Solved:
            u, info = odeint(
                f,
                u0,
                times,
                args=(p,),
                Dfun=jac,
                tfirst=True,
                full_output=True,
                rtol=rtol,
                atol=atol,
                mxstep=MOST_STEPS,
            )
            if info["message"] != "Integration successful.":
                raise Failed(info["message"])
            return u[1:], lambda: {x: int(info[x][-1]) for x in ("nst", "nfe", "nje")}

        return run

    return at


# ---------------------------------------------------------------------------------------------
# CVODES, of CasADi
# ---------------------------------------------------------------------------------------------


def _cvodes(case: StiffCase, rtol: float, atol: float, **options: Any) -> Any:
    import casadi

    u, p = casadi.SX.sym("u", len(case.u0)), casadi.SX.sym("p", len(case.p))
    equations = case.equations(casadi.vertsplit(u), casadi.vertsplit(p))
    limits = {"abstol": atol, "reltol": rtol, "max_num_steps": MOST_STEPS}
    system = {"x": u, "p": p, "ode": casadi.vertcat(*equations)}
    quiet = {"show_eval_warnings": False, "disable_internal_warnings": True}
    options = {**limits, **quiet, **options}
    return casadi.integrator("solver", "cvodes", system, case.t0, case.t.tolist(), options)


def casadi_states(case: StiffCase) -> At:
    def at(rtol: float, atol: float) -> Run:
        solver = _cvodes(case, rtol, atol)
        u0, p, u = case.u0.copy(), case.p.copy(), np.empty(case.exact.shape)
        solve = casadi_solve(solver, u0, p, u)

        def counts() -> Counts:
            solver(x0=u0, p=p)
            return {
                x: int(solver.stats()[x]) for x in ("nsteps", "netfails", "nfevals", "nlinsetups")
            }

        def run() -> Solved:
            solve()
            return u, counts

        return run

    return at


def casadi_gradient(case: StiffCase, forward: bool, **options: Any) -> At:
    """By CVODES's adjoint, or its forward sensitivities."""

    def at(rtol: float, atol: float) -> Run:
        import casadi

        scale = casadi.DM(np.repeat(1 / case.size[:, None], len(case.t), 1))
        solver = _cvodes(case, rtol, atol, **options)
        return casadi_derivative(
            solver,
            case.u0,
            case.p,
            lambda u: casadi.sumsqr(u * scale) / case.exact.size,
            forward,
        )

    return at


# ---------------------------------------------------------------------------------------------
# diffsol
# ---------------------------------------------------------------------------------------------


@cache
def _diffsol(case: StiffCase, method: str) -> Any:
    import pydiffsol

    solver = pydiffsol.Ode(diffsl(case), ode_solver=getattr(pydiffsol, method))
    solver.t0 = case.t0
    return solver


def diffsol_states(case: StiffCase, method: str) -> At:
    solver, p, t = _diffsol(case, method), case.p, case.t

    def at(rtol: float, atol: float) -> Run:
        def run() -> Solved:
            solver.rtol, solver.atol = rtol, atol
            return solver.solve_dense(p, t).ys.T, dict

        return run

    return at


def diffsol_gradient(case: StiffCase, method: str, forward: bool) -> At:
    """By forward sensitivities, or the discrete adjoint."""
    solver, p, t = _diffsol(case, method), case.p, case.t
    scale = 2 / case.size[:, None] ** 2 / case.exact.size

    def at(rtol: float, atol: float) -> Run:
        def run() -> Array:
            solver.rtol, solver.atol = rtol, atol
            solver.sens_rtol, solver.sens_atol = rtol, atol
            if forward:
                solution = solver.solve_fwd_sens(p, t)
                by_u = solution.ys * scale
                return np.array([(s * by_u).sum() for s in solution.sens])
            solution, checkpoint = solver.solve_adjoint_fwd(p, t)
            return np.ravel(solver.solve_adjoint_bkwd(solution, checkpoint, solution.ys * scale))

        return run

    return at


# ---------------------------------------------------------------------------------------------
# diffrax
# ---------------------------------------------------------------------------------------------


@cache
def _diffrax(case: StiffCase) -> tuple[Callable[..., Any], Any]:
    """``solution(p, rtol, atol, **options)`` at the case's times, and ``u0`` and ``p`` for it."""
    jax, diffrax = jax_modules()
    u0, p, times = (jax.numpy.asarray(x) for x in (case.u0, case.p, case.t))

    def f(t: Any, u: Any, p: Any) -> Any:
        return jax.numpy.stack(case.equations(u, p))

    def solution(p: Any, rtol: Any, atol: Any, **options: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(f),
            diffrax.Kvaerno5(),
            case.t0,
            case.t[-1],
            None,  # the size of the first step: diffrax chooses
            u0,
            p,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, pcoeff=0.4, icoeff=0.3),
            **{"max_steps": 10**5, "throw": False, **options},
        )

    return solution, p


def diffrax_states(case: StiffCase) -> At:
    jax, _ = jax_modules()
    solution, p = _diffrax(case)

    @jax.jit
    def compiled(p: Any, rtol: Any, atol: Any) -> Any:
        found = solution(p, rtol, atol)
        names = ("num_steps", "num_accepted_steps", "num_rejected_steps")
        return found.ys, {name: found.stats[name] for name in names}

    def at(rtol: float, atol: float) -> Run:
        limits = jax.numpy.asarray(rtol), jax.numpy.asarray(atol)

        def run() -> Solved:
            u, stats = jax.block_until_ready(compiled(p, *limits))
            return u, lambda: {name: int(value) for name, value in stats.items()}

        return run

    return at


def diffrax_gradient(case: StiffCase, adjoint: str) -> At:
    """With an adjoint of diffrax that has a room for no more steps than the solve takes."""
    jax, diffrax = jax_modules()
    solution, p = _diffrax(case)
    scale = jax.numpy.asarray(1 / case.size)

    def at(rtol: float, atol: float) -> Run:
        steps = diffrax_states(case)(rtol, atol)()[1]()["num_steps"] + 1
        options: dict[str, Any] = {"adjoint": getattr(diffrax, adjoint)()}
        if adjoint == "RecursiveCheckpointAdjoint":
            options["adjoint"] = diffrax.RecursiveCheckpointAdjoint(checkpoints=steps)

        def loss(p: Any) -> Any:
            u = solution(p, rtol, atol, max_steps=steps, **options).ys
            return ((u * scale) ** 2).mean()

        if adjoint == "ForwardMode":
            compiled = jax.jit(jax.jacfwd(lambda p: (loss(p),) * 2, has_aux=True))
            return lambda: jax.block_until_ready(compiled(p))[0]
        compiled = jax.jit(jax.value_and_grad(loss))
        return lambda: jax.block_until_ready(compiled(p))[1]

    return at


# ---------------------------------------------------------------------------------------------
# Which there are
# ---------------------------------------------------------------------------------------------


class StiffSide(NamedTuple):
    """The package that it needs, and what makes it of a `StiffCase`."""

    package: str
    make: Callable[[StiffCase], At]


PEERS: dict[str, StiffSide] = {
    "CVODES (CasADi)": StiffSide("casadi", casadi_states),
    **{
        f"diffsol {method}": StiffSide("pydiffsol", partial(diffsol_states, method=method))
        for method in ("bdf", "esdirk34", "tr_bdf2")
    },
    "diffrax Kvaerno5": StiffSide("diffrax", diffrax_states),
    "SciPy LSODA": StiffSide("scipy", lsoda_states),
    "SciPy Radau": StiffSide("scipy", partial(solve_ivp_states, method="Radau")),
    "SciPy BDF": StiffSide("scipy", partial(solve_ivp_states, method="BDF")),
}

GRADIENTS: dict[str, StiffSide] = {
    "CVODES (CasADi), forward": StiffSide("casadi", partial(casadi_gradient, forward=True)),
    "CVODES (CasADi), adjoint": StiffSide("casadi", partial(casadi_gradient, forward=False)),
    **{
        f"diffsol {method}, {'forward' if forward else 'adjoint'}": StiffSide(
            "pydiffsol", partial(diffsol_gradient, method=method, forward=forward)
        )
        for method in ("bdf", "esdirk34", "tr_bdf2")
        for forward in (True, False)
    },
    **{
        f"diffrax {adjoint}": StiffSide("diffrax", partial(diffrax_gradient, adjoint=adjoint))
        for adjoint in ("RecursiveCheckpointAdjoint", "ForwardMode", "DirectAdjoint")
    },
}


def present(sides: dict[str, StiffSide]) -> dict[str, StiffSide]:
    return {name: side for name, side in sides.items() if installed(side.package)}
