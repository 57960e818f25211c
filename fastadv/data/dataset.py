"""A data set in memory: bytes, labels, and mean and standard deviation per channel."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadv.data import draws
from fastadv.data.labels import split_rows, stratified_rows
from fastadv.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory.

    ``train_images``, ``test_images``: (N,C,H,W) uint8; ``train_labels``, ``test_labels``: (N,)
    int64 in ``[0, num_classes)``; ``mean``, ``std``: one number per channel for pixels in
    [0,1], computed from the training images if not given. ``classes`` are the names of the classes,
    () where they have none.
    Raises ``UserError`` for inconsistent shapes, an empty set or a label out of range.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, images, labels in (
            ("training", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            _check(f"The {part} set of {self.name}", images, labels, self.num_classes)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise UserError(
                f"{self.name} has training images of {tuple(self.train_images.shape[1:])} and test "
                f"images of {tuple(self.test_images.shape[1:])}; both must have one shape (C,H,W)."
            )
        if not self.mean:
            mean, std = channel_statistics(self.train_images)
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.train_images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.train_images.shape[2], self.train_images.shape[3]


def _check(what: str, images: Tensor, labels: Tensor, num_classes: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(
            f"{what} must be uint8 images (N,C,H,W), not {images.dtype} {tuple(images.shape)}."
        )
    if len(images) == 0:
        raise UserError(f"{what} is empty; check the folder or file name.")
    if labels.dtype != torch.int64 or labels.shape != (len(images),):
        raise UserError(
            f"{what} has {len(images)} images and labels of shape {tuple(labels.shape)}, "
            f"{labels.dtype}; one int64 label per image is needed."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"{what} has labels from {low} to {high}; with {num_classes} classes they must lie "
            f"in 0..{num_classes - 1}."
        )


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (N,C,H,W), in [0,1] units."""
    return level_statistics(grey_levels(images))


def grey_levels(images: Tensor) -> Tensor:
    """Histogram of each channel of uint8 images (N,C,H,W): (C,256) int64."""
    channels = range(images.shape[1])
    return torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in channels])


def level_statistics(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in [0,1] units, from its ``grey_levels``."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for levels in counts.double():
        share = levels / levels.sum()
        mean = float(share @ values)
        means.append(mean)
        # Avoids a division by zero for a constant channel; 1/255 is one grey level.
        stds.append(max(float(share @ (values - mean) ** 2) ** 0.5, 1 / 255))
    return tuple(means), tuple(stds)


def limited(dataset: Dataset, limit: int | None) -> Dataset:
    """``dataset`` with at most ``limit`` training images, each class in proportion, seed 0."""
    if limit is None or limit >= len(dataset.train_labels):
        return dataset
    if limit < 1:
        raise UserError(f"The limit of training images must be at least 1, not {limit}.")
    rows = stratified_rows(dataset.train_labels, limit, draws.LIMIT, seed=0)
    return replace(
        dataset, train_images=dataset.train_images[rows], train_labels=dataset.train_labels[rows]
    )


def split_validation(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``split_labels`` of the data set's training labels."""
    return split_labels(dataset.train_labels, fraction, seed)


def split_labels(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Training and validation rows of ``labels`` (N,), both sorted (n,) int64.

    ``ceil(fraction * N)`` rows are held out, each class in proportion; the split depends only on
    the labels, the fraction and the seed. Raises ``UserError`` unless 0 < fraction < 1 and both
    parts have images.
    """
    train, held_out = (
        split_rows(labels, fraction, draws.SPLIT, seed)
        if 0 < fraction < 1
        else (torch.empty(0), torch.empty(0))
    )
    if not len(train):
        raise UserError(
            f"A validation share of {fraction} of {len(labels)} training images "
            "leaves no images to train or to validate on; choose a number between 0 and 1."
        )
    return train, held_out
