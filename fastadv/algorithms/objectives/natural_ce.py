"""The natural cross entropy alone: x' is left to a regularizer (GAT, NuAT)."""

from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract import Fit, Objective, Outputs, required
from fastadv.engine.model.bn_momentum import ADVERSARIAL, NATURAL


class NaturalCE(Objective):
    """fit(f(x), y).

    The published code of GAT and NuAT forwards x before the attack, in training mode, and after it
    x' and then x. The first pass is that of their attack's loss (``natural_logits_first``); the
    statistics of BatchNorm are those after the other two in this order.
    """

    fits: ClassVar[tuple[str, ...]] = ("natural",)

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def bn_updates(self) -> tuple[str, ...]:
        """See ``OrdersBatchNorm``."""
        return (ADVERSARIAL, NATURAL)

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        return fit(required(outputs.natural), y, outputs.context)
