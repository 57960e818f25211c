"""What an evaluation has found so far: a ledger for each attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastadv.evaluation.counts import Counts, by_square
from fastadv.evaluation.ledger import Ledger
from fastadv.evaluation.verdicts import Verdicts


@dataclass(frozen=True)
class Found:
    """``ledgers`` and the names of their ``stages`` by attack, over the first ``images``.

    ``masks`` as in ``Counts``. ``halted``: the evaluation was stopped before it was complete.
    """

    ledgers: Mapping[str, Ledger]
    stages: Mapping[str, list[str]]
    images: int
    masks: list[bool]
    halted: bool = False

    def counts(self) -> Counts:
        """The counts over all images, which must have their verdicts."""
        for name, ledger in self.ledgers.items():
            known = int(ledger.known.sum())
            if known not in (0, self.images):  # none: a metric, which counts by itself
                raise RuntimeError(f"{name} has {known} verdicts on {self.images} images")
        rows = [ledger.rows for ledger in self.ledgers.values()]
        right = [int(ledger.right.sum()) for ledger in self.ledgers.values()]
        zero_gradient, saturated = (
            [int(each[column].sum()) for each in rows] for column in ("flat", "saturated")
        )
        squares = [
            by_square(self.stages[name], ledger.rows["fooled_by"])
            for name, ledger in self.ledgers.items()
        ]
        return Counts(
            list(self.ledgers), self.images, right, zero_gradient, saturated, squares, self.masks
        )

    def verdicts(
        self, attack: str, facts: Mapping[str, Any], index: np.ndarray | None = None
    ) -> Verdicts | None:
        """The verdicts under ``attack``; ``index`` (N,) are the rows of the images in their data
        set (None: 0..N-1). None where the labels are no classes, or nothing says what is right."""
        ledger = self.ledgers[attack]
        rows = ledger.rows
        if not len(rows) or (rows["label"] < 0).any() or not ledger.known.all():
            return None
        arrays = {name: rows[name] for name in ("label", "margin", "fooled_by")}
        arrays["right"] = ledger.right
        arrays["index"] = np.arange(len(rows)) if index is None else index
        # An infinite margin of logits that are masked says no more than none.
        arrays["margin"] = np.where(np.isinf(arrays["margin"]), np.nan, arrays["margin"])
        return Verdicts.collected(arrays, self.stages[attack], facts)
