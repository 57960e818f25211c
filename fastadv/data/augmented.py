"""A loader with more augmentation than crop and flip, starting at a given epoch."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from fastadv.data import draws
from fastadv.data.batch import LoaderBatch

_LATER = 1000  # above the numbers of the draws of one augmentation


class Loader(Protocol):
    """The interface of every loader."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LoaderBatch]: ...


class Augmented(ABC):
    """The batches of ``loader``; from epoch ``first_epoch`` (counted from 0) images are augmented.

    The augmentation of a sample depends only on ``seed``, the epoch and its row; the second view
    uses its own stream, and so does every ``place`` among augmentations in a row. Rows, labels and
    views are unchanged. After the augmentation a ``View`` no longer gives the origin of a pixel, so
    do not combine this with parts that store pixels.
    """

    def __init__(self, loader: Loader, *, seed: int, first_epoch: int = 0, place: int = 0) -> None:
        self.loader, self.first_epoch, self.seed = loader, first_epoch, seed
        self._more = (_LATER + place,) if place else ()

    @abstractmethod
    def augment(self, images: Tensor, index: Tensor, *counters: int) -> Tensor:
        """``images`` (B,C,H,W) in [0,1] of rows ``index`` (B,), drawn from ``counters``."""

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.loader)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LoaderBatch]:
        """The batches of ``epoch``, starting at batch ``start_batch``."""
        for batch in self.loader.epoch(epoch, start_batch):
            given = epoch < self.first_epoch or not len(batch.index)
            yield batch if given else self._augmented(batch, epoch)

    def _augmented(self, batch: LoaderBatch, epoch: int) -> LoaderBatch:
        index = batch.index
        image = self.augment(batch.image, index, draws.AUGMENT, self.seed, epoch, *self._more)
        if batch.second is None:
            return dataclasses.replace(batch, image=image)
        other, view = batch.second
        other = self.augment(other, index, draws.SECOND_AUGMENT, self.seed, epoch, *self._more)
        return dataclasses.replace(batch, image=image, second=(other, view))
