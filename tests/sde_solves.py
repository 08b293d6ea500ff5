"""Problems of the tests of SDEs."""

from __future__ import annotations

from diffsolve import (
    SOSRI,
    LambaEM,
    LambaEulerHeun,
)

ADAPTIVE = [LambaEM(), LambaEulerHeun(), SOSRI()]
LOOSE = {"rtol": 1e-2, "atol": 1e-2}


def of(alg) -> str:
    return next(iter(alg.interpretation))
