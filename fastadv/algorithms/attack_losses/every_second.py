"""An attack's loss with a term in every second update (GAT, NuAT: Sriramanan et al.)."""

import torch

from fastadv.algorithms.contract import AttackLoss, Setup


class EverySecond(AttackLoss):
    """The target's loss, plus a term in the second, fourth, ... update of each epoch.

    ``on`` (0-dim) is 1 in these and 0 in the others. Without ``steps_per_epoch`` updates are
    counted from the first of the run.
    """

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self.on = torch.zeros((), device=setup.device, dtype=setup.dtype)

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        self.on.fill_(update % (self.setup.steps_per_epoch or update + 1) % 2)
