"""A loader whose rows are not all there: files that were removed, or that broke during the run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastadv.data.augmented import Loader
from fastadv.data.batch import LoaderBatch
from fastadv.data.view import View


class LeavingOut:
    """The batches of ``loader`` without the rows ``absent``, a set that may grow while the loader
    is read. All other rows come in the batches, in the order and with the views that they would
    have with them."""

    def __init__(self, loader: Loader, absent: set[int]) -> None:
        self.loader, self.absent = loader, absent

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.loader)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LoaderBatch]:
        """The batches of ``epoch``, starting at batch ``start_batch``."""
        for batch in self.loader.epoch(epoch, start_batch):
            yield self._present(batch) if self.absent else batch

    def _present(self, batch: LoaderBatch) -> LoaderBatch:
        rows = batch.index.tolist()
        kept = [place for place, row in enumerate(rows) if row not in self.absent]
        if len(kept) == len(rows):
            return batch
        places = torch.tensor(kept, dtype=torch.int64, device=batch.index.device)
        second = batch.second
        return LoaderBatch(
            batch.index[places],
            _images(batch.image, places),
            batch.label[places],
            _view(batch.view, places),
            None if second is None else (_images(second[0], places), _view(second[1], places)),
        )


def _images(images: Tensor, places: Tensor) -> Tensor:
    """Images ``places`` of ``images``, in their layout."""
    chosen = images[places]
    if images.is_contiguous():
        return chosen
    return chosen.contiguous(memory_format=torch.channels_last)


def _view(view: View, places: Tensor) -> View:
    return View(view.top[places], view.left[places], view.flip[places])
