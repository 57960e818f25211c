"""Changes of the prediction along an attack that are to be equal (FGSM-PCO: Wang et al., 2024)."""

from collections import Counter

from torch import Tensor

from fastadv.algorithms.contract import (
    TRAINING,
    Adversarial,
    Batch,
    Capabilities,
    Outputs,
    Pass,
    Regularizer,
)
from fastadv.declared import NonNegative, option
from fastadv.errors import UserError


class EqualChanges(Regularizer):
    """| mean (f(x1) - f(x0))^2 - mean (f(x1) - f(x'))^2 |, the means over batch and classes.

    The attack steps from x0 to x1, and x' is another point, which the network is trained on. All
    three predictions are differentiated. The pass at x0 is that of the attack once more, and moves
    no statistics of BatchNorm; that at x1 comes after the one at x' (HandingWangXDGroup/FGSM-PCO,
    FGSM-PCO.py).
    """

    reg_weight: NonNegative = option(10.0, "weight of the regularizer in the loss")

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return Counter({Pass(TRAINING, "train"): 2})

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        if attacked.start is None or attacked.stepped is None:
            raise UserError(
                "equal-changes compares the end of an attack's step with another point: take an "
                "adversary that trains on one, such as 'fgsm-pco'."
            )
        last = self.net.logits(attacked.stepped)
        with self.net.bn_momenta.still():
            first = self.net.logits(attacked.start)
        changes = (last - first).square().mean() - (last - outputs.adversarial).square().mean()
        return changes.abs()
