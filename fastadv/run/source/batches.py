"""Labelled images in order, for evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fastadv.data import draws
from fastadv.data.labels import stratified_rows
from fastadv.engine.process import distributed


def eval_batch_size(device: torch.device, values: int) -> int:
    """Images per evaluation batch, where one image has ``values`` numbers.

    On a CPU 100 images of CIFAR's size are as fast as more, and an interruption loses less; of
    smaller images it takes more, of larger ones fewer.
    """
    if device.type != "cpu":
        return 500
    return min(500, max(8, 100 * 3 * 32 * 32 // values))


LabelledImages = tuple[Tensor, Tensor]
Read = Callable[[Tensor, Tensor, int], Iterable[LabelledImages]]
"""From the labels (N,) of a set, rows of it and a batch size to the batches of these rows."""


class EvalBatches:
    """Labelled images in order, batch by batch, as often as asked.

    ``batches(rows, batch_size)`` gives the chosen ones of the images whose labels are ``labels``
    (N,). At most ``limit`` of them are evaluated, each class in proportion, always the same ones.
    ``name`` says what they are. ``content`` is a digest of all N: the networks of two runs can be
    compared on images with the same one. ``wrong_labels`` is how many of the N labels are not the
    true ones, because of label noise.
    """

    def __init__(
        self,
        batches: Callable[[Tensor, int], Iterable[LabelledImages]],
        labels: Tensor,
        batch_size: int,
        limit: int | None = None,
        *,
        name: str = "images",
        content: str = "",
        wrong_labels: int = 0,
    ) -> None:
        self._batches, self._labels, self.batch_size = batches, labels.cpu(), batch_size
        self.name, self.content, self.wrong_labels = name, content, wrong_labels
        self.rows = torch.arange(len(labels))
        if limit is not None and limit < len(labels):
            self.rows = stratified_rows(self._labels, limit, draws.LIMIT, seed=0)

    @property
    def count(self) -> int:
        """How many images the set has, of which some may be left out."""
        return len(self._labels)

    def named(self, name: str) -> EvalBatches:
        """The same images, all of them, under another name."""
        found = self.limited(None)
        found.name = name
        return found

    def limited(self, limit: int | None) -> EvalBatches:
        """The same images, at most ``limit`` of them."""
        return EvalBatches(
            self._batches,
            self._labels,
            self.batch_size,
            limit,
            name=self.name,
            content=self.content,
            wrong_labels=self.wrong_labels,
        )

    @property
    def label_noise(self) -> str:
        """How many of the set's labels are wrong, in words."""
        count = len(self._labels)
        return f"{100 * self.wrong_labels / count:.1f} % of {count:,} labels are wrong"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LabelledImages]:
        # Processes take batches in turn: each must find one.
        share = -(-len(self.rows) // distributed.world_size())
        yield from self._batches(self.rows, max(1, min(self.batch_size, share)))
