"""No attack: the network trains on clean images."""

from dataclasses import dataclass

from fastadv.algorithms.contract import Adversarial, Adversary, Batch, Context


@dataclass(eq=False)
class NoAttack(Adversary):
    """x_adv = x."""

    def make(self, batch: Batch, context: Context) -> Adversarial:
        return Adversarial(batch.x, batch.x, context)
