"""Standard training first, then PGD (Gupta et al., 2020: the first epochs need no attack)."""

from fastadv.algorithms.adversaries.pgd import PGD
from fastadv.algorithms.contract import Adversarial, Batch, Context, Setup
from fastadv.algorithms.phases import epoch_of
from fastadv.declared import NonNegative, option


class CleanFirst(PGD):
    """x' = x before epoch ``attack_start``, and PGD from then on.

    The paper switches once, from natural to adversarial images, and leaves the rest of the training
    as it is.
    """

    attack_start: NonNegative = option(
        0.5, "epoch, counted from 0, from which images are attacked; below 1: share of the run"
    )

    def follows_epochs(self) -> bool:
        return super().follows_epochs() or self.attack_start > 0

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._start = epoch_of(self.attack_start, setup, "attack_start")

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        self.active = int(epoch) >= self._start

    def make(self, batch: Batch, context: Context) -> Adversarial:
        if self.active:
            return super().make(batch, context)
        return Adversarial(batch.x, batch.x, context)
