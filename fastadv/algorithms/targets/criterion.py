"""The user's own loss, a function of the logits and the labels."""

from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract import Context, Target
from fastadv.algorithms.user_loss import UserLoss, check_function
from fastadv.declared import option


class Criterion(Target):
    """criterion(f(x), y), which the caller gives: several labels per image, one logit, regression,
    any loss of one's own for classes.

    ``criterion(logits, y)`` returns one loss per sample, (B,). Logits and labels may have any
    shape that begins with B.
    """

    labels: ClassVar[str] = "any"
    given_as: ClassVar[str] = "criterion"

    criterion: UserLoss | None = option(None, "loss per sample, a function of logits and labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_function("criterion", self.criterion)

    def given_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """See ``GivenLoss``."""
        if self.criterion is None:
            raise RuntimeError("a criterion without a function passed __post_init__")
        return self.criterion(logits, y)

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        return self.given_loss(logits, y)
