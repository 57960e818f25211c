"""Cross entropy with the given label."""

from collections.abc import Iterable

from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import AttackLoss, Capabilities, Conflict, Context, Fit


class CrossEntropyAttack(AttackLoss):
    """CE(f(x'), y), whatever label the target fits."""

    def is_plain(self) -> bool:
        return type(self) is CrossEntropyAttack  # another class may compute something else

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if method.labels != "classes":
            yield Conflict(
                "target",
                "the cross entropy compares logits with classes: pass attack_loss='fit' for the "
                "target's own loss.",
            )

    def per_sample(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return functional.cross_entropy(logits, y, reduction="none")

    def mean(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return functional.cross_entropy(logits, y)
