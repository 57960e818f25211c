"""The averaging part: the average of the weights that is evaluated."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastadv.algorithms.contract.part import Part


class Averaging(Part):
    """An average of the weights, which is evaluated in place of the weights.

    All parameters of a model are averaged, by name. Frozen ones are included: their average is a
    constant, and they may learn later. ``parameters`` is name -> the present parameter.
    """

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Allocate the average; called once, after ``prepare``."""

    def update(self, parameters: Mapping[str, Tensor], ok: Tensor, ended: int | None) -> None:
        """Called after every optimizer step with ``ended`` None, and after the last update of epoch
        ``ended`` (from 0); changes the average only where ``ok`` (0-dim bool)."""

    def replaced(self, parameters: Mapping[str, Tensor], old: Mapping[str, str]) -> None:
        """Called when the model has other parameters than before. ``old`` is present name -> name
        before. A new parameter has no average yet; the average of a removed one is dropped."""

    def averaged(self) -> dict[str, Tensor]:
        """Name -> averaged parameter. For a name that is missing, the live parameter is
        evaluated."""
        return {}
