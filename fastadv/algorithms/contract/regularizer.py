"""The regularizer: what is added to the mean of the objective."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.setup import Setup
from fastadv.algorithms.contract.tensors import Adversarial, Batch, Outputs
from fastadv.declared import NonNegative, option
from fastadv.errors import UserError


class Regularizer(Part):
    """A term that is added to the mean of the objective, times ``reg_weight``.

    With ``reg_ramp`` the weight rises with the epoch e (from 0) as reg_weight (e + 1)/epochs.
    """

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
        if self.reg_ramp and self.setup.total_epochs is not None:
            share = (int(epoch) + 1) / self.setup.total_epochs
            self._ramp.fill_(self.reg_weight * min(share, 1.0))

    @final
    def weight(self) -> float | Tensor:
        """The factor of ``term`` in this update; a 0-dim tensor with ``reg_ramp``."""
        return self._ramp if self.reg_ramp else self.reg_weight

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        """The term (0-dim), differentiable in the weights. ``x_adv`` is the input of the outer
        pass, after weakening; ``attacked`` is what the adversary made."""
        raise NotImplementedError
