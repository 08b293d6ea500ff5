"""Numbers of ``stable_steps.py``, for both engines: its kernels import nothing else of it."""

from __future__ import annotations

#: Directions of the complex plane in a table of sizes (``explicit_rk/stability.py``).
DIRECTIONS = 33
#: Logarithms of the growth of a mode in a time ``1 / |lambda|``, one for each row of the table.
GROWTHS = tuple(10.0**-j for j in range(1, 10))
#: Logarithm of the growth of a mode over the whole span, at most.
GROWTH_IN_ALL = 0.3
#: A step of more than this part of the limit is near it.
NEAR = 0.8
#: Evaluations of steps from one look at the Jacobian to the next, at most: it takes two.
MOST_WAIT = 64
#: Looks in a row until two agree, and what is agreement.
MOST_LOOKS, AGREEMENT = 4, 0.05
#: What is added of other directions to the one that is followed.
MIXED = 1e-3
#: Products with differences of two sizes that differ by more than this part are none.
NONLINEAR = 0.5
WIDER = 8.0
#: A step whose estimate of the stiffness is so many times that of the limit is looked at again ...
FASTER = 1.2
#: ... where the product with its size is more than this part of the interval of stability.
HALF = 0.5
#: A limit is new up to this wait, and where steps near it end is looked at, too.
NEW = 2
#: A step so many times longer than that of the last look is looked at again, too.
GROWN = 5.0
#: A step of more than so many times the limit at its end is refused.
TOO_LONG = 1.05
