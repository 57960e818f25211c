"""DenseNet with bottlenecks and compression, for small images."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.models.common import conv1x1, conv3x3, make_dropout


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1, BN, ReLU, 3x3; the ``growth`` new channels are concatenated to the input.

    (B,C,H,W) to (B,C+growth,H,W).
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, 4 * growth)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat((x, out), 1)


class Transition(nn.Module):
    """BN, ReLU, 1x1 to half the channels, 2x2 average (rounding up, for tiny images)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2, ceil_mode=True)


class DenseNet(nn.Module):
    """Four dense blocks, halved in channels and size between them (Huang et al. 2017, DenseNet-BC).

    Pixels (B,in_channels,H,W) in [0,1] to logits (B,num_classes), with the 3x3 stem for CIFAR.
    ``width`` is the growth rate. ``dropout`` acts before the classifier.
    """

    # A transition belongs to the dense block before it.
    stage_prefixes: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("dense1", "trans1"),
        ("dense2", "trans2"),
        ("dense3", "trans3"),
        ("dense4",),
    )

    def __init__(
        self,
        depths: Sequence[int],
        *,
        num_classes: int = 10,
        width: int = 32,
        in_channels: int = 3,
        dropout: float = 0.0,
        normalize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize or nn.Identity()
        self.conv1 = conv3x3(in_channels, 2 * width)
        self.dense1, channels = _dense_block(2 * width, depths[0], width)
        self.trans1 = Transition(channels, channels // 2)
        self.dense2, channels = _dense_block(channels // 2, depths[1], width)
        self.trans2 = Transition(channels, channels // 2)
        self.dense3, channels = _dense_block(channels // 2, depths[2], width)
        self.trans3 = Transition(channels, channels // 2)
        self.dense4, channels = _dense_block(channels // 2, depths[3], width)
        self.bn = nn.BatchNorm2d(channels)
        self.dropout = make_dropout(dropout)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.trans1(self.dense1(self.conv1(self.normalize(x))))
        out = self.dense4(self.trans3(self.dense3(self.trans2(self.dense2(out)))))
        out = F.relu(self.bn(out)).mean((2, 3))
        return self.linear(self.dropout(out))


def _dense_block(in_channels: int, depth: int, growth: int) -> tuple[nn.Sequential, int]:
    layers = [DenseLayer(in_channels + i * growth, growth) for i in range(depth)]
    return nn.Sequential(*layers), in_channels + depth * growth


def densenet121(
    *,
    num_classes: int = 10,
    width: int = 32,
    in_channels: int = 3,
    dropout: float = 0.0,
    normalize: nn.Module | None = None,
) -> DenseNet:
    """DenseNet-121 for CIFAR; ``width`` is the growth rate (published: 32)."""
    return DenseNet(
        (6, 12, 24, 16),
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        dropout=dropout,
        normalize=normalize,
    )
