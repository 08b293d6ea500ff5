"""What the solves of a problem leave for its next one."""

from __future__ import annotations

from typing import Any


class SolveCache:
    """What a problem keeps of its latest solve; no part of the problem itself.

    Copies and pickles of a problem leave it out, and so does a search for what ``f`` uses.

    Attributes
    ----------
    prepared
        A ``Prepared``: the arguments of the latest solve, checked and normalised.
    """

    __slots__ = ("prepared",)

    def __init__(self) -> None:
        self.prepared: object | None = None


class SolveMemo:
    """What a right-hand side keeps of its solves; each entry says itself whether it still holds.

    Attributes
    ----------
    lookup
        A ``LastLookup`` of the native engine: the program that was found.
    setup
        What the native engine made of the program for one method, settings and sensealg.
    """

    __slots__ = ("lookup", "setup")

    def __init__(self) -> None:
        self.lookup: object | None = None
        self.setup: Any = None
