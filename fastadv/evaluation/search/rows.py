"""Rows of images with all that belongs to them: chosen, joined, and cut into batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""Tensors (n,...) with one row for each image."""


def count(rows: Mapping[str, Tensor]) -> int:
    """The number of images."""
    return len(next(iter(rows.values()))) if rows else 0


def chosen(rows: Mapping[str, Tensor], which: Tensor) -> Rows:
    """The rows at ``which``, (m,) int64 or (n,) bool."""
    return {name: values[which] for name, values in rows.items()}


def joined(parts: Iterable[Mapping[str, Tensor]]) -> Rows:
    """All rows of ``parts``, in order; they hold tensors of the same names."""
    parts = [part for part in parts if count(part)]
    if len(parts) < 2:
        return dict(parts[0]) if parts else {}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Buffer:
    """Rows that wait."""

    def __init__(self) -> None:
        self._parts: list[Mapping[str, Tensor]] = []
        self.count = 0

    def put(self, rows: Mapping[str, Tensor]) -> None:
        """Add ``rows`` behind the others."""
        if count(rows):
            self._parts.append(rows)
            self.count += count(rows)

    def take(self, most: int) -> Rows:
        """The first rows, at most ``most`` of them."""
        taken, missing = [], most
        while self._parts and missing > 0:
            part = self._parts[0]
            here = count(part)
            if here <= missing:
                taken.append(self._parts.pop(0))
            else:
                taken.append({name: values[:missing] for name, values in part.items()})
                self._parts[0] = {name: values[missing:] for name, values in part.items()}
                here = missing
            missing -= here
        self.count -= most - missing
        return joined(taken)
