"""What is solved."""

from diffsolve.problems import library

__all__ = ["library"]
