"""GAT's change of the prediction, which a regularizer and an attack's loss share with its weight
(Sriramanan et al., 2020)."""

from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract import Weighted
from fastadv.declared import NonNegative, option

LATE = 0.86  # of the run: after 86 of 100 epochs, where the learning rate drops also
FACTOR = 4.0  # of the weight from then on


def change(first: Tensor, second: Tensor) -> Tensor:
    """|softmax(first) - softmax(second)|_2^2 per sample (B,), logits (B,classes)."""
    return (first.softmax(1) - second.softmax(1)).square().sum(1)


class LateWeight(Weighted):
    """A weight that is ``reg_weight`` and 4 times that in the last 14 % of the run (the published
    code's epochs 86 to 99, from 0, on CIFAR-10)."""

    suspects: ClassVar[tuple[str, ...]] = ("reg_weight",)

    reg_weight: NonNegative = option(10.0, "weight of the squared change of the prediction")
    reg_ramp: bool = option(True, "raise the weight fourfold in the last 14 percent of the run")

    def ramp(self, epoch: int, epochs: float) -> float:
        return FACTOR if epoch >= LATE * epochs else 1.0
