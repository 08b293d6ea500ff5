"""Brownian motions: reproducible from a seed, consistent over any intervals."""

from diffsolve.solvers.stochastic.noise.base import Noise, draw_seed
from diffsolve.solvers.stochastic.noise.path import BrownianPath
from diffsolve.solvers.stochastic.noise.tree import VirtualBrownianTree

__all__ = ["BrownianPath", "Noise", "VirtualBrownianTree", "draw_seed"]
