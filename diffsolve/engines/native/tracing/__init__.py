"""From a right-hand side to a graph of expressions."""
