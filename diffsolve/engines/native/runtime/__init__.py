"""Solves and reverse passes that run as machine code."""
