"""Records which code runs while a right-hand side is traced."""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

import torch
import torch.utils.dlpack

from diffsolve.engines.native.tracing.fingerprint.code_reads import ReadPlan

_TO_DLPACK: Any = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]


class CodeRecorder:
    """Records the code of every Python function that runs, by ``sys.setprofile``.

    Attributes
    ----------
    codes
        The code that ran, by identity.
    is_blocked
        Whether another profiler is installed. It is left alone, and nothing is recorded.
    exported_memory
        Whether a tensor's memory was handed to another library by a call that torch does not show.
    """

    def __init__(self) -> None:
        self.codes: dict[int, CodeType] = {}
        self.is_blocked = self.exported_memory = False

    def __enter__(self) -> CodeRecorder:
        self.is_blocked = sys.getprofile() is not None
        if not self.is_blocked:
            sys.setprofile(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_blocked:
            sys.setprofile(None)

    def _record(self, frame: Any, event: str, called: Any) -> None:
        if event == "call":
            code = frame.f_code
            self.codes[id(code)] = code
        elif called is _TO_DLPACK and event == "c_call":
            self.exported_memory = True

    def pause(self) -> None:
        """Stop recording while the tracer works, until ``resume``."""
        if not self.is_blocked:
            sys.setprofile(None)

    def resume(self) -> None:
        if not self.is_blocked:
            sys.setprofile(self._record)

    def plan(self) -> ReadPlan:
        """Where the recorded code looks."""
        why = "a profiler looks on, so that its reads could not be noted" if self.is_blocked else ""
        return ReadPlan(self.codes.values(), why)
