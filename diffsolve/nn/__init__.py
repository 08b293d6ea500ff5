"""Neural differential equations as ``torch.nn`` modules."""

from diffsolve.nn.ode import NeuralODE
from diffsolve.nn.sde import NeuralSDE

__all__ = ["NeuralODE", "NeuralSDE"]
