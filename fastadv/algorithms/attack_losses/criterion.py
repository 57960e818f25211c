"""The user's own loss of the attack, a function of the logits and the labels."""

from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract import AttackLoss, Context, Fit
from fastadv.algorithms.user_loss import UserLoss, check_function
from fastadv.declared import option


class CriterionAttack(AttackLoss):
    """attack_criterion(f(x'), y), which the caller gives, one value per sample (B,)."""

    given_as: ClassVar[str] = "attack_criterion"

    attack_criterion: UserLoss | None = option(
        None, "what the attack maximises per sample, a function of logits and labels"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_function("attack_criterion", self.attack_criterion)

    def given_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """See ``GivenLoss``."""
        if self.attack_criterion is None:
            raise RuntimeError("a criterion without a function passed __post_init__")
        return self.attack_criterion(logits, y)

    def per_sample(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return self.given_loss(logits, y)
