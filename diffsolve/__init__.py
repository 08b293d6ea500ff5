"""diffsolve: differentiable ODE solvers for PyTorch that expose their internal estimates."""

from diffsolve import nn, problems, regularization
from diffsolve.adjoints.backsolve import BacksolveAdjoint, BacksolveWarning
from diffsolve.adjoints.discrete import DiscreteAdjoint
from diffsolve.adjoints.interpolating import InterpolatingAdjoint
from diffsolve.adjoints.sensealg import Sensealg
from diffsolve.jacobian import jacobian_sparsity
from diffsolve.problems.ode import ODEProblem
from diffsolve.solution import ReturnCode, Solution, SolveError, Stats, Steps
from diffsolve.solve import solve
from diffsolve.solvers.algorithm import Algorithm
from diffsolve.solvers.continuous_extension import Interpolant
from diffsolve.solvers.controllers import Controller, IController, PIController, PIDController
from diffsolve.solvers.explicit_rk.methods import (
    BS3,
    DP5,
    DP8,
    RK4,
    Euler,
    ExplicitRK,
    Heun,
    Midpoint,
    Ralston,
    Tsit5,
    Vern6,
    Vern7,
    Vern9,
)
from diffsolve.solvers.explicit_rk.tableau import Tableau
from diffsolve.solvers.order_conditions import TableauError

__version__ = "0.1.0"

__all__ = [
    "BS3",
    "DP5",
    "DP8",
    "RK4",
    "Algorithm",
    "BacksolveAdjoint",
    "BacksolveWarning",
    "Controller",
    "DiscreteAdjoint",
    "Euler",
    "ExplicitRK",
    "Heun",
    "IController",
    "Interpolant",
    "InterpolatingAdjoint",
    "Midpoint",
    "ODEProblem",
    "PIController",
    "PIDController",
    "Ralston",
    "ReturnCode",
    "Sensealg",
    "Solution",
    "SolveError",
    "Stats",
    "Steps",
    "Tableau",
    "TableauError",
    "Tsit5",
    "Vern6",
    "Vern7",
    "Vern9",
    "jacobian_sparsity",
    "nn",
    "problems",
    "regularization",
    "solve",
]
