"""Labels for unlabelled images from a trained network, for robust self-training (RST)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastadv.data.view import unit_images
from fastadv.engine import guard
from fastadv.errors import UserError


@torch.no_grad()
def pseudo_labels(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """The classes (N,) int64 that ``model`` in eval mode predicts for ``images`` (N,C,H,W) uint8.

    Hard labels of the largest logit, once (Carmon et al., 2019: from a network trained by plain
    cross entropy on the labelled images). On the CPU; the model is left as it was found.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise UserError(
            f"Unlabelled images must be uint8 (N,C,H,W), not {images.dtype} {tuple(images.shape)}."
        )
    parameter = next(model.parameters())
    with guard.train_flags(model, False):
        found = [
            model(unit_images(part.to(parameter.device), parameter.dtype)).argmax(1).cpu()
            for part in images.split(batch_size)
        ]
    return torch.cat(found)


def write_pseudo_labels(run: str, images: str, out: str, num_classes: int) -> dict[int, int]:
    """Label the images of the .npz file ``images`` with the best network of the run folder ``run``.

    ``images`` holds ``images``, (N,H,W,C) or (N,H,W) uint8; ``out``, another .npz, gets them and
    their ``labels`` (N,) int64. Returns how many images each class got.
    """
    from fastadv.saved_models import load_model

    pixels = _read(Path(images))
    stored = pixels if pixels.ndim == 4 else pixels[..., None]
    batch = torch.from_numpy(stored).permute(0, 3, 1, 2).contiguous()
    model = load_model(run, num_classes, batch.shape[1])
    labels = pseudo_labels(model, batch)
    np.savez(out, images=pixels, labels=labels.numpy())
    counts = labels.bincount(minlength=num_classes)
    return {label: int(count) for label, count in enumerate(counts)}


def read_pseudo_labelled(path: str) -> tuple[Tensor, Tensor]:
    """Images (N,C,H,W) uint8 and labels (N,) int64 that ``write_pseudo_labels`` wrote."""
    pixels = _read(Path(path))
    stored = pixels if pixels.ndim == 4 else pixels[..., None]
    with np.load(path) as file:
        if "labels" not in file:
            raise UserError(f"{path} has no labels yet; write them with fastadv pseudo-label.")
        labels = torch.from_numpy(np.asarray(file["labels"], dtype=np.int64))
    if len(labels) != len(stored):
        raise UserError(f"{path} has {len(stored)} images but {len(labels)} labels.")
    return torch.from_numpy(stored).permute(0, 3, 1, 2).contiguous(), labels


def _read(path: Path) -> np.ndarray:
    try:
        with np.load(path) as file:
            pixels = np.asarray(file["images"])
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"Cannot read images from {path}: {error}.") from None
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise UserError(f"The images in {path} must be uint8 (N,H,W,C), not {pixels.dtype}.")
    return pixels
