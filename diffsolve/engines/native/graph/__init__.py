"""Expressions and their derivatives."""
