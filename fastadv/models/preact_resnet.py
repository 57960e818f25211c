"""Pre-activation ResNet for small images, in both published shortcut variants."""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine.model import fused_norm
from fastadv.errors import UserError, unknown
from fastadv.models.common import conv1x1, conv3x3, make_dropout

SHORTCUTS = ("preact", "raw")


class PreActBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3, plus the shortcut (He et al. 2016, "Identity mappings").

    (B,C,H,W) to (B,C',H/stride,W/stride). Where sizes differ the shortcut is a 1x1 projection:
    of the first BN+ReLU's output (``shortcut="preact"``) or of the raw block input (``"raw"``).
    ``dropout`` is its probability at the input of the second convolution.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: str, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = make_dropout(dropout)
        self.conv2 = conv3x3(channels, channels)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(conv1x1(in_channels, channels, stride))
        self.projects_raw = shortcut == "raw"

    def forward(self, x: Tensor) -> Tensor:
        # Not in place: APART differentiates with respect to this tensor.
        out = F.relu(self.bn1(x))
        if self.shortcut is None:
            skip = x
        else:
            skip = self.shortcut(x if self.projects_raw else out)
        out = F.relu(self.bn2(self.conv1(out)))
        out = self.conv2(self.dropout(out))
        return fused_norm.add(out, skip)


def preact_stage(
    in_channels: int,
    channels: int,
    depth: int,
    stride: int,
    shortcut: str,
    dropout: float = 0.0,
) -> nn.Sequential:
    """``depth`` blocks of ``channels`` channels; the first one strides."""
    blocks = [PreActBlock(in_channels, channels, stride, shortcut, dropout)]
    blocks += [PreActBlock(channels, channels, 1, shortcut, dropout) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


class PreActResNet(nn.Module):
    """Four stages of pre-activation blocks, ``width`` to 8 ``width`` channels, for any image size.

    Pixels (B,in_channels,H,W) in [0,1] to logits (B,num_classes). Two networks are published under
    this name. robust_overfitting, AWP, RWP, RAT and KD-SWA project the BN+ReLU output
    (``shortcut="preact"``, the default, because most published tables come from it and He et al.
    2016 define it so); fast_adversarial, APART and AdvLC project the raw block input (``"raw"``).
    Parameters have the same names and shapes in both. ``dropout`` acts before the classifier, not
    inside the blocks.
    """

    stage_prefixes: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("layer1",),
        ("layer2",),
        ("layer3",),
        ("layer4",),
    )

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
        dropout: float = 0.0,
        normalize: nn.Module | None = None,
        shortcut: str = "preact",
    ) -> None:
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise unknown("shortcut", shortcut, SHORTCUTS)
        if len(depths) != 4 or min(depths) < 1:
            raise UserError(f"depths must be four numbers of at least 1, not {tuple(depths)}.")
        self.normalize = normalize or nn.Identity()
        self.conv1 = conv3x3(in_channels, width)
        self.layer1 = preact_stage(width, width, depths[0], 1, shortcut)
        self.layer2 = preact_stage(width, 2 * width, depths[1], 2, shortcut)
        self.layer3 = preact_stage(2 * width, 4 * width, depths[2], 2, shortcut)
        self.layer4 = preact_stage(4 * width, 8 * width, depths[3], 2, shortcut)
        self.bn = nn.BatchNorm2d(8 * width)
        self.dropout = make_dropout(dropout)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = F.relu(self.bn(out)).mean((2, 3))
        return self.linear(self.dropout(out))


def preact_resnet18(
    *,
    num_classes: int = 10,
    width: int = 64,
    in_channels: int = 3,
    dropout: float = 0.0,
    normalize: nn.Module | None = None,
    shortcut: str = "preact",
    depths: Sequence[int] = (2, 2, 2, 2),
) -> PreActResNet:
    """PreAct ResNet-18: 8 blocks; ``width`` is the first stage's channels (published: 64)."""
    return PreActResNet(
        depths=depths,
        num_classes=num_classes,
        width=width,
        in_channels=in_channels,
        dropout=dropout,
        normalize=normalize,
        shortcut=shortcut,
    )
