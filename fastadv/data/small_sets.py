"""Data sets that need neither a download nor a folder."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastadv.data import draws
from fastadv.data.dataset import Dataset
from fastadv.data.labels import split_rows


def read_digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, (1,8,8), 1,437 to train on and 360 to test.

    The values 0..16 are scaled to 0..255; the split is stratified with a fixed seed.
    """
    table = torch.from_numpy(_digits_table())
    images = (table[:, :-1] * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = table[:, -1].long()
    train, test = split_rows(labels, 0.2, draws.SPLIT, seed=0)
    sets = images[train], labels[train], images[test], labels[test]
    return Dataset("digits", *sets, 10, classes=tuple("0123456789"))


def _digits_table() -> np.ndarray:
    """One row per digit: 64 pixels and the label."""
    package = find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "datasets/data/digits.csv.gz"
        if file.exists():  # scikit-learn itself takes a second to import
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def make_synthetic(
    train: int = 2048,
    test: int = 512,
    num_classes: int = 10,
    size: int = 32,
    seed: int = 0,
) -> Dataset:
    """Images that a network can learn: a smooth pattern per class, of random strength, plus noise.

    Labels cycle through the classes, so that each set is balanced.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_classes, 3, 4, 4, generator=generator)
    patterns = interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    patterns /= patterns.abs().amax((1, 2, 3), keepdim=True)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % num_classes
        strength = 0.2 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator)
        noise = 0.08 * torch.randn(count, 3, size, size, generator=generator)
        images = (0.5 + strength * patterns[labels] + noise).clamp_(0, 1)
        return images.mul_(255).round_().to(torch.uint8), labels

    return Dataset("synthetic", *draw(train), *draw(test), num_classes)
