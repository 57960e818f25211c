"""CIFAR-10, CIFAR-100 and SVHN through torchvision's readers and their standard folders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from fastadv.data.dataset import Dataset
from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import NotThere, UserError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class _Published:
    reader: str  # the class in torchvision.datasets
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Published per-channel statistics of the training images over all pixels; for SVHN all published
# code uses 0.5.
PUBLISHED = {
    "cifar10": _Published("CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": _Published("CIFAR100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": _Published("SVHN", 10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def read_torchvision(name: str, root: Path, download: bool) -> Dataset:
    """One of ``PUBLISHED`` from torchvision's folder in ``root``; ``download`` fetches it first."""
    entry = PUBLISHED[name]
    train, classes = _read(name, entry, root, True, download)
    test, _ = _read(name, entry, root, False, download)
    return Dataset(name, *train, *test, entry.num_classes, entry.mean, entry.std, classes)


def _read(
    name: str, entry: _Published, root: Path, train: bool, download: bool
) -> tuple[tuple[Tensor, Tensor], tuple[str, ...]]:
    """Images and labels, and the names of the classes."""
    import_torchvision()
    from torchvision import datasets

    which: dict[str, Any] = {"train": train}
    if name == "svhn":
        which = {"split": "train" if train else "test"}
    try:
        source = getattr(datasets, entry.reader)(str(root), download=download, **which)
    except (URLError, ConnectionError) as error:
        raise UserError(f"{name} could not be downloaded to {root}: {error}.") from error
    except (RuntimeError, FileNotFoundError) as error:
        # torchvision raises the same error for missing and corrupted files.
        raise NotThere(
            f"{name} is missing or damaged in {root.resolve()}; add --download to fetch it, or "
            "--data-root with the folder that it is in."
        ) from error
    if name == "svhn":  # already (N,C,H,W)
        images, labels = torch.from_numpy(source.data), torch.from_numpy(source.labels).long()
        return (images, labels), tuple("0123456789")
    pixels = np.ascontiguousarray(source.data.transpose(0, 3, 1, 2))
    return (torch.from_numpy(pixels), torch.tensor(source.targets)), tuple(source.classes)
