"""Brownian motions: reproducible from a seed, consistent over any intervals."""

from diffsolve.solvers.stochastic.noise.base import Noise, draw_seed
from diffsolve.solvers.stochastic.noise.path import BrownianPath

__all__ = ["BrownianPath", "Noise", "draw_seed"]
