"""The averaging part: the average of the weights that is evaluated."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastadv.algorithms.contract.part import Part


class Averaging(Part):
    """An average of the weights, which is evaluated in place of the weights.

    All parameters of a model are averaged, by name. Frozen ones are included: their average is a
    constant, and they may learn later. ``tensors`` is name -> the present parameter, and with
    ``averages_buffers`` also name -> the present buffer.
    """

    @property
    def averages_buffers(self) -> bool:
        """True if the floating-point buffers of the model's state are averaged like parameters, and
        then evaluated as they are averaged; constant for given options."""
        return False

    def start(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocate the average; called once, after ``prepare``."""

    def update(self, tensors: Mapping[str, Tensor], ok: Tensor, ended: int | None) -> None:
        """Called after every optimizer step with ``ended`` None, and after the last update of epoch
        ``ended`` (from 0); changes the average only where ``ok`` (0-dim bool)."""

    def replaced(self, tensors: Mapping[str, Tensor], old: Mapping[str, str]) -> None:
        """Called when the model has other parameters or modules than before. ``old`` is present
        name -> name before. A new tensor has no average yet; the average of a removed one is
        dropped."""

    def averaged(self) -> dict[str, Tensor]:
        """Name -> average. For a name that is missing, the live tensor is evaluated."""
        return {}
