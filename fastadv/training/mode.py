"""What ``mode="auto"`` means: the fastest mode for this device and the work ahead."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fastadv.engine.model import guard
from fastadv.engine.model.network import Network
from fastadv.engine.model.untouched import untouched
from fastadv.engine.process import distributed
from fastadv.errors import UserError, unknown

MODES = ("auto", "eager", "compiled", "captured")

# On 2 cores with AVX-512 bf16 an eager PGD-10 step of PreActResNet-18 already runs at 99 % of the
# machine's matrix rate, and compiling it won nothing (bench/results). With AMX the products are
# several times faster and the rest of a step shows: there compiling wins a minute or two of
# compilation back within about ten minutes of work; twice that leaves room.
WORTH_COMPILING_SECONDS = 1200.0
# Inductor's kernels inside a captured graph pay for their compilation over a run, not over a test.
WORTH_COMPILING_STEPS = 1000


def first_mode(mode: str, device: torch.device) -> str:
    """``mode`` as far as the device alone decides; "auto" may stay open on a CPU."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if mode == "captured" and device.type != "cuda":
        raise UserError("mode='captured' replays CUDA graphs and needs a CUDA device; use 'auto'.")
    if mode == "auto" and device.type == "cuda":
        return "captured"
    return mode


def compiles(mode: str, total_steps: int | None) -> bool:
    """Whether regions are compiled in ``mode``; a captured run that is short, or may be, replays
    eager kernels."""
    if mode == "captured":
        return total_steps is not None and total_steps >= WORTH_COMPILING_STEPS
    return mode == "compiled"


def pick_mode(net: Network, x: Tensor, units: float, total_steps: int | None) -> str:
    """``"compiled"`` if the run ahead is long enough to win the compiler's time back.

    On a CPU without AMX it never is. The run is estimated from one forward pass over ``x``
    (B,C,H,W) in eval mode, ``units`` times as long a step, and ``total_steps``; unknown length is
    eager.
    """
    if total_steps is None or not torch.cpu._is_amx_tile_supported():
        return "eager"
    with torch.no_grad(), guard.train_flags(net.model, False), untouched(net.model):
        net.logits(x)
        began = time.perf_counter()
        net.logits(x)
        seconds = time.perf_counter() - began
    long = seconds * units * total_steps > WORTH_COMPILING_SECONDS
    return "compiled" if distributed.any_process(long, net.device) else "eager"
