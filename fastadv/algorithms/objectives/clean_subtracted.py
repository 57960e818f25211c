"""Adversarial cross entropy with the clean one taken away (AdvLC paper, Eq. 9)."""

from dataclasses import dataclass

from torch import Tensor

from fastadv.algorithms.contract import Fit, Objective, Outputs, computed
from fastadv.declared import Share


@dataclass(eq=False)
class CleanSubtracted(Objective):
    """fit(f(x'), y) - clean_weight fit(f(x), y), ``clean_weight`` in [0,1].

    x is the centre of the ball. The paper sweeps the weight; 0 is plain adversarial training.
    """

    clean_weight: Share = 0.5

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        natural_logits = computed(outputs.natural, "natural_logits_train")
        clean = fit(natural_logits, y, outputs.intermediates)
        return fit(outputs.adversarial, y, outputs.intermediates) - self.clean_weight * clean
