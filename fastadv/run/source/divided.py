"""The training set divided into what is trained on and what is held out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.data.dataset import split_labels
from fastadv.data.label_noise import noisy_labels
from fastadv.run.config import RunConfig
from fastadv.run.source.batches import EvalBatches, Read
from fastadv.storage.digests import digest


class Divided(NamedTuple):
    """The ``rows`` that are trained on, the ``labels`` (N,) of which training sees theirs, and the
    sets that are evaluated."""

    rows: Tensor
    labels: Tensor
    training: EvalBatches
    validation: EvalBatches
    test: EvalBatches


def divided(
    config: RunConfig,
    trained: tuple[Tensor, Read],
    tested: tuple[Tensor, Read],
    num_classes: int,
    batch_size: int,
    content: Mapping[str, str],
    absent: Collection[int] = (),
) -> Divided:
    """The training set (true labels, and how to read it) divided into what is trained on and what
    is held out, with noise in the labels of the former; and the test set. Nothing is evaluated on
    the ``absent`` rows."""
    true, read = trained
    rows, held_out = split_labels(true, config.val_fraction, config.seed)
    if config.select == "test":
        rows = torch.arange(len(true))
    noisy = noisy_labels(true, config.label_noise, num_classes, config.seed)

    def of_training_data(name: str, labels: Tensor, places: Tensor) -> EvalBatches:
        if absent:
            places = torch.tensor([row for row in places.tolist() if row not in absent])
        return EvalBatches(
            lambda chosen, together: read(labels, places[chosen], together),
            labels[places],
            batch_size,
            name=name,
            content=digest([content["training data"], places, labels[places]]),
            wrong_labels=int((labels != true)[places].sum()),
        )

    labels, read_test = tested
    test = EvalBatches(
        lambda chosen, together: read_test(labels, chosen, together),
        labels,
        batch_size,
        config.test_limit,
        name="test images",
        content=content["test data"],
    )
    return Divided(
        rows,
        noisy,
        of_training_data("training images", noisy, rows),
        test if config.select == "test" else of_training_data("validation images", true, held_out),
        test,
    )
