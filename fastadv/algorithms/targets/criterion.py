"""The user's own loss, a function of the logits and the labels."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract import Context, Target
from fastadv.algorithms.user_loss import UserLoss, check_function, require_per_sample
from fastadv.declared import option


@dataclass(eq=False)
class Criterion(Target):
    """criterion(f(x), y), which the caller gives: multi-label, one logit, regression, any loss of
    one's own for classes.

    ``criterion(logits, y)`` returns one loss per sample, (B,). Logits and labels may have any
    shape that begins with B. The attack maximises the same function, unless another is given.
    """

    labels: ClassVar[str] = "any"

    criterion: UserLoss | None = option(None, "loss per sample, a function of logits and labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_function("criterion", self.criterion)

    def check_logits(self, logits: Tensor, y: Tensor) -> None:
        require_per_sample("criterion", self._loss, logits, y)

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        return self._loss(logits, y)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.criterion is None:
            raise RuntimeError("a criterion without a function passed __post_init__")
        return self.criterion(logits, y)
