"""A small network that computes in float64 whatever its images are, for runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class WideNet(nn.Module):
    """Two convolutions with BatchNorm: (B,C,H,W) to (B,classes)."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, num_classes)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = functional.softplus(self.bn1(self.conv1(x.to(torch.float64))))
        x = functional.softplus(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def wide_net(num_classes: int = 10, in_channels: int = 1) -> WideNet:
    """For ``--model wide_net:wide_net``."""
    return WideNet(num_classes, in_channels)
