"""A data set in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastadv.data import DeviceLoader, Loader, MixedLoader, eval_batches, is_tree, load
from fastadv.data.catalogue import load_tree
from fastadv.data.dataset import Dataset
from fastadv.data.leaving_out import LeavingOut
from fastadv.data.listing import Listing, Placed, placed_among
from fastadv.run.config import RunConfig
from fastadv.run.pseudo_labels import read_pseudo_labelled
from fastadv.run.source.batches import LabelledImages, Read, eval_batch_size
from fastadv.run.source.divided import divided
from fastadv.run.source.images import Source
from fastadv.run.source.kept_digests import as_begun
from fastadv.run.source.tree import has_begun
from fastadv.storage.digests import digest


def from_memory(
    config: RunConfig, device: torch.device, options: dict[str, Any], begun: Listing | None
) -> Source:
    """The configured data set on ``device``; ``options`` are those of its loader, and ``begun`` the
    files that the run was begun with. Raises ``UserError``."""
    data, files = _loaded(config, begun)
    absent = set() if files is None else files.absent
    count = len(data.train_images)
    content = {
        "training data": digest([data.train_images, data.train_labels]),
        "test data": digest([data.test_images, data.test_labels]),
    }
    if files is not None:
        content, files = as_begun(content, files)

    def reading(images: Tensor) -> Read:
        def read(labels: Tensor, places: Tensor, batch_size: int) -> Iterator[LabelledImages]:
            for part in places.split(batch_size):
                yield from eval_batches(images[part], labels[part], len(part), device)

        return read

    sets = divided(
        config,
        (data.train_labels, reading(data.train_images)),
        (data.test_labels, reading(data.test_images)),
        data.num_classes,
        eval_batch_size(device, math.prod(data.train_images.shape[1:])),
        content,
        absent,
    )
    rows = sets.rows
    loader: Loader
    if config.unlabelled is None:
        loader = DeviceLoader(data.train_images, sets.labels, indices=rows, **options)
    else:
        more, labels = read_pseudo_labelled(config.unlabelled, data.num_classes)
        count += len(more)
        content["--unlabelled data"] = digest([more, labels])
        loader = MixedLoader(data.train_images, sets.labels, more, labels, indices=rows, **options)
    return Source(
        num_samples=count,
        trained_on=len(rows) + count - len(data.train_images),
        num_classes=data.num_classes,
        classes=data.classes,
        channels=data.train_images.shape[1],
        image_size=(data.train_images.shape[2], data.train_images.shape[3]),
        mean=data.mean,
        std=data.std,
        loader=loader if files is None else LeavingOut(loader, absent),
        training=sets.training,
        validation=sets.validation,
        test=sets.test,
        streams=False,
        content=content,
        files=files,
    )


def _loaded(config: RunConfig, begun: Listing | None) -> tuple[Dataset, Placed | None]:
    """The data set, and where its files are among those that the run was begun with. The images of
    absent rows are black."""
    root, size = config.data_root, config.image_size
    broken = {"skip_broken": config.skip_broken, "begun": has_begun(config)}
    # Another file would make another choice of a limited number.
    if not is_tree(config.data) or config.limit is not None:
        data = load(
            config.data,
            root=root,
            download=config.download,
            limit=config.limit,
            image_size=size,
            **broken,
        )
        return data, None
    data, tree = load_tree(config.data, root, size, **broken)
    files = placed_among(tree, begun)
    if len(files.train) == len(files.listing.train):
        return data, files
    images = torch.zeros(len(files.listing.train), *data.train_images.shape[1:], dtype=torch.uint8)
    images[files.train] = data.train_images
    labels = files.listing.labels
    return dataclasses.replace(data, train_images=images, train_labels=labels), files
