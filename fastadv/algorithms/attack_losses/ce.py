"""Cross entropy with the given label."""

from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import AttackLoss, Context, Fit


class CrossEntropyAttack(AttackLoss):
    """CE(f(x'), y), whatever label the target fits."""

    def requires(self) -> frozenset[str]:
        return frozenset({"class_logits"})

    def is_plain(self) -> bool:
        return type(self) is CrossEntropyAttack  # another class may compute something else

    def per_sample(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return functional.cross_entropy(logits, y, reduction="none")

    def mean(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return functional.cross_entropy(logits, y)
