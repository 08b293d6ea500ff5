"""The discrete adjoint of SDEs in machine code; ``reverse.py`` for ODEs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsolve.engines.native.programs.rows import RowProgram
from diffsolve.engines.native.runtime.reverse import Swept
from diffsolve.engines.native.runtime.threads import Crew, share_out
from diffsolve.solvers.kernels import layout as L


def sweep(
    crew: Crew, states: Tensor, cotangents: Sequence[Tensor | None], active: tuple[bool, ...]
) -> Swept:
    """Pull cotangents of the saved states and of the estimates back to the start.

    Parameters
    ----------
    crew, states
        Of the forward solve.
    cotangents
        Of the saved states ``(T, N)`` and of ``error, error_norm, stiffness`` ``(n,)``.
    active
        Which tensors of the parameters are differentiated.
    """
    native: Any = crew.parts[0].native
    program: RowProgram = native.program
    made: Any = crew.parts[0].template
    bars = [x if x is None or not x.numel() else x.contiguous() for x in cotangents]
    estimates = any(x is not None and x.numel() for x in bars[1:])
    step_vjp, diffusion_vjp, function = made.reverse(program, active, estimates)
    entries = program.active_entries(active)
    parts: list[Any] = []
    place = 0
    started = time.perf_counter()
    for forward in crew.parts:
        part: Any = forward.copy()
        part.stop = threading.Event()
        part.work()
        integers, n, dtype = part.integers, part.n, part.dtype
        part.work_of_noise(integers[L.AHEAD_COUNT])
        part.hold_new(L.G_ROW, np.empty(2 * integers[L.DIFFUSION_SIZE], dtype))
        part.hold_new(L.SUMS_BAR, np.zeros(2, dtype))
        room = integers[L.STATE_ROOM] * integers[L.STATE_SIZE]
        part.hold(L.STATES, states[place : place + room])
        place += room
        part.restart_counts()
        integers[L.NG] = 0
        part.hold_new(L.STATE_BAR, np.zeros(n, dtype))
        part.hold_new(L.BAR, np.empty(n, dtype))
        part.buffers = part.held[L.STATE_BAR], part.held[L.BAR]
        part.hold_new(L.P_BAR, np.zeros(max(len(entries), 1) * program.lanes, dtype))
        if bars[0] is not None and bars[0].numel():
            part.hold(L.SAVED_BARS, bars[0])
            integers[L.SAVED_BARS] += part.first * program.d * part.dtype.itemsize
        for slot, bar in zip(
            (L.ERROR_BARS, L.ERROR_NORM_BARS, L.STIFFNESS_BARS), bars[1:], strict=True
        ):
            if bar is not None and bar.numel():
                part.hold(slot, bar)
        if integers[L.STRIDE] > 1:
            each = n + 2 * integers[L.NOISE_SIZE]
            part.hold_new(L.SEGMENT, np.empty((integers[L.STRIDE], each), dtype))
        integers[L.FUSED_VJP], integers[L.DIFFUSION_VJP] = step_vjp, diffusion_vjp
        integers[L.SWEPT] = integers[L.ACCEPTED]
        integers[L.SWEEP_LAST] = integers[L.ACCEPTED] - 1
        parts.append(part)
    share_out(parts, lambda part: part.run(function))
    kernel_s = time.perf_counter() - started
    swapped = parts[0].integers[L.ACCEPTED] % 2
    u_bar = np.concatenate([part.buffers[swapped] for part in parts])
    lanes = np.sum([part.held[L.P_BAR] for part in parts], axis=0)
    p_bar = np.zeros(program.n_params, parts[0].dtype)
    p_bar[entries] = lanes.reshape(-1, program.lanes).sum(1)[: len(entries)]
    counts = (*parts[0].counts(), parts[0].integers[L.NG])
    return Swept(u_bar, torch.from_numpy(p_bar), counts, kernel_s)
