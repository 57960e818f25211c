"""A loader whose images are augmented beyond crop and flip, from some epoch of a run on."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from fastadv.data import draws
from fastadv.data.batch import LoaderBatch


class Loader(Protocol):
    """What every loader does."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LoaderBatch]: ...


class Augmented(ABC):
    """The batches of ``loader``, their images augmented from epoch ``first_epoch`` (from 0) on.

    What a sample gets depends on ``seed``, the epoch and its row alone, the second view's on a
    stream of its own; rows, labels and the views drawn before stay. A ``View`` no longer says
    where a pixel came from: not for parts that store pixels.
    """

    def __init__(self, loader: Loader, *, seed: int, first_epoch: int = 0) -> None:
        self.loader, self.first_epoch, self.seed = loader, first_epoch, seed

    @abstractmethod
    def augment(self, images: Tensor, index: Tensor, *counters: int) -> Tensor:
        """``images`` (B,C,H,W) in [0,1] of rows ``index`` (B,), drawn from ``counters``."""

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.loader)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LoaderBatch]:
        """The batches of ``epoch`` from ``start_batch`` on."""
        for batch in self.loader.epoch(epoch, start_batch):
            yield batch if epoch < self.first_epoch else self._augmented(batch, epoch)

    def _augmented(self, batch: LoaderBatch, epoch: int) -> LoaderBatch:
        index = batch.index
        image = self.augment(batch.image, index, draws.AUGMENT, self.seed, epoch)
        if batch.second is None:
            return dataclasses.replace(batch, image=image)
        other, view = batch.second
        other = self.augment(other, index, draws.SECOND_AUGMENT, self.seed, epoch)
        return dataclasses.replace(batch, image=image, second=(other, view))
