"""Cross entropy with smoothed labels, whatever smoothing the target has."""

from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import AttackLoss, Context, Fit
from fastadv.declared import ShareBelowOne, option


class SmoothedAttack(AttackLoss):
    """CE(f(x'), (1 - s) y + s / classes), s = ``attack_smoothing``: torch's own smoothing."""

    attack_smoothing: ShareBelowOne = option(
        0.4, "probability that the attack's label gives to all classes alike"
    )

    def requires(self) -> frozenset[str]:
        return frozenset({"class_logits"})

    def per_sample(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return functional.cross_entropy(
            logits, y, reduction="none", label_smoothing=self.attack_smoothing
        )
