"""State files as other public code writes them, and what that code computes from them: names,
shapes and order of operations written down from its sources, independent of ``fastadv.models``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


class Writer:
    """Makes the tensors of a state, float64 and with every BatchNorm's numbers of its own."""

    def __init__(self, seed: int = 0) -> None:
        self.state: State = {}
        self._draws = torch.Generator().manual_seed(seed)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._draws, dtype=torch.float64)

    def conv(self, name: str, out: int, into: int, size: int) -> None:
        self.state[f"{name}.weight"] = self._normal(out, into, size, size) / (into * size) ** 0.5

    def norm(self, name: str, channels: int) -> None:
        self.state[f"{name}.weight"] = 1 + 0.2 * self._normal(channels)
        self.state[f"{name}.bias"] = 0.2 * self._normal(channels)
        self.state[f"{name}.running_mean"] = 0.2 * self._normal(channels)
        self.state[f"{name}.running_var"] = 1 + 0.2 * self._normal(channels).abs()
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def linear(self, name: str, out: int, into: int) -> None:
        self.state[f"{name}.weight"] = self._normal(out, into) / into**0.5
        self.state[f"{name}.bias"] = self._normal(out)


def conv(state: State, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{part}"].view(1, -1, 1, 1)
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def wide_resnet(
    depth: int = 16, widen: int = 2, classes: int = 10, sub_block1: bool = True
) -> State:
    """The state of TRADES' WideResNet, which AWP, MART and RobustBench use too."""
    writer, blocks = Writer(), (depth - 4) // 6
    sizes = [16, 16 * widen, 32 * widen, 64 * widen]
    writer.conv("conv1", 16, 3, 3)
    stages = [("block1", 0), *([("sub_block1", 0)] if sub_block1 else []), ("block2", 1)]
    for stage, place in [*stages, ("block3", 2)]:
        for number in range(blocks):
            into, out = sizes[place if number == 0 else place + 1], sizes[place + 1]
            name = f"{stage}.layer.{number}"
            writer.norm(f"{name}.bn1", into)
            writer.conv(f"{name}.conv1", out, into, 3)
            writer.norm(f"{name}.bn2", out)
            writer.conv(f"{name}.conv2", out, out, 3)
            if into != out:
                writer.conv(f"{name}.convShortcut", out, into, 1)
    writer.norm("bn1", sizes[3])
    writer.linear("fc", classes, sizes[3])
    return writer.state


def wide_resnet_logits(state: State, x: Tensor) -> Tensor:
    out = conv(state, "conv1", x)
    for place, stage in enumerate(("block1", "block2", "block3")):
        number = 0
        while f"{stage}.layer.{number}.bn1.weight" in state:
            name, stride = f"{stage}.layer.{number}", 2 if place > 0 and number == 0 else 1
            active = norm(state, f"{name}.bn1", out).relu()
            inner = conv(state, f"{name}.conv1", active, stride)
            inner = conv(state, f"{name}.conv2", norm(state, f"{name}.bn2", inner).relu())
            if f"{name}.convShortcut.weight" in state:
                out = conv(state, f"{name}.convShortcut", active, stride, 0)
            out = out + inner
            number += 1
    out = F.avg_pool2d(norm(state, "bn1", out).relu(), 8)
    return linear(state, "fc", out.flatten(1))


def preact_resnet18(width: int = 4, classes: int = 10, last_norm: bool = True) -> State:
    """The state of PreActResNet18 of robust_overfitting, AWP, fast_adversarial and RobustBench;
    that of pytorch-cifar has no ``last_norm``."""
    writer = Writer()
    writer.conv("conv1", width, 3, 3)
    into = width
    for stage in range(4):
        out = width * 2**stage
        for number in range(2):
            name = f"layer{stage + 1}.{number}"
            writer.norm(f"{name}.bn1", into)
            writer.conv(f"{name}.conv1", out, into, 3)
            writer.norm(f"{name}.bn2", out)
            writer.conv(f"{name}.conv2", out, out, 3)
            if into != out:
                writer.conv(f"{name}.shortcut.0", out, into, 1)
            into = out
    if last_norm:
        writer.norm("bn", into)
    writer.linear("linear", classes, into)
    return writer.state


def preact_resnet18_logits(state: State, x: Tensor, projects: str) -> Tensor:
    """``projects``: "raw" (fast_adversarial; RobustBench's PreActBlock), where the shortcut reads
    the block's input, or "preact" (robust_overfitting; RobustBench's PreActBlockV2)."""
    out = conv(state, "conv1", x)
    for stage in range(4):
        for number in range(2):
            name, stride = f"layer{stage + 1}.{number}", 2 if stage > 0 and number == 0 else 1
            active = norm(state, f"{name}.bn1", out).relu()
            inner = conv(state, f"{name}.conv1", active, stride)
            inner = conv(state, f"{name}.conv2", norm(state, f"{name}.bn2", inner).relu())
            if f"{name}.shortcut.0.weight" in state:
                read = active if projects == "preact" else out
                out = conv(state, f"{name}.shortcut.0", read, stride, 0)
            out = out + inner
    out = F.avg_pool2d(norm(state, "bn", out).relu(), 4)
    return linear(state, "linear", out.flatten(1))


def resnet18(width: int = 4, classes: int = 10, torchvision: bool = False) -> State:
    """The state of ResNet18 of pytorch-cifar, which RobustBench uses too, or of torchvision's."""
    writer = Writer()
    shortcut = "downsample" if torchvision else "shortcut"
    writer.conv("conv1", width, 3, 7 if torchvision else 3)
    writer.norm("bn1", width)
    into = width
    for stage in range(4):
        out = width * 2**stage
        for number in range(2):
            name = f"layer{stage + 1}.{number}"
            writer.conv(f"{name}.conv1", out, into, 3)
            writer.norm(f"{name}.bn1", out)
            writer.conv(f"{name}.conv2", out, out, 3)
            writer.norm(f"{name}.bn2", out)
            if into != out:
                writer.conv(f"{name}.{shortcut}.0", out, into, 1)
                writer.norm(f"{name}.{shortcut}.1", out)
            into = out
    writer.linear("fc" if torchvision else "linear", classes, into)
    return writer.state


def resnet18_logits(state: State, x: Tensor) -> Tensor:
    large = "fc.weight" in state
    shortcut = "downsample" if large else "shortcut"
    out = conv(state, "conv1", x, 2 if large else 1, 3 if large else 1)
    out = norm(state, "bn1", out).relu()
    if large:
        out = F.max_pool2d(out, 3, 2, 1)
    for stage in range(4):
        for number in range(2):
            name, stride = f"layer{stage + 1}.{number}", 2 if stage > 0 and number == 0 else 1
            inner = norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", out, stride)).relu()
            inner = norm(state, f"{name}.bn2", conv(state, f"{name}.conv2", inner))
            if f"{name}.{shortcut}.0.weight" in state:
                out = conv(state, f"{name}.{shortcut}.0", out, stride, 0)
                out = norm(state, f"{name}.{shortcut}.1", out)
            out = (out + inner).relu()
    return linear(state, "fc" if large else "linear", out.mean((2, 3)))
