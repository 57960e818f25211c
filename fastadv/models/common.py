"""Shared by all architectures: input normalisation, small convolutions, initial weights."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadv.declared import parse_number
from fastadv.errors import UserError, brief


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel: (B,C,H,W) pixels in [0,1] to the scale a network expects.

    It is a layer, so that attacks and eps are in pixels for every scaling.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def make_normalize(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> nn.Module:
    """A ``Normalize`` for ``channels`` channels, or ``nn.Identity`` if neither is given.

    If only one is given, the other is mean 0 or std 1. Raises ``UserError`` for a wrong
    number of values or a std that is not positive.
    """
    if mean is None and std is None:
        return nn.Identity()
    mean = [0.0] * channels if mean is None else _numbers("mean", mean)
    std = [1.0] * channels if std is None else _numbers("std", std)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise UserError(
                f"{name} has {len(values)} values but the images have {channels} channels; "
                "give one value per channel."
            )
        if not all(math.isfinite(value) for value in values):
            raise UserError(f"{name} must be finite numbers, not {values}.")
    if min(std) <= 0:
        raise UserError(f"std must be above 0 in every channel, not {std}.")
    return Normalize(mean, std)


def _numbers(name: str, values: Any) -> list[float]:
    """``values`` as numbers. Raises ``UserError`` for anything but a sequence of them."""
    values = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{name} is a list with a number per channel, not {brief(values)}.")
    return [parse_number(value, name) for value in values]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias: a BatchNorm follows or precedes it."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def make_dropout(probability: float) -> nn.Module:
    """Dropout of single values; ``nn.Identity`` at 0, which draws no random numbers."""
    return nn.Dropout(probability) if probability > 0 else nn.Identity()


def initialize(model: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out, ReLU), BatchNorm 1 and 0, zero biases.

    He et al. 2015; used by the Wide-ResNet of TRADES and torchvision's ResNets. The other published
    networks for small images use PyTorch's default initial weights.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
