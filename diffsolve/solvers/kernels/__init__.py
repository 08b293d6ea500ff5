"""What compiled kernels of all families share. Only ``layout`` may be imported without Numba."""
