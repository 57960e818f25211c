"""Data sets that need neither a download nor a folder."""

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
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    train, test = split_rows(labels, 0.2, draws.SPLIT, seed=0)
    return Dataset("digits", images[train], labels[train], images[test], labels[test], 10)


def make_synthetic(
    train: int = 2048,
    test: int = 512,
    num_classes: int = 10,
    channels: int = 3,
    size: int = 32,
    seed: int = 0,
) -> Dataset:
    """Images that a network can learn: a smooth pattern a class, in random strength, and noise.

    Labels run through the classes in turn, so that each set is balanced.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_classes, channels, 4, 4, generator=generator)
    patterns = interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    patterns /= patterns.abs().amax((1, 2, 3), keepdim=True)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % num_classes
        strength = 0.2 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator)
        noise = 0.08 * torch.randn(count, channels, size, size, generator=generator)
        images = (0.5 + strength * patterns[labels] + noise).clamp_(0, 1)
        return images.mul_(255).round_().to(torch.uint8), labels

    return Dataset("synthetic", *draw(train), *draw(test), num_classes)
