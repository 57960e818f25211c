"""The loss that the target fits."""

from torch import Tensor

from fastadv.algorithms.contract import AttackLoss, Context, Fit


class FitAttack(AttackLoss):
    """The target's own loss of f(x'), such as the user's criterion."""

    def per_sample(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return fit(logits, y, context)
