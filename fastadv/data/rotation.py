"""Random rotations in addition to a loader's crops and flips: up to 15 degrees to either side.

robust_overfitting, AWP, RWP and RAT use them on CIFAR-100 (there as torchvision's
``RandomRotation(15)``: nearest pixel, black outside the image).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.data import draws
from fastadv.data.augmented import Augmented

DEGREES = 15.0


class Rotated(Augmented):
    """Rotates every image by its own angle."""

    def augment(self, images: Tensor, index: Tensor, *counters: int) -> Tensor:
        angles = (2 * draws.uniform(index, *counters) - 1) * DEGREES
        return rotate(images, angles)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """``images`` (B,C,H,W) rotated counter-clockwise around their centres by ``degrees`` (B,)."""
    height, width = images.shape[-2:]
    angle = degrees.to(torch.float32) * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # Where each pixel comes from, in units of half the image's width and height.
    rows = (
        torch.stack([cos, -sin * (height / width), zero], 1),
        torch.stack([sin * (width / height), cos, zero], 1),
    )
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    turned = functional.grid_sample(wide, grid.to(wide.dtype), mode="nearest", align_corners=False)
    return torch.empty_like(images).copy_(turned)  # in the images' own type and layout
