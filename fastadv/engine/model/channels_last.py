"""Kernels of convolutions in the layout in which a CPU convolves fastest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16)  # those that oneDNN convolves


@contextmanager
def kernels_channels_last(model: nn.Module) -> Iterator[None]:
    """Within this context the kernels of the plain 2-d convolutions of ``model`` are copies in
    ``channels_last``, which makes all activations so. They hold the same values and do not require
    grad; sums are taken in another order, so results are equal up to rounding.

    Kernels on another device than a CPU, and those that are in this layout already, stay.
    """
    places = [
        (module, module._parameters["weight"])
        for module in model.modules()
        if type(module) is nn.Conv2d and _wants_copy(module._parameters.get("weight"))
    ]
    copies = {id(weight): _copy(weight) for _, weight in places}  # a shared kernel has one copy
    try:
        for module, weight in places:
            module._parameters["weight"] = copies[id(weight)]
        yield
    finally:
        for module, weight in places:
            module._parameters["weight"] = weight


def _wants_copy(weight: Tensor | None) -> bool:
    if weight is None or weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return False
    # A 1x1 or one-channel kernel is contiguous in both layouts.
    informative = math.prod(weight.shape[2:]) > 1 and weight.shape[1] > 1
    return informative and not weight.is_contiguous(memory_format=torch.channels_last)


def _copy(weight: Tensor | None) -> nn.Parameter:
    if weight is None:
        raise ValueError("a convolution without a kernel has no copy")
    with torch.inference_mode(False):  # autograd does not save what the caller's mode would make
        values = weight.detach().contiguous(memory_format=torch.channels_last)
        return nn.Parameter(values, requires_grad=False)
