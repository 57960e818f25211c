"""Labels for unlabelled images from a trained network, for robust self-training (RST)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastadv.data.array_file import replacing
from fastadv.data.npz_file import NotPlain, open_npz
from fastadv.data.pixels import unit_images
from fastadv.engine.model import guard
from fastadv.engine.model.outputs import logits_in
from fastadv.engine.process.memory import machine_memory
from fastadv.errors import UserError
from fastadv.run.saved_models import read_saved, require_as_asked
from fastadv.storage import files
from fastadv.storage.printable import printable


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
            logits_in(model(unit_images(part.to(parameter.device), parameter.dtype)), None)
            .argmax(1)
            .cpu()
            for part in images.split(batch_size)
        ]
    return torch.cat(found)


def write_pseudo_labels(run: str, images: str, out: str) -> dict[int, int]:
    """Label the images of the .npz file ``images`` with the best network of the run folder ``run``.

    ``images`` holds ``images``, (N,H,W,C) or (N,H,W) uint8; ``out``, another .npz, gets them and
    their ``labels`` (N,) int64. Returns how many images each class got.
    """
    place = Path(out if out.endswith(".npz") else f"{out}.npz")
    files.require_plain(place)
    batch, _ = _read(images, ("images",))
    found = read_saved(run)
    require_as_asked(found, None, batch.shape[1], printable(images))
    num_classes, model = found.built_for.num_classes, found.model()
    labels = pseudo_labels(model, batch)
    try:
        with replacing(place) as file:
            np.savez(file, images=batch.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    except OSError as error:
        raise UserError(f"Cannot write {printable(place)}: {error.strerror}.") from error
    counts = labels.bincount(minlength=num_classes)
    return {label: int(count) for label, count in enumerate(counts)}


def read_pseudo_labelled(path: str, num_classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (N,C,H,W) uint8 and labels (N,) int64 that ``write_pseudo_labels`` wrote.

    Labels must be below ``num_classes`` where it is given.
    """
    pixels, labels = _read(path, ("images", "labels"))
    if labels is None:
        raise UserError(
            f"{printable(path)} has no labels yet; write them with fastadv pseudo-label."
        )
    if len(labels) != len(pixels):
        raise UserError(f"{printable(path)} has {len(pixels)} images but {len(labels)} labels.")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise UserError(
            f"{printable(path)} has labels from {low} to {high}, which are not those of the data's "
            f"{num_classes} classes; label the images with a run on this data."
        )
    return pixels, labels


def _read(path: str, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """The images (N,C,H,W) uint8 in ``path``, and the labels where asked for and there."""
    try:
        with open_npz(Path(path), names) as held:
            if "images" not in held:
                raise NotPlain("it holds no array called images")
            found, labels = held["images"], held.get("labels")
            if sum(member.nbytes for member in held.values()) > machine_memory() // 2:
                raise NotPlain("it would take more than half of this machine's memory")
            if found.dtype != np.uint8 or len(found.shape) not in (3, 4):
                raise UserError(
                    f"The images in {printable(path)} must be uint8 (N,H,W,C), not {found.dtype}."
                )
            stored = np.concatenate([*found.blocks()]) if found.shape[0] else found.whole()
            if labels is not None and (labels.dtype.kind not in "iu" or len(labels.shape) != 1):
                raise UserError(
                    f"The labels in {printable(path)} must be whole numbers (N,), not "
                    f"{labels.dtype} {labels.shape}."
                )
            classes = None if labels is None else labels.whole().astype(np.int64)
    except (NotPlain, OSError) as error:
        raise UserError(
            f"Cannot read images from {printable(path)}: {printable(str(error))}."
        ) from None
    stored = stored if stored.ndim == 4 else stored[..., None]
    images = torch.from_numpy(stored).permute(0, 3, 1, 2).contiguous()
    return images, None if classes is None else torch.from_numpy(classes)
