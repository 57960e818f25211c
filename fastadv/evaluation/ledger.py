"""What is known of every image under one attack, in the memory of the host: 24 bytes an image."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fastadv.evaluation.arrivals import Arrivals, Values

ABSENT, OPEN, RIGHT = -3, -2, -1
"""Entries of ``fooled_by`` that are no stage: an image that was not looked at, one without a
verdict, and one that is classified correctly under the attack."""

_ROW = np.dtype(
    [
        ("label", "<i4"),
        ("fooled_by", "<i2"),
        ("passed", "<i2"),
        ("runs", "<i2"),
        ("margin", "<f4"),
        ("strength", "<f8"),
        ("flat", "?"),
        ("saturated", "?"),
    ]
)
# In this order: what Ctrl-C leaves half written is an image that is searched again.
_WRITTEN = ("label", "margin", "strength", "flat", "saturated", "runs", "passed", "fooled_by")
_EMPTY = np.array([(-1, ABSENT, 0, 0, np.nan, -np.inf, False, False)], _ROW)[0]


class Ledger:
    """A row for each image, by its place in the pass; it grows with the places.

    ``label``: the class. ``fooled_by``: the stage that fooled the network, or one of the constants
    above. ``passed``: the number of a cascade's searches that the image has survived, and ``runs``:
    of the runs of the next one. ``margin``: the smallest one seen; nan if none is known.
    ``strength``: that of the strongest point so far (``Search.strength``). ``flat``: the gradient
    was exactly zero at the start. ``saturated``: the loss was exactly zero after the attack.

    Rows of a CUDA device are copied without waiting for it, and entered when they have arrived.
    """

    def __init__(self, rows: np.ndarray | None = None) -> None:
        self._rows = np.empty(0, _ROW) if rows is None else rows
        self._count = len(self._rows)
        self._arrivals = Arrivals(self._write)

    def __len__(self) -> int:
        """One more than the highest place."""
        return self._count

    def expect(self, places: range) -> None:
        """Note that there are images at ``places``."""
        self._grow(places.stop)
        stages = self._rows["fooled_by"][places.start : places.stop]
        stages[stages == ABSENT] = OPEN

    def put(self, place: Tensor, **columns: Tensor) -> None:
        """Set ``columns`` (n,) of the images at ``place`` (n,). Another label than the one that is
        there is a ``ValueError``, now or when the values have arrived: verdicts that belong to
        other images would be counted."""
        self._arrivals.send({"place": place, **columns})

    def settle(self, *, wait: bool = True) -> None:
        """Enter what has arrived from the device; with ``wait``, all of it."""
        self._arrivals.settle(wait=wait)

    def _write(self, values: Values) -> None:
        place = values["place"].numpy()
        if not len(place):
            return
        self._grow(int(place.max()) + 1)
        for name in _WRITTEN:
            if name not in values:
                continue
            new = values[name]
            column = (new.float() if new.dtype == torch.bfloat16 else new).numpy()
            if name == "label":
                old = self._rows[name][place]
                if ((old >= 0) & (old != column)).any():
                    raise ValueError("what is known belongs to other images")
            self._rows[name][place] = column

    def _grow(self, count: int) -> None:
        if count > len(self._rows):
            more = max(count, 2 * len(self._rows)) - len(self._rows)
            self._rows = np.concatenate([self._rows, np.full(more, _EMPTY, _ROW)])
        self._count = max(self._count, count)

    @property
    def rows(self) -> np.ndarray:
        """All rows, a structured array with the names above."""
        return self._rows[: self._count]

    @property
    def known(self) -> np.ndarray:
        """(N,) bool: there is a verdict."""
        return np.asarray(self.rows["fooled_by"] >= RIGHT)

    @property
    def right(self) -> np.ndarray:
        """(N,) bool: classified correctly under the attack."""
        return np.asarray(self.rows["fooled_by"] == RIGHT)

    def is_known(self, places: range) -> np.ndarray:
        """(n,) bool: there is a verdict on the image at each of ``places``."""
        self._grow(places.stop)
        return np.asarray(self._rows["fooled_by"][places.start : places.stop] >= RIGHT)

    def of(self, start: int, count: int) -> np.ndarray:
        """The rows of ``count`` images from place ``start``."""
        self._grow(start + count)
        return self._rows[start : start + count]

    def bounds(self, total: int) -> tuple[float, float]:
        """The lowest and the highest accuracy on ``total`` images that are still possible: all that
        have no verdict are fooled, or none of them."""
        known = int(self.known.sum())
        right = int(self.right.sum())
        return right / total, (right + total - known) / total

    def is_further_than(self, before: Ledger | None) -> bool:
        """True if more is known of an image than in ``before`` (None: than nothing): a verdict, or
        another search or run that it has survived."""
        known = np.zeros(len(self), np.int64)
        if before is not None:
            count = min(len(self), len(before))
            known[:count] = _progress(before.rows[:count])
        return bool((_progress(self.rows) > np.maximum(known, 0)).any())

    def packed(self) -> bytes:
        """The rows as bytes."""
        return self.rows.tobytes()

    @classmethod
    def unpacked(cls, content: bytes) -> Ledger:
        """The ledger of ``packed``. Raises ``ValueError`` for anything else."""
        return cls(np.frombuffer(bytearray(content), _ROW) if content else None)

    @classmethod
    def union(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """What is known in any of ``ledgers``, which are of the same images."""
        whole = cls()
        for other in ledgers:
            other.settle()
            whole._grow(len(other))
            mine = whole._rows[: len(other)]
            better = _progress(other.rows) > _progress(mine)
            mine[better] = other.rows[better]
        return whole


def _progress(rows: np.ndarray) -> np.ndarray:
    """How much is known: a verdict is more than an open image, and that is the more, the further
    its searches are."""
    passed = rows["passed"].astype(np.int64) << 16 | rows["runs"]
    open_or_not = np.where(rows["fooled_by"] == ABSENT, -1, passed)
    return np.where(rows["fooled_by"] >= RIGHT, 1 << 40, open_or_not)
