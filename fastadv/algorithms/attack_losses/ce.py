"""Cross entropy with the given label."""

from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import AttackLoss, Context, Fit


class CrossEntropyAttack(AttackLoss):
    """CE(f(x'), y), whatever label the target fits."""

    def is_plain(self) -> bool:
        return True

    def per_sample(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return functional.cross_entropy(logits, y, reduction="none")

    def mean(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return functional.cross_entropy(logits, y)
