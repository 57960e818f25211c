"""A network of two convolutions, for runs of seconds: ``--model small_net:SmallNet``."""

from __future__ import annotations

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Images (B,C,H,W) of any size to logits (B,num_classes)."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits
