"""The averaging part: which weights are evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastadv.algorithms.contract.part import Part


@dataclass(eq=False)
class Averaging(Part):
    """Which weights are evaluated.

    All of a model's parameters are averaged, by name: a frozen one's average is that of a constant,
    and it may learn later. In ``parameters`` they are as they stand in the model now.
    """

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Allocate the average."""

    def update(self, parameters: Mapping[str, Tensor], ok: Tensor) -> None:
        """After every optimizer step."""

    def epoch_end(self, epoch: int, parameters: Mapping[str, Tensor], ok: Tensor) -> None:
        """After the last update of ``epoch`` (from 0)."""

    def replaced(self, parameters: Mapping[str, Tensor], old: Mapping[str, str]) -> None:
        """Other parameters stand in the model: ``old`` says by which name one was known before.
        One that was not there has no average yet; those that are gone lose theirs."""

    def averaged(self) -> dict[str, Tensor]:
        """The averaged parameters by name; the live ones are evaluated for those missing."""
        return {}

    def average(self) -> list[Tensor] | None:
        """The averaged parameters, or None while the live ones are to be evaluated."""
        return [*self.averaged().values()] or None
