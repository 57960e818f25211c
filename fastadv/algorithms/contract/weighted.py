"""A part whose term is added with a weight, which may rise over the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.setup import Setup
from fastadv.declared import NonNegative, option
from fastadv.errors import UserError


class Weighted(Part):
    """A part with a term that is added times ``weight()``.

    The weight is ``reg_weight``; with ``reg_ramp`` it is reg_weight ``ramp(epoch, epochs)``. Two
    parts of a method that derive from this class (a regularizer, and the attack's loss that holds
    its term) have one weight, since options are shared by name.
    """

    suspects: ClassVar[tuple[str, ...]] = ("reg_weight",)

    reg_weight: NonNegative = option(1.0, "weight of the regularizer in the loss")
    reg_ramp: bool = option(False, "let the weight of the regularizer rise linearly over the run")

    def follows_epochs(self) -> bool:
        return self.reg_ramp

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._ramp = torch.zeros((), device=setup.device, dtype=setup.dtype)
        if self.reg_ramp and setup.total_epochs is None:
            raise UserError("reg_ramp follows the run: pass total_steps= and steps_per_epoch=.")

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        if self.reg_ramp and self.setup.total_epochs is not None:
            self._ramp.fill_(self.reg_weight * self.ramp(int(epoch), self.setup.total_epochs))

    def ramp(self, epoch: int, epochs: float) -> float:
        """The share of ``reg_weight`` in ``epoch`` (from 0) of a run of ``epochs``:
        (epoch + 1)/epochs, at most 1."""
        return min((epoch + 1) / epochs, 1.0)

    def weight(self) -> float | Tensor:
        """The factor of the term in this update: a number, or a 0-dim tensor that is filled in
        place. A part that learns its weight returns a tensor of its ``state``."""
        return self._ramp if self.reg_ramp else self.reg_weight

    def report(self) -> Mapping[str, Tensor]:
        """See ``Reports``: the weight, if it changes during the run."""
        weight = self.weight()
        return {"weight": weight} if isinstance(weight, Tensor) else {}
