"""Wide ResNet for small images, any depth and width."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.errors import UserError
from fastadv.models.common import conv3x3, initialize, make_dropout
from fastadv.models.preact_resnet import preact_stage


class WideResNet(nn.Module):
    """Three stages of (depth-4)/6 pre-activation blocks with 16, 32, 64 times ``width`` channels.

    Pixels (B,in_channels,H,W) in [0,1] to logits (B,num_classes). Zagoruyko and Komodakis 2016, as
    in TRADES: projections read the BN+ReLU output. ``dropout`` acts before the classifier
    (memorization paper, Table A.1), not inside the blocks. Raises ``UserError`` when ``depth`` is
    not 6n+4.
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
        if depth < 10 or depth % 6 != 4:
            raise UserError(
                f"The depth of a Wide ResNet must be 6n+4 (10, 16, 22, 28, 34, ...), not {depth}."
            )
        blocks = (depth - 4) // 6
        self.normalize = normalize or nn.Identity()
        self.conv1 = conv3x3(in_channels, 16)
        self.block1 = preact_stage(16, 16 * width, blocks, 1, "preact")
        self.block2 = preact_stage(16 * width, 32 * width, blocks, 2, "preact")
        self.block3 = preact_stage(32 * width, 64 * width, blocks, 2, "preact")
        self.bn = nn.BatchNorm2d(64 * width)
        self.dropout = make_dropout(dropout)
        self.linear = nn.Linear(64 * width, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        out = F.relu(self.bn(out)).mean((2, 3))
        return self.linear(self.dropout(out))


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
