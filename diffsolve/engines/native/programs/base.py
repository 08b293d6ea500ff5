"""What compiled right-hand sides share: their functions, made when they are first asked for."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from diffsolve.engines.native.codegen.llvm import Code
from diffsolve.engines.native.declined import Declined
from diffsolve.engines.native.graph.expression import Node, Pool, needed
from diffsolve.engines.native.locks import compiling

_log = logging.getLogger("diffsolve")
#: A function of more operations than this takes a second and more to compile.
MOST_OPERATIONS = 25_000


class Program(ABC):
    """A right-hand side, or a drift with its diffusion, as machine code.

    It is found by the content of its graph, and holds no tensor of the user's.

    Parameters
    ----------
    pool, outputs
        The graph: expressions of the inputs ``("t", 0)``, ``("u", i)`` and ``("p", j)``.
    blocks
        First entry and length of each tensor among the flat parameters.
    is_float32
        Whether the state is float32 rather than float64.

    Attributes
    ----------
    n_params
        Numbers in all tensors that it uses besides the state.
    size
        Operations of one evaluation.
    compile_s
        Seconds spent on compiling so far.
    templates
        What kernels are given in solves with it; see ``runtime/template.py``.
    """

    #: What makes a function, by its kind: called with the program and the key.
    makers: ClassVar[Mapping[str, Callable[..., Any]]]

    def __init__(
        self,
        pool: Pool,
        outputs: Sequence[Node],
        blocks: Sequence[tuple[int, int]],
        is_float32: bool,
    ):
        self.pool, self.is_float32 = pool, is_float32
        self.blocks = tuple(blocks)
        self.n_params = sum(count for _, count in blocks)
        self.size = len(needed(outputs))
        self.compile_s = 0.0
        self.templates: dict[Any, Any] = {}
        self._codes: dict[tuple[Any, ...], Code | None] = {}
        pool.most = 10 * MOST_OPERATIONS

    def address(self, kind: str, *key: Any) -> int:
        """Address of a function; 0 where it would be too long to be worth it.

        Parameters
        ----------
        kind
            One of ``makers``.
        key
            What else decides what the function computes, such as the blocks of parameters that are
            differentiated.

        Raises
        ------
        Declined
            If it cannot be compiled.
        """
        name = (kind, *key)
        code = self._codes.get(name, self)
        if code is self:
            with compiling:
                if name not in self._codes:
                    started = time.perf_counter()
                    self._codes[name] = self._compiled(self.makers[kind](self, *key))
                    self.compile_s += time.perf_counter() - started
            code = self._codes[name]
        return 0 if code is None else code.address  # type: ignore[union-attr]

    def _compiled(self, source: Any) -> Code | None:
        if source is None:
            return None
        size = self.operations(source)
        if size > MOST_OPERATIONS:
            raise Declined(f"its derivative is too large: {size:,} scalar operations")
        try:
            return self.translate(source)
        except Declined:
            raise
        except Exception as error:  # an LLVM that this was not written for
            reason = f"{type(error).__name__}: {error}"
            _log.warning("diffsolve: LLVM could not compile a right-hand side: %s", reason)
            raise Declined(f"LLVM could not compile it, {reason}") from error

    @abstractmethod
    def operations(self, source: Any) -> int:
        """Scalar operations of what one of ``makers`` gave."""

    @abstractmethod
    def translate(self, source: Any) -> Code:
        """Machine code of what one of ``makers`` gave."""

    def active_entries(self, active: tuple[bool, ...]) -> list[int]:
        """Positions in the flat parameters of the blocks that are differentiated."""
        blocks = zip(self.blocks, active, strict=True)
        return [i for (offset, count), on in blocks if on for i in range(offset, offset + count)]
