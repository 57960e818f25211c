"""AutoAugment and cutout in addition to a loader's crops and flips, starting at a given epoch.

The augmentation of the Consistency paper's main results (Tack et al., AAAI 2022): crop and flip
for the first half of the run, then in addition AutoAugment's policy for CIFAR-10 (Cubuk et al.,
CVPR 2019; the operations are torchvision's, pixels from outside the image are black) and cutout of
one square of half the image's side (DeVries and Taylor 2017): 16 of 32 pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.data import draws
from fastadv.data.augmented import Augmented, Loader
from fastadv.data.pixels import unit_images
from fastadv.engine.torchvision_shim import import_torchvision

NEVER = 2.0  # above every probability of the policy


class AutoAugmented(Augmented):
    """Applies the policy and cutout to images of one or three channels."""

    def __init__(self, loader: Loader, *, seed: int, first_epoch: int = 0, place: int = 0) -> None:
        import_torchvision()
        super().__init__(loader, seed=seed, first_epoch=first_epoch, place=place)

    def augment(self, images: Tensor, index: Tensor, *counters: int) -> Tensor:
        stored = images.float().mul(255).round().to(torch.uint8)
        policy = auto_augment(stored, index, *counters)
        return cut_out(unit_images(policy, images.dtype), index, *counters)


def auto_augment(images: Tensor, index: Tensor, *counters: int) -> Tensor:
    """AutoAugment's CIFAR-10 policy on ``images`` (B,C,H,W) uint8, of rows ``index`` (B,).

    Each sample draws one of 25 pairs of operations, which of the two are applied, and the direction
    of those that have one. The draws are a pure function of its row and ``counters``.
    """
    pairs = _transform(0, 0, 0).policies
    choice = draws.integers(index, len(pairs), *counters, 0)
    result = images.clone()
    for place in (0, 1):
        chances = torch.tensor([pair[place][1] for pair in pairs], device=index.device)
        applied = draws.uniform(index, *counters, 1 + place) <= chances[choice]
        sign = draws.integers(index, 2, *counters, 3 + place)
        # Samples with the same operation are processed together: few calls per batch.
        kinds = torch.where(applied, 2 * choice + sign, -1)
        for kind in kinds.unique().tolist():
            if kind >= 0:
                rows = (kinds == kind).nonzero().squeeze(1)
                result[rows] = _transform(kind // 2, place, kind % 2)(result[rows])
    return result


def _transform(pair: int, place: int, sign: int) -> Any:
    """torchvision's transform, which applies only operation ``place`` of ``pair``."""
    transforms = import_torchvision().transforms
    transform = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    chances = torch.full((2,), NEVER)
    chances[place] = 0.0
    # Replaces the public static method that draws by one that returns our choice.
    transform.get_params = lambda _: (pair, chances, torch.full((2,), sign))
    return transform


def cut_out(images: Tensor, index: Tensor, *counters: int) -> Tensor:
    """``images`` (B,C,H,W) with zeros in a square of half the shorter side around a random pixel.

    The pixel is uniform over the image, so the border cuts some squares (the released code).
    """
    height, width = images.shape[-2:]
    half = min(height, width) // 2 // 2
    center_y = draws.integers(index, height, *counters, 5)
    center_x = draws.integers(index, width, *counters, 6)
    inside = _band(center_y, half, height)[:, None, :, None]
    inside = inside & _band(center_x, half, width)[:, None, None, :]
    return images.masked_fill(inside, 0.0)


def _band(center: Tensor, half: int, size: int) -> Tensor:
    """(B,size), true from ``center - half`` to before ``center + half``."""
    place = torch.arange(size, device=center.device)
    return (place >= center[:, None] - half) & (place < center[:, None] + half)
