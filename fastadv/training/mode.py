"""The mode that ``mode="auto"`` picks: the fastest for the device and the length of the run."""

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

# On 2 cores with AVX-512 bf16 an eager PGD-10 step of PreActResNet-18 runs at 99 % of the machine's
# matrix rate, and compiling it gains nothing (bench/results). With AMX the matrix products are
# several times faster, so the rest of a step counts. Compiling takes a minute or two, which a run
# of about ten minutes gains back; the threshold is twice that.
WORTH_COMPILING_SECONDS = 1200.0
# A captured run of fewer steps does not gain back the time to compile its kernels.
WORTH_COMPILING_STEPS = 1000


def first_mode(mode: str, device: torch.device) -> str:
    """``mode`` as far as the device decides it: "auto" becomes "captured" on CUDA and stays "auto"
    on a CPU. Raises ``UserError`` for an unknown mode, and for "captured" without CUDA."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if mode == "captured" and device.type != "cuda":
        raise UserError("mode='captured' replays CUDA graphs and needs a CUDA device; use 'auto'.")
    if mode == "auto" and device.type == "cuda":
        return "captured"
    return mode


def compiles(mode: str, total_steps: int | None) -> bool:
    """True if regions are compiled in ``mode``. A captured run that is short or of unknown length
    (``total_steps``, in calls) replays eager kernels."""
    if mode == "captured":
        return total_steps is not None and total_steps >= WORTH_COMPILING_STEPS
    return mode == "compiled"


def pick_mode(net: Network, x: Tensor, units: float, total_steps: int | None) -> str:
    """``"compiled"`` if the run is long enough to gain back the time to compile, else ``"eager"``.

    On a CPU without AMX, and for a run of unknown length, it is ``"eager"``. The estimated length
    is the time of one forward pass over ``x`` (B,C,H,W) in eval mode, times ``units`` (the cost of
    a step in forward passes), times ``total_steps``.
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
