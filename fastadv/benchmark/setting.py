"""What every candidate of one comparison shares: network, images, device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.models import build_model

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # CIFAR-10's


@dataclass(frozen=True)
class Setting:
    """A network, a batch of random images and where they are.

    ``width`` None is the network's published one. Images are uniform in [0,1] and labels random:
    the time does not depend on them.
    """

    model: str = "preact_resnet18"
    width: int | None = None
    batch_size: int = 128
    image_size: int = 32
    num_classes: int = 10
    device: str = "cpu"
    seed: int = 0

    def make_model(self, *, channels_last: bool = False) -> nn.Module:
        """The network with CIFAR-10's normalisation as its first layer, the same each time."""
        torch.manual_seed(self.seed)
        model = build_model(
            self.model, num_classes=self.num_classes, width=self.width, mean=MEAN, std=STD
        )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        placed: Any = model.to(torch.device(self.device))  # torch's types know no memory_format
        return placed.to(memory_format=layout)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, self.image_size, self.image_size)

    def batches(self, count: int = 4, *, channels_last: bool = False) -> list[BenchBatch]:
        """``count`` batches to use in turn."""
        generator = torch.Generator().manual_seed(self.seed)
        return [self._batch(generator, number, channels_last) for number in range(count)]

    def _batch(self, generator: torch.Generator, number: int, channels_last: bool) -> BenchBatch:
        size = self.batch_size
        images = torch.rand(size, *self.image_shape, generator=generator)
        labels = torch.randint(self.num_classes, (size,), generator=generator)
        if channels_last:
            images = images.to(memory_format=torch.channels_last)
        index = torch.arange(number * size, (number + 1) * size)
        device = torch.device(self.device)
        return BenchBatch(images.to(device), labels.to(device), index.to(device))

    def as_row(self) -> dict[str, Any]:
        """For a JSON row."""
        return {name: value for name, value in asdict(self).items() if name != "device"}


@dataclass(frozen=True)
class BenchBatch:
    """Images (B,3,H,W), labels (B,) and their rows in an imaginary training set (B,)."""

    x: Tensor
    y: Tensor
    index: Tensor


def in_turn(batches: list[BenchBatch]) -> Iterator[BenchBatch]:
    """The batches, cyclically."""
    return cycle(batches)
