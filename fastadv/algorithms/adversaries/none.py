"""No attack: the network trains on the images as they are."""

from dataclasses import dataclass

from fastadv.algorithms.contract import Adversarial, Adversary, Batch, Intermediates


@dataclass(eq=False)
class NoAttack(Adversary):
    """x_adv = x."""

    def make(self, batch: Batch, intermediates: Intermediates) -> Adversarial:
        return Adversarial(batch.x, batch.x, intermediates)
