"""diffsolve: differentiable solvers of ODEs and SDEs for PyTorch that expose their estimates."""

from diffsolve import nn as nn
from diffsolve import problems as problems
from diffsolve import regularization
from diffsolve.adjoints.backsolve import BacksolveAdjoint, BacksolveWarning
from diffsolve.adjoints.discrete import DiscreteAdjoint
from diffsolve.adjoints.interpolating import InterpolatingAdjoint
from diffsolve.adjoints.reversible import ReversibleAdjoint
from diffsolve.adjoints.sensealg import Sensealg
from diffsolve.jacobian import check_jacobian, jacobian_sparsity
from diffsolve.problems.ode import ODEProblem
from diffsolve.problems.sde import SDEProblem
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
from diffsolve.solvers.rosenbrock.methods import (
    ROS3P,
    Rodas3,
    Rodas4,
    Rodas4P,
    Rodas5,
    Rodas5P,
    Rosenbrock,
    Rosenbrock23,
    Rosenbrock32,
)
from diffsolve.solvers.rosenbrock.tableau import RosenbrockTableau
from diffsolve.solvers.sdirk.methods import (
    SDIRK,
    SDIRK2,
    TRBDF2,
    ImplicitEuler,
    ImplicitMidpoint,
    KenCarp3,
    KenCarp4,
    KenCarp5,
    Kvaerno3,
    Kvaerno4,
    Kvaerno5,
    Trapezoid,
)
from diffsolve.solvers.sdirk.tableau import SDIRKTableau
from diffsolve.solvers.stochastic.implicit import ImplicitEM, ImplicitRKMil
from diffsolve.solvers.stochastic.low_order import EM, EulerHeun, LambaEM, LambaEulerHeun
from diffsolve.solvers.stochastic.milstein import RKMil, RKMilCommute, RKMilGeneral
from diffsolve.solvers.stochastic.noise import BrownianPath, VirtualBrownianTree
from diffsolve.solvers.stochastic.reversible import ReversibleHeun
from diffsolve.solvers.stochastic.srk import SOSRA, SOSRI, SRA, SRA1, SRI, SRIW1
from diffsolve.solvers.stochastic.tableau import SRATableau, SRITableau
from diffsolve.solvers.switching import AutoSwitch, AutoTsit5, AutoVern7

__version__ = "0.1.0"

# not nn and problems: "import *" would take the place of the user's torch.nn
__all__ = [
    "BS3",
    "DP5",
    "DP8",
    "EM",
    "RK4",
    "ROS3P",
    "SDIRK",
    "SDIRK2",
    "SOSRA",
    "SOSRI",
    "SRA",
    "SRA1",
    "SRI",
    "SRIW1",
    "TRBDF2",
    "Algorithm",
    "AutoSwitch",
    "AutoTsit5",
    "AutoVern7",
    "BacksolveAdjoint",
    "BacksolveWarning",
    "BrownianPath",
    "Controller",
    "DiscreteAdjoint",
    "Euler",
    "EulerHeun",
    "ExplicitRK",
    "Heun",
    "IController",
    "ImplicitEM",
    "ImplicitEuler",
    "ImplicitMidpoint",
    "ImplicitRKMil",
    "Interpolant",
    "InterpolatingAdjoint",
    "KenCarp3",
    "KenCarp4",
    "KenCarp5",
    "Kvaerno3",
    "Kvaerno4",
    "Kvaerno5",
    "LambaEM",
    "LambaEulerHeun",
    "Midpoint",
    "ODEProblem",
    "PIController",
    "PIDController",
    "RKMil",
    "RKMilCommute",
    "RKMilGeneral",
    "Ralston",
    "ReturnCode",
    "ReversibleAdjoint",
    "ReversibleHeun",
    "Rodas3",
    "Rodas4",
    "Rodas4P",
    "Rodas5",
    "Rodas5P",
    "Rosenbrock",
    "Rosenbrock23",
    "Rosenbrock32",
    "RosenbrockTableau",
    "SDEProblem",
    "SDIRKTableau",
    "SRATableau",
    "SRITableau",
    "Sensealg",
    "Solution",
    "SolveError",
    "Stats",
    "Steps",
    "Tableau",
    "TableauError",
    "Trapezoid",
    "Tsit5",
    "Vern6",
    "Vern7",
    "Vern9",
    "VirtualBrownianTree",
    "check_jacobian",
    "jacobian_sparsity",
    "regularization",
    "solve",
]
