"""Wide ResNet for small images, any depth and width."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.errors import UserError
from fastadv.models.common import conv3x3, initialize
from fastadv.models.preact_resnet import preact_stage


class WideResNet(nn.Module):
    """Three stages of (depth-4)/6 pre-activation blocks with 16, 32, 64 times ``width`` channels.

    Pixels (B,in_channels,H,W) in [0,1] to logits (B,num_classes). Zagoruyko and Komodakis 2016, as
    in TRADES: projections read the BN+ReLU output. ``dropout`` acts in each block, between BN+ReLU
    and the second convolution (as in the memorization paper, Table A.1), not before the classifier.
    Raises ``UserError`` when ``depth`` is not 6n+4.
    """

    stage_prefixes: ClassVar[tuple[tuple[str, ...], ...]] = (("block1",), ("block2",), ("block3",))

    def __init__(
        self,
        *,
        depth: int = 28,
        num_classes: int = 10,
        width: int = 10,
        in_channels: int = 3,
        dropout: float = 0.0,
        normalize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        blocks = blocks_of(depth)
        self.normalize = normalize or nn.Identity()
        self.conv1 = conv3x3(in_channels, 16)
        self.block1 = preact_stage(16, 16 * width, blocks, 1, "preact", dropout)
        self.block2 = preact_stage(16 * width, 32 * width, blocks, 2, "preact", dropout)
        self.block3 = preact_stage(32 * width, 64 * width, blocks, 2, "preact", dropout)
        self.bn = nn.BatchNorm2d(64 * width)
        self.linear = nn.Linear(64 * width, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        out = F.relu(self.bn(out)).mean((2, 3))
        return self.linear(out)


def blocks_of(depth: int) -> int:
    """The blocks in each of the three stages; ``UserError`` when ``depth`` is not 6n+4."""
    if depth < 10 or depth % 6 != 4:
        raise UserError(
            f"The depth of a Wide ResNet must be 6n+4 (10, 16, 22, 28, 34, ...), not {depth}."
        )
    return (depth - 4) // 6


def wide_resnet28_10(
    *,
    num_classes: int = 10,
    width: int = 10,
    in_channels: int = 3,
    dropout: float = 0.0,
    normalize: nn.Module | None = None,
    depth: int = 28,
) -> WideResNet:
    """WRN-28-10 by default; ``width`` is the widening factor."""
    return WideResNet(
        depth=depth,
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        dropout=dropout,
        normalize=normalize,
    )


def wide_resnet34_10(
    *,
    num_classes: int = 10,
    width: int = 10,
    in_channels: int = 3,
    dropout: float = 0.0,
    normalize: nn.Module | None = None,
    depth: int = 34,
) -> WideResNet:
    """WRN-34-10 by default; ``width`` is the widening factor."""
    return WideResNet(
        depth=depth,
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        dropout=dropout,
        normalize=normalize,
    )


def wide_resnet32_10(
    *,
    num_classes: int = 10,
    width: int = 10,
    in_channels: int = 3,
    dropout: float = 0.0,
    normalize: nn.Module | None = None,
    depth: int = 32,
) -> WideResNet:
    """WRN-32-10 by default, of Madry et al. 2018, FAT and GAIRAT; ``width`` is the widening factor.

    These authors count stem, 6n convolutions and classifier, so ``depth`` is 6n+2 (8, 14, 20, 26,
    32, ...): the network is ``wide_resnet34_10`` under another name. Raises ``UserError`` for
    another ``depth``.
    """
    if depth < 8 or depth % 6 != 2:
        raise UserError(
            "The depth of wide_resnet32_10 counts no projections and must be 6n+2 (8, 14, 20, 26, "
            f"32, ...), not {depth}; wide_resnet34_10 counts them."
        )
    return WideResNet(
        depth=depth + 2,
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        dropout=dropout,
        normalize=normalize,
    )
