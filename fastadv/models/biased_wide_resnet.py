"""Wide ResNet with biases, in which the second convolution of a block strides."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine.model import fused_norm
from fastadv.models.common import make_dropout
from fastadv.models.wide_resnet import blocks_of

LAST_MOMENTUM = 0.9


class BiasedWideBlock(nn.Module):
    """BN, ReLU, 3x3, dropout, BN, ReLU, 3x3 with the stride, plus the shortcut.

    (B,C,H,W) to (B,C',H/stride,W/stride). Where sizes differ the shortcut is a 1x1 projection of
    the raw block input. All convolutions have a bias.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.dropout = make_dropout(dropout)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        # Not in place: APART differentiates with respect to this tensor.
        out = F.relu(self.bn1(x))
        out = self.dropout(self.conv1(out))
        out = self.conv2(F.relu(self.bn2(out)))
        return fused_norm.add(out, x if self.shortcut is None else self.shortcut(x))


class BiasedWideResNet(nn.Module):
    """Three stages of (depth-4)/6 blocks with 16, 32, 64 times ``width`` channels.

    Pixels (B,in_channels,H,W) in [0,1] to logits (B,num_classes). The widespread PyTorch form of
    Zagoruyko and Komodakis 2016 whose convolutions have biases. It differs from ``WideResNet`` in
    four ways: these biases, the convolution that strides (the second of a block), projections of
    the raw block input, and the momentum 0.9 of the last BatchNorm's running statistics.
    ``dropout`` acts in each block, between the first convolution and BatchNorm. Raises
    ``UserError`` when ``depth`` is not 6n+4.
    """

    stage_prefixes: ClassVar[tuple[tuple[str, ...], ...]] = (("block1",), ("block2",), ("block3",))

    def __init__(
        self,
        *,
        depth: int = 34,
        num_classes: int = 10,
        width: int = 1,
        in_channels: int = 3,
        dropout: float = 0.0,
        normalize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        blocks = blocks_of(depth)
        self.normalize = normalize or nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.block1 = _stage(16, 16 * width, blocks, 1, dropout)
        self.block2 = _stage(16 * width, 32 * width, blocks, 2, dropout)
        self.block3 = _stage(32 * width, 64 * width, blocks, 2, dropout)
        self.bn = nn.BatchNorm2d(64 * width, momentum=LAST_MOMENTUM)
        self.linear = nn.Linear(64 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        return self.linear(F.relu(self.bn(out)).mean((2, 3)))


def _stage(
    in_channels: int, channels: int, blocks: int, stride: int, dropout: float
) -> nn.Sequential:
    """``blocks`` blocks of ``channels`` channels; the first one strides."""
    first = BiasedWideBlock(in_channels, channels, stride, dropout)
    others = [BiasedWideBlock(channels, channels, 1, dropout) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)


def wide_resnet34_1(
    *,
    num_classes: int = 10,
    width: int = 1,
    in_channels: int = 3,
    dropout: float = 0.0,
    normalize: nn.Module | None = None,
    depth: int = 34,
) -> BiasedWideResNet:
    """The Wide ResNet-34 of the AdvLC paper (Li and Spratling 2023, Sec. 4), whose published
    default is a widening factor of 1; ``width`` is this factor."""
    return BiasedWideResNet(
        depth=depth,
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        dropout=dropout,
        normalize=normalize,
    )
