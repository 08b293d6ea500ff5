"""The problems of the library by name."""

from __future__ import annotations

import numpy as np

from diffsolve.problems import library
from diffsolve.problems.library import LibraryProblem

PROBLEMS = {
    name: getattr(library, name)
    for name in library.__all__
    if isinstance(getattr(library, name), LibraryProblem)
}
STIFF = [name for name, problem in PROBLEMS.items() if problem.stiff]


# The equations once more, written component by component with NumPy.


def np_pleiades(t, u, p):
    x, y, vx, vy = np.split(u, 4)
    ax, ay = np.zeros(7), np.zeros(7)
    for i in range(7):
        for j in range(7):
            if i != j:
                r = np.hypot(x[j] - x[i], y[j] - y[i])
                ax[i] += p[j] * (x[j] - x[i]) / r**3
                ay[i] += p[j] * (y[j] - y[i]) / r**3
    return np.concatenate((vx, vy, ax, ay))


def np_arenstorf(t, u, p):
    d1 = ((u[0] + p[0]) ** 2 + u[1] ** 2) ** 1.5
    d2 = ((u[0] - (1 - p[0])) ** 2 + u[1] ** 2) ** 1.5
    return np.array(
        [
            u[2],
            u[3],
            u[0] + 2 * u[3] - (1 - p[0]) * (u[0] + p[0]) / d1 - p[0] * (u[0] - (1 - p[0])) / d2,
            u[1] - 2 * u[2] - (1 - p[0]) * u[1] / d1 - p[0] * u[1] / d2,
        ]
    )


def np_hires(t, u, p):
    k1, k2, k3, k4, k5, k6, kp, km, ks, oks = p
    y1, y2, y3, y4, y5, y6, y7, y8 = u
    return np.array(
        [
            -k1 * y1 + k2 * y2 + k6 * y3 + oks,
            k1 * y1 - (k2 + k3) * y2,
            -(k6 + k1) * y3 + k2 * y4 + k5 * y5,
            k3 * y2 + k1 * y3 - (k4 + k2) * y4,
            -(k5 + k1) * y5 + k2 * (y6 + y7),
            -kp * y6 * y8 + k4 * y4 + k1 * y5 - k2 * y6 + km * y7,
            kp * y6 * y8 - (k2 + km + ks) * y7,
            -kp * y6 * y8 + (k2 + km + ks) * y7,
        ]
    )


# the substances, and how many of which are made (above zero) or used by each reaction
SUBSTANCES = "NO2 NO O3P O3 HO2 OH HCHO CO ALD MEO2 C2O3 CO2 PAN CH3O HNO3 O1D SO2 SO4 NO3 N2O5"
REACTIONS = """
NO2 = NO O3P; NO O3 = NO2; HO2 NO = NO2 OH; HCHO = HO2 HO2 CO; HCHO = CO; HCHO OH = HO2 CO;
ALD = MEO2 HO2 CO; ALD OH = C2O3; C2O3 NO = NO2 MEO2 CO2; C2O3 NO2 = PAN; PAN = C2O3 NO2;
MEO2 NO = CH3O NO2; CH3O = HCHO HO2; NO2 OH = HNO3; O3P = O3; O3 = O1D; O3 = O3P; O1D = OH OH;
O1D = O3P; SO2 OH = SO4 HO2; NO3 = NO; NO3 = NO2 O3P; NO2 O3 = NO3; NO3 NO2 = N2O5; N2O5 = NO3 NO2
"""


def np_pollu(t, u, p):
    place = {name: i for i, name in enumerate(SUBSTANCES.split())}
    slope = np.zeros_like(u * p[0])
    for k, reaction in zip(p, REACTIONS.split(";"), strict=True):
        before, after = ([place[name] for name in side.split()] for side in reaction.split("="))
        rate = k * np.prod(u[before])
        np.subtract.at(slope, before, rate)
        np.add.at(slope, after, rate)
    return slope


