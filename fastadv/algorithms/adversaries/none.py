"""No attack: the network trains on clean images."""

from typing import ClassVar

from fastadv.algorithms.contract import Adversarial, Adversary, Batch, Context
from fastadv.errors import UserError


class NoAttack(Adversary):
    """x_adv = x."""

    attacks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shrink or self.flip_signs:
            raise UserError(
                "shrink and flip_signs weaken a perturbation; without an attack x' = x, and there "
                "is none."
            )

    @property
    def gradient_steps(self) -> int:
        return 0

    def make(self, batch: Batch, context: Context) -> Adversarial:
        return Adversarial(batch.x, batch.x, context)
