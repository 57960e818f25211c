"""The files that a run was begun with: a run goes on without those that were removed since.

Rows keep the numbers that they had, so that the division into training and validation images, the
order of an epoch, noise, and what a recipe keeps per sample stay what they were. An absent row is
left out of its batch (``LeavingOut``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastadv.data.folders import ImageTree
from fastadv.errors import UserError


@dataclass(frozen=True)
class Listing:
    """A mark (name, size, class) of every file of a tree, ``train`` (N,) and ``test`` (M,) int64;
    ``labels`` (N,) int64 are the classes of the training files. ``content``: name of a set -> the
    digest that the run was begun with."""

    train: Tensor
    labels: Tensor
    test: Tensor
    content: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: ImageTree) -> Listing:
        """The files of ``tree``."""
        train = _marks(tree, tree.train_files, tree.train_labels)
        return cls(
            train,
            torch.tensor(tree.train_labels),
            _marks(tree, tree.test_files, tree.test_labels),
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "train": self.train,
            "labels": self.labels,
            "test": self.test,
            "content": dict(self.content),
        }

    @classmethod
    def from_state(cls, saved: Any) -> Listing:
        """The listing that ``state`` returned. Raises ``UserError`` for anything else."""
        try:
            found = cls(saved["train"], saved["labels"], saved["test"], dict(saved["content"]))
            plain = [found.train, found.labels, found.test]
            fits = all(each.dtype == torch.int64 and each.ndim == 1 for each in plain)
            if not fits or len(found.train) != len(found.labels) or int(found.labels.min()) < 0:
                raise ValueError("its shapes do not fit")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"The checkpoint's list of image files is damaged ({error}): restore last.pt."
            ) from None
        return found


@dataclass(frozen=True)
class Placed:
    """A tree's files in the rows of the ``listing`` that its run was begun with.

    ``train`` (n,) and ``test`` (m,) int64: the row of each of the tree's files, in their order.
    """

    listing: Listing
    train: Tensor
    test: Tensor

    @property
    def absent(self) -> set[int]:
        """The training rows whose files are not there any more."""
        return set(range(len(self.listing.train))) - set(self.train.tolist())

    @property
    def missing(self) -> int:
        """How many files are not there any more."""
        begun = len(self.listing.train) + len(self.listing.test)
        return begun - len(self.train) - len(self.test)


def placed_among(tree: ImageTree, begun: Listing | None) -> Placed:
    """``tree`` in the rows of ``begun``; in its own if that is None, or if the tree has a file that
    was not there, so that it is another data set."""
    own = Listing.of(tree)
    if begun is not None:
        rows = [_rows(begun.train, own.train), _rows(begun.test, own.test)]
        if rows[0] is not None and rows[1] is not None:
            return Placed(begun, rows[0], rows[1])
    return Placed(own, torch.arange(len(own.train)), torch.arange(len(own.test)))


def _rows(begun: Tensor, now: Tensor) -> Tensor | None:
    """The place of each of ``now`` in ``begun``, None if one is not there."""
    places = {mark: row for row, mark in enumerate(begun.tolist())}
    found = [places.get(mark, -1) for mark in now.tolist()]
    return None if -1 in found else torch.tensor(found, dtype=torch.int64)


def _marks(tree: ImageTree, files: list[str], labels: list[int]) -> Tensor:
    marks = []
    for file, label in zip(files, labels, strict=True):
        name = os.fsencode(os.path.relpath(file, tree.root))
        said = name + f"\0{os.stat(file).st_size}\0{tree.classes[label]}\0{label}".encode(
            "utf-8", "surrogateescape"
        )
        mark = hashlib.blake2b(said, digest_size=8).digest()
        marks.append(int.from_bytes(mark, "little", signed=True))
    return torch.tensor(marks, dtype=torch.int64)
