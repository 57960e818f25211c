"""Smaller training images in some epochs, for cheaper passes (Wong et al. 2020, on ImageNet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.by_epoch import Phases
from fastadv.data.augmented import Loader
from fastadv.data.batch import LoaderBatch
from fastadv.errors import UserError


class SizedByEpoch:
    """The batches of ``loader``, in each epoch with square images of the side that ``sides`` says.

    ``sides`` are pixels, one number or phases by epoch. Images are scaled after all augmentation,
    both views alike; rows, labels and views are unchanged. As after other augmentation, a ``View``
    no longer gives the origin of a pixel.
    """

    def __init__(self, loader: Loader, sides: int | Phases) -> None:
        self.loader, self.sides = loader, sides

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.loader)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LoaderBatch]:
        """The batches of ``epoch``, starting at batch ``start_batch``."""
        side = self.side(epoch)
        for batch in self.loader.epoch(epoch, start_batch):
            second = batch.second
            if second is not None:
                second = scaled(second[0], side), second[1]
            yield dataclasses.replace(batch, image=scaled(batch.image, side), second=second)

    def side(self, epoch: int) -> int:
        """The side of the images in ``epoch`` (from 0), in pixels."""
        return int(self.sides.at(epoch)) if isinstance(self.sides, Phases) else self.sides


def require_within(sides: int | Phases, size: tuple[int, int]) -> None:
    """Raise ``UserError`` unless images of ``size`` (H,W) can be scaled down to each of ``sides``:
    they are square and none of these is larger."""
    height, width = size
    if height != width:
        raise UserError(
            f"--image-sizes are those of square images, and these are {height}x{width}: make "
            "those of a folder square by --image-size, or omit it."
        )
    largest = max(sides.values()) if isinstance(sides, Phases) else sides
    if largest > height:
        raise UserError(
            f"--image-sizes makes images smaller, not larger: these are {height}x{width}, so "
            f"choose at most {height} in place of {largest:g}; --image-size sets the size of "
            "those of a folder."
        )


def scaled(images: Tensor, side: int) -> Tensor:
    """``images`` (B,C,H,W) in [0,1] as (B,C,side,side): bilinear, each pixel the weighted mean of
    all that it covers. Of that size already, they are returned as they are."""
    if images.shape[-2:] == (side, side):
        return images
    if not len(images):
        return images.new_empty(0, images.shape[1], side, side)
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    small = functional.interpolate(wide, size=(side, side), mode="bilinear", antialias=True)
    last = images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    found = torch.empty(small.shape, dtype=images.dtype, device=images.device, memory_format=layout)
    return found.copy_(small.clamp_(0, 1))  # weights that are rounded may sum to more than 1