def np_brusselator(t, u, p):
    n = len(u) // 2
    a, b, alpha = np.broadcast_to(p, (3, n))
    slope = np.empty_like(u * p[0, 0])
    for i in range(n):
        x, y = u[i], u[n + i]
        x_left, y_left = (u[i - 1], u[n + i - 1]) if i > 0 else (1, 3)
        x_right, y_right = (u[i + 1], u[n + i + 1]) if i < n - 1 else (1, 3)
        grid = alpha[i] * (n + 1) ** 2
        slope[i] = a[i] + x**2 * y - (b[i] + 1) * x + grid * (x_left - 2 * x + x_right)
        slope[n + i] = b[i] * x - x**2 * y + grid * (y_left - 2 * y + y_right)
    return slope


def np_stiff_linear(t, u, p):
    reflection = np.eye(len(u)) - 2 / len(u)
    return -reflection @ np.diag(p) @ reflection @ u


FORMULAS = {
    "lotka_volterra": lambda t, u, p: np.array(
        [p[0] * u[0] - p[1] * u[0] * u[1], -p[2] * u[1] + p[3] * u[0] * u[1]]
    ),
    "lotka_volterra_time": lambda t, u, p: np.array(
        [p[0] * u[0] - p[1] * u[0] * u[1] * t, -p[2] * u[1] + t * p[3] * u[0] * u[1]]
    ),
    "lorenz": lambda t, u, p: np.array(
        [p[0] * (u[1] - u[0]), u[0] * (p[1] - u[2]) - u[1], u[0] * u[1] - p[2] * u[2]]
    ),
    "fitzhugh_nagumo": lambda t, u, p: np.array(
        [u[0] - u[0] ** 3 / 3 - u[1] + p[3], p[2] * (u[0] + p[0] - p[1] * u[1])]
    ),
    "pleiades": np_pleiades,
    "arenstorf": np_arenstorf,
    "rigid_body": lambda t, u, p: np.array(
        [p[0] * u[1] * u[2], p[1] * u[0] * u[2], p[2] * u[0] * u[1]]
    ),
    "henon_heiles": lambda t, u, p: np.array(
        [
            u[2],
            u[3],
            -u[0] - 2 * p[0] * u[0] * u[1],
            -u[1] - p[0] * (u[0] ** 2 - u[1] ** 2),
        ]
    ),
    "linear": lambda t, u, p: p @ u,
    "spiral": lambda t, u, p: u**3 @ p,
    "rober": lambda t, u, p: np.array(
        [
            -p[0] * u[0] + p[2] * u[1] * u[2],
            p[0] * u[0] - p[2] * u[1] * u[2] - p[1] * u[1] ** 2,
            p[1] * u[1] ** 2,
        ]
    ),
    "orego": lambda t, u, p: np.array(
        [
            p[0] * (u[1] + u[0] * (1 - p[2] * u[0] - u[1])),
            (u[2] - (1 + u[0]) * u[1]) / p[0],
            p[1] * (u[0] - u[2]),
        ]
    ),
    "hires": np_hires,
    "e5": lambda t, u, p: np.array(
        [
            -p[0] * u[0] - p[1] * u[0] * u[2],
            p[0] * u[0] - p[3] * p[2] * u[1] * u[2],
            p[0] * u[0] - p[1] * u[0] * u[2] - p[3] * p[2] * u[1] * u[2] + p[2] * u[3],
            p[1] * u[0] * u[2] - p[2] * u[3],
        ]
    ),
    "pollu": np_pollu,
    "van_der_pol": lambda t, u, p: np.array([u[1], p[0] * (1 - u[0] ** 2) * u[1] - u[0]]),
    "brusselator_1d": np_brusselator,
    "stiff_linear": np_stiff_linear,
    "prothero_robinson": lambda t, u, p: p[0] * (u - np.cos(t)) - np.sin(t),
}


def slopes_by_complex_steps(f, x: np.ndarray) -> np.ndarray:
    """``[i, ..., j]``: of ``f_i`` along each entry of ``x``; exact to rounding, at any scale."""
    columns = []
    for j in range(x.size):
        moved = x.astype(complex)
        moved.flat[j] += 1e-150j
        columns.append(f(moved).imag / 1e-150)
    return np.stack(columns, -1)
