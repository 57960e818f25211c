"""What the tests of the pass over compiled graphs share: a backend that counts what it fused, and a
network with every pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import CLASSES
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.fx import GraphModule
from torch.nn import functional

from fastadv.kernels import FUSED_NORM_SHARED

WIDTH = 3


class Fused:
    """A backend that keeps, for each fused operator of each graph it is given, the letters of what
    it contains: before, after, relu."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.compiler = lookup_backend(backend)
        self.graphs: list[list[str]] = []

    def __call__(self, module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        calls = [node for node in module.graph.nodes if node.target is FUSED_NORM_SHARED]
        found = [
            "b" * (node.args[3] is not None) + "a" * (node.args[4] is not None) + "r" * node.args[9]  # type: ignore[operator]
            for node in calls
        ]
        self.graphs.append(found)
        compiled: Callable[..., Any] = self.compiler(module, inputs)
        return compiled


def conv(strides: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, size, stride=strides, padding=size // 2, bias=False)


class PreBlock(nn.Module):
    """A block that is normalised at its beginning; with ``strides`` 2 its shortcut is projected."""

    def __init__(self, strides: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        self.conv1, self.conv2 = conv(strides), conv()
        self.shortcut = conv(2, 1) if strides == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(functional.relu(self.bn2(self.conv1(out)))) + skip


class PostBlock(nn.Module):
    """A block that ends in BatchNorm, the residual and ReLU, in place as torchvision's."""

    def __init__(self, projects: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.bn1, self.bn2 = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(conv(1, 1), nn.BatchNorm2d(WIDTH)) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class EveryPattern(nn.Module):
    """(B,3,H,W) to (B,4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.layer1, self.layer2 = nn.Sequential(PreBlock(1)), nn.Sequential(PreBlock(2))
        self.bn, self.conv2 = nn.BatchNorm2d(WIDTH), conv()
        self.layer3, self.layer4 = nn.Sequential(PostBlock(False)), nn.Sequential(PostBlock(True))
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.conv1(x)))
        x = self.layer4(self.layer3(self.conv2(self.bn(x))))
        return self.linear(x.mean((2, 3)))


# In the order of the graph.
EVERY_PATTERN = ["r", "r", "br", "r", "b", "r", "ar", "r", "", "ar"]


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in float64 and channels_last with weights and buffers drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                values = torch.rand(tensor.shape, generator=generator).double()
                tensor.copy_(
                    values + 0.5 if tensor.dim() < 2 and "bias" not in name else values - 0.5
                )
    return model
