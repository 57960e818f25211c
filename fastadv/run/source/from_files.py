"""Files that are decoded while training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadv.data import augmentations
from fastadv.data.broken import REPAIR, BrokenImages, note, sentence
from fastadv.data.catalogue import cache_folder
from fastadv.data.dali import DaliLoader
from fastadv.data.leaving_out import LeavingOut
from fastadv.data.listing import Listing, placed_among
from fastadv.data.packed import tell, tell_left_out
from fastadv.errors import UserError
from fastadv.run.config import RunConfig
from fastadv.run.source.batches import LabelledImages, Read, eval_batch_size
from fastadv.run.source.divided import divided
from fastadv.run.source.images import Source
from fastadv.run.source.kept_digests import as_begun
from fastadv.run.source.tree import has_begun, looked_at
from fastadv.storage.digests import digest


def _digest_of_files(files: Iterable[str], labels: Iterable[int]) -> str:
    """Of files that are too many to be read at once: their names below the class, sizes, labels."""
    entries = zip(files, labels, strict=True)
    return digest([(*Path(file).parts[-2:], os.stat(file).st_size, int(y)) for file, y in entries])


def from_files(
    config: RunConfig, device: torch.device, options: dict[str, Any], begun: Listing | None
) -> Source:
    """The configured folder of images, decoded by DALI; ``options`` are those of its loader, and
    ``begun`` the files that the run was begun with. Raises ``UserError``."""
    if config.limit is not None:
        raise UserError("--limit is for data sets in memory; omit it with --loader dali.")
    tree, form, (mean, std) = looked_at(config)
    if not has_begun(config):
        tell_left_out(tree)
    files = placed_among(tree, begun)
    absent = files.absent
    content = {
        "training data": _digest_of_files(tree.train_files, tree.train_labels),
        "test data": _digest_of_files(tree.test_files, tree.test_labels),
    }
    content, files = as_begun(content, files)
    train_files = [""] * len(files.listing.train)  # without a name: not there any more
    for row, file in zip(files.train.tolist(), tree.train_files, strict=True):
        train_files[row] = file

    def on_broken(found: list[str]) -> None:
        note(tree, found, cache_folder(config.data_root))
        if not config.skip_broken:
            raise BrokenImages(sentence(tree, found, REPAIR), found)
        tell(sentence(tree, found, "they are left out from here on"))

    def reading(files: list[str]) -> Read:
        def read(labels: Tensor, places: Tensor, batch_size: int) -> Iterator[LabelledImages]:
            common: dict[str, Any] = {"batch_size": batch_size, "device": device}
            common["on_broken"] = on_broken
            return DaliLoader(files, labels.tolist(), form, indices=places, **common).ordered()

        return read

    sets = divided(
        config,
        (files.listing.labels, reading(train_files)),
        (torch.tensor(tree.test_labels), reading(tree.test_files)),
        len(tree.classes),
        eval_batch_size(device, form.bytes_each),
        content,
        absent,
    )
    rows, labels = sets.rows, sets.labels
    options["resized_crop"] = augmentations.CROP in augmentations.names_in(config.augmentation)
    options |= {"absent": absent, "on_broken": on_broken}
    loader = DaliLoader(train_files, labels.tolist(), form, indices=rows, **options)
    return Source(
        num_samples=len(labels),
        trained_on=len(rows),
        num_classes=len(tree.classes),
        classes=tree.classes,
        channels=form.channels,
        image_size=(form.height, form.width),
        mean=mean,
        std=std,
        loader=LeavingOut(loader, absent),
        training=sets.training,
        validation=sets.validation,
        test=sets.test,
        streams=True,
        content=content,
        files=files,
    )
