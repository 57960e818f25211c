"""Adversarial cross entropy minus a part of the clean one (AdvLC paper, Eq. 9)."""

from dataclasses import dataclass

from torch import Tensor

from fastadv.algorithms.contract import Fit, Objective, Outputs, required
from fastadv.declared import Share, option


@dataclass(eq=False)
class CleanSubtracted(Objective):
    """fit(f(x'), y) - clean_weight fit(f(x), y), ``clean_weight`` in [0,1].

    x is the centre of the ball. The paper tries several weights; 0 is plain adversarial training.
    """

    clean_weight: Share = option(0.5, "weight of the clean loss that is subtracted")

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        clean = fit(required(outputs.natural), y, outputs.context)
        return fit(outputs.adversarial, y, outputs.context) - self.clean_weight * clean
