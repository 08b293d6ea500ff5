"""Solves and reverse passes that torch runs, operation by operation."""
