"""Whether a network's BatchNorms run in fastadv's own kernels: the setting ``fused_norm``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from fastadv.declared import coerce

FusedNorm = Literal["auto", "on", "off"]
"""The words of the setting. "auto" is "on" only on a device in ``FASTER``."""

FASTER: Mapping[str, str] = {}
"""A device's name -> the ``run`` of its rows of kind "fused norm" in bench/results/, every one of
which is faster with the own kernels beyond doubt: its 10-90 % interval is above 1."""


def choose(setting: str, device: torch.device) -> bool:
    """True if BatchNorm, ReLU and residuals run in fastadv's own kernels on ``device``.

    Always False on a CPU, where they are PyTorch's. Raises ``UserError`` for a word that is not
    one of ``FusedNorm``.
    """
    word = coerce("fused_norm", setting, FusedNorm)
    if device.type != "cuda" or word == "off":
        return False
    return word == "on" or torch.cuda.get_device_name(device) in FASTER
