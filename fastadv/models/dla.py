"""Deep layer aggregation, for small images."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.models.common import conv1x1, conv3x3, make_dropout
from fastadv.models.resnet import BasicBlock


class Root(nn.Module):
    """Aggregate branches: concatenate, 1x1, BN, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv1x1(in_channels, out_channels)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, branches: list[Tensor]) -> Tensor:
        return F.relu(self.bn(self.conv(torch.cat(branches, 1))))


class Tree(nn.Module):
    """Two residual blocks in a row under one root; a deep tree has a whole tree before them.

    (B,C,H,W) to (B,out_channels,H/stride,W/stride). A deep tree's root also reads the tree before
    and, through one more block, the input ("iterative" and "hierarchical" aggregation).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, deep: bool) -> None:
        super().__init__()
        self.root = Root((4 if deep else 2) * out_channels, out_channels)
        self.level_1: Tree | None = None
        self.prev_root: BasicBlock | None = None
        if deep:
            self.level_1 = Tree(in_channels, out_channels, stride, deep=False)
            self.prev_root = BasicBlock(in_channels, out_channels, stride)
            in_channels, stride = out_channels, 1
        self.left_node = BasicBlock(in_channels, out_channels, stride)
        self.right_node = BasicBlock(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        if self.level_1 is not None and self.prev_root is not None:
            branches.append(self.prev_root(x))
            x = self.level_1(x)
            branches.append(x)
        left = self.left_node(x)
        return self.root([*branches, left, self.right_node(left)])


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution, BN, ReLU."""
    return nn.Sequential(
        conv3x3(in_channels, out_channels), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class DLA(nn.Module):
    """DLA with residual blocks and trees of one, two, two, one levels (Yu et al. 2018).

    Pixels (B,in_channels,H,W) in [0,1] to logits (B,num_classes). It is the network called DLA in
    the CIFAR collections, which RAT's authors used: three 3x3 layers at full resolution (16, 16, 32
    channels), then ``layer3`` to ``layer6`` with ``width`` to 8 ``width`` channels (published: 64).
    ``dropout`` acts before the classifier.
    """

    stage_prefixes: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("layer3",),
        ("layer4",),
        ("layer5",),
        ("layer6",),
    )

    def __init__(
        self,
        *,
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
        dropout: float = 0.0,
        normalize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize or nn.Identity()
        quarter, half = max(width // 4, 1), max(width // 2, 1)
        self.base = conv_bn_relu(in_channels, quarter)
        self.layer1 = conv_bn_relu(quarter, quarter)
        self.layer2 = conv_bn_relu(quarter, half)
        self.layer3 = Tree(half, width, 1, deep=False)
        self.layer4 = Tree(width, 2 * width, 2, deep=True)
        self.layer5 = Tree(2 * width, 4 * width, 2, deep=True)
        self.layer6 = Tree(4 * width, 8 * width, 2, deep=False)
        self.dropout = make_dropout(dropout)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer2(self.layer1(self.base(self.normalize(x))))
        out = self.layer6(self.layer5(self.layer4(self.layer3(out))))
        return self.linear(self.dropout(out.mean((2, 3))))
