"""The data of a run, where they are gone: what is known of them, without an image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NoReturn

import torch

from fastadv.errors import UserError
from fastadv.run.built_for import BuiltFor
from fastadv.run.config import RunConfig
from fastadv.run.source import EvalBatches, LabelledImages, Source, eval_batch_size


class AbsentImages(EvalBatches):
    """Images that are known by their number and digest only; ``why`` is said to who wants more."""

    def __init__(self, count: int, content: str, batch_size: int, name: str, why: str) -> None:
        super().__init__(
            lambda rows, together: self._refuse(),
            torch.zeros(count, dtype=torch.int64),
            batch_size,
            name=name,
            content=content,
        )
        self._why = why

    def limited(self, limit: int | None) -> EvalBatches:
        return self if limit is None else self._refuse()

    def __iter__(self) -> Iterator[LabelledImages]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError(self._why)


class _NoLoader:
    def __init__(self, why: str) -> None:
        self._why = why

    def __len__(self) -> int:
        raise UserError(self._why)

    def epoch(self, epoch: int, start_batch: int = 0) -> NoReturn:
        raise UserError(self._why)


def absent_source(
    config: RunConfig, own: BuiltFor, known: object, device: torch.device, why: str
) -> Source:
    """The data of ``config`` for a network built for ``own``. ``known`` is what a checkpoint holds
    of the test images; without it, they are refused like all others. Raises ``UserError`` with
    ``why`` once an image is wanted."""
    held = known if isinstance(known, Mapping) else {}
    count, content = held.get("count"), held.get("content")
    if not isinstance(count, int) or not isinstance(content, str) or count < 1:
        raise UserError(why)
    batch_size = eval_batch_size(device, own.in_channels * math.prod(own.image_size))
    test = AbsentImages(count, content, batch_size, "test images", why)
    training = AbsentImages(1, "", batch_size, "training images", why)
    validation = AbsentImages(1, "", batch_size, "validation images", why)
    return Source(
        num_samples=1,
        trained_on=1,
        num_classes=own.num_classes,
        classes=own.classes,
        channels=own.in_channels,
        image_size=own.image_size,
        mean=own.mean,
        std=own.std,
        loader=_NoLoader(why),
        training=training,
        validation=test if config.select == "test" else validation,
        test=test,
        streams=bool(held.get("streamed")),
        content={"test data": content},
    )
