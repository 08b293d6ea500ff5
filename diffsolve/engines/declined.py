"""Why a right-hand side, or a solve, cannot run as machine code."""

from __future__ import annotations


class Declined(Exception):
    """The native engine cannot run this; the message says why, and continues "because"."""
