"""Adversarial cross entropy minus a part of the clean one (AdvLC paper, Eq. 9)."""

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract import Capabilities, Conflict, Fit, Objective, Outputs, required
from fastadv.declared import Share, option


class CleanSubtracted(Objective):
    """fit(f(x'), y) - clean_weight fit(f(x), y), ``clean_weight`` in [0,1].

    x is the centre of the ball. The paper tries several weights; 0 is plain adversarial training.
    """

    fits: ClassVar[tuple[str, ...]] = ("adversarial", "natural")

    clean_weight: Share = option(0.5, "weight of the clean loss that is subtracted")

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict(
                "adversary",
                "it weighs the loss at x' against the loss at x; without an attack they are equal.",
            )

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        clean = fit(required(outputs.natural), y, outputs.natural_context)
        return fit(outputs.adversarial, y, outputs.context) - self.clean_weight * clean
