"""Torchvision's operations on pixels, by the names and with the strengths of its augmentations.

RandAugment, TrivialAugment and AugMix of ``torchvision.transforms.v2`` draw from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.engine.torchvision_shim import import_torchvision

BINS = 31  # of the strengths of RandAugment and TrivialAugment
_LEVELS = 10  # of AugMix's


class Operation(NamedTuple):
    """``strengths``: what it can be called with, None for one without; ``signed``: each of them may
    also be negative."""

    name: str
    strengths: tuple[float, ...] | None = None
    signed: bool = False


def usual(height: int, width: int) -> tuple[Operation, ...]:
    """RandAugment's operations (Cubuk et al. 2020) on images of this size."""
    shares = {"TranslateX": 150 / 331 * width, "TranslateY": 150 / 331 * height, "Rotate": 30.0}
    return _space(BINS, {"ShearX": 0.3, "ShearY": 0.3, **shares}, _colours(0.9), (8, 4), True)


def wide() -> tuple[Operation, ...]:
    """TrivialAugment's (Müller and Hutter 2021, "wide")."""
    geometry = {"ShearX": 0.99, "ShearY": 0.99, "TranslateX": 32.0, "TranslateY": 32.0}
    return _space(BINS, {**geometry, "Rotate": 135.0}, _colours(0.99), (8, 6), True)


def of_augmix(height: int, width: int) -> tuple[Operation, ...]:
    """AugMix's (Hendrycks et al. 2020), with those of colours, as torchvision has it."""
    shares = {"TranslateX": width / 3, "TranslateY": height / 3, "Rotate": 30.0}
    geometry = {"ShearX": 0.3, "ShearY": 0.3, **shares}
    found = _space(_LEVELS, geometry, _colours(0.9), (4, 4), False)
    colours = [each for each in found if each.name in _colours(0)]
    return (*(each for each in found if each not in colours), *colours)


def _colours(most: float) -> dict[str, float]:
    return dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), most)


def _space(
    bins: int,
    geometry: Mapping[str, float],
    colours: Mapping[str, float],
    bits: tuple[int, int],
    identity: bool,
) -> tuple[Operation, ...]:
    """``bits``: those that Posterize keeps at the first level, and how many fewer at the last."""
    found = [Operation("Identity")] * identity
    for name, most in (*geometry.items(), *colours.items()):
        found.append(Operation(name, _values(torch.linspace(0.0, most, bins)), True))
    kept = (bits[0] - (torch.arange(bins) / ((bins - 1) / bits[1]))).round().int()
    found.append(Operation("Posterize", _values(kept)))
    found.append(Operation("Solarize", _values(torch.linspace(1.0, 0.0, bins))))
    return (*found, Operation("AutoContrast"), Operation("Equalize"))


def _values(strengths: Tensor) -> tuple[float, ...]:
    return tuple(float(each) for each in strengths)


def apply(images: Tensor, name: str, strength: float, interpolation: str) -> Tensor:
    """Operation ``name`` on ``images`` (n,C,H,W) uint8 of one or three channels; pixels from
    outside an image are black."""
    import_torchvision()
    from torchvision.transforms.v2 import InterpolationMode, functional

    mode = InterpolationMode(interpolation)

    def affine(shear: tuple[float, float] = (0.0, 0.0), **more: Any) -> Tensor:
        where = {"translate": [0, 0]} | more
        return functional.affine(
            images, angle=0.0, scale=1.0, shear=list(shear), interpolation=mode, **where
        )

    def sheared(place: int) -> Tensor:
        angle = math.degrees(math.atan(strength))
        return affine((angle, 0.0) if place == 0 else (0.0, angle), center=[0, 0])

    does: dict[str, Callable[[], Tensor]] = {
        "Identity": lambda: images,
        "ShearX": lambda: sheared(0),
        "ShearY": lambda: sheared(1),
        "TranslateX": lambda: affine(translate=[int(strength), 0]),
        "TranslateY": lambda: affine(translate=[0, int(strength)]),
        "Rotate": lambda: functional.rotate(images, strength, interpolation=mode),
        "Brightness": lambda: functional.adjust_brightness(images, 1.0 + strength),
        "Color": lambda: functional.adjust_saturation(images, 1.0 + strength),
        "Contrast": lambda: functional.adjust_contrast(images, 1.0 + strength),
        "Sharpness": lambda: functional.adjust_sharpness(images, 1.0 + strength),
        "Posterize": lambda: functional.posterize(images, int(strength)),
        "Solarize": lambda: functional.solarize(images, 255.0 * strength),
        "AutoContrast": lambda: functional.autocontrast(images),
        "Equalize": lambda: functional.equalize(images),
    }
    return does[name]()
