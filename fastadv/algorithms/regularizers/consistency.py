"""Consistency: two attacked augmentations of an image get alike predictions (Tack et al., 2022)."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastadv.algorithms.contract import (
    Adversarial,
    Batch,
    Capabilities,
    Conflict,
    Outputs,
    Regularizer,
)
from fastadv.algorithms.regularizers.divergence import jensen_shannon
from fastadv.declared import Positive, option


class Consistency(Regularizer):
    """mean_i JS(softmax(z'_i / T), softmax(z''_i / T)), z' and z'' the logits of the two attacked
    views.

    The step trains on both views as one batch of 2B images, attacked and forwarded together; the
    objective is the mean over 2B. T is ``js_temperature``: 0.5 in alinlab/consistency-adversarial,
    1 in the AdvLC paper. The main results of Tack's paper augment both views by AutoAugment and
    cutout in the second half of the run (``fastadv train --augmentation autoaugment``). The AdvLC
    paper does not mention that; the default is crops and flips.
    """

    on_data: ClassVar[Mapping[str, Mapping[str, Any]]] = {"digits": {"reg_weight": 5.0}}

    js_temperature: Positive = option(0.5, "temperature of the predictions that are compared")

    def requires(self) -> frozenset[str]:
        return frozenset({"second_view", "class_logits"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if method.sample_state:
            yield Conflict(
                "this method",
                "two views of a sample in one batch would update its stored state in two different "
                "ways.",
            )

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        first, second = outputs.adversarial.chunk(2)
        return jensen_shannon(first, second, self.js_temperature).mean()
