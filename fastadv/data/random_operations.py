"""RandAugment, TrivialAugment and AugMix, as ``torchvision.transforms.v2`` computes them.

Every draw is a pure function of the seed, the epoch and the row of a sample. Samples that drew the
same operation are processed together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fastadv.data import draws
from fastadv.data.augmented import Augmented
from fastadv.data.operations import BINS, Operation, apply, of_augmix, usual, wide
from fastadv.data.pixels import unit_images

MAGNITUDE = 9  # of RandAugment, torchvision's default
OPERATIONS = 2  # in a row, the same
SEVERITY, CHAINS, DEEPEST = 3, 3, 3  # of AugMix, the same


class _OnStoredPixels(Augmented):
    """An augmentation of images as they are stored, (B,C,H,W) uint8."""

    def augment(self, images: Tensor, index: Tensor, *counters: int) -> Tensor:
        stored = images.float().mul(255).round().to(torch.uint8)
        return unit_images(self.of_stored(stored, index, *counters), images.dtype)

    @abstractmethod
    def of_stored(self, images: Tensor, index: Tensor, *counters: int) -> Tensor:
        """``images`` of rows ``index`` (B,), drawn from ``counters``."""


class RandAugmented(_OnStoredPixels):
    """Two of 14 operations in a row, each at magnitude 9 of 30 (Cubuk et al. 2020)."""

    def of_stored(self, images: Tensor, index: Tensor, *counters: int) -> Tensor:
        space = usual(*images.shape[-2:])
        strength = torch.full_like(index, MAGNITUDE)
        for place in range(OPERATIONS):
            images = drawn_operation(images, index, space, strength, "nearest", *counters, place)
        return images


class TrivialAugmented(_OnStoredPixels):
    """One of 14 operations at a random strength (Müller and Hutter 2021, wide)."""

    def of_stored(self, images: Tensor, index: Tensor, *counters: int) -> Tensor:
        strength = draws.integers(index, BINS, *counters, 0, 2)
        return drawn_operation(images, index, wide(), strength, "nearest", *counters, 0)


class AugMixed(_OnStoredPixels):
    """The image mixed with three chains of one to three weak operations (Hendrycks et al. 2020).

    The weights of the chains are uniform on the simplex, and so is that of the image against
    them (alpha = 1).
    """

    def of_stored(self, images: Tensor, index: Tensor, *counters: int) -> Tensor:
        space = of_augmix(*images.shape[-2:])
        weights = chain_weights(index, *counters)
        mixed = weights[:, 0, None, None, None] * images
        for chain in range(CHAINS):
            part = images
            depth = 1 + draws.integers(index, DEEPEST, *counters, chain, DEEPEST)
            for step in range(DEEPEST):
                where = (*counters, chain, step)
                strength = draws.integers(index, SEVERITY, *where, 2)
                rows = (depth > step).nonzero().squeeze(1)
                part = part.clone()
                part[rows] = drawn_operation(
                    part[rows], index[rows], space, strength[rows], "bilinear", *where
                )
            mixed += weights[:, chain + 1, None, None, None] * part
        return mixed.to(torch.uint8)


def chain_weights(index: Tensor, *counters: int) -> Tensor:
    """(B,1+CHAINS) float32, with rows that sum to 1: the weights of the image and of the chains."""
    share = draws.uniform(index, *counters, CHAINS, 0)  # of all chains together
    exponential = [
        -torch.log1p(-draws.uniform(index, *counters, CHAINS, 1 + chain)) for chain in range(CHAINS)
    ]
    chains = torch.stack(exponential, 1)
    chains = chains / chains.sum(1, keepdim=True)  # a flat Dirichlet distribution
    return torch.cat([1 - share[:, None], share[:, None] * chains], 1).float()


def drawn_operation(
    images: Tensor,
    index: Tensor,
    space: Sequence[Operation],
    strength: Tensor,
    interpolation: str,
    *counters: int,
) -> Tensor:
    """One operation of ``space`` on each of ``images`` (n,C,H,W) uint8 of rows ``index`` (n,), at
    the place ``strength`` (n,) among its strengths, half of the signed ones with a minus."""
    choice = draws.integers(index, len(space), *counters, 0).tolist()
    negative = draws.integers(index, 2, *counters, 1).tolist()
    groups: dict[tuple[str, float], list[int]] = {}
    drawn = zip(choice, strength.tolist(), negative, strict=True)
    for row, (chosen, place, sign) in enumerate(drawn):
        name, strengths, signed = space[chosen]
        value = 0.0 if strengths is None else strengths[place]
        groups.setdefault((name, -value if signed and sign else value), []).append(row)
    result = images.clone()
    for (name, value), rows in groups.items():
        result[rows] = apply(images[rows], name, value, interpolation)
    return result
