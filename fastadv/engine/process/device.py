"""The device on which a process computes."""

from __future__ import annotations

import torch

from fastadv.engine.process import distributed
from fastadv.errors import UserError, brief


def choose_device(name: str) -> torch.device:
    """The device called ``name``: "auto", "cpu", "cuda" or "cuda:N".

    "auto" is CUDA if there is a GPU, otherwise the CPU. "cuda" without a number is the GPU with the
    number of this process's local rank. Raises ``UserError`` for another name, and for CUDA without
    a GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"Unknown device {brief(name)}; use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here; omit --device or use --device cpu.")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", distributed.local_rank())
    return device
