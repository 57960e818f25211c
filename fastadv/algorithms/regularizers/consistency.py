"""Consistency: two augmentations of an image are attacked and predicted alike (Tack, 2022)."""

from dataclasses import dataclass

from torch import Tensor

from fastadv.algorithms.contract import Adversarial, Batch, Outputs, Regularizer
from fastadv.algorithms.regularizers.divergence import jensen_shannon
from fastadv.declared import Positive, option


@dataclass(eq=False)
class Consistency(Regularizer):
    """mean_i JS(softmax(z'_i / T), softmax(z''_i / T)), z' and z'' of the two views' examples.

    The step trains on both views as one batch of 2B images, attacked and forwarded together; the
    objective is its mean over 2B. T is ``js_temperature``: 0.5 in alinlab/consistency-adversarial,
    1 in the AdvLC paper. Its paper's main results augment both views by AutoAugment and cutout in
    the second half of the run (``fastadv train --augmentation autoaugment``); the AdvLC paper
    says nothing of it, and crops and flips are the default.
    """

    js_temperature: Positive = option(0.5, "temperature of the predictions that are compared")

    def requires(self) -> frozenset[str]:
        return frozenset({"second_view"})

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        first, second = outputs.adversarial.chunk(2)
        return jensen_shannon(first, second, self.js_temperature).mean()
