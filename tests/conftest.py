"""Settings that every test shares: one thread, fixed seeds, reproducible property tests."""

import random

import hypothesis
import numpy as np
import pytest
import torch

# The systems of the tests are small: threads cost more than they save, and with one thread sums
# are taken in the same order on every machine.
torch.set_num_threads(1)


class _TorchRandom:
    """PyTorch's default generator, as Hypothesis wants it: seeded anew for each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # Hypothesis keeps only a weak reference to it
hypothesis.register_random(_torch_random)

# The first example of a test pays for tracing and compiling, so a deadline would be flaky.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seed_generators() -> None:
    """Start every test from the same seeds, whichever tests ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
