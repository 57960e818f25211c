"""MixUp and CutMix: each image is mixed with its neighbour in the batch, and so is its label.

MixUp (Zhang et al. 2018) takes a weighted mean of the pixels, CutMix (Yun et al. 2019) pastes a
rectangle of the neighbour. As in ``torchvision.transforms.v2`` with its alpha of 1, a batch has
one weight, uniform between 0 and 1. Neighbours are the images 0 and 1, 2 and 3, and so on:
processes that share a batch in even parts mix the same images as one process does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.data import draws
from fastadv.data.augmented import Loader
from fastadv.data.batch import LoaderBatch

KINDS = ("mixup", "cutmix")


class Mixed:
    """The batches of ``loader`` with mixed images and soft labels (B, ``num_classes``) float32.

    Of several ``kinds`` each batch takes one. What is drawn for a batch depends on ``seed``, the
    epoch and its number alone; both views are mixed alike. The last image of an odd batch stays.
    """

    def __init__(
        self, loader: Loader, kinds: Sequence[str], *, num_classes: int, seed: int
    ) -> None:
        self.loader, self.kinds, self.seed = loader, tuple(kinds), seed
        self.num_classes = num_classes

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.loader)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LoaderBatch]:
        """The batches of ``epoch``, starting at batch ``start_batch``."""
        for number, batch in enumerate(self.loader.epoch(epoch, start_batch), start_batch):
            yield self._mixed(batch, epoch, number)

    def _mixed(self, batch: LoaderBatch, epoch: int, number: int) -> LoaderBatch:
        where = (draws.MIX, self.seed, epoch)
        row = torch.tensor([number])
        kind = self.kinds[int(draws.integers(row, len(self.kinds), *where, 0))]
        weight = float(draws.uniform(row, *where, 1))
        height, width = batch.image.shape[-2:]
        box = None
        if kind == "cutmix":
            x = int(draws.integers(row, width, *where, 2))
            y = int(draws.integers(row, height, *where, 3))
            box = pasted(weight, x, y, width, height)
            left, top, right, bottom = box
            weight = 1 - (right - left) * (bottom - top) / (width * height)
        partner = neighbours(len(batch.label)).to(batch.label.device)
        labels = functional.one_hot(batch.label, self.num_classes).float()
        labels = weight * labels + (1 - weight) * labels[partner]
        image = _mix(batch.image, partner, weight, box)
        second = batch.second
        if second is not None:
            second = (_mix(second[0], partner, weight, box), second[1])
        return dataclasses.replace(batch, image=image, label=labels, second=second)


def neighbours(count: int) -> Tensor:
    """The place (``count``,) of the other image of each pair; of an odd one, its own."""
    places = torch.arange(count)
    return torch.where(places ^ 1 < count, places ^ 1, places)


def pasted(weight: float, x: int, y: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the rectangle around (x,y) that takes the share 1 - ``weight``
    of the image, where the border does not cut it."""
    half = 0.5 * math.sqrt(1 - weight)
    half_width, half_height = int(half * width), int(half * height)
    return (
        max(x - half_width, 0),
        max(y - half_height, 0),
        min(x + half_width, width),
        min(y + half_height, height),
    )


def _mix(
    images: Tensor, partner: Tensor, weight: float, box: tuple[int, int, int, int] | None
) -> Tensor:
    others = images[partner]
    if box is None:
        return (weight * images + (1 - weight) * others).clamp(0, 1)  # rounding may leave the range
    left, top, right, bottom = box
    result = images.clone()
    result[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return result
