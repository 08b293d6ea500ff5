"""The kernels that draw normals and divide intervals."""

from __future__ import annotations

from diffsolve.solvers.kernels.family import KernelSet


class _NoiseKernels(KernelSet):
    has_long_loops = True


NOISE = _NoiseKernels("stochastic/noise", "diffsolve.solvers.stochastic.noise.kernel_bridges")
