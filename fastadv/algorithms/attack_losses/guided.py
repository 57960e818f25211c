"""GAT's attack: the cross entropy and the change of the prediction (Sriramanan et al., 2020)."""

from torch import Tensor

from fastadv.algorithms.attack_losses.every_second import EverySecond
from fastadv.algorithms.contract import Context, Fit, required
from fastadv.algorithms.guidance import LateWeight, change


class GuidedAttack(LateWeight, EverySecond):
    """fit(f(x'), y) + weight |softmax f(x') - softmax f(x)|_2^2; the square only in every second
    update, as in the published code.

    f(x) is in BatchNorm's training mode, a pass before the attack that moves the running
    statistics.
    """

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_first", "class_logits"})

    def per_sample(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        moved = change(logits, required(context.natural_logits_first))
        return fit(logits, y, context) + self.on * self.weight() * moved
