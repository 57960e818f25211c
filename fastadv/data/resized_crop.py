"""Random crops of any size and shape, resized to the whole image: the augmentation of ImageNet.

Torchvision's ``RandomResizedCrop`` with its defaults (Szegedy et al. 2015), which the published
ImageNet training of Free and F+FGSM takes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.data import draws
from fastadv.data.augmented import Augmented

SHARES = (0.08, 1.0)  # of the image's area
RATIOS = (3 / 4, 4 / 3)  # width to height
TRIES = 10


class Boxes(NamedTuple):
    """A rectangle in each image of a batch, in pixels: each (B,) int64."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


class ResizedCrop(Augmented):
    """Crops every image and scales the crop to the image's size, in place of shifted crops.

    The crop is one of the loader's image, which is as large as the result: in files that are
    larger, what a loader cuts off or scales down is lost. ``DaliLoader`` can crop the files.
    """

    def augment(self, images: Tensor, index: Tensor, *counters: int) -> Tensor:
        height, width = (torch.full_like(index, side) for side in images.shape[-2:])
        return resized(images, draw_boxes(index, height, width, *counters))


def draw_boxes(index: Tensor, height: Tensor, width: Tensor, *counters: int) -> Boxes:
    """A box for each of the images ``index`` (B,), of ``height`` and ``width`` (B,).

    Its share of the area is uniform, its ratio log-uniform. The first of ``TRIES`` that lies within
    the image is taken, at a uniform place; if none does, the largest of an allowed ratio, centred.
    A pure function of rows, sizes and ``counters``.
    """
    tries = torch.arange(TRIES, device=index.device)
    each = index[:, None] * TRIES + tries  # another number for every try of every sample
    area = (height * width)[:, None] * _between(draws.uniform(each, *counters, 0), *SHARES)
    logs = _between(draws.uniform(each, *counters, 1), *map(math.log, RATIOS))
    widths = (area * logs.exp()).sqrt().round().long()
    heights = (area / logs.exp()).sqrt().round().long()
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0) & (heights <= height[:, None])
    first = fits.int().argmax(1, keepdim=True)
    found, none = fits.any(1), _largest(height, width)
    tall = torch.where(found, heights.gather(1, first)[:, 0], none.height)
    wide = torch.where(found, widths.gather(1, first)[:, 0], none.width)
    down, right = height - tall + 1, width - wide + 1  # the places that are left
    top = (draws.uniform(index, *counters, 2) * down).long()
    left = (draws.uniform(index, *counters, 3) * right).long()
    return Boxes(torch.where(found, top, none.top), torch.where(found, left, none.left), tall, wide)


def _between(share: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * share


def _largest(height: Tensor, width: Tensor) -> Boxes:
    """The largest centred box whose ratio is allowed."""
    low, high = RATIOS
    ratio = width / height
    tall = torch.where(ratio < low, (width / low).round().long(), height)
    wide = torch.where(ratio > high, (height * high).round().long(), width)
    return Boxes((height - tall) // 2, (width - wide) // 2, tall, wide)


def resized(images: Tensor, boxes: Boxes) -> Tensor:
    """The ``boxes`` of ``images`` (B,C,H,W), each scaled to (H,W) bilinearly, as if cut out
    first: no pixel from outside of a box is read."""
    height, width = images.shape[-2:]
    down = _places(boxes.top, boxes.height, height)
    right = _places(boxes.left, boxes.width, width)
    grid = torch.stack(
        [
            right[:, None, :].expand(-1, height, -1),
            down[:, :, None].expand(-1, -1, width),
        ],
        -1,
    )
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    found = functional.grid_sample(wide, grid.to(wide.dtype), mode="bilinear", align_corners=False)
    return torch.empty_like(images).copy_(found)  # in the images' own type and layout


def _places(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where ``size`` pixels come from, (B,size) float64 in ``grid_sample``'s units: the image from
    -1 to 1."""
    start, length = start[:, None].double(), length[:, None].double()
    pixels = (torch.arange(size, device=start.device) + 0.5) * length / size - 0.5
    inside = pixels.clamp(min=0).minimum(length - 1)
    return (2 * (start + inside) + 1) / size - 1
