"""Labelled and pseudo-labelled images in one batch, for robust self-training (RST)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastadv.data import draws
from fastadv.data.batch import LoaderBatch
from fastadv.data.device_loader import DeviceLoader
from fastadv.errors import UserError


class MixedLoader:
    """Batches of half labelled and half pseudo-labelled images, shuffled together.

    As in the RST code (Carmon et al., NeurIPS 2019): the labelled half is a slice of a shuffled
    pass, the other half is drawn with replacement, and an epoch is ``ceil(N / batch_size)``
    batches, so it sees half of the N labelled images. All batches have ``batch_size`` samples.

    ``images`` (N,C,H,W) and ``more_images`` (M,C,H,W) uint8; ``labels`` (N,) and ``more_labels``
    (M,) int64, the latter from a model trained on the former. A pseudo-labelled sample's index is
    its row plus N; if it is drawn twice in an epoch, both draws have the same view.
    ``indices`` are the labelled rows to train on; all other options are those of ``DeviceLoader``.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        more_images: Tensor,
        more_labels: Tensor,
        *,
        batch_size: int,
        indices: Tensor | None = None,
        **options: Any,
    ) -> None:
        if images.shape[1:] != more_images.shape[1:] or not len(more_images):
            raise UserError(
                f"The pseudo-labelled images are {tuple(more_images.shape)}; at least one is "
                f"needed, of the labelled images' shape {tuple(images.shape[1:])}."
            )
        if batch_size < 2 or batch_size % 2:
            raise UserError(
                f"Half of each batch is pseudo-labelled, so {batch_size} must be an even number."
            )
        rows = torch.arange(len(images)) if indices is None else indices
        self.batch_size = batch_size
        self.offset, self.pool = len(images), len(more_images)
        self.rank = options.get("rank", 0)
        self.world_size = options.get("world_size", 1)
        self.labelled = DeviceLoader(
            torch.cat([images, more_images]),
            torch.cat([labels, more_labels]),
            batch_size=batch_size // 2,
            indices=rows,
            **{**options, "drop_last": True},
        )
        self._length = -(-len(rows) // (batch_size * self.world_size))

    def __len__(self) -> int:
        """Batches per epoch."""
        return min(self._length, len(self.labelled))

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LoaderBatch]:
        """The batches of ``epoch``, starting at batch ``start_batch``."""
        whole = self._mixed(self._labelled_rows(epoch), epoch)
        first = self.rank * self.batch_size
        rows = whole[:, first : first + self.batch_size].flatten()
        return self.labelled.batches(rows, [self.batch_size] * len(self), epoch, start_batch)

    def _labelled_rows(self, epoch: int) -> Tensor:
        """The labelled rows of each batch of all processes."""
        loader, half = self.labelled, self.labelled.batch_size * self.world_size
        order = draws.shuffled(loader.rows, draws.ORDER, loader.seed, epoch)
        return order[: len(self) * half].view(-1, half)

    def _mixed(self, labelled: Tensor, epoch: int) -> Tensor:
        seed = self.labelled.seed
        slots = torch.arange(labelled.numel(), device=labelled.device).view_as(labelled)
        drawn = draws.integers(slots, self.pool, draws.MIXED_ROWS, seed, epoch) + self.offset
        both = torch.cat([labelled, drawn], dim=1)
        places = torch.arange(both.numel(), device=both.device).view_as(both)
        keys = draws.hashed(places, draws.MIXED_ORDER, seed, epoch)
        return both.gather(1, keys.argsort(dim=1, stable=True))
