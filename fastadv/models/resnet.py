"""Post-activation ResNet, with the stem of small images or of ImageNet."""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.errors import unknown
from fastadv.models.common import conv1x1, conv3x3, initialize, make_dropout

STEMS = ("cifar", "imagenet")


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """1x1 convolution and BN if the shortcut changes the size, else ``None``."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """3x3, BN, ReLU, 3x3, BN, plus the shortcut, ReLU (He et al. 2015)."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 to four times the channels; the 3x3 strides (torchvision's "v1.5")."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


Block = type[BasicBlock] | type[Bottleneck]


def resnet_stage(
    block: Block, in_channels: int, channels: int, depth: int, stride: int
) -> nn.Sequential:
    """``depth`` blocks; the first one strides."""
    blocks = [block(in_channels, channels, stride)]
    blocks += [block(block.expansion * channels, channels) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


class ResNet(nn.Module):
    """Four stages of post-activation blocks; pixels (B,in_channels,H,W) to logits (B,num_classes).

    ``stem="cifar"`` is one 3x3 convolution at full resolution, ``"imagenet"`` the 7x7 of stride 2
    and a max-pooling, with torchvision's initial weights. ``dropout`` acts before the classifier.
    """

    stage_prefixes: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("layer1",),
        ("layer2",),
        ("layer3",),
        ("layer4",),
    )

    def __init__(
        self,
        block: Block,
        depths: Sequence[int],
        *,
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
        dropout: float = 0.0,
        normalize: nn.Module | None = None,
        stem: str = "cifar",
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise unknown("stem", stem, STEMS)
        self.normalize = normalize or nn.Identity()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = conv3x3(in_channels, width)
        self.bn = nn.BatchNorm2d(width)
        self.pool: nn.Module = nn.Identity()
        if stem == "imagenet":
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        wide = block.expansion * width
        self.layer1 = resnet_stage(block, width, width, depths[0], 1)
        self.layer2 = resnet_stage(block, wide, 2 * width, depths[1], 2)
        self.layer3 = resnet_stage(block, 2 * wide, 4 * width, depths[2], 2)
        self.layer4 = resnet_stage(block, 4 * wide, 8 * width, depths[3], 2)
        self.dropout = make_dropout(dropout)
        self.linear = nn.Linear(8 * wide, num_classes)
        if stem == "imagenet":
            initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(F.relu(self.bn(self.conv1(self.normalize(x)))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(self.dropout(out.mean((2, 3))))


def resnet18(
    *,
    num_classes: int = 10,
    width: int = 64,
    in_channels: int = 3,
    dropout: float = 0.0,
    normalize: nn.Module | None = None,
    stem: str = "cifar",
) -> ResNet:
    """ResNet-18; ``width`` is the first stage's channels (published: 64)."""
    return ResNet(
        BasicBlock,
        (2, 2, 2, 2),
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        dropout=dropout,
        normalize=normalize,
        stem=stem,
    )


def resnet50(
    *,
    num_classes: int = 10,
    width: int = 64,
    in_channels: int = 3,
    dropout: float = 0.0,
    normalize: nn.Module | None = None,
    stem: str = "cifar",
) -> ResNet:
    """ResNet-50; ``width`` is the first bottlenecks' inner channels (published: 64)."""
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        dropout=dropout,
        normalize=normalize,
        stem=stem,
    )
