"""The configured data: which loader takes them, and what the training batches go through."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastadv.data import augmentations, is_tree
from fastadv.data.choice import choose_loader, stream_format
from fastadv.data.image_sizes import SizedByEpoch, require_within
from fastadv.data.listing import Listing
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.run.config import RunConfig
from fastadv.run.source.from_files import from_files
from fastadv.run.source.from_memory import from_memory
from fastadv.run.source.images import Source
from fastadv.run.source.tree import tree_of


def open_source(
    config: RunConfig, device: torch.device, views: int = 1, begun: Listing | None = None
) -> Source:
    """The configured data on ``device``; ``views=2`` draws a second view of each image. ``begun``
    are the files that the run was begun with, if it is a folder of images that goes on.

    ``loader="auto"`` keeps a set on the device if it takes a quarter of its memory at most, and
    streams a larger tree of files through DALI. Raises ``UserError`` for data and a method that
    cannot go together.
    """
    _require_one_update_a_row(config)
    _require_pixels_to_follow(config)
    options: dict[str, Any] = {
        "batch_size": _own_batch_size(config),
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "whole": config.bn == "global",
        "device": device,
        "seed": config.seed,
        "pad": config.pad,
        "flip": config.flip,
        "padding": config.padding,
        "views": views,
        "channels_last": True,
    }
    kind = _loader(config, device)
    if kind == "dali" and config.unlabelled is not None:
        raise UserError("--unlabelled mixes images in memory; omit --loader dali.")
    if kind == "dali":
        return _sized(config, _augmented(config, from_files(config, device, options, begun)))
    return _sized(config, _augmented(config, from_memory(config, device, options, begun)))


def _require_one_update_a_row(config: RunConfig) -> None:
    if config.unlabelled is not None and config.plan.keeps_sample_state:
        raise UserError(
            "--unlabelled draws images with replacement, so a batch may hold the same one twice, "
            f"with two updates of the state that {config.method} keeps per sample; omit it, "
            "or choose parts without state per sample."
        )


def _require_pixels_to_follow(config: RunConfig) -> None:
    does = augmentations.does(config.augmentation)
    if does and config.plan.keeps_perturbations:
        raise UserError(
            f"--augmentation {config.augmentation} {does} images, and a perturbation kept for each "
            f"sample cannot follow; omit it with {config.method}."
        )


def _augmented(config: RunConfig, source: Source) -> Source:
    """``source`` with the configured augmentation beyond crop and flip."""
    loader = augmentations.augmented(
        source.loader,
        config.augmentation,
        seed=config.seed,
        epochs=config.epochs,
        channels=source.channels,
        num_classes=source.num_classes,
        crops_files=source.streams,
    )
    return dataclasses.replace(source, loader=loader)


def _sized(config: RunConfig, source: Source) -> Source:
    """``source`` with training images of the configured sizes."""
    if config.image_sizes is None:
        return source
    require_within(config.image_sizes, source.image_size)
    return dataclasses.replace(source, loader=SizedByEpoch(source.loader, config.image_sizes))


def _own_batch_size(config: RunConfig) -> int:
    """The images of a step that one process takes; all processes take equally many."""
    whole, processes = config.batch_size, distributed.world_size()
    if whole % processes:
        raise UserError(
            f"--batch-size is the whole step's, {whole} images, which {processes} processes "
            "cannot share equally; choose a multiple, or another number of processes."
        )
    return whole // processes


def _loader(config: RunConfig, device: torch.device) -> str:
    if config.loader != "auto":
        if config.loader == "dali" and not is_tree(config.data):
            raise UserError(
                "--loader dali streams trees of image files (folder:, imagenet:), not "
                f"{config.data}; omit --loader."
            )
        return config.loader
    if not is_tree(config.data):
        return "device"
    tree = tree_of(config)
    form = stream_format(tree, config.image_size)
    count = len(tree.train_files)
    if config.limit is not None:
        count = min(count, config.limit)
    size = count * form.channels * form.height * form.width
    return choose_loader(config.data, size, device)
