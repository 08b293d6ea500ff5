"""Tableaus of orders six to nine, a file a method.

The numbers are the published ones rounded to double precision. Vectors and rows are written
dense; a row of ``a`` ends at its last nonzero coefficient. Their conditions, thousands of sums over
trees, are checked by the tests rather than at each import.
"""

from diffsolve.solvers.explicit_rk.high_order.dp8 import DP8
from diffsolve.solvers.explicit_rk.high_order.vern6 import VERN6
from diffsolve.solvers.explicit_rk.high_order.vern7 import VERN7
from diffsolve.solvers.explicit_rk.high_order.vern9 import VERN9

__all__ = ["DP8", "VERN6", "VERN7", "VERN9"]
